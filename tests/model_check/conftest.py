"""Makes the modules of this folder importable by its tests, and prints what the runs went through.

pytest's importlib mode leaves sys.path alone.
"""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent))

_totals: Counter[str] = Counter()


@pytest.fixture(scope="session")
def totals() -> Counter[str]:
    """What all runs of the session went through."""
    return _totals


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if _totals:
        counted = ", ".join(f"{number} {what}" for what, number in sorted(_totals.items()))
        terminalreporter.write_line(f"model check: {counted}")
