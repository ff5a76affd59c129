"""Physical lengths of a batch, in buffers of fixed address that CUDA graphs read."""

from __future__ import annotations

from typing import Any

import torch
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.worker.gpu.buffer_utils import UvaBackedTensor
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.model_states.interface import ModelState

from rkv_vllm.execution.attention_groups import with_lengths
from rkv_vllm.execution.gpu.query_ring import GpuQueryRing
from rkv_vllm.host.retype import override

#: `query_rows` of a request whose queries are not captured.
NOT_CAPTURED = -1


class PhysicalLengths:
    """What compaction changed about each request slot, on the host and on the device.

    Attributes:
        evicted, query_rows: per request slot, written on the host and read by the device.
        seq_lens [max requests], positions [max tokens]: physical, of the batch about to run.
        upper_bound: int32 [requests of the batch about to run], what the host knows of `seq_lens`.
        is_real: whether those on the device were filled for the batch about to run; otherwise it is one of
            vLLM's dummies, which hold no compacted request.
    """

    upper_bound: torch.Tensor

    def __init__(self, max_num_requests: int, max_num_tokens: int, device: torch.device) -> None:
        self.evicted = UvaBackedTensor(max_num_requests, dtype=torch.int32)
        self.query_rows = UvaBackedTensor(max_num_requests, dtype=torch.int32)
        self.query_rows.np.fill(NOT_CAPTURED)
        self.seq_lens = torch.zeros(max_num_requests, dtype=torch.int32, device=device)
        self.positions = torch.zeros(max_num_tokens, dtype=torch.int64, device=device)
        self.is_real = False

    def begin(self, batch: InputBatch) -> bool:
        """Gets ready for a batch about to run; whether it is a real one."""
        is_real, self.is_real = self.is_real, False
        self.upper_bound = batch.seq_lens_cpu_upper_bound
        if is_real:
            slots = batch.idx_mapping_np[: batch.num_reqs]
            self.upper_bound = self.upper_bound.clone()
            self.upper_bound[: batch.num_reqs] -= torch.from_numpy(self.evicted.np[slots])
        else:
            self.seq_lens[: batch.seq_lens.shape[0]].copy_(batch.seq_lens)
        return is_real

    def physical(self, common: CommonAttentionMetadata) -> CommonAttentionMetadata:
        """Of the batch that was begun, which may be cut to the requests that are no padding."""
        count = common.num_reqs
        return with_lengths(common, self.seq_lens[:count], self.upper_bound[:count])


def tell_batches(model_state: ModelState, lengths: PhysicalLengths, ring: GpuQueryRing) -> None:
    """Has `lengths` told of each batch before attention's metadata is built, and nothing of dummies captured.

    vLLM picks the class of `model_state` by model and has no hook on its way to attention.
    """
    state_class = type(model_state)

    def prepare_attn(state: Any, input_batch: InputBatch, *args: Any, **kwargs: Any) -> dict[str, Any]:
        if not lengths.begin(input_batch):
            ring.ring_indices.fill_(NOT_CAPTURED)
        return state_class.prepare_attn(state, input_batch, *args, **kwargs)

    override(model_state, "Telling", prepare_attn=prepare_attn)
