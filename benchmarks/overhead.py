"""What R-KV costs where memory is not short: tokens per second against stock vLLM, alternately on one GPU.

    python benchmarks/overhead.py --model shapes/r1-distill-llama-8b --out overhead.json

The model folder needs no weights, only its dimensions: weights are random, prompts are token ids, and every
request runs to its full length. Both engines are up at the same time, each with its share of the memory, and
take turns; the table gives medians.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from vllm import LLM, SamplingParams

from rkv_vllm import rkv_engine_args
from rkv_vllm.provenance import command_line, versions


def engine(model: str, share: float, **extra: Any) -> LLM:
    return LLM(
        model=model,
        load_format="dummy",
        skip_tokenizer_init=True,
        max_model_len=8192,
        gpu_memory_utilization=share,
        **extra,
    )


def tokens_per_second(llm: LLM, args: argparse.Namespace, budget: int | None, seed: int) -> float:
    rng = random.Random(seed)
    asked = [
        {"prompt_token_ids": [rng.randrange(1000, 30000) for _ in range(args.input)]}
        for _ in range(args.requests)
    ]
    extra_args = None if budget is None else {"rkv_budget": budget}
    params = SamplingParams(
        temperature=0, max_tokens=args.output, ignore_eos=True, detokenize=False, extra_args=extra_args
    )
    started = time.monotonic()
    outputs = llm.generate(asked, params, use_tqdm=False)
    return sum(len(output.outputs[0].token_ids) for output in outputs) / (time.monotonic() - started)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--input", type=int, default=128)
    parser.add_argument("--output", type=int, default=2048)
    parser.add_argument("--budget", type=int, default=1024)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--share", type=float, default=0.45, help="of the GPU's memory, for each engine")
    args = parser.parse_args()

    stock = engine(args.model, args.share)
    ours = engine(args.model, args.share, **rkv_engine_args())
    runs = {"stock": (stock, None), "off": (ours, 0), "rkv": (ours, args.budget)}
    for llm, budget in runs.values():  # warm-up
        tokens_per_second(llm, argparse.Namespace(**{**vars(args), "output": 64}), budget, seed=0)
    speeds: dict[str, list[float]] = {name: [] for name in runs}
    for repetition in range(args.repetitions):
        for name, (llm, budget) in runs.items():
            speeds[name].append(round(tokens_per_second(llm, args, budget, seed=repetition), 1))
            print(name, speeds[name][-1], flush=True)
        medians = {name: statistics.median(values) for name, values in speeds.items()}
        result = {
            "command": command_line("python", "benchmarks/overhead.py"),
            "gpu": torch.cuda.get_device_name(),
            "versions": versions(),
            "tokens_per_second": speeds,
            "median": medians,
            "ratio_to_stock": {name: round(value / medians["stock"], 4) for name, value in medians.items()},
        }
        args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result["ratio_to_stock"]))


if __name__ == "__main__":
    main()
