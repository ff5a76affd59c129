"""Physical lengths of a batch, in buffers of fixed address that CUDA graphs read."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from vllm.v1.worker.gpu.buffer_utils import UvaBackedTensor
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.model_states.interface import ModelState

from rkv_vllm.execution.gpu.query_ring import GpuQueryRing
from rkv_vllm.host.retype import override

#: `query_rows` of a request whose queries are not captured.
NOT_CAPTURED = -1


class PhysicalLengths:
    """What compaction changed about each request slot, on the host and on the device.

    Attributes:
        evicted, query_rows: per request slot, written on the host and read by the device.
        seq_lens [max requests], positions [max tokens]: physical, of the batch about to run.
        is_real: whether those were filled for the batch about to run; otherwise it is one of vLLM's dummies,
            which hold no compacted request.
    """

    def __init__(self, max_num_requests: int, max_num_tokens: int, device: torch.device) -> None:
        self.evicted = UvaBackedTensor(max_num_requests, dtype=torch.int32)
        self.query_rows = UvaBackedTensor(max_num_requests, dtype=torch.int32)
        self.query_rows.np.fill(NOT_CAPTURED)
        self.seq_lens = torch.zeros(max_num_requests, dtype=torch.int32, device=device)
        self.positions = torch.zeros(max_num_tokens, dtype=torch.int64, device=device)
        self.is_real = False


def make_attention_physical(model_state: ModelState, lengths: PhysicalLengths, ring: GpuQueryRing) -> None:
    """Makes the model's attention metadata physical; the batch itself stays logical for everything else.

    vLLM picks the class of `model_state` by model and has no hook on its way to attention.
    """
    state_class = type(model_state)

    def prepare_attn(state: Any, input_batch: InputBatch, *args: Any, **kwargs: Any) -> dict[str, Any]:
        count = input_batch.seq_lens.shape[0]
        upper_bound = input_batch.seq_lens_cpu_upper_bound
        if lengths.is_real:
            lengths.is_real = False
            upper_bound = upper_bound.clone()
            upper_bound[: input_batch.num_reqs] -= torch.from_numpy(
                lengths.evicted.np[input_batch.idx_mapping_np[: input_batch.num_reqs]]
            )
        else:
            lengths.seq_lens[:count].copy_(input_batch.seq_lens)
            ring.ring_indices.fill_(NOT_CAPTURED)
        physical = dataclasses.replace(
            input_batch, seq_lens=lengths.seq_lens[:count], seq_lens_cpu_upper_bound=upper_bound
        )
        return state_class.prepare_attn(state, physical, *args, **kwargs)

    override(model_state, "Physical", prepare_attn=prepare_attn)
