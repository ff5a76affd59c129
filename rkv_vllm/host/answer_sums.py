"""Adds up the results of the `n` answers of a request, in Python and behind a server alike.

The engine runs each answer as a request of its own, and vLLM's front end keeps the result of the one that
finishes last. There is no hook between the two: the method that takes the engine's outputs is replaced in its
class, once in a process, by one that first makes that result the sum over all.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, wraps
from typing import Any
from weakref import WeakKeyDictionary

from vllm.v1.engine.output_processor import OutputProcessor

from rkv_vllm.decisions.messages import RESULT_KEY, CompactionResult
from rkv_vllm.decisions.result_sum import combined


@cache
def install() -> None:
    """Does it once in a process, however often it is called; engines without compaction notice nothing."""
    OutputProcessor.process_outputs = adding_up(OutputProcessor.process_outputs)


def adding_up(process_outputs: Callable[..., Any]) -> Callable[..., Any]:
    """`OutputProcessor.process_outputs`, with the results of answers to one request added up."""
    results: WeakKeyDictionary[Any, dict[str, CompactionResult]] = WeakKeyDictionary()

    def add_up(processor: OutputProcessor, request_id: str, params: dict[str, Any]) -> None:
        state = processor.request_states.get(request_id)
        if state is None or state.parent_req is None or RESULT_KEY not in params:
            return
        siblings = results.setdefault(state.parent_req, {})
        siblings[request_id] = params[RESULT_KEY]  # the newest: with stop strings there are several
        params[RESULT_KEY] = combined(siblings.values())

    @wraps(process_outputs)
    def process_and_add_up(
        self: OutputProcessor, engine_core_outputs: list[Any], *args: Any, **kwargs: Any
    ) -> Any:
        for output in engine_core_outputs:
            if output.kv_transfer_params is not None:
                add_up(self, output.request_id, output.kv_transfer_params)
        return process_outputs(self, engine_core_outputs, *args, **kwargs)

    return process_and_add_up
