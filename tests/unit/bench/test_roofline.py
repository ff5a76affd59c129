"""The least time of a step."""

from __future__ import annotations

import pytest
from llama_8b import SHAPE as LLAMA_8B

from rkv_vllm.bench.roofline import (
    HardwareLimits,
    attention_seconds,
    compaction_seconds,
    matmul_seconds,
    row_roofline,
    step_roofline,
)
from rkv_vllm.bench.rows import Row
from rkv_vllm.settings.config import CompactionSettings

H200 = HardwareLimits(bytes_per_second=4.3e12, operations_per_second=790e12)
ROW = Row(name="row", input=128, output=16384, budget=1024)


def test_parameters_of_llama_8b() -> None:
    """Proves that the arithmetic gives the model's 8.03 billion parameters, and 128 KiB of cache a token."""
    assert LLAMA_8B.parameters == pytest.approx(8.03e9, rel=1e-3)
    assert LLAMA_8B.parameters - LLAMA_8B.multiplied_parameters == 128256 * 4096
    tied = LLAMA_8B.model_copy(update={"tied_embedding": True})
    assert tied.parameters == tied.multiplied_parameters == LLAMA_8B.multiplied_parameters
    assert LLAMA_8B.kv.bytes_per_token == 128 * 1024


def test_products_read_the_weights_or_compute() -> None:
    """Proves that few requests cost reading the weights, and many their operations, from one number on."""
    weights = LLAMA_8B.multiplied_parameters * 2 / 4.3e12
    assert matmul_seconds(LLAMA_8B, H200, 1) == matmul_seconds(LLAMA_8B, H200, 180) == weights
    assert matmul_seconds(LLAMA_8B, H200, 400) == pytest.approx(
        400 * 2 * LLAMA_8B.multiplied_parameters / 790e12
    )


def test_attention_reads_the_cache_or_computes() -> None:
    """Proves that attention is bound by bytes, or by operations where those are slow."""
    assert attention_seconds(LLAMA_8B, H200, 1000) == pytest.approx(1000 * 131072 / 4.3e12)
    slow = HardwareLimits(bytes_per_second=4.3e12, operations_per_second=1e12)
    assert attention_seconds(LLAMA_8B, slow, 1000) == pytest.approx(4 * 32 * 32 * 128 * 1000 / 1e12)


def test_a_compaction_s_floor() -> None:
    """Proves the roofline of a round at 1,152 tokens, and that rkv alone pays, for pairs with a new key."""
    rkv = compaction_seconds(LLAMA_8B, H200, CompactionSettings(1024, 128, "rkv"))
    assert 1000 * rkv == pytest.approx(0.111, rel=0.02)
    recency = compaction_seconds(LLAMA_8B, H200, CompactionSettings(1024, 128, "recency"))
    assert rkv - recency == pytest.approx(256 * (1152**2 - 1024**2) * 128 / 790e12)


def test_an_a100_s_memory() -> None:
    """Proves for an A100's memory that about 50 full caches face about 400 compacted ones, and the ratio."""
    sizes = {"pages": 26_000, "page_size": 16, "max_num_seqs": 1024}
    stock = row_roofline(LLAMA_8B, H200, ROW, "stock", **sizes)
    rkv = row_roofline(LLAMA_8B, H200, ROW, "rkv", **sizes)
    assert 45 < stock.running < 55 and 370 < rkv.running < 410
    assert stock.compaction == 0 < rkv.compaction < 0.05 * rkv.milliseconds
    assert 5.0 < rkv.tokens_per_second / stock.tokens_per_second < 6.5
    off = row_roofline(LLAMA_8B, H200, ROW, "off", **sizes)
    assert off == stock


def test_a_cache_in_fp8_halves_what_is_read_of_it() -> None:
    """Proves that attention and rounds read half, weights are read as they were, and operations stay."""
    fp8 = LLAMA_8B.model_copy(update={"cache_element_bytes": 1})
    assert fp8.kv.bytes_per_token * 2 == LLAMA_8B.kv.bytes_per_token
    assert attention_seconds(fp8, H200, 1000) == pytest.approx(attention_seconds(LLAMA_8B, H200, 1000) / 2)
    assert matmul_seconds(fp8, H200, 10) == matmul_seconds(LLAMA_8B, H200, 10)
    settings = CompactionSettings(1024, 128, "recency")
    assert compaction_seconds(fp8, H200, settings) == compaction_seconds(LLAMA_8B, H200, settings) / 2


def test_a_step_s_floor_is_the_sum_of_its_phases() -> None:
    """Proves that phases add up, and that a request which is never due is not compacted."""
    roofline = step_roofline(LLAMA_8B, H200, ROW.model_copy(update={"ages": (0, 512)}), "rkv", 10)
    assert roofline.compaction == 0 and roofline.slots_per_request == pytest.approx(128 + 255.5)
    assert roofline.milliseconds == roofline.matmul + roofline.attention
    assert roofline.tokens_per_second == pytest.approx(10_000 / roofline.milliseconds)
