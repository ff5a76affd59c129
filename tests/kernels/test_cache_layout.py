"""The description of a paged cache: what it accepts and refuses; and what the kernels' modules import."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from rkv_vllm.kernels.cache_layout import PagedKV


def test_layers_may_share_a_buffer_or_not() -> None:
    """Proves layer offsets counted in elements from layer 0, and dimensions read off the views."""
    buffer = torch.zeros(3, 4, 2, 16, 64, dtype=torch.float16)
    kv = PagedKV(list(buffer.unbind()))
    assert kv.layer_offsets.tolist() == [0, 8192, 16384]
    assert (kv.num_layers, kv.num_pages, kv.num_heads, kv.page_size, kv.head_size) == (3, 4, 2, 16, 32)
    token_major = torch.zeros(4, 16, 2, 64).transpose(1, 2)
    assert PagedKV([token_major]).num_heads == 2


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([], "at least one layer"),
        ([torch.zeros(4, 16, 64)], "must be"),
        ([torch.zeros(4, 2, 16, 64), torch.zeros(5, 2, 16, 64)], "layer 1 has shape"),
        ([torch.zeros(4, 2, 16, 64), torch.zeros(4, 2, 16, 64).half()], "layer 1 has dtype"),
        ([torch.zeros(4, 2, 16, 64), torch.zeros(4, 16, 2, 64).transpose(1, 2)], "layer 1 has strides"),
        ([torch.zeros(4, 2, 8, 64)], "page size 8"),
        ([torch.zeros(4, 2, 16, 63)], "row width 63"),
        ([torch.zeros(4, 2, 64, 16).transpose(2, 3)], "must be contiguous"),
        ([torch.zeros(4, 2, 16, 40)], "head size 20"),
        ([torch.empty_strided((1, 1, 16, 32), (2**31, 512, 32, 1), device="meta")], "too far apart"),
    ],
)
def test_wrong_layers_are_refused(layers: list[torch.Tensor], message: str) -> None:
    """Proves each mistake named when the cache is described."""
    with pytest.raises(ValueError, match=message):
        PagedKV(layers)


def test_reference_needs_neither_triton_nor_vllm() -> None:
    """Proves that the CPU paths import where Triton and vLLM are absent."""
    code = (
        "import sys; sys.modules['triton'] = sys.modules['vllm'] = None\n"
        "import rkv_vllm.kernels.naive, rkv_vllm.kernels.tiled, rkv_vllm.kernels.cache_layout"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
