"""The block table of one KV cache group of Model Runner V2."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from vllm.v1.worker.gpu.block_table import BlockTables


class GpuGroupTable:
    """See `GpuTables`. vLLM appends a step's new pages behind those that are said to count."""

    def __init__(self, block_tables: BlockTables, slot_of: Mapping[str, int], group_id: int) -> None:
        """
        Args:
            block_tables: the runner's, of all groups.
            slot_of: each request's row.
            group_id: vLLM's number of the group.
        """
        self._table = block_tables.block_tables[group_id]
        self._num_blocks = block_tables.num_blocks.np[group_id]
        self._slot_of = slot_of

    def page_row(self, request_id: str) -> torch.Tensor:
        row: torch.Tensor = self._table.gpu[self._slot_of[request_id]]
        return row

    def replace_pages(self, request_id: str, pages: Sequence[int]) -> None:
        self._table.stage_write(self._slot_of[request_id], 0, pages)
        self.set_num_pages(request_id, len(pages))

    def set_num_pages(self, request_id: str, pages: int) -> None:
        self._num_blocks[self._slot_of[request_id]] = pages
