"""A vLLM engine in a process of its own, driven step by step, and what a test gets to see of it.

vLLM's CPU worker changes its process for good (thread count, memory binding, torch's functions), which is why
no engine runs in the test's own process. Each engine computes with one thread: two engines of a test may then
run side by side, and a machine shared with others does not slow down both by spinning.

vLLM takes ten seconds to import: a fork server does it once for all engines of a test run, none of which
computes anything there.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

if TYPE_CHECKING:
    import torch

    from rkv_vllm.kernels.rotary_pairs import RotaryPairs

#: Of all engines, from before vLLM is imported.
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "TORCH_COMPILE_DISABLE": "1",  # vLLM compiles a helper of its sampler, in three seconds an engine
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
}
IMPORTED_ONCE = ("vllm.entrypoints.llm", "vllm.v1.engine.llm_engine", "vllm.v1.worker.cpu_worker")
PAGE_SIZE = 32
#: Far beyond every test's lengths: R-KV is in place, and nothing is ever due.
ABOVE_ANY_LENGTH = 4096


#: Name of its spec, layers, tokens a page, KV heads, head size.
Group = tuple[str, int, int, int, int]


@dataclass(frozen=True)
class Settings:
    """Settings of an engine.

    `rkv`: with R-KV's classes, or stock; `pages`: of the pool, the null page included; `ranks`: workers that
    share each layer (tensor parallelism); `beyond_pool`: budget and buffer of a server that lets
    max_model_len exceed the pool; `dummy_weights`: of a folder that holds a configuration alone;
    `cache_dtype`: vLLM's name of what the cache holds; `drafts`: tokens that n-gram speculation drafts for a
    request and step; `skip_tokenizer`: of a checkpoint that has none; `dense_retention`: the prefix cache
    keeps all pages of windows too; `max_model_len`, `step_tokens`: limits of requests and steps.
    """

    rkv: bool = True
    granularity: str = "token"
    scope: str = "head"
    order: str = "temporal"
    scheduler: str | None = None
    pages: int = 512
    ranks: int = 1
    multiprocess: bool = False
    beyond_pool: tuple[int, int] | None = None
    dummy_weights: bool = False
    cache_dtype: str = "auto"
    drafts: int = 0
    skip_tokenizer: bool = False
    dense_retention: bool = False
    max_model_len: int = 2304
    step_tokens: int = 512


@dataclass(frozen=True)
class Ask:
    """A request.

    `extra` is `SamplingParams.extra_args`; `arrives_at`: steps of the run before it comes; `abort_after`:
    tokens after which the client leaves; `seed`: of sampling at temperature 1, greedy without one; `n`:
    answers, of which the first is kept, and the steps do not tell them apart.
    """

    prompt: Sequence[int]
    max_tokens: int
    extra: Mapping[str, Any] = field(default_factory=dict)
    arrives_at: int = 0
    abort_after: int | None = None
    seed: int | None = None
    n: int = 1


@dataclass
class Answer:
    """What came back for an `Ask`; `error`: of validation, which a server answers with HTTP 400."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish_reason: str | None = None
    error: str | None = None
    cached_tokens: int | None = None
    result: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Step:
    """What the scheduler decided in one step; requests are named by their place in the run's asks.

    Attributes:
        compacted: tokens before the compaction, by request.
        preempted: requests that lost all their pages.
        pages: pages held after the step was scheduled, in all KV cache groups, by running request.
        computed: logical length after the step, by running request.
    """

    compacted: Mapping[int, int]
    preempted: frozenset[int]
    pages: Mapping[int, int]
    computed: Mapping[int, int]


@dataclass(frozen=True)
class Run:
    """Answers in the order of the asks, and every step (none is seen of an engine in several processes)."""

    answers: list[Answer]
    steps: list[Step]

    def preemptions(self) -> int:
        return sum(len(step.preempted) for step in self.steps)

    def compactions(self, ask: int) -> int:
        return sum(ask in step.compacted for step in self.steps)

    def most_pages(self) -> int:
        """Pages in use at the same time, at most."""
        return max(sum(step.pages.values()) for step in self.steps)


class Engine:
    """The test's end: a handle on the process in which the engine lives."""

    def __init__(self, model: Path, settings: Settings) -> None:
        self.settings = settings
        processes = get_context("forkserver")
        processes.set_forkserver_preload(list(IMPORTED_ONCE))
        self._process = ProcessPoolExecutor(
            max_workers=1,
            mp_context=processes,
            initializer=_start,
            initargs=(model, settings),
        )
        with patch.dict(os.environ, ENVIRONMENT):
            self._process.submit(os.getpid)  # starts the process now, so that engines start side by side

    def submit(self, asks: Sequence[Ask], *, keep_prefix_cache: bool = False) -> Future[Run]:
        return self._process.submit(_run, list(asks), keep_prefix_cache)

    def run(self, asks: Sequence[Ask], *, keep_prefix_cache: bool = False) -> Run:
        """Runs all asks, from an empty prefix cache unless told to keep it, until none is left.

        Raises: AssertionError where, after any step, a page is lost, held twice or not where its request's
        length says, or where at the end a page has not come back to the pool.
        """
        return self.submit(asks, keep_prefix_cache=keep_prefix_cache).result()

    def rotary_pairs(self) -> RotaryPairs:
        """How the loaded model pairs a head's dimensions, as its worker sees it."""
        return self._process.submit(_rotary_pairs).result()

    def first_layer_keys(self, length: int) -> torch.Tensor:
        """[KV heads, length, head size]: of the newest request, in the first compacted layer."""
        return self._process.submit(_first_layer_keys, length).result()

    def planned_and_made_groups(self) -> tuple[list[Group], list[Group]]:
        """KV cache groups that a config lets expect, and those that vLLM has made of the loaded model."""
        return self._process.submit(_planned_and_made_groups).result()

    def close(self) -> None:
        self._process.submit(_stop)
        self._process.shutdown()


# -- in the engine's process ---------------------------------------------------------------------------------

_host: _Host


def _start(model: Path, settings: Settings) -> None:
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = str(int(settings.multiprocess))
    global _host
    _host = _Host(model, settings)


def _run(asks: list[Ask], keep_prefix_cache: bool) -> Run:
    return _host.run(asks, keep_prefix_cache)


def _rotary_pairs() -> RotaryPairs:
    return _host.rotary_pairs()


def _first_layer_keys(length: int) -> torch.Tensor:
    return _host.first_layer_keys(length)


def _planned_and_made_groups() -> tuple[list[Group], list[Group]]:
    return _host.planned_and_made_groups()


def _stop() -> None:
    _host.stop()


class _Host:
    def __init__(self, model: Path, settings: Settings) -> None:
        from vllm import LLM

        from rkv_vllm import rkv_engine_args

        max_model_len = settings.max_model_len
        defaults: dict[str, Any] = {}
        if settings.beyond_pool is not None:
            budget, buffer = settings.beyond_pool
            defaults = {"budget": budget, "buffer": buffer, "beyond_pool": True}
        else:
            max_model_len = min(max_model_len, (settings.pages - 1) * PAGE_SIZE)
        defaults |= {
            "granularity": settings.granularity,
            "scope": settings.scope,
            "order": settings.order,
        }
        rkv: dict[str, Any] = rkv_engine_args(**defaults) if settings.rkv else {}
        if settings.scheduler is not None:
            rkv["scheduler_cls"] = settings.scheduler
        model_files: dict[str, Any] = {}
        if settings.dummy_weights:
            model_files = {"load_format": "dummy"}
        speculation = {"method": "ngram", "num_speculative_tokens": settings.drafts, "prompt_lookup_max": 2}
        engine = LLM(
            model=str(model),
            dtype="float32",
            block_size=PAGE_SIZE,
            kv_cache_dtype=settings.cache_dtype,
            num_gpu_blocks_override=settings.pages,
            kv_cache_memory_bytes=1 << 30,
            max_model_len=max_model_len,
            tensor_parallel_size=settings.ranks,
            max_num_seqs=64,
            max_num_batched_tokens=settings.step_tokens,
            enforce_eager=True,
            prefix_cache_retention_interval=None if settings.dense_retention else 0,
            speculative_config=speculation if settings.drafts else None,
            skip_tokenizer_init=settings.skip_tokenizer or settings.dummy_weights,
            **model_files,
            **rkv,
        ).llm_engine
        self._engine = engine
        self._names: dict[str, int] = {}
        self._preemptions: dict[str, int] = {}
        self._steps: list[Step] = []
        self._newcomer_pages: tuple[list[int], ...] = ()  # by KV cache group
        self._scheduler: Any = None
        if not settings.multiprocess:
            self._scheduler = engine.engine_core.engine_core.scheduler
            self._watch_scheduler()

    def run(self, asks: list[Ask], keep_prefix_cache: bool) -> Run:
        assert not self._engine.has_unfinished_requests(), "an earlier run failed half way"
        if not keep_prefix_cache:
            self._engine.reset_prefix_cache()
        self._names.clear()
        self._preemptions.clear()
        self._steps.clear()
        answers = [Answer() for _ in asks]
        coming = sorted(range(len(asks)), key=lambda index: asks[index].arrives_at)
        steps = 0
        while coming or self._engine.has_unfinished_requests():
            while coming and asks[coming[0]].arrives_at <= steps:
                index = coming.pop(0)
                self._add(index, asks[index], answers[index])
            steps += 1
            for output in self._engine.step():
                index = int(output.request_id)
                _note(output, answers[index])
                limit = asks[index].abort_after
                if limit is not None and not output.finished and len(answers[index].tokens) >= limit:
                    self._engine.abort_request([output.request_id])
                    answers[index].finish_reason = "abort"
        self._check_pool_is_full()
        self._engine.collective_rpc("execute_dummy_batch")  # as when data-parallel neighbours go on
        return Run(answers, list(self._steps))

    def rotary_pairs(self) -> RotaryPairs:
        (pairs,) = self._engine.collective_rpc(lambda worker: worker.model_runner._rotary_pairs)
        return pairs

    def first_layer_keys(self, length: int) -> torch.Tensor:
        import torch

        def read(worker: Any) -> torch.Tensor:
            [(compactor, _)] = worker.model_runner._compactors.compactors
            pages = torch.tensor(self._newcomer_pages[compactor.group.group_id])
            keys: torch.Tensor = compactor._caches[0].read(pages, length)[0]
            return keys.clone()

        (keys,) = self._engine.collective_rpc(read)
        return keys

    def planned_and_made_groups(self) -> tuple[list[Group], list[Group]]:
        from rkv_vllm.host.kv_cache_groups import planned_groups

        made = self._scheduler.kv_cache_manager.kv_cache_config.kv_cache_groups
        planned = planned_groups(self._engine.vllm_config, PAGE_SIZE)
        return ([_group(each) for each in planned], [_group(each) for each in made])

    def stop(self) -> None:
        # An engine core in a process of its own would keep this one from ending.
        self._engine.engine_core.shutdown()

    def _add(self, index: int, ask: Ask, answer: Answer) -> None:
        from vllm import SamplingParams
        from vllm.exceptions import VLLMValidationError

        params = SamplingParams(
            temperature=0.0 if ask.seed is None else 1.0,
            seed=ask.seed,
            n=ask.n,
            max_tokens=ask.max_tokens,
            ignore_eos=True,
            logprobs=0,  # of the chosen token alone
            detokenize=False,
            extra_args=dict(ask.extra),
        )
        try:
            name = self._engine.add_request(str(index), {"prompt_token_ids": list(ask.prompt)}, params)
        except VLLMValidationError as error:
            answer.error = str(error)
        else:
            names = [name] if ask.n == 1 else [f"{number}_{name}" for number in range(ask.n)]
            self._names |= dict.fromkeys(names, index)

    def _watch_scheduler(self) -> None:
        schedule = self._scheduler.schedule

        def watched(*args: Any, **kwargs: Any) -> Any:
            output = schedule(*args, **kwargs)
            for newcomer in output.scheduled_new_reqs:
                self._newcomer_pages = newcomer.block_ids
            self._check_integrity()
            self._steps.append(self._step(output))
            return output

        self._scheduler.schedule = watched

    def _step(self, output: Any) -> Step:
        from rkv_vllm.decisions.messages import plan_of

        running = {self._names[request.request_id]: request for request in self._scheduler.running}
        preempted = set()
        for name, request in self._scheduler.requests.items():
            if request.num_preemptions > self._preemptions.get(name, 0):
                preempted.add(self._names[name])
                self._preemptions[name] = request.num_preemptions
        return Step(
            compacted={self._names[round_.request_id]: round_.length for round_ in plan_of(output).rounds},
            preempted=frozenset(preempted),
            pages={index: self._num_pages(request.request_id) for index, request in running.items()},
            computed={index: request.num_computed_tokens for index, request in running.items()},
        )

    @property
    def _managers(self) -> Any:
        return self._scheduler.kv_cache_manager.coordinator.single_type_managers

    def _num_pages(self, request_id: str) -> int:
        return sum(
            not page.is_null for manager in self._managers for page in manager.req_to_blocks[request_id]
        )

    def _check_integrity(self) -> None:
        if hasattr(self._scheduler, "check_integrity"):
            self._scheduler.check_integrity()

    def _check_pool_is_full(self) -> None:
        if self._scheduler is None:
            # vLLM resets its prefix cache only when every page is back.
            assert self._engine.reset_prefix_cache(), "pages are still held"
            return
        self._check_integrity()
        pool = self._scheduler.kv_cache_manager.block_pool
        free, total = pool.get_num_free_blocks(), pool.num_gpu_blocks
        assert free == total - 1, f"{free} of {total} pages are free, and one is vLLM's null page"
        assert not any(pages for manager in self._managers for pages in manager.req_to_blocks.values())


def _group(made: Any) -> Group:
    spec = made.kv_cache_spec
    return (type(spec).__name__, len(made.layer_names), spec.block_size, spec.num_kv_heads, spec.head_size)


def _note(output: Any, answer: Answer) -> None:
    """Copies a request's output so far, whole each time."""
    completion = output.outputs[0]
    answer.tokens = list(completion.token_ids)
    positions = zip(answer.tokens, completion.logprobs, strict=True)
    answer.logprobs = [candidates[token].logprob for token, candidates in positions]
    answer.finish_reason = completion.finish_reason
    answer.cached_tokens = output.num_cached_tokens
    if output.finished and output.kv_transfer_params:
        answer.result = output.kv_transfer_params["rkv"]
