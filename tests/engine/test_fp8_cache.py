"""A cache in FP8: the same guarantees as in the model's dtype, against stock vLLM with the same cache."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import identity_scheduler
import pytest
import texts
import torch
from engine_process import ABOVE_ANY_LENGTH, PAGE_SIZE, Ask, Engine, Run, Settings
from safetensors.torch import save_file
from support.identical import assert_bit_identical

from rkv_vllm.settings.policy_table import POLICY_NAMES

pytestmark = pytest.mark.skipif(
    not (torch.cpu._is_avx512_supported() or torch.cpu._is_amx_tile_supported()),
    reason="vLLM's CPU attention needs AVX-512 or AMX to keep FP8",
)
TOKENS = 90


@pytest.fixture(scope="module")
def prompts(encode: texts.Encode) -> list[list[int]]:
    return [list(encode(text)) for text in (texts.multiples(7), texts.COUNTDOWN, texts.squares(16))]


@pytest.fixture(scope="module")
def fp8(start_engine: Callable[[Settings], Engine]) -> Engine:
    return start_engine(Settings(cache_dtype="fp8"))


@pytest.fixture(scope="module")
def stock_run(start_engine: Callable[[Settings], Engine], prompts: list[list[int]]) -> Run:
    engine = start_engine(Settings(rkv=False, cache_dtype="fp8"))
    return engine.run([Ask(prompt, TOKENS) for prompt in prompts])


def test_budget_above_the_length_is_stock(fp8: Engine, prompts: list[list[int]], stock_run: Run) -> None:
    """Requests that never reach their budget get the tokens and logprobs of stock FP8 to the bit."""
    run = fp8.run([Ask(prompt, TOKENS, {"rkv_budget": ABOVE_ANY_LENGTH}) for prompt in prompts])

    assert_bit_identical(run.answers, stock_run.answers)
    assert not any(step.compacted for step in run.steps)


def test_moved_pages_are_stock(
    start_engine: Callable[[Settings], Engine], prompts: list[list[int]], stock_run: Run
) -> None:
    """Moving every request's whole KV into other pages every 16 tokens changes no bit of the output."""
    engine = start_engine(Settings(scheduler="identity_scheduler.IdentityScheduler", cache_dtype="fp8"))
    run = engine.run([Ask(prompt, TOKENS, {"rkv_budget": ABOVE_ANY_LENGTH}) for prompt in prompts])

    assert_bit_identical(run.answers, stock_run.answers)
    assert run.compactions(0) == (TOKENS - 2) // identity_scheduler.EVERY + 1


def test_compacted_requests_get_the_same_again(fp8: Engine, prompts: list[list[int]], stock_run: Run) -> None:
    """Requests of every policy within a budget of 32 get the same tokens and logprobs to the bit when they
    come in another order, and other ones than with their full cache. (In a batch of another size vLLM rounds
    differently, and a number at the border between two of FP8 falls to its other side,.)"""
    asks = [
        Ask(prompts[index % len(prompts)], TOKENS, {"rkv_budget": 32, "rkv_buffer": 16, "rkv_policy": policy})
        for index, policy in enumerate(POLICY_NAMES)
    ]
    run, again = fp8.run(asks), fp8.run(asks[::-1])

    assert_bit_identical(run.answers, again.answers[::-1])
    for answer, full in zip(run.answers, stock_run.answers, strict=False):
        assert answer.result["compactions"] >= 4
        assert answer.logprobs != full.logprobs


def test_pages_leave_alike(start_engine: Callable[[Settings], Engine], prompts: list[list[int]]) -> None:
    """By page, and in e5m2, requests of every policy drop pages, and get the same to the bit again."""
    engine = start_engine(Settings(granularity="page", cache_dtype="fp8_e5m2"))
    asks = [
        Ask(prompts[index % len(prompts)], TOKENS, {"rkv_budget": 64, "rkv_buffer": 8, "rkv_policy": policy})
        for index, policy in enumerate(POLICY_NAMES)
    ]
    run, again = engine.run(asks), engine.run(asks[::-1])

    assert_bit_identical(run.answers, again.answers[::-1])
    for answer in run.answers:
        assert answer.result["evicted_tokens"] >= PAGE_SIZE


@pytest.fixture
def with_scales(model: Path, tmp_path: Path) -> Path:
    """The model's folder as one of compressed-tensors, with scales that differ by layer."""
    config = json.loads((model / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "config_groups": {},
        "kv_cache_scheme": {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True},
    }
    scales = {
        f"model.layers.{layer}.self_attn.{kind}_scale": torch.tensor([0.02 * (layer + 1)])
        for layer in range(config["num_hidden_layers"])
        for kind in "kvq"
    }
    for file in model.iterdir():
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(scales, tmp_path / "scales.safetensors")
    return tmp_path


def test_a_checkpoint_turns_fp8_on_in_the_worker(with_scales: Path, prompts: list[list[int]]) -> None:
    """Where only the checkpoint says so, R-KV runs on the cache of stock vLLM, its scales and all: a budget
    above the length changes no bit, and one below compacts."""
    stock, ours = (Engine(with_scales, Settings(rkv=rkv)) for rkv in (False, True))
    expected = stock.run([Ask(prompt, 40) for prompt in prompts]).answers
    found = ours.run([Ask(prompt, 40, {"rkv_budget": ABOVE_ANY_LENGTH}) for prompt in prompts]).answers
    compacted = ours.run([Ask(prompt, 40, {"rkv_budget": 32, "rkv_buffer": 8}) for prompt in prompts]).answers
    stored = ours.first_layer_keys(1).dtype
    for engine in (stock, ours):
        engine.close()

    assert stored == torch.uint8
    assert_bit_identical(found, expected)
    assert all(answer.result["compactions"] >= 2 for answer in compacted)
