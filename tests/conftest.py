"""One Triton for the whole test run, one thread for each of several workers, and what they add up to.

Several workers (`make test` has two) run the tests that carry an `xdist_group` group by group, longest first,
and the others one by one in the gaps.
"""

import logging
import os
import sys
from collections import Counter
from typing import Any

# Read when torch and Triton are imported, which the engine's tests do through vLLM.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from hypothesis import settings

pytest.register_assert_rewrite("support.identical")

# No test measures time: an example may take as long as a busy machine needs.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

_totals: Counter[str] = Counter()


@pytest.hookimpl(tryfirst=True)  # before the workers add the groups to the tests' names
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Groups each file that starts engines or servers, and lets workers begin with the groups."""
    for item in items:
        if item.get_closest_marker("engine") and not item.get_closest_marker("xdist_group"):
            item.add_marker(pytest.mark.xdist_group(item.path.stem))
    if hasattr(config, "workerinput"):
        items.sort(key=_start_order)


def _start_order(item: pytest.Item) -> int:
    group = item.get_closest_marker("xdist_group")
    if group is None:
        return 2
    return 0 if group.args == ("common engines",) else 1


@pytest.fixture(scope="session")
def totals() -> Counter[str]:
    """What all runs of the model check went through."""
    return _totals


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["model check"] = dict(_totals)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """A worker has ended; it has no output where it crashed."""
    _totals.update(getattr(node, "workeroutput", {}).get("model check", {}))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if _totals:
        counted = ", ".join(f"{number} {what}" for what, number in sorted(_totals.items()))
        terminalreporter.write_line(f"model check: {counted}")


@pytest.fixture(autouse=True)
def _vllm_logs_to_an_open_stream() -> None:
    """A command run by a test before may have bound vLLM's log to its own output, which is closed by now."""
    for handler in logging.getLogger("vllm").handlers:
        if type(handler) is logging.StreamHandler:  # not one of pytest's, which are kinds of it
            handler.stream = sys.__stderr__  # setStream would flush the closed one
