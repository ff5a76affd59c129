"""Collects the tests that the machine can run, and says which it cannot."""

import pytest
import torch

collect_ignore = [] if torch.cuda.is_available() else ["test_on_gpu.py"]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if not torch.cuda.is_available():
        terminalreporter.write_line(
            "kernels: no CUDA device, so test_on_gpu.py and all bfloat16 and full-size cases were left out"
        )
