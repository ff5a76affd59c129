"""Prints what the runs went through."""

from __future__ import annotations

from collections import Counter

import pytest

_totals: Counter[str] = Counter()


@pytest.fixture(scope="session")
def totals() -> Counter[str]:
    """What all runs of the session went through."""
    return _totals


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if _totals:
        counted = ", ".join(f"{number} {what}" for what, number in sorted(_totals.items()))
        terminalreporter.write_line(f"model check: {counted}")
