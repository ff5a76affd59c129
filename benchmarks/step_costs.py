"""What a decoding step's large parts cost on this GPU: products by tokens, attention by batch.

    python benchmarks/step_costs.py --json step-costs.json

Llama-8B's dimensions in bfloat16, random numbers, captured in CUDA graphs as vLLM does. Products: the four of
a layer, of 32 layers, and the head, for each number of tokens (rows) in a step. Attention: vLLM's
FlashAttention 3 over scattered pages, 32 layers, for batches and lengths as they come with and without
compaction.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import linear
from vllm.vllm_flash_attn import flash_attn_varlen_func, get_scheduler_metadata

from rkv_vllm.provenance import command_line

LAYERS, TIMED_LAYERS = 32, 4  # the timed ones, whose weights do not fit the L2 cache, stand for all
WEIGHTS = ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336))
HEAD = (128256, 4096)
TOKENS = (*range(32, 257, 32), *range(272, 529, 16), *range(576, 1025, 64))
KV_HEADS, GROUP, HEAD_SIZE = 8, 4, 128
PAGE_SIZES = (16, 32, 64, 128)
BATCHES = (  # requests, and the range of their lengths
    (384, 1025, 1152),
    (400, 1025, 1152),
    (416, 1025, 1152),
    (256, 1639, 1766),
    (124, 4097, 4224),
    (52, 128, 16512),
)


def milliseconds(call: Callable[[], Any], repetitions: int = 7) -> float:
    """Median of a captured call."""
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    times = []
    for _ in range(repetitions):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda._sleep(300_000)
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def random_weights(shape: tuple[int, int]) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.bfloat16, device="cuda") * 0.02


def products() -> list[dict[str, float]]:
    layers = [[random_weights(shape) for shape in WEIGHTS] for _ in range(TIMED_LAYERS)]
    head = random_weights(HEAD)
    rows = []
    for tokens in TOKENS:
        inputs = [
            torch.randn(tokens, width, dtype=torch.bfloat16, device="cuda") for _, width in (*WEIGHTS, HEAD)
        ]

        def of_layers(inputs: list[torch.Tensor] = inputs) -> None:
            for layer in layers:
                for weight, x in zip(layer, inputs, strict=False):
                    linear(x, weight)

        def of_head(inputs: list[torch.Tensor] = inputs) -> None:
            linear(inputs[-1], head)

        rows.append(
            {
                "tokens": tokens,
                "layers": milliseconds(of_layers) * LAYERS / TIMED_LAYERS,
                "head": milliseconds(of_head),
            }
        )
    return rows


def attention(page_size: int, batch: int, shortest: int, longest: int) -> dict[str, float]:
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(shortest, longest + 1, (batch,), generator=generator)
    pages = -(-lengths // page_size)
    kv = torch.randn(
        int(pages.sum()), page_size, KV_HEADS, 2 * HEAD_SIZE, dtype=torch.bfloat16, device="cuda"
    )
    order = torch.randperm(kv.shape[0], generator=generator).int()
    table = torch.zeros(batch, int(pages.max()), dtype=torch.int32)
    for row, own in zip(table, order.split(pages.tolist()), strict=True):
        row[: len(own)] = own
    table, used = table.cuda(), lengths.int().cuda()
    starts = torch.arange(batch + 1, dtype=torch.int32, device="cuda")
    queries = torch.randn(batch, KV_HEADS * GROUP, HEAD_SIZE, dtype=torch.bfloat16, device="cuda")
    out = torch.empty_like(queries)
    plan = get_scheduler_metadata(
        batch_size=batch,
        max_seqlen_q=1,
        max_seqlen_k=longest,
        num_heads_q=KV_HEADS * GROUP,
        num_heads_kv=KV_HEADS,
        headdim=HEAD_SIZE,
        cache_seqlens=used,
        qkv_dtype=torch.bfloat16,
        cu_seqlens_q=starts,
        page_size=page_size,
        causal=True,
        num_splits=0,
    )

    def call() -> None:
        flash_attn_varlen_func(
            q=queries,
            k=kv[..., :HEAD_SIZE],
            v=kv[..., HEAD_SIZE:],
            out=out,
            cu_seqlens_q=starts,
            max_seqlen_q=1,
            seqused_k=used,
            max_seqlen_k=longest,
            softmax_scale=HEAD_SIZE**-0.5,
            causal=True,
            block_table=table,
            fa_version=3,
            scheduler_metadata=plan,
            num_splits=0,
        )

    time = milliseconds(call)
    read = int(lengths.sum()) * KV_HEADS * 2 * HEAD_SIZE * 2
    return {
        "page_size": page_size,
        "requests": batch,
        "shortest": shortest,
        "longest": longest,
        "milliseconds": time * LAYERS,
        "terabytes_per_second": read / time / 1e9,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="where to write the numbers")
    arguments = parser.parse_args()
    of_products = products()
    for row in of_products:
        print(f"{row['tokens']:>5} tokens: products {row['layers']:.2f} ms, head {row['head']:.2f} ms")
    of_attention = [attention(page_size, *batch) for page_size in PAGE_SIZES for batch in BATCHES]
    for each in of_attention:
        print(
            f"pages of {each['page_size']:>3}, {each['requests']:>3} requests of {each['shortest']} to "
            f"{each['longest']}: {each['milliseconds']:.2f} ms, {each['terabytes_per_second']:.2f} TB/s"
        )
    if arguments.json:
        result = {
            "command": command_line("python", "benchmarks/step_costs.py"),
            "device": torch.cuda.get_device_name(),
            "products": of_products,
            "attention": of_attention,
        }
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
