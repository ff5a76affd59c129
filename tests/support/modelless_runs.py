"""Runs of engines without a model: steps to an answer, ours beside stock vLLM's."""

from __future__ import annotations

from typing import Any

from rkv_vllm.bench.modelless import ModellessEngine
from rkv_vllm.scheduling.scheduler import CompactingSchedulerMixin

#: Server settings of an engine; None: stock vLLM.
Rkv = dict[str, Any] | None


def make_engine(rkv: Rkv, **changes: Any) -> ModellessEngine:
    """An engine of ample size; `changes` are other arguments of `ModellessEngine`."""
    arguments: dict[str, Any] = {
        "pages": 20_000,
        "page_size": 16,
        "max_num_seqs": 256,
        "max_num_batched_tokens": 8192,
        "max_model_len": 16_320,
    }
    return ModellessEngine(rkv, **arguments | changes)


def budget(tokens: int, buffer: int = 128, policy: str = "recency") -> dict[str, Any]:
    """`extra_args` of a request."""
    return {"rkv_budget": tokens, "rkv_buffer": buffer, "rkv_policy": policy}


def run_steps(engine: ModellessEngine, count: int) -> None:
    for _ in range(count):
        engine.schedule()
        engine.update()


def steps_to_answer(engine: ModellessEngine, request_id: str, most: int) -> int:
    """Steps until the request has ended, or `most`."""
    for step in range(1, most):
        engine.schedule()
        if any(out.request_id == request_id and out.finish_reason is not None for out in engine.update()):
            return step
    return most


def run_to_end(engine: ModellessEngine, most: int = 20_000) -> tuple[int, int]:
    """Steps until all requests have ended, and how many preemptions it took."""
    preemptions = 0
    for step in range(most):
        if not engine.scheduler.has_requests():
            if isinstance(engine.scheduler, CompactingSchedulerMixin):
                engine.scheduler.check_integrity()
            return step, preemptions
        preemptions += len(engine.schedule().preempted_req_ids or ())
        engine.update()
    raise AssertionError(f"the engine does not come to an end in {most} steps")
