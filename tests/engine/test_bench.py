"""`rkv-vllm bench` on real engines: are its counts those of the engines?"""

from __future__ import annotations

from pathlib import Path

import pytest

from rkv_vllm.bench.load import ages
from rkv_vllm.bench.report import compare
from rkv_vllm.bench.results import Measure, Results
from rkv_vllm.bench.rows import Group, Row
from rkv_vllm.bench.run import run_group

ENGINE = (
    "--dtype float32 --enforce-eager --block-size 32 --num-gpu-blocks-override 64 "
    "--kv-cache-memory-bytes 128M --max-num-seqs 8 --max-num-batched-tokens 256"
)
STEADY = Row(name="steady", input=32, output=128, budget=48, buffer=16, concurrency=3, ages=(40, 48))
BATCH = Row(name="batch", input=32, output=64, budget=48, buffer=16, policy="recency", batch=4)
TOO_LONG = Row(name="too long", input=32, output=4000, budget=48)
#: Of a request of `BATCH`: due at 64 tokens and after each 16 more; its last token is never computed.
COMPACTIONS = (32 + 64 - 1 - 64) // 16 + 1


@pytest.fixture(scope="module")
def results(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Results:
    saved: list[Results] = []
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("OMP_NUM_THREADS", "1"), ("VLLM_CPU_OMP_THREADS_BIND", "nobind")):
            patch.setenv(name, value)
        results = run_group(
            Group(model=str(model), engine=f"{ENGINE} --max-model-len 256", rows=(STEADY, TOO_LONG, BATCH)),
            Measure(windows=2, window_steps=12, settle_steps=4),
            extra=[],
            rounds=1,
            time_limit=None,
            log=tmp_path_factory.mktemp("bench") / "log",
            say=print,
            save=lambda so_far: saved.append(so_far.model_copy(deep=True)),
        )
    progress = [sum(len(run.loads) for run in each.runs) for each in saved]
    assert progress == sorted(progress) and progress[-1] == 6
    assert len(saved) == 2 * (2 * 3 + 1)  # when a load begins, when it ends, and after each run
    return results


def test_a_ramp_goes_on_with_the_same_requests(model: Path, tmp_path: Path) -> None:
    """Proves budget auto under a load that rises beyond the pool and falls: at first all is kept, then less,
    nobody is preempted, and every page is back at the end."""
    level = Row(name="1", input=32, output=200, budget=48, buffer=16, concurrency=2, warmup_tokens=8)
    more = level.model_copy(update={"name": "2", "concurrency": 6, "goes_on": True, "seed": 1})
    less = level.model_copy(update={"name": "3", "concurrency": 2, "goes_on": True, "seed": 2})
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("OMP_NUM_THREADS", "1"), ("VLLM_CPU_OMP_THREADS_BIND", "nobind")):
            patch.setenv(name, value)
        results = run_group(
            Group(
                model=str(model),
                engine=f"{ENGINE.replace('64', '24')} --max-model-len 256",
                lives=("auto",),
                rows=(level, more, less),
            ),
            Measure(windows=1, window_steps=60, settle_steps=4),
            extra=[],
            rounds=1,
            time_limit=None,
            log=tmp_path / "log",
            say=print,
            save=lambda so_far: None,
        )
    loads = results.runs[0].loads
    assert [(load.failure, load.pool_whole) for load in loads] == [(None, None), (None, None), (None, True)]
    assert [load.first_requests for load in loads] == [2, 4, 0]
    sides = [comparison.sides["auto"] for comparison in compare(results)]
    assert [round(side.running) for side in sides] == [2, 6, 2]
    assert [side.preemptions for side in sides] == [0, 0, 0]
    assert loads[0].windows[0].compactions == 0 < loads[1].windows[0].compactions
    kept = [side.kept_share for side in sides]
    assert kept[0] is not None and kept[1] is not None and kept[1] < 0.8 < kept[0]
    assert all(side.token_p99 for side in sides)


def test_engines_differ_in_compaction_alone(results: Results) -> None:
    """Proves that both engines ran all rows, that R-KV's compacted and stock's did not, that every page came
    back, and that a row which cannot run fails alone."""
    assert [run.kind for run in results.runs] == ["stock", "rkv"]
    for run in results.runs:
        assert run.failure is None and run.facts is not None
        assert (run.facts.pool_pages, run.facts.page_size, run.facts.shape.layers) == (63, 32, 30)
        steady, too_long, batch = run.loads
        assert too_long.failure == "4032 tokens exceed max_model_len (256)" and not too_long.windows
        for load in (steady, batch):
            assert load.failure is None and load.pool_whole and len(load.windows) == 2
            compacted = sum(window.compactions for window in load.windows)
            assert (compacted > 0) == (run.kind == "rkv")
    (ratio, _, _) = (each.ratio for each in compare(results))
    assert ratio is not None and ratio > 0


def test_tokens_of_a_batch_are_those_asked_for(results: Results) -> None:
    """Proves that a batch's window counts each output token, prompt token and compaction once."""
    for run in results.runs:
        for window in run.loads[2].windows:
            assert window.output_tokens == 4 * 64
            assert window.prompt_tokens == 4 * 32
            assert window.started == window.finished == 4
            if run.kind == "rkv":
                assert window.compactions == 4 * COMPACTIONS
                assert window.evicted_tokens == 16 * window.compactions
                assert window.compaction_milliseconds_per_step > 0


def test_a_steady_load_is_steady(results: Results) -> None:
    """Proves that requests of the row's age run from the first window on, each with a token a step."""
    for run in results.runs:
        load = run.loads[0]
        assert load.steady and (load.entry, load.first_requests, load.backlog) == ("staggered", 3, 0)
        assert load.fill_prompt_tokens == sum(32 + age for age in ages(STEADY, 3))
        for window in load.windows:
            assert window.steps == 12
            assert window.running == 3
            assert window.output_tokens == 3 * 12
            assert window.tokens_per_second == pytest.approx(36 / window.seconds)
            assert 0 < window.pool_use <= window.most_pool_use < 0.5
        assert load.curve
