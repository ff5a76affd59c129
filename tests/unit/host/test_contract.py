"""The check of the installed vLLM against the methods and attributes that are relied on."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import pytest
from vllm.v1.core.sched.scheduler import Scheduler

from rkv_vllm.host import contract as host_contract
from rkv_vllm.host.contract import CONTRACT, CONTRACT_V1_RUNNER, SUPPORTED, contract_problems

SCHEDULE = "vllm.v1.core.sched.scheduler.Scheduler.schedule"


def test_the_installed_vllm_keeps_the_contract() -> None:
    """Proves that a supported release has every method that is relied on, as it was written against."""
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


@pytest.mark.parametrize("installed", ["0.31.1", "0.34.0", "0.33.0.post1", "0.32.1", "(none)"])
def test_another_version_is_named(installed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Proves that any other release is reported with its version and those that work."""
    monkeypatch.setattr(host_contract, "_installed_version", lambda: installed)
    assert contract_problems() == [
        f"vLLM {installed} is installed; this release works with vLLM 0.32.0 and 0.33.0 only"
    ]


@pytest.mark.parametrize("installed", ["0.32.0", "0.32.0+cpu", "0.33.0", "0.33.0+cu130"])
def test_local_builds_of_the_release_pass(installed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Proves that a build tag does not make another release of it."""
    monkeypatch.setattr(host_contract, "_installed_version", lambda: installed)
    assert contract_problems() == []


@pytest.mark.parametrize(
    ("installed", "expected"), [("0.32.0", "first"), ("0.33.0+cpu", "second"), ("0.34.0", "second")]
)
def test_each_release_has_its_own_contract(
    installed: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Proves that what changed is expected as the installed release has it, or the newest that is known."""
    monkeypatch.setattr(host_contract, "_installed_version", lambda: installed)
    changed = {SCHEDULE: {"0.32.0": ("first",), "0.33.0": ("second",)}}
    assert contract_problems(changed)[-1] == f"{SCHEDULE} takes (throttle_prefills) and not ({expected})"


def test_what_did_not_change_since_an_older_release_is_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Proves that an entry holds for all later releases, up to the next one that is named."""
    for installed in SUPPORTED:
        monkeypatch.setattr(host_contract, "_installed_version", lambda installed=installed: installed)
        assert contract_problems({SCHEDULE: {SUPPORTED[0]: ("throttle_prefills",)}}) == []


def test_a_method_that_subclasses_have_to_define_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Proves that an abstract class which asks for one more method is reported, before one is made of it."""

    class StatLogger(ABC):
        @abstractmethod
        def record(self) -> None: ...

        @abstractmethod
        def flush(self) -> None: ...

    name = "vllm.v1.metrics.loggers.AggregateStatLoggerBase"
    assert contract_problems({name: frozenset({"__init__", "log_engine_initialized", "record"})}) == []
    monkeypatch.setattr(name, StatLogger)
    assert contract_problems({name: frozenset({"record"})}) == [
        f"{name} wants (flush, record) of a subclass and not (record)"
    ]
    gone = f"{name}s"
    assert contract_problems({gone: frozenset()}) == [f"{gone} does not exist in this vLLM"]


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
        "worker.cpu_model_runner.CPUModelRunner.query_start_loc",
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
