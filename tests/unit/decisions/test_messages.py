"""How a worker's reports travel to the scheduler."""

from __future__ import annotations

import pickle

from vllm.v1.outputs import EMPTY_MODEL_RUNNER_OUTPUT, ModelRunnerOutput

from rkv_vllm.decisions.messages import PageReport, reports_of, with_reports

REPORT = PageReport("one", 7, (3, 5))


def test_reports_survive_the_way_from_another_process() -> None:
    """Proves that reports come with vLLM's output, pickled as its executors send it."""
    output = ModelRunnerOutput(req_ids=["one"], req_id_to_index={"one": 0}, sampled_token_ids=[[4]])
    received = pickle.loads(pickle.dumps(with_reports(output, [REPORT])))
    assert received.sampled_token_ids == [[4]]
    assert reports_of(received) == (REPORT,)


def test_the_shared_empty_output_stays_empty() -> None:
    """Proves that a report with an empty step does not stick to vLLM's one empty output."""
    assert reports_of(with_reports(EMPTY_MODEL_RUNNER_OUTPUT, [REPORT])) == (REPORT,)
    assert reports_of(EMPTY_MODEL_RUNNER_OUTPUT) == ()
