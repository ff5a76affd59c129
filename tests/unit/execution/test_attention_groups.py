"""Which lengths vLLM's metadata builders get to see, of compacted layers and of others."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.worker.utils import AttentionGroup

from rkv_vllm.execution.attention_groups import CompactedAttentionGroup, make_physical
from rkv_vllm.execution.cpu.runner import CompactingCpuRunner
from rkv_vllm.execution.gpu.physical_lengths import PhysicalLengths

LOGICAL = torch.tensor([70, 9, 500, 3], dtype=torch.int32)
EVICTED = torch.tensor([32, 0, 400, 0], dtype=torch.int32)
LONGEST = 4096


class Builder:
    """Stands for a backend's: hands on what it is given, and keeps what it was told beside it."""

    def build(self, prefix: int, common: CommonAttentionMetadata, **kwargs: Any) -> CommonAttentionMetadata:
        self.told = (prefix, kwargs)
        return common

    def build_for_cudagraph_capture(self, common: CommonAttentionMetadata) -> CommonAttentionMetadata:
        return common


def group() -> AttentionGroup:
    return AttentionGroup(None, ["layer"], None, 0, metadata_builders=[Builder()])


def batch(padding: int = 0) -> CommonAttentionMetadata:
    """Four requests of a token each, with rows of no request behind them."""
    lengths = torch.nn.functional.pad(LOGICAL, (0, padding))
    starts = torch.arange(len(lengths) + 1, dtype=torch.int32)
    common = CommonAttentionMetadata(
        query_start_loc=starts,
        query_start_loc_cpu=starts,
        seq_lens=lengths,
        num_reqs=len(lengths),
        num_actual_tokens=len(lengths),
        max_query_len=1,
        max_seq_len=LONGEST,
        block_table_tensor=starts,
        slot_mapping=starts,
        seq_lens_cpu_upper_bound=lengths.clone(),
    )
    common.compute_num_computed_tokens()  # as a group that was built before may have had it done
    return common


def cpu_physical(common: CommonAttentionMetadata) -> CommonAttentionMetadata:
    return CompactingCpuRunner._physical(SimpleNamespace(_evicted_of_batch=EVICTED), common)


def gpu_lengths(padding: int) -> PhysicalLengths:
    """Of the same batch, its requests in slots 3, 1, 0 and 2; the device's part is done."""
    lengths = PhysicalLengths.__new__(PhysicalLengths)
    evicted = np.zeros(6, dtype=np.int32)
    evicted[[3, 1, 0, 2]] = EVICTED
    lengths.evicted = SimpleNamespace(np=evicted)
    lengths.seq_lens = torch.zeros(8, dtype=torch.int32)
    lengths.seq_lens[:4] = LOGICAL - EVICTED
    lengths.is_real = True
    assert lengths.begin(gpu_batch(padding))
    return lengths


def gpu_batch(padding: int) -> Any:
    common = batch(padding)
    return SimpleNamespace(
        num_reqs=4,
        idx_mapping_np=np.array([3, 1, 0, 2]),
        seq_lens=common.seq_lens,
        seq_lens_cpu_upper_bound=common.seq_lens_cpu_upper_bound,
    )


@pytest.mark.parametrize("padding", [0, 2])
@pytest.mark.parametrize("runner", ["cpu", "gpu"])
def test_compacted_layers_alone_read_physical_lengths(runner: str, padding: int) -> None:
    """Proves that metadata of a compacted group has what is left of each request, in every field that says a
    length, and that the batch, from which other groups build theirs next, stays as it is."""
    compacted, other = group(), group()
    make_physical([compacted], cpu_physical if runner == "cpu" else gpu_lengths(padding).physical)
    common = batch(padding)
    found = compacted.build_metadata(common, 0, 7, extra=5)
    rows = [38, 9, 100, 3] + padding * [0]
    assert found.seq_lens.tolist() == found.seq_lens_cpu_upper_bound.tolist() == rows
    assert found.max_seq_len == 100
    assert found.compute_num_computed_tokens().tolist() == [length - 1 for length in rows]
    assert compacted.metadata_builders[0].told == (7, {"extra": 5})
    assert other.build_metadata(common) is common
    assert common.seq_lens.tolist() == common.seq_lens_cpu_upper_bound.tolist()[: 4 + padding]
    assert common.seq_lens[:4].tolist() == LOGICAL.tolist() and common.max_seq_len == LONGEST
    assert common.compute_num_computed_tokens()[:4].tolist() == (LOGICAL - 1).tolist()


def test_a_graph_is_captured_on_the_buffer_for_any_length() -> None:
    """Proves that what a graph bakes is the address of the physical lengths and vLLM's own bound on them."""
    lengths, compacted = gpu_lengths(0), group()
    make_physical([compacted], lengths.physical)
    found = compacted.build_metadata_for_cudagraph_capture(batch())
    assert found.seq_lens.data_ptr() == lengths.seq_lens.data_ptr()
    assert found.max_seq_len == LONGEST


def test_a_dummy_batch_is_logical() -> None:
    """Proves that a batch for which nothing was prepared is read as vLLM made it, and the one before it
    leaves nothing behind."""
    lengths, compacted = gpu_lengths(0), group()
    assert not lengths.begin(gpu_batch(0))
    make_physical([compacted], lengths.physical)
    found = compacted.build_metadata(batch())
    assert found.seq_lens.tolist() == found.seq_lens_cpu_upper_bound.tolist() == LOGICAL.tolist()


def test_vllms_groups_stay_what_they_are() -> None:
    """Proves that a group keeps its builders and passes for vLLM's own."""
    compacted = group()
    builders = compacted.metadata_builders
    make_physical([compacted], cpu_physical)
    assert isinstance(compacted, AttentionGroup) and type(compacted) is CompactedAttentionGroup
    assert compacted.metadata_builders is builders
