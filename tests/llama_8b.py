"""R1-Distill-Llama-8B as the benchmark's tests know it: its dimensions, and what an engine says of itself."""

from __future__ import annotations

from rkv_vllm.bench.results import EngineFacts
from rkv_vllm.bench.roofline import ModelShape

SHAPE = ModelShape(
    layers=32,
    hidden=4096,
    heads=32,
    kv_heads=8,
    head_size=128,
    intermediate=14336,
    vocabulary=128256,
    tied_embedding=False,
    element_bytes=2,
)
FACTS = EngineFacts(
    shape=SHAPE,
    model="shapes/r1-distill-llama-8b",
    pool_pages=1000,
    page_size=16,
    max_num_seqs=1024,
    max_num_batched_tokens=8192,
    max_model_len=4096,
    prefix_caching=True,
    async_scheduling=True,
    cudagraph_mode="FULL_AND_PIECEWISE",
    largest_graph=512,
    start_seconds=60.0,
)
