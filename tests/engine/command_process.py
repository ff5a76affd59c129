"""A command of `rkv-vllm` in a process of its own, on one thread and without a network."""

from __future__ import annotations

import os
import subprocess
import sys

ENVIRONMENT = {
    "COLUMNS": "300",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
}


def run_command(*words: str) -> subprocess.CompletedProcess[str]:
    """What the command printed, and its status, whatever that is."""
    return subprocess.run(
        [sys.executable, "-m", "rkv_vllm.cli", *words],
        env={**os.environ, **ENVIRONMENT},
        text=True,
        capture_output=True,
        check=False,
    )
