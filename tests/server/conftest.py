"""Live servers for tests."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
from live_server import MODEL, OPTIONS, StartServer

from rkv_vllm.demo.model import prepare
from rkv_vllm.demo.server import serving


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if here == item.path.parent and item.path.stem.endswith("_live"):
            item.add_marker(pytest.mark.engine)


@pytest.fixture(scope="session")
def start_server(tmp_path_factory: pytest.TempPathFactory) -> StartServer:
    """Use it in a `with` statement: one server at a time fits beside the other tests' engines."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    model = prepare()

    def start(*options: str) -> AbstractContextManager[str]:
        log = tmp_path_factory.mktemp("server") / "log"
        return serving(model, MODEL, [*OPTIONS, *options], log, waiting=lambda _: None)

    return start
