"""Plain pages and queries for the CPU's compactors, and a block table for those of either device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from rkv_vllm.execution.layer_groups import LayerGroup
from rkv_vllm.settings.policy_table import RING_SIZE


def all_layers(count: int, place: int = 0) -> LayerGroup:
    """The group of a model all of whose layers share pages."""
    return LayerGroup(group_id=place, place=place, layers=tuple(range(count)))


@dataclass
class PlainCache:
    """A layer in plain pages [pages, H, page size, 2 D], as the CPU's compactor uses its layers."""

    data: torch.Tensor
    scale: float
    page_size: int

    def numbers(self, stored: torch.Tensor) -> torch.Tensor:
        return stored

    def read(self, pages: torch.Tensor, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        tokens = self.data[pages].transpose(0, 1).flatten(1, 2)[:, :length]
        keys, values = tokens.chunk(2, dim=-1)
        return keys, values

    def write(self, pages: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
        tokens = torch.cat((keys, values), dim=-1)
        for index, page in enumerate(pages.tolist()):
            piece = tokens[:, index * self.page_size : (index + 1) * self.page_size]
            self.data[page, :, : piece.shape[1]] = piece


@dataclass
class PlainQueries:
    ring: torch.Tensor

    def newest(self, layer: int, row: int, end: int, count: int) -> torch.Tensor:
        places = [position % RING_SIZE for position in range(end - count, end)]
        return self.ring[layer, row, places].transpose(0, 1)


@dataclass
class Tables:
    """The block table of a runner, as compactors of either device write it."""

    pages: dict[str, tuple[int, ...]] = field(default_factory=dict)

    def replace_pages(self, request_id: str, pages: Sequence[int]) -> None:
        self.pages[request_id] = tuple(pages)

    def pages_of(self, request_id: str) -> list[int]:
        raise AssertionError("the scheduler names all pages")

    def page_row(self, request_id: str) -> torch.Tensor:
        raise AssertionError("the scheduler names all pages")

    def set_num_pages(self, request_id: str, pages: int) -> None:
        raise AssertionError("the scheduler names all pages")
