"""A random paged cache with requests in it, for every test that compacts one."""

from __future__ import annotations

import torch

from rkv_vllm.kernels.batch import CompactionBatch, QueryWindow
from rkv_vllm.kernels.cache_layout import FP8, PagedKV
from rkv_vllm.kernels.options import Order
from rkv_vllm.settings.config import WINDOW
from rkv_vllm.settings.policy_table import RING_SIZE

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")


class PagedCache:
    """Random keys and values in pages, requests scattered over them, and the requests' window queries.

    Attributes:
        layers: one [pages, H, page size, 2 * D] a layer.
        kv: the same, as the kernels take it.
        lengths: tokens of each request.
        source: page ids of each request, in the order of its tokens.
        free: ids of all other pages.
        rows: row of ``queries`` of each request.
        ends: logical length of each request, behind which its newest query lies in the ring.
        queries: the query ring [L, rows, RING_SIZE, Hq, D]; of an FP8 cache, FP8 in float32.
        key_scales, query_scale: [L, H] and a number, by which what is stored in FP8 is multiplied; else 1.
        factors: [L, H], on the logits: one over the root of the head size, times the scales.
        device: where all of it lies.
    """

    def __init__(
        self,
        lengths: list[int],
        *,
        layers: int = 1,
        heads: int = 1,
        group: int = 1,
        head_size: int = 64,
        page_size: int = 16,
        dtype: torch.dtype = torch.float32,
        shift: float = 0.7,
        token_major: bool = False,
        apart: bool = False,
        seed: int = 0,
        device: torch.device = DEVICE,
    ) -> None:
        """Fill the cache.

        Args:
            lengths: tokens of each request.
            layers, heads, group, head_size, page_size, dtype: L, H, Hq / H, D, tokens a page, and elements.
            shift: weight of a direction common to all keys of a head: the larger, the more keys match.
            token_major: whether a page holds its tokens' heads side by side.
            apart: whether layers lie in buffers of their own.
            seed: of all random numbers.
            device: where all of it lies.
        """
        self.device = device
        generator = torch.Generator().manual_seed(seed)
        pages_of = [-(-length // page_size) for length in lengths]
        self.num_pages = 2 * sum(pages_of) + 3
        shape = (self.num_pages, heads, page_size, 2 * head_size)
        self.key_scales, self.query_scale = torch.ones(layers, heads, device=device), 1.0
        if dtype in FP8:
            self.key_scales[:, ::2], self.key_scales[:, 1::2], self.query_scale = 3.0, 0.02, 0.3
        self.layers = []
        for scales in self.key_scales:
            mean = torch.randn(1, heads, 1, 2 * head_size, generator=generator)
            data = torch.randn(shape, generator=generator) + shift * mean
            data = (data / scales[:, None, None].cpu()).to(dtype).to(device)
            if token_major:
                data = data.transpose(1, 2).contiguous().transpose(1, 2)
            self.layers.append(data)
        if not apart:
            strides = self.layers[0].stride()
            backing = torch.empty(layers, self.layers[0].numel(), dtype=dtype, device=device)
            views = [
                backing[index].as_strided(shape, strides, index * backing.stride(0))
                for index in range(layers)
            ]
            for view, layer in zip(views, self.layers, strict=True):
                view.copy_(layer)
            self.layers = views
        self.kv = PagedKV(self.layers)
        self.lengths = lengths
        order = torch.randperm(self.num_pages, generator=generator).tolist()
        self.source: list[list[int]] = []
        for count in pages_of:
            self.source.append(order[:count])
            order = order[count:]
        self.free = order
        self.rows = torch.randperm(len(lengths) + 2, generator=generator)[: len(lengths)].tolist()
        self.ends = [length + 5 + 3 * index for index, length in enumerate(lengths, RING_SIZE)]
        ring = (layers, len(lengths) + 2, RING_SIZE, heads * group, head_size)
        queries = (2.0 / self.query_scale * torch.randn(ring, generator=generator)).to(dtype).to(device)
        self.queries = queries.float() if dtype in FP8 else queries
        self.factors = head_size**-0.5 * self.query_scale * self.key_scales
        self.group = group

    def batch(
        self,
        keeps: list[int],
        targets: list[list[int]] | None = None,
        order: Order = "temporal",
        protects: list[int] | None = None,
        looked_at: int = WINDOW,
    ) -> CompactionBatch:
        """All requests, to be compacted in place unless there are target pages."""
        return CompactionBatch.build(
            lengths=self.lengths,
            keeps=keeps,
            source_pages=self.source,
            target_pages=self.source if targets is None else targets,
            page_size=self.kv.page_size,
            device=self.device,
            queries=self.query_windows(looked_at),
            order=order,
            protects=protects,
        )

    def tokens(self, layer: int, pages: list[int], length: int) -> torch.Tensor:
        """[H, length, 2 * D] of a request, gathered."""
        data = self.layers[layer][torch.tensor(pages, device=self.device)]
        return data.transpose(0, 1).flatten(1, 2)[:, :length]

    def keys(self, layer: int, request: int) -> torch.Tensor:
        """[H, N, D] of a request, as they were before they were scaled and stored."""
        tokens = self.tokens(layer, self.source[request], self.lengths[request])
        keys = tokens[..., : self.kv.head_size]
        return keys.double() * self.key_scales[layer, :, None, None] if self.kv.dtype in FP8 else keys

    def query_windows(self, count: int = WINDOW) -> list[QueryWindow]:
        """Where the newest queries of each request are."""
        return [QueryWindow(row, end, count) for row, end in zip(self.rows, self.ends, strict=True)]

    def newest_queries(self, layer: int, request: int, count: int = WINDOW) -> torch.Tensor:
        """[Hq, count, D] of a request, oldest first, as they were before they were scaled and captured."""
        end = self.ends[request]
        places = [position % RING_SIZE for position in range(end - count, end)]
        return self.query_scale * self.queries[layer, self.rows[request], places].transpose(0, 1)
