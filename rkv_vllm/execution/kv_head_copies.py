"""Tensor parallel ranks that hold copies of one KV head, each with a part of the query heads of its group.

With more ranks than KV heads vLLM copies each head to several ranks. By its own queries alone each of them
would keep other tokens than the others, and an answer would depend on the number of ranks. So they put the
window's queries together before a round, and decide alike: they run the same rounds, on equal keys.
"""

from __future__ import annotations

import torch
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_rank, tensor_model_parallel_all_gather


def ranks_per_kv_head(vllm_config: VllmConfig) -> int:
    """Ranks that hold the same KV head: 1, if there are as many heads as ranks."""
    ranks = vllm_config.parallel_config.tensor_parallel_size
    return max(ranks // vllm_config.model_config.get_total_num_kv_heads(), 1)


def whole_group(queries: torch.Tensor, ranks: int, dim: int) -> torch.Tensor:
    """The queries of all query heads that share the own KV head, in the model's order.

    All ranks have to call it, with queries of the same shape.

    Args:
        queries: of the own query heads, which lie along `dim`.
        ranks: how many ranks hold the same KV head.
        dim: along which the heads of the others are put beside them.
    """
    if ranks == 1:
        return queries
    own_heads = queries.shape[dim]
    of_all = tensor_model_parallel_all_gather(queries.contiguous(), dim)
    first = get_tensor_model_parallel_rank() // ranks * ranks
    return of_all.narrow(dim, first * own_heads, ranks * own_heads)
