"""The check of the installed vLLM against the methods and attributes that are relied on."""

from __future__ import annotations

from typing import Any

import pytest
from vllm.v1.core.sched.scheduler import Scheduler

from rkv_vllm.host import contract as host_contract
from rkv_vllm.host.contract import CONTRACT, CONTRACT_V1_RUNNER, contract_problems

SCHEDULE = "vllm.v1.core.sched.scheduler.Scheduler.schedule"


def test_the_installed_vllm_keeps_the_contract() -> None:
    """Proves that the pinned release has every method that is relied on, as it was written against."""
    assert contract_problems(CONTRACT, CONTRACT_V1_RUNNER) == []


def test_a_changed_signature_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Proves that a method with other parameters is reported with both lists."""

    def schedule(self: Any, throttle_prefills: bool = False, budget: int = 0) -> None: ...

    monkeypatch.setattr(Scheduler, "schedule", schedule)
    assert contract_problems(CONTRACT) == [
        f"{SCHEDULE} takes (throttle_prefills, budget) and not (throttle_prefills)"
    ]


def test_a_renamed_parameter_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Proves that names count and not only their number: some calls are by keyword."""
    monkeypatch.setattr(Scheduler, "schedule", lambda self, throttle: None)
    assert contract_problems(CONTRACT) == [f"{SCHEDULE} takes (throttle) and not (throttle_prefills)"]


@pytest.mark.parametrize(
    "name",
    [
        "vllm.v1.core.sched.scheduler.Scheduler.no_such_method",
        "vllm.v1.core.sched.scheduler.NoSuchClass.schedule",
        "vllm.no_such_module.Scheduler.schedule",
    ],
)
def test_what_is_gone_is_named(name: str) -> None:
    """Proves that a missing method, class or module is reported and raises nothing."""
    assert contract_problems({name: ()}) == [f"{name} does not exist in this vLLM"]


@pytest.mark.parametrize("installed", ["0.31.1", "0.33.0", "0.32.0.post1", "0.32.1", "(none)"])
def test_another_version_is_named(installed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Proves that any other release is reported with its version and the one that works."""
    monkeypatch.setattr(host_contract, "_installed_version", lambda: installed)
    assert contract_problems() == [f"vLLM {installed} is installed; this release works with vLLM 0.32.0 only"]


@pytest.mark.parametrize("installed", ["0.32.0", "0.32.0+cpu", "0.32.0+cu129"])
def test_local_builds_of_the_release_pass(installed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Proves that a build tag does not make another release of it."""
    monkeypatch.setattr(host_contract, "_installed_version", lambda: installed)
    assert contract_problems() == []


class Renamed:
    """Stands for a class of vLLM whose attributes are a property, an annotation, and two assignments."""

    annotated: int

    def __init__(self) -> None:
        self.assigned, self.typed = 1, 2

    @property
    def computed(self) -> int:
        return self.assigned + self.typed


class Derived(Renamed):
    pass


@pytest.mark.parametrize("owner", [Renamed, Derived])
@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("annotated", True),
        ("assigned", True),
        ("typed", True),
        ("computed", True),
        ("watermark_pages", False),
    ],
)
def test_a_renamed_attribute_is_noticed(
    owner: type, name: str, found: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Proves that an attribute is found where a class or its base declares it, and missed where none does."""
    monkeypatch.setattr("vllm.v1.core.kv_cache_manager.KVCacheManager", owner)
    attribute = f"vllm.v1.core.kv_cache_manager.KVCacheManager.{name}"
    assert contract_problems({attribute: None}) == (
        [] if found else [f"{attribute} does not exist in this vLLM"]
    )


@pytest.mark.parametrize(
    "attribute",
    [
        "core.kv_cache_manager.KVCacheManager.watermark_blocks",
        "core.sched.scheduler.Scheduler.prev_step_scheduled_req_ids",
        "worker.cpu_model_runner.CPUModelRunner.optimistic_seq_lens_cpu",
    ],
)
def test_attributes_of_vllm_are_read_from_its_source(attribute: str) -> None:
    """Proves on vLLM's own classes that an assigned attribute is seen, and one of nearly its name is not."""
    name = f"vllm.v1.{attribute}"
    assert name in {**CONTRACT, **CONTRACT_V1_RUNNER}
    assert contract_problems({name: None}) == []
    assert contract_problems({f"{name}s": None}) == [f"{name}s does not exist in this vLLM"]


def test_all_contracts_are_checked() -> None:
    """Proves that problems of several contracts come together."""
    gone = [{f"vllm.config.VllmConfig.{name}": ()} for name in ("first", "second")]
    assert len(contract_problems(*gone)) == 2
