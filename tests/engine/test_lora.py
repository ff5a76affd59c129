"""LoRA adapters and budgets, in a real engine."""

from __future__ import annotations

import json
import os
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from unittest.mock import patch

import torch
from engine_process import ENVIRONMENT, IMPORTED_ONCE, PAGE_SIZE
from safetensors.torch import save_file

LENGTH, TOKENS, BUDGET, BUFFER = 80, 60, 40, 16
RANK = 8


def save_adapter(folder: Path, model: Path, seed: int) -> Path:
    """Random weights, large enough to change every answer, for projections of queries and values."""
    shape = json.loads((model / "config.json").read_text())
    heads = {"q_proj": shape["num_attention_heads"], "v_proj": shape["num_key_value_heads"]}
    size, head_size = shape["hidden_size"], shape["hidden_size"] // shape["num_attention_heads"]
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for layer in range(shape["num_hidden_layers"]):
        for name, count in heads.items():
            path = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            weights[f"{path}.lora_A.weight"] = torch.randn(RANK, size, generator=generator) / 10
            weights[f"{path}.lora_B.weight"] = torch.randn(count * head_size, RANK, generator=generator) / 10
    folder.mkdir()
    save_file(weights, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "target_modules": list(heads)}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def answers(model: Path, adapters: list[Path]) -> list[tuple[list[int], dict[str, int]]]:
    """Of the base, of each adapter, and of the first adapter again: tokens and report."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    from rkv_vllm import rkv_engine_args

    llm = LLM(
        model=str(model),
        dtype="float32",
        block_size=PAGE_SIZE,
        num_gpu_blocks_override=64,
        kv_cache_memory_bytes=1 << 28,
        max_model_len=512,
        enforce_eager=True,
        enable_lora=True,
        max_loras=2,
        max_lora_rank=RANK,
        **rkv_engine_args(budget=BUDGET, buffer=BUFFER),
    )
    a, b = (LoRARequest(folder.name, number, str(folder)) for number, folder in enumerate(adapters, 1))
    prompt = {"prompt_token_ids": list(range(100, 100 + LENGTH))}
    sampling = SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True, detokenize=False)
    # One at a time: in a batch of several adapters, vLLM's CPU engine computes some of them as the base.
    outputs = [
        llm.generate(prompt, sampling, lora_request=adapter)[0] for adapter in (None, a, b, None, a, b)
    ]
    return [(list(output.outputs[0].token_ids), output.kv_transfer_params["rkv"]) for output in outputs]


def test_adapters_and_compactions_do_not_mix(model: Path, tmp_path: Path) -> None:
    """The base and two adapters, compacted after one and the same prompt: three different answers, each the
    same again when asked again with what the prefix cache has by then."""
    adapters = [save_adapter(tmp_path / name, model, seed) for seed, name in enumerate("ab")]
    processes = get_context("forkserver")
    processes.set_forkserver_preload(list(IMPORTED_ONCE))
    with patch.dict(os.environ, ENVIRONMENT), ProcessPoolExecutor(1, mp_context=processes) as process:
        found = process.submit(answers, model, adapters).result()
    texts = [tuple(tokens) for tokens, _ in found]
    assert len(set(texts[:3])) == 3
    assert texts[3:] == texts[:3]
    assert all(report["compactions"] >= 3 for _, report in found)
