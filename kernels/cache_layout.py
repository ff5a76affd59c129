"""A paged cache as the kernels see it."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

PLAIN = (torch.float32, torch.float16, torch.bfloat16)
"""Types of caches that hold keys and values as they are."""

FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
"""Types of caches that hold them over a scale, of the layer or of the KV head."""

ALIGNMENT = 16
"""Elements; a row that starts at a multiple of it can be read in 16-byte pieces."""


@dataclass(frozen=True)
class PagedKV:
    """Keys and values of all layers, in pages.

    Attributes:
        layers: one strided view [num_pages, H, page_size, 2 * D] a layer, all of one dtype, device, shape and
            stride; element ``[p, h, s]`` holds the key in its first D elements and the value in the other D.
            The views may lie in one buffer or in several.
        layer_offsets: int64 [L] on the device: start of each layer, in elements from layer 0's start.

    Raises:
        ValueError: on construction, if the layers are not as above, a row is not contiguous, ``page_size``
            is no multiple of 16, or a layer, page, head or slot does not start at a multiple of 16 elements.
    """

    layers: list[torch.Tensor]
    layer_offsets: torch.Tensor = field(init=False)

    def __post_init__(self) -> None:
        if not self.layers:
            raise ValueError("a paged cache needs at least one layer")
        first = self.layers[0]
        if first.dim() != 4:
            raise ValueError(
                f"a layer must be [pages, heads, page size, 2 * head size], not {tuple(first.shape)}"
            )
        for index, layer in enumerate(self.layers):
            for what in ("shape", "dtype", "device"):
                if getattr(layer, what) != getattr(first, what):
                    raise ValueError(
                        f"layer {index} has {what} {getattr(layer, what)}, layer 0 {getattr(first, what)}"
                    )
            if layer.stride() != first.stride():
                raise ValueError(f"layer {index} has strides {layer.stride()}, layer 0 {first.stride()}")
        if first.shape[2] % 16 or first.shape[3] % 2:
            raise ValueError(
                f"page size {first.shape[2]} must be a multiple of 16 and row width {first.shape[3]} even"
            )
        if first.stride(3) != 1:
            raise ValueError(f"a key must be contiguous, not of stride {first.stride(3)}")
        offsets = [layer.data_ptr() - first.data_ptr() for layer in self.layers]
        if any(offset % (first.element_size() * ALIGNMENT) for offset in offsets):
            raise ValueError(f"each layer must start at a multiple of {ALIGNMENT} elements from layer 0")
        if any(stride % ALIGNMENT for stride in first.stride()[:3]) or self.head_size % ALIGNMENT:
            raise ValueError(
                f"strides {first.stride()[:3]} and head size {self.head_size} must be multiples of 16"
            )
        if max(first.stride(0), first.shape[2] * first.stride(2)) >= 2**31:
            raise ValueError(f"pages or slots lie too far apart for 32-bit strides: {first.stride()}")
        starts = [offset // first.element_size() for offset in offsets]
        table = torch.tensor(starts, dtype=torch.int64, device=first.device)
        object.__setattr__(self, "layer_offsets", table)

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def num_pages(self) -> int:
        return self.layers[0].shape[0]

    @property
    def num_heads(self) -> int:
        """KV heads a layer (H)."""
        return self.layers[0].shape[1]

    @property
    def page_size(self) -> int:
        """Tokens a page."""
        return self.layers[0].shape[2]

    @property
    def head_size(self) -> int:
        """Elements of one key (D)."""
        return self.layers[0].shape[3] // 2

    @property
    def dtype(self) -> torch.dtype:
        return self.layers[0].dtype

    def equal_factors(self, factor: float) -> torch.Tensor:
        """float32 [L, H] on the device: one factor on the logits of all layers and KV heads."""
        return torch.full((self.num_layers, self.num_heads), factor, device=self.device)

    @property
    def device(self) -> torch.device:
        return self.layers[0].device
