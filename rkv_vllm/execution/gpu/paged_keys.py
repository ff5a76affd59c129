"""The keys of one request in one layer, copied out of its pages a part at a time."""

from __future__ import annotations

import torch


class PagedKeys:
    """Stands for a tensor [H, N, D]; see `rkv_vllm.policies.base.Keys`."""

    def __init__(self, keys: torch.Tensor, pages: torch.Tensor, length: int) -> None:
        """
        Args:
            keys: of the layer, [pages, H, page size, D].
            pages: ids of the request's pages, in order, on the keys' device.
            length: N.
        """
        self._keys = keys
        self._pages = pages
        _, heads, self._page_size, size = keys.shape
        self.shape = (heads, length, size)
        self.device = keys.device

    def __getitem__(self, index: tuple[slice, slice], /) -> torch.Tensor:
        heads, tokens = index
        start, stop, _ = tokens.indices(self.shape[1])
        first_page = start // self._page_size
        pages = self._pages[first_page : -(-stop // self._page_size)]
        skipped = first_page * self._page_size
        copied = self._keys[pages].transpose(0, 1).flatten(1, 2)  # [H, tokens of these pages, D]
        return copied[heads, start - skipped : stop - skipped]
