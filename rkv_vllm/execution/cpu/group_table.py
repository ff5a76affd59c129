"""The block table of one KV cache group of the V1 runner."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from vllm.v1.worker.gpu_input_batch import CachedRequestState, InputBatch


class CpuGroupTable:
    """See `CpuTables`."""

    def __init__(
        self, requests: Mapping[str, CachedRequestState], input_batch: InputBatch, group_id: int
    ) -> None:
        """
        Args:
            requests: the runner's, by id.
            input_batch: the runner's.
            group_id: vLLM's number of the group.
        """
        self._requests = requests
        self._input_batch = input_batch
        self._group_id = group_id

    def pages_of(self, request_id: str) -> list[int]:
        return list(self._requests[request_id].block_ids[self._group_id])

    def replace_pages(self, request_id: str, pages: Sequence[int]) -> None:
        self._requests[request_id].block_ids[self._group_id][:] = pages
        # A request not scheduled in the last step has no batch row; vLLM rebuilds it from `requests`.
        row = self._input_batch.req_id_to_index.get(request_id)
        if row is not None:
            self._input_batch.block_table[self._group_id].add_row(list(pages), row)
