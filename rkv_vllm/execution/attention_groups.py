"""Attention metadata of compacted layers: physical lengths, while the batch stays logical for all else.

vLLM keeps one `AttentionGroup` for all layers that share pages and a backend, in both runners, and builds
there what their attention reads. What other layers read of the same batch stays as it is: windows and
recurrent states go by positions in the text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.worker.utils import AttentionGroup

from rkv_vllm.host.retype import retype

#: Gives what all backends build their metadata from, with physical lengths in place of logical ones.
Physical = Callable[[CommonAttentionMetadata], CommonAttentionMetadata]


class CompactedAttentionGroup(AttentionGroup):
    """Layers whose caches are compacted."""

    physical: Physical

    def build_metadata(
        self,
        common_attn_metadata: CommonAttentionMetadata,
        ubatch_idx: int = 0,
        common_prefix_len: int = 0,
        **kwargs: Any,
    ) -> Any:
        physical = self.physical(common_attn_metadata)
        return super().build_metadata(physical, ubatch_idx, common_prefix_len, **kwargs)

    def build_metadata_for_cudagraph_capture(
        self, common_attn_metadata: CommonAttentionMetadata, ubatch_idx: int = 0
    ) -> Any:
        # The graph will be replayed for lengths that are not known yet: the bound stays what vLLM says.
        physical = self.physical(common_attn_metadata).replace(max_seq_len=common_attn_metadata.max_seq_len)
        return super().build_metadata_for_cudagraph_capture(physical, ubatch_idx)


def make_physical(groups: Iterable[AttentionGroup], physical: Physical) -> None:
    """Has groups of compacted layers read physical lengths; vLLM makes the groups and has no hook for it."""
    for group in groups:
        retype(group, CompactedAttentionGroup).physical = physical


def with_lengths(common: CommonAttentionMetadata, seq_lens: Any, upper_bound: Any) -> CommonAttentionMetadata:
    """The same batch with other lengths.

    Args:
        common: of the batch; it is left as it is.
        seq_lens: int32 [requests], on the device.
        upper_bound: int32 [requests], on the host.
    """
    return common.replace(
        seq_lens=seq_lens,
        seq_lens_cpu_upper_bound=upper_bound,
        max_seq_len=int(upper_bound.max()),
        _num_computed_tokens_cache=None,  # of the lengths that were there
    )
