"""Results of several answers to one request, where vLLM's front end takes them from the engine."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from vllm.v1.engine.output_processor import OutputProcessor
from vllm.v1.engine.parallel_sampling import ParentRequest

from rkv_vllm.host.answer_sums import adding_up, install

RESULT = {
    "budget": 256,
    "buffer": 128,
    "policy": "rkv",
    "evicted_tokens": 640,
    "peak_pages": 12,
    "pages_without_compaction": 29,
    "page_size": 32,
    "reason": None,
}


def output(name: str, compactions: int) -> SimpleNamespace:
    return SimpleNamespace(
        request_id=name, kv_transfer_params={"rkv": {**RESULT, "compactions": compactions}}
    )


def test_the_answers_of_one_request_are_added_up_where_they_finish() -> None:
    """Proves that the last of several answers carries the sum of all; another request's are left alone.

    An answer may report more than once, as one with stop strings does: its newest report counts.
    """
    parent: Any = ParentRequest.__new__(ParentRequest)
    processor: Any = SimpleNamespace(
        request_states={
            "0_r": SimpleNamespace(parent_req=parent),
            "1_r": SimpleNamespace(parent_req=parent),
            "alone": SimpleNamespace(parent_req=None),
        }
    )
    processed: list[Any] = []
    process = adding_up(lambda self, outputs, timestamp: processed.append((self, outputs, timestamp)))
    others = [
        SimpleNamespace(request_id="0_r", kv_transfer_params=None),
        SimpleNamespace(request_id="1_r", kv_transfer_params={"connector": 1}),
    ]
    outputs = [output("0_r", 1), output("0_r", 2), output("alone", 7), *others, output("1_r", 40)]
    process(processor, outputs, 0.5)
    assert processed == [(processor, outputs, 0.5)]
    results = [each.kv_transfer_params["rkv"] for each in outputs if each not in others]
    assert [result["compactions"] for result in results] == [1, 2, 7, 42]
    assert results[-1]["sequences"] == 2
    assert "sequences" not in results[0]


def test_it_is_installed_once() -> None:
    """Proves that a second call, as vLLM makes it in some processes, adds nothing up twice."""
    install()
    installed = OutputProcessor.process_outputs
    install()
    assert OutputProcessor.process_outputs is installed
