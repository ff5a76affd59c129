"""Processes of engines, watched."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from rkv_vllm.bench import run
from rkv_vllm.bench.results import EngineRun
from rkv_vllm.bench.rows import Group, Row


def process(code: str, folder: Path) -> run.EngineProcess:
    """A process that runs code in place of an engine's run."""
    return run.EngineProcess([sys.executable, "-c", code], folder / "results", folder / "log")


def watch(code: str, folder: Path, deadline: float | None = None) -> str | None:
    return process(code, folder).run("{}", deadline, print)


def test_progress_goes_on_and_everything_into_the_log(tmp_path: Path) -> None:
    """Proves that a good end is no problem, and that progress is told apart from all else."""
    said: list[str] = []
    code = "import sys; print('[bench] one', file=sys.stderr); print('noise', file=sys.stderr); print('out')"
    assert process(code, tmp_path).run("{}", None, said.append) is None
    assert said == ["one"]
    assert sorted((tmp_path / "log").read_text().splitlines()) == ["[bench] one", "noise", "out"]


def test_a_process_waits_for_its_order(tmp_path: Path) -> None:
    """Proves that a process may start long before its turn, and then gets one line and its file's name."""
    waiting = process("import sys; open(sys.argv[1], 'w').write(sys.stdin.read())", tmp_path)
    assert waiting.results.read_text() == ""
    assert waiting.run('{"kind": "rkv"}', None, print) is None
    assert waiting.results.read_text() == '{"kind": "rkv"}\n'


def test_a_process_whose_turn_never_comes_ends(tmp_path: Path) -> None:
    """Proves that one which still waits is stopped with its children, and that none runs without a spec."""
    waiting = process(code_with_child(tmp_path / "child", "input()"), tmp_path)
    wait_for_text(tmp_path / "child")
    waiting.end()
    assert_gone(tmp_path / "child")
    run = [sys.executable, "-m", "rkv_vllm.bench.engine_run", str(tmp_path / "lines")]
    assert subprocess.run(run, stdin=subprocess.DEVNULL, check=True).returncode == 0
    assert not (tmp_path / "lines").exists()


def test_what_went_wrong_is_named(tmp_path: Path) -> None:
    """Proves that a process that dies leaves its status and its own error, not vLLM's wrapper."""
    code = """import sys
print("ValueError: no memory", file=sys.stderr)
print("RuntimeError: Engine core initialization failed. See root cause above.", file=sys.stderr)
sys.exit(3)"""
    problem = watch(code, tmp_path)
    assert problem == "the engine's process ended with status 3: ValueError: no memory"
    silent = watch("raise SystemExit(4)", tmp_path)
    assert silent == "the engine's process ended with status 4: it printed nothing"


def code_with_child(child_file: Path, then: str) -> str:
    """Code of a process that starts another, notes its id, and goes on."""
    return f"""import subprocess, time
child = subprocess.Popen(["sleep", "600"])
open({str(child_file)!r}, "w").write(str(child.pid))
{then}"""


def wait_for_text(file: Path) -> None:
    for _ in range(6000):  # a minute: Python starts in it even on a busy machine
        if file.exists() and file.read_text():
            return
        time.sleep(0.01)
    raise AssertionError(f"nobody wrote {file.name}")


def assert_gone(child_file: Path) -> None:
    state = Path("/proc", child_file.read_text(), "stat")
    for _ in range(200):  # until its new parent has taken note
        if not state.exists() or state.read_text().split()[2] == "Z":
            return
        time.sleep(0.05)
    raise AssertionError("the child lives on")


def test_a_process_that_hangs_is_stopped_with_its_children(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Proves that some time after the deadline all of its processes are gone, and why."""
    monkeypatch.setattr(run, "GRACE_SECONDS", 0.5)
    code = code_with_child(tmp_path / "child", "time.sleep(600)")
    problem = watch(code, tmp_path, time.time() + 1)
    assert problem == "the time limit came first"
    assert_gone(tmp_path / "child")


def test_what_outlives_its_parent_is_stopped(tmp_path: Path) -> None:
    """Proves that a child which keeps the output open ends with its parent."""
    code = code_with_child(tmp_path / "child", "")
    assert watch(code, tmp_path) is None
    assert_gone(tmp_path / "child")


def test_lives_share_the_time_by_their_loads() -> None:
    """Proves that an engine with more loads gets more of the time, and the last one all that is left."""
    rows = (Row(name="a"), Row(name="b", kinds=("rkv",)), Row(name="c", kinds=("rkv",)))
    group = Group(rows=rows)
    assert run._share(group, ["stock", "rkv"], 1000.0, 1080.0) == 1030.0
    assert run._share(group, ["rkv"], 1000.0, 1080.0) == 1080.0


def test_half_a_line_is_left_for_later(tmp_path: Path) -> None:
    """Proves that what a process is just writing does not spoil what it wrote before."""
    file, engine_run = tmp_path / "lines", EngineRun(kind="rkv", arguments=[])
    file.write_text('{"half')
    run._read(file, engine_run)
    assert engine_run.facts is None and engine_run.loads == []
