"""Which pages were evicted, on their way from the device to the host and on to the scheduler."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from vllm.v1.outputs import AsyncModelRunnerOutput, KVConnectorOutput, ModelRunnerOutput

from rkv_vllm.decisions.messages import PageCompaction, PageReport, with_reports


class EvictedPageIds:
    """The pages that left in one step, copied to the host behind the work that chooses them."""

    def __init__(self, compactions: Sequence[PageCompaction], evicted: Sequence[torch.Tensor]) -> None:
        """Starts the copy.

        Args:
            compactions: the rounds of the step.
            evicted: for each, int32 ids on the device.
        """
        self._compactions = list(compactions)
        self._counts = [ids.shape[0] for ids in evicted]
        on_device = torch.cat(list(evicted))
        self._ids = torch.empty_like(on_device, device="cpu", pin_memory=on_device.is_cuda)
        self._ids.copy_(on_device, non_blocking=True)
        self._copied = torch.cuda.Event(blocking=True) if on_device.is_cuda else None
        if self._copied is not None:
            self._copied.record()

    def reports(self) -> list[PageReport]:
        """Waits for the copy, and reads it."""
        if self._copied is not None:
            self._copied.synchronize()
        by_round = zip(self._compactions, self._ids.split(self._counts), strict=True)
        return [PageReport(c.request_id, c.eviction_id, tuple(ids.tolist())) for c, ids in by_round]


class ReportingOutput(AsyncModelRunnerOutput):
    """A step's output, which vLLM asks for when it needs it, with the reports of the evicted pages."""

    def __init__(
        self, model_output: AsyncModelRunnerOutput | ModelRunnerOutput, evicted: Sequence[EvictedPageIds]
    ) -> None:
        self._model_output = model_output
        self._evicted = evicted

    def get_output(self) -> ModelRunnerOutput:
        output = self._model_output
        if isinstance(output, AsyncModelRunnerOutput):
            output = output.get_output()
        return with_reports(output, [report for step in self._evicted for report in step.reports()])

    def get_kv_connector_output(self) -> KVConnectorOutput | None:
        """What vLLM asks for where `get_output` fails, from release 0.33 on."""
        output = self._model_output
        if isinstance(output, AsyncModelRunnerOutput):
            return output.get_kv_connector_output()
        return output.kv_connector_output
