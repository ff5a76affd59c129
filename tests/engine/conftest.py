"""Engines and prompts for tests on a real model."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import texts
import torch
from engine_process import Ask, Engine, Run, Settings

from rkv_vllm.demo.model import prepare

if TYPE_CHECKING:
    from hf_reference import HfReference

StartEngine = Callable[[Settings], Engine]

#: Fixtures of the whole run that start an engine: of several workers, one runs all files that use them.
COMMON = {"stock", "rkv", "long_run"}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    ours = [item for item in items if here in item.path.parents]
    shared = {item.path for item in ours if COMMON & _fixtures(item)}
    for item in ours:
        item.add_marker(pytest.mark.engine)
        if item.path in shared:
            item.add_marker(pytest.mark.xdist_group("common engines"))


def _fixtures(item: pytest.Item) -> set[str]:
    return set(getattr(item, "fixturenames", ()))


@pytest.fixture(scope="session")
def model() -> Path:
    """Directory of SmolLM2-135M-Instruct, made on first use."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    return prepare()


@pytest.fixture(scope="session")
def encode(model: Path) -> texts.Encode:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model).encode


@pytest.fixture(scope="session")
def stock(model: Path) -> Iterator[Engine]:
    """vLLM as it is, R-KV's classes absent."""
    engine = Engine(model, Settings(rkv=False))
    yield engine
    engine.close()


@pytest.fixture(scope="session")
def rkv(model: Path) -> Iterator[Engine]:
    """vLLM with R-KV switched on and no default budget: each request brings its own."""
    engine = Engine(model, Settings())
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def reference(model: Path) -> Iterator[HfReference]:
    """transformers with the float64 reference of the algorithm, on one thread as the engines are."""
    from hf_reference import HfReference

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield HfReference(model)
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def long_ask(encode: texts.Encode) -> Ask:
    """2,097 tokens, 1,073 of them the prompt."""
    prompt = encode(texts.squares(90))[:1073]
    return Ask(prompt, 1024, {"rkv_budget": 512, "rkv_buffer": 128, "rkv_policy": "rkv"})


@pytest.fixture(scope="session")
def long_run(model: Path, long_ask: Ask) -> Iterator[Future[Run]]:
    """`long_ask` on an engine of its own, which takes a minute or two beside the other tests."""
    engine = Engine(model, Settings())
    yield engine.submit([long_ask])
    engine.close()


@pytest.fixture(autouse=True)
def start_long_run_first(request: pytest.FixtureRequest) -> None:
    """With the first test that shares an engine: a worker that runs none of those starts nothing."""
    wanted = any("long_run" in _fixtures(item) for item in request.session.items)
    if wanted and request.node.get_closest_marker("xdist_group").args == ("common engines",):
        request.getfixturevalue("long_run")


@pytest.fixture(scope="module")
def start_engine(model: Path) -> Iterator[StartEngine]:
    """Starts engines that a test module needs besides the common two, and stops them after it."""
    engines: dict[Settings, Engine] = {}

    def start(settings: Settings) -> Engine:
        if settings not in engines:
            engines[settings] = Engine(model, settings)
        return engines[settings]

    yield start
    for engine in engines.values():
        engine.close()
