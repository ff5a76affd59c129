"""How processes of the server end."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
from multiprocessing import get_context

from rkv_vllm.host.process_end import skip_last_collections, skip_last_collections_of_engine


class Told:
    def __del__(self):
        print("collected")


def leave_garbage(prepare):
    prepare()
    told = Told()
    told.itself = told


def in_a_process_of_its_own(prepare):
    get_context("spawn").Process(target=leave_garbage, args=(prepare,)).start()


if __name__ == "__main__":
    {run}
"""


@pytest.mark.parametrize(
    ("run", "said"),
    [
        ("leave_garbage(lambda: None)", "collected"),
        ("leave_garbage(skip_last_collections)", ""),
        ("leave_garbage(skip_last_collections_of_engine)", "collected"),
        ("in_a_process_of_its_own(skip_last_collections_of_engine)", ""),
    ],
)
def test_a_process_ends_without_looking_for_garbage(run: str, said: str, tmp_path: Path) -> None:
    """Proves that the server's and the engine's own processes end so, and a user's that has an engine in it
    ends as ever."""
    program = tmp_path / "program.py"
    program.write_text(PROGRAM.format(run=run))
    ended = subprocess.run([sys.executable, program], capture_output=True, text=True, check=True)
    assert (ended.stdout.strip(), ended.stderr) == (said, "")
