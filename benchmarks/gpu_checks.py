"""What must hold in a real engine on a GPU: measured by one command, one JSON object a check.

    python benchmarks/gpu_checks.py --model PATH --out checks.json
    python benchmarks/gpu_checks.py --model PATH --out checks.json \
        --checks tensor_parallel,pipeline_parallel,data_parallel    # on two GPUs
    VLLM_ALLOW_INSECURE_SERIALIZATION=1 python benchmarks/gpu_checks.py --model PATH --out checks.json \
        --checks kv_head_copies                                     # which sends a function to the workers
    python benchmarks/gpu_checks.py --model PATH --out checks.json \
        --kv-cache-dtype fp8                                        # stock vLLM's and ours alike

PATH is the checkpoint of the derivation reasoner. Each engine runs in vLLM's
production configuration: Model Runner V2, async scheduling, FULL and PIECEWISE CUDA graphs, prefix caching.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest import mock

import prometheus_client
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from vllm import LLM, AsyncEngineArgs, RequestOutput, SamplingParams
from vllm.v1.engine.async_llm import AsyncLLM

from rkv_vllm import rkv_engine_args
from rkv_vllm.evaluation.tasks.derivation import decode, make_derivation
from rkv_vllm.evaluation.thinking import after_thinking
from rkv_vllm.provenance import command_line

NUM_PAGES_SMALL = 2400  # of 16 tokens: four full caches of the checks' requests, and 33 of budget 768

ENGINE_ARGS: dict[str, Any] = {
    "max_model_len": 2304,
    "max_num_seqs": 128,
    "kv_cache_memory_bytes": 4 * 2**30,
    "gpu_memory_utilization": 0.1,  # only what has to be free at start; checks may run side by side
}


def engine(model: str, *, rkv: bool = True, **overrides: Any) -> LLM:
    extension = rkv_engine_args() if rkv else {}
    return LLM(model=model, disable_log_stats=False, **(ENGINE_ARGS | extension | overrides))


def prompts(count: int, seed: int) -> list[dict[str, Any]]:
    rng = random.Random(seed)
    return [{"prompt_token_ids": make_derivation(rng, 24, 6).prompt_ids} for _ in range(count)]


def greedy(max_tokens: int, budget: int | None = None, policy: str = "rkv") -> SamplingParams:
    extra_args = None if budget is None else {"rkv_budget": budget, "rkv_policy": policy}
    return SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True, extra_args=extra_args)


def tokens(outputs: list[RequestOutput]) -> list[list[int]]:
    return [list(output.outputs[0].token_ids) for output in outputs]


def metric(llm: LLM, name: str) -> float:
    return sum(m.value for m in llm.get_metrics() if m.name == name)  # type: ignore[union-attr]


def agreement(left: list[list[int]], right: list[list[int]]) -> dict[str, int]:
    """Requests that agree to the last token, and tokens before the first difference of each."""
    same = sum(a == b for a, b in zip(left, right, strict=True))
    prefix = 0
    for a, b in zip(left, right, strict=True):
        prefix += next((i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), len(a))
    return {
        "requests": len(left),
        "same": same,
        "tokens": sum(map(len, left)),
        "tokens_before_difference": prefix,
    }


def full_caches_kept(llm: LLM, asked: list[dict[str, Any]]) -> dict[str, int]:
    """A budget above the length against the full cache, in one engine."""
    off = tokens(llm.generate(asked, greedy(1000, 0), use_tqdm=False))
    above = tokens(llm.generate(asked, greedy(1000, 4096), use_tqdm=False))
    return agreement(off, above)


def percent_right(llm: LLM) -> float:
    """Right answers of 96 derivations at budget 768, beside four full caches that grow."""
    rng = random.Random(3)
    problems = [make_derivation(rng, 24, 6) for _ in range(96)]
    asked = [{"prompt_token_ids": problem.prompt_ids} for problem in problems]
    params = SamplingParams(temperature=0, max_tokens=2048, extra_args={"rkv_budget": 768})
    growing = prompts(4, seed=4)
    both = [greedy(2048, 0)] * len(growing) + [params] * len(asked)
    outputs = llm.generate(growing + asked, both, use_tqdm=False)[len(growing) :]
    answers = [after_thinking(decode(output.outputs[0].token_ids), opened=True) for output in outputs]
    right = [p.is_right(answer or "") for p, answer in zip(problems, answers, strict=True)]
    return round(100 * sum(right) / len(right), 1)


def check_identity(model: str) -> dict[str, Any]:
    """Budget above the length: the same tokens as stock vLLM, 32 requests of 1,000 tokens."""
    asked = prompts(32, seed=1)
    stock = engine(model, rkv=False)
    expected = tokens(stock.generate(asked, greedy(1000), use_tqdm=False))
    again = tokens(stock.generate(asked, greedy(1000), use_tqdm=False))
    del stock
    ours = engine(model)
    return {
        "stock_against_itself": agreement(expected, again),
        "budget_above_length": agreement(
            expected, tokens(ours.generate(asked, greedy(1000, 4096), use_tqdm=False))
        ),
        "off": agreement(expected, tokens(ours.generate(asked, greedy(1000, 0), use_tqdm=False))),
    }


def check_graphs(model: str) -> dict[str, Any]:
    """FULL graphs replay what the same kernels do without graphs, in batches of odd, padded sizes.

    The largest is padded to whichever graph is fastest (`rkv_vllm/execution/gpu/graph_choice.py`).

    Batch-invariant: otherwise vLLM lets FlashAttention choose other splits outside a graph than inside. In
    this process: otherwise how fast requests reach the engine decides which of them share their first steps,
    and a step with prompts takes other kernels than one without.
    """
    by_mode = {}
    with mock.patch.dict(os.environ, VLLM_BATCH_INVARIANT="1", VLLM_ENABLE_V1_MULTIPROCESSING="0"):
        for mode in ("FULL_AND_PIECEWISE", "NONE"):
            llm = engine(model, max_num_seqs=512, compilation_config={"cudagraph_mode": mode})
            by_mode[mode] = [
                tokens(llm.generate(prompts(size, seed=size), greedy(600, 256), use_tqdm=False))
                for size in (1, 3, 13, 37, 401)
            ]
            del llm
    return {
        str(len(graph)): agreement(graph, eager)
        for graph, eager in zip(by_mode["FULL_AND_PIECEWISE"], by_mode["NONE"], strict=True)
    }


def check_preemption(model: str) -> dict[str, Any]:
    """Preempted, compacted and resumed requests sample on, and are as often right as in a large pool.

    Requests with full caches run beside them, whose growth nobody keeps room for.
    """
    large = engine(model)
    in_large_pool = percent_right(large)
    del large
    small = engine(model, num_gpu_blocks_override=NUM_PAGES_SMALL)
    return {
        "percent_right_in_large_pool": in_large_pool,
        "percent_right_in_small_pool": percent_right(small),
        "preemptions": metric(small, "vllm:num_preemptions"),
        "pool_in_use_at_end": metric(small, "vllm:kv_cache_usage_perc"),
    }


def mixed_load(llm: LLM, count: int) -> dict[str, Any]:
    """Requests of mixed budgets and policies on 40 shared prompts, every fifth aborted while they run."""
    rng = random.Random(4)
    shared = prompts(40, seed=4)
    started, finished, aborted = time.monotonic(), 0, 0
    core = llm.llm_engine
    to_abort = []
    for index in range(count):
        params = greedy(
            rng.randrange(100, 900),
            rng.choice([0, 128, 256, 512]),
            rng.choice(["rkv", "rkv", "snapkv", "keydiff", "recency", "random"]),
        )
        core.add_request(str(index), rng.choice(shared), params)
        if index % 5 == 0:
            to_abort.append(str(index))
    steps = 0
    while core.has_unfinished_requests():
        finished += sum(output.finished for output in core.step())
        steps += 1
        if to_abort and steps % 3 == 0:
            core.abort_request([to_abort.pop()])
            aborted += 1
    return {
        "finished": finished,
        "aborts_sent": aborted,
        "preemptions": metric(llm, "vllm:num_preemptions"),
        "prefix_cache_hits": metric(llm, "vllm:prefix_cache_hits"),
        "pool_in_use_at_end": metric(llm, "vllm:kv_cache_usage_perc"),
        "seconds": round(time.monotonic() - started, 1),
    }


def check_mixed_load(model: str) -> dict[str, Any]:
    """1,000 requests of mixed budgets and policies on shared prompts, every fifth aborted."""
    return mixed_load(engine(model, num_gpu_blocks_override=4 * NUM_PAGES_SMALL), 1000)


def check_pages(model: str) -> dict[str, Any]:
    """Page granularity: full cache where nothing leaves, and a pool that is whole after a mixed load."""
    pool = {"num_gpu_blocks_override": 4 * NUM_PAGES_SMALL}
    llm, asked = engine(model, **pool, **rkv_engine_args(granularity="page")), prompts(32, seed=1)
    kept = full_caches_kept(llm, asked)
    results = [output.kv_transfer_params for output in llm.generate(asked, greedy(1000, 256), use_tqdm=False)]
    return {
        "budget_above_length": kept,
        "at_budget_256": [results[0], results[-1]],
        "mixed_load": mixed_load(llm, 400),
    }


def check_tensor_parallel(model: str) -> dict[str, Any]:
    """Two GPUs, each with half of every layer's KV heads."""
    return _on_ranks(engine(model, tensor_parallel_size=2))


def check_kv_head_copies(model: str) -> dict[str, Any]:
    """Two GPUs with copies of the one KV head of a random model: they have to keep the same tokens.

    Keys and values are equal on both, so that after rounds whose scores look at each rank's own query heads
    the caches are equal too, page by page, where the ranks have decided alike.
    """
    with tempfile.TemporaryDirectory() as folder:
        config = AutoConfig.from_pretrained(model, num_key_value_heads=1)
        AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(folder)
        llm = engine(folder, tensor_parallel_size=2, skip_tokenizer_init=True)
        outputs = llm.generate(prompts(64, seed=2), greedy(600, 256), use_tqdm=False)
        digests = llm.collective_rpc(page_sums)
    compactions = sum(output.kv_transfer_params["rkv"]["compactions"] for output in outputs)
    return {"compactions": compactions, "pages": len(digests[0]), "caches_equal": digests[0] == digests[1]}


def page_sums(worker: Any) -> list[int]:
    """On a worker: the sum of each page's bits, layer by layer."""
    layers = worker.model_runner._rkv_layers
    pages = [layer.kv_cache.reshape(layer.kv_cache.shape[0], -1).view(torch.int16) for layer in layers]
    return [int(number) for each in pages for number in each.sum(dim=1, dtype=torch.int64).tolist()]


def check_pipeline_parallel(model: str) -> dict[str, Any]:
    """Two GPUs, each with half of the layers."""
    return _on_ranks(engine(model, pipeline_parallel_size=2))


def _on_ranks(llm: LLM) -> dict[str, Any]:
    """Full caches where nothing leaves, answers from compacted ones, and a pool that is whole at the end."""
    return {
        "budget_above_length": full_caches_kept(llm, prompts(32, seed=1)),
        "percent_right": percent_right(llm),
        "mixed_load": mixed_load(llm, 400),
    }


def check_metrics(model: str) -> dict[str, Any]:
    """What a server shows on /metrics of 64 requests at budget 256: counts, and GPU time by events."""
    return _served(model)


def check_data_parallel(model: str) -> dict[str, Any]:
    """The same from two engines, one a GPU, behind one front end."""
    return _served(model, data_parallel_size=2)


def _served(model: str, **overrides: Any) -> dict[str, Any]:
    arguments = AsyncEngineArgs(model=model, **ENGINE_ARGS, **rkv_engine_args(budget=256), **overrides)

    async def serve() -> None:
        llm = AsyncLLM.from_engine_args(arguments)

        async def answer(index: int, prompt: dict[str, Any]) -> None:
            async for _ in llm.generate(prompt, greedy(1000), str(index)):
                pass

        await asyncio.gather(*(answer(*each) for each in enumerate(prompts(64, seed=6))))
        llm.shutdown()

    asyncio.run(serve())
    return {
        f"{sample.name} engine {sample.labels['engine']}"
        + (f" le {sample.labels['le']}" if "le" in sample.labels else ""): sample.value
        for family in prometheus_client.REGISTRY.collect()
        for sample in family.samples
        if sample.name.startswith("rkv_")
        and sample.value
        and not sample.name.endswith("_created")
        and (not sample.name.endswith("_bucket") or "duration" in sample.name)
    }


CHECKS = {
    "identity": check_identity,
    "graphs": check_graphs,
    "preemption": check_preemption,
    "mixed_load": check_mixed_load,
    "pages": check_pages,
    "metrics": check_metrics,
}
CHECKS_OF_TWO_GPUS = {
    "tensor_parallel": check_tensor_parallel,
    "pipeline_parallel": check_pipeline_parallel,
    "data_parallel": check_data_parallel,
    "kv_head_copies": check_kv_head_copies,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--kv-cache-dtype", default="auto", help="of every engine; default: the model's")
    checks = CHECKS | CHECKS_OF_TWO_GPUS
    parser.add_argument("--checks", default=",".join(CHECKS), help=f"some of {', '.join(checks)}")
    args = parser.parse_args()
    ENGINE_ARGS["kv_cache_dtype"] = args.kv_cache_dtype
    results: dict[str, Any] = {"command": command_line("python", "benchmarks/gpu_checks.py")}
    for name in args.checks.split(","):
        started = time.monotonic()
        results[name] = checks[name](args.model)
        results[name]["check_seconds"] = round(time.monotonic() - started, 1)
        print(name, json.dumps(results[name]), flush=True)
        args.out.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
