"""Accuracy of a reasoning model on the derivation task, by policy and budget, in one vLLM engine.

    python benchmarks/reasoner.py --model PATH --problems 64 --settings full,rkv:512,rkv:768,snapkv:768

Greedy, at most 2,048 tokens; an answer that never came counts as wrong. Works on the CPU build and on GPUs.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import derivation
from vllm import LLM, SamplingParams

from rkv_vllm import rkv_engine_args

MAX_TOKENS = 2048


def sampling_params(setting: str) -> SamplingParams:
    """`full`, or `policy:budget`, as greedy sampling parameters."""
    policy, _, budget = setting.partition(":")
    extra_args: dict[str, Any] = {"rkv_budget": 0}
    if policy != "full":
        extra_args = {"rkv_budget": int(budget), "rkv_policy": policy}
    return SamplingParams(
        temperature=0, max_tokens=MAX_TOKENS, skip_special_tokens=False, extra_args=extra_args
    )


def measure(llm: LLM, problems: list[dict[str, str]], setting: str) -> dict[str, Any]:
    """One row of the table."""
    started = time.monotonic()
    prompts = [{"prompt_token_ids": derivation.prompt_ids(problem)} for problem in problems]
    outputs = llm.generate(prompts, sampling_params(setting), use_tqdm=False)
    answers = [derivation.parse_answer(derivation.decode(o.outputs[0].token_ids)) for o in outputs]
    right = sum(answer == problem["answer"] for answer, problem in zip(answers, problems, strict=True))
    share, count = right / len(problems), len(problems)
    results = [output.kv_transfer_params["rkv"] for output in outputs]
    return {
        "setting": setting,
        "accuracy_percent": round(100 * share, 1),
        "standard_error_percent": round(100 * math.sqrt(share * (1 - share) / count), 1),
        "truncated": sum(answer is None for answer in answers),
        "mean_tokens": round(sum(len(o.outputs[0].token_ids) for o in outputs) / count),
        "mean_compactions": round(sum(result["compactions"] for result in results) / count, 1),
        "mean_evicted_tokens": round(sum(result["evicted_tokens"] for result in results) / count),
        "peak_pages": max(result["peak_pages"] for result in results),
        "seconds": round(time.monotonic() - started, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="folder of the checkpoint")
    parser.add_argument("--problems", type=int, default=64)
    parser.add_argument("--seed", type=int, default=2026)
    parser.add_argument("--settings", default="full,rkv:512,rkv:768,snapkv:768")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--out", type=Path, help="also write the rows as JSON")
    args = parser.parse_args()

    rng = random.Random(args.seed)
    problems = [derivation.make_problem(rng, n_vars=24, passes=6) for _ in range(args.problems)]
    llm = LLM(
        model=args.model,
        dtype=args.dtype,
        max_model_len=2304,
        max_num_seqs=min(args.problems, 256),
        kv_cache_memory_bytes=2 * 2**30,
        **rkv_engine_args(),
    )
    rows = []
    for setting in args.settings.split(","):
        rows.append(measure(llm, problems, setting))
        print(json.dumps(rows[-1]), flush=True)
    if args.out:
        args.out.write_text(
            json.dumps({"command": " ".join(sys.argv), "seed": args.seed, "rows": rows}, indent=1)
        )


if __name__ == "__main__":
    main()
