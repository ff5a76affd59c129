"""Runs a workload through a real compacting scheduler and the symbolic worker; checks both at each step."""

from __future__ import annotations

import pickle
import random
from collections import Counter, deque
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import torch
from request_model import STOP_TOKEN, VOCABULARY, RequestModel, Window, stored, unshortened
from symbolic_worker import Drafter, Memory, SymbolicRunner
from vllm.config import VllmConfig
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.utils.math_utils import cdiv
from vllm.v1.core.kv_cache_utils import get_block_hash, get_group_id, get_request_block_hasher
from vllm.v1.core.sched.interface import PauseState
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.kv_cache_interface import ChunkedLocalAttentionSpec, KVCacheSpec, SlidingWindowSpec
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus

from rkv_vllm.bench import modelless
from rkv_vllm.decisions.auto_lengths import AutoLengths
from rkv_vllm.decisions.messages import (
    REFUSAL_KEY,
    RESULT_KEY,
    CompactionResult,
    TokenCompaction,
    plan_of,
    reports_of,
    take_tally,
)
from rkv_vllm.decisions.query_rows import num_query_rows
from rkv_vllm.observability.tally import read
from rkv_vllm.scheduling import scheduler as scheduler_module
from rkv_vllm.scheduling.scheduler import CompactingAsyncScheduler, CompactingScheduler
from rkv_vllm.settings.config import CompactionSettings, RkvConfig
from rkv_vllm.settings.request_size import RequestSize
from rkv_vllm.settings.requested import RequestedSettings

MAX_MODEL_LEN = 1024


@dataclass(frozen=True)
class Arrival:
    """A request, and what its client does. `extra_args` are as over the API."""

    request_id: str
    prompt: tuple[int, ...]
    max_tokens: int
    extra_args: dict[str, Any] | None = None
    at_step: int = 0
    abort_after_tokens: int | None = None
    abort_at_step: int | None = None
    priority: int = 0
    stops_early: bool = True

    def settings(self, config: RkvConfig) -> CompactionSettings | None:
        longest = min(len(self.prompt) + self.max_tokens, MAX_MODEL_LEN)
        size = RequestSize(prompt=len(self.prompt), longest=longest)
        return config.resolve(RequestedSettings.from_extra_args(self.extra_args), size)

    def peak_slots(self, setup: Setup) -> int:
        """Slots that it needs at once when it is alone."""
        settings = self.settings(setup.config)
        if settings is None:
            return len(self.prompt) + self.max_tokens
        page_size = setup.evicted_page_size
        most = RequestModel(len(self.prompt), settings, page_size).max_slots_by_page
        if most is None:
            most = max(len(self.prompt), settings.threshold)
            if settings.auto and settings.auto.switch_at:
                most = max(most, len(self.prompt) + self.max_tokens)  # it may not come down all the way
        return min(most, len(self.prompt) + self.max_tokens)


@dataclass(frozen=True)
class Setup:
    """An engine. `depth` is the number of steps in flight: 1 for the sync scheduler.

    Without `keeps_room` requests are admitted as in stock vLLM, so that more of them are preempted.
    `query_rows` are as many as on a server of `max_num_seqs` where it is None. `restless` is an operator who
    pauses the engine now and then, and a data-parallel neighbour that asks for steps without prefill. With
    `drafts` a step verifies up to so many a request, each right with a chance of `luck`. `groups` are those
    of the model's layers; None: they are compacted. With `dense_retention` the prefix cache keeps all pages
    of windows.
    """

    num_pages: int
    page_size: int = 16
    depth: int = 1
    max_num_seqs: int = 8
    max_num_batched_tokens: int = 128
    prefix_caching: bool = True
    priorities: bool = False
    keeps_room: bool = True
    query_rows: int | None = None
    watermark: float = 0.0
    long_prefill_token_threshold: int = 0
    restless: bool = False
    v2_runner: bool = False
    drafts: int = 0
    luck: float = 0.7
    groups: tuple[Window | None, ...] = (None,)
    dense_retention: bool = False
    config: RkvConfig = field(default_factory=RkvConfig)
    reset_at_steps: frozenset[int] = frozenset()
    seed: int = 0

    @property
    def num_query_rows(self) -> int:
        return self.query_rows or num_query_rows(self.max_num_seqs)

    @property
    def window(self) -> Window | None:
        """All groups that are not compacted have the same one."""
        return next((window for window in self.groups if window is not None), None)

    def specs(self) -> list[KVCacheSpec | None]:
        """The groups as vLLM knows them."""
        return [None if window is None else self._spec(window) for window in self.groups]

    def _spec(self, window: Window) -> SlidingWindowSpec | ChunkedLocalAttentionSpec:
        common: dict[str, Any] = {
            "block_size": self.page_size,
            "num_kv_heads": 1,
            "head_size": 8,
            "dtype": torch.float32,
        }
        if window.chunked:
            return ChunkedLocalAttentionSpec(attention_chunk_size=window.size, **common)
        return SlidingWindowSpec(sliding_window=window.size, **common)

    def pages_of_windows(self, length: int) -> int:
        """Pages that vLLM wants for a request of that length in groups that are not compacted."""
        in_flight = self.depth * self.max_num_batched_tokens
        return sum(
            min(
                cdiv(length, self.page_size),
                self._spec(window).max_admission_blocks_per_request(in_flight, MAX_MODEL_LEN),
            )
            for window in self.groups
            if window is not None
        )

    @property
    def num_compacted(self) -> int:
        return self.groups.count(None)

    @property
    def evicted_page_size(self) -> int | None:
        """Tokens that leave together; None where each leaves by itself."""
        return self.page_size if self.config.granularity == "page" else None


@dataclass
class Outcome:
    """What came of a workload; `points` are the logical lengths at which each request was compacted."""

    tokens: dict[str, list[int]]
    points: dict[str, list[int]]
    counts: Counter[str]


def make_scheduler(setup: Setup) -> CompactingScheduler | CompactingAsyncScheduler:
    with (
        patch.object(scheduler_module, "num_query_rows", lambda max_num_seqs: setup.num_query_rows),
        patch.object(VllmConfig, "max_concurrent_batches", setup.depth),
    ):
        scheduler = modelless.make_scheduler(
            setup.config.model_dump(exclude_unset=True),
            num_blocks=setup.num_pages,
            page_size=setup.page_size,
            max_num_seqs=setup.max_num_seqs,
            max_num_batched_tokens=setup.max_num_batched_tokens,
            max_model_len=MAX_MODEL_LEN,
            asynchronous=setup.depth > 1,
            vocabulary=VOCABULARY,
            prefix_caching=setup.prefix_caching,
            policy="priority" if setup.priorities else "fcfs",
            v2_runner=setup.v2_runner,
            num_drafts=setup.drafts,
            groups=setup.specs(),
            dense_retention=setup.dense_retention,
            watermark=setup.watermark,
            long_prefill_token_threshold=setup.long_prefill_token_threshold,
        )
    if not setup.keeps_room:
        scheduler._admission.set_watermark = lambda *args, **kwargs: None  # type: ignore[method-assign]
    return scheduler


class Engine:
    """vLLM's engine core in small: a scheduler, up to `depth` steps in flight, and clients."""

    def __init__(self, setup: Setup, arrivals: list[Arrival]) -> None:
        self.setup = setup
        self.scheduler = make_scheduler(setup)
        self.models = {
            arrival.request_id: RequestModel(
                len(arrival.prompt), arrival.settings(setup.config), setup.evicted_page_size, setup.window
            )
            for arrival in arrivals
        }
        self.arrivals = {arrival.request_id: arrival for arrival in arrivals}
        self.memory = Memory(setup.num_pages, setup.page_size, setup.num_query_rows)
        drafter = Drafter(setup.drafts, setup.luck, setup.seed) if setup.drafts else None
        self.runner = SymbolicRunner(
            self.memory, self.models, runs_ahead=setup.depth > 1, drafter=drafter, groups=setup.groups
        )
        self._due: list[str] = []
        self._known_to_be_due: list[str] = []
        self._watch_preemptions()
        self._watch_orders()
        self.requests: dict[str, Request] = {}
        self.tokens: dict[str, list[int]] = {arrival.request_id: [] for arrival in arrivals}
        self.results: dict[str, CompactionResult] = {}
        self.refused: set[str] = set()
        self.peak_pages: Counter[str] = Counter()
        self.counts: Counter[str] = Counter()
        self.shown: dict[
            str, float
        ] = {}  # what a server would show, by metric, summed over labels but outcome
        self._gauges: dict[tuple[str, ...], float] = {}
        self._replayed_until: dict[str, int] = {}
        self._random = random.Random(setup.seed)
        self._operator = random.Random(setup.seed + 1)
        self._step = 0
        self._paused_until = 0
        self._in_flight: deque[tuple[SchedulerOutput, ModelRunnerOutput]] = deque()

    def _watch_preemptions(self) -> None:
        """A request may be given a page and preempted in one step, which nobody sees afterwards."""
        preempt = self.scheduler._preempt_request

        def watched(request: Request, *args: Any, **kwargs: Any) -> None:
            name = request.request_id
            held = self.scheduler._groups.num_pages(name)
            self.peak_pages[name] = max(self.peak_pages[name], held)
            computed = request.num_computed_tokens
            self._replayed_until[name] = max(computed, self._replayed_until.get(name, 0))
            preempt(request, *args, **kwargs)

        self.scheduler._preempt_request = watched  # type: ignore[method-assign]

    # -- the loop ------------------------------------------------------------------------------------------

    def run(self, most_steps: int = 20_000) -> Outcome:
        """To the end of all requests.

        Raises: AssertionError where anything is not as it should be, at the step in which it shows.
        """
        to_come = deque(sorted(self.arrivals.values(), key=lambda arrival: arrival.at_step))
        while to_come or self.scheduler.has_requests() or self._in_flight or self._paused_until:
            assert self._step < most_steps, "the engine does not come to an end"
            while to_come and to_come[0].at_step <= self._step:
                self._add(to_come.popleft())
            self._clients_and_operator()
            self._one_step()
            self._step += 1
        self._check_end()
        return Outcome(
            tokens=self.tokens,
            points={request_id: self._settled_points(request_id) for request_id in self.models},
            counts=self.counts,
        )

    def _add(self, arrival: Arrival) -> None:
        request = Request(
            request_id=arrival.request_id,
            prompt_token_ids=list(arrival.prompt),
            sampling_params=SamplingParams(
                max_tokens=arrival.max_tokens,
                stop_token_ids=[STOP_TOKEN] if arrival.stops_early else [],
                extra_args=arrival.extra_args,
            ),
            pooling_params=None,
            arrival_time=float(len(self.requests)),
            priority=arrival.priority,
            block_hasher=get_request_block_hasher(self.setup.page_size, sha256),
        )
        self.requests[arrival.request_id] = request
        self.scheduler.add_request(request)

    def _clients_and_operator(self) -> None:
        if self._paused_until and self._paused_until <= self._step:
            self.scheduler.set_pause_state(PauseState.UNPAUSED)
            self._paused_until = 0
        elif self.setup.restless and not self._paused_until and self._operator.random() < 0.03:
            state = self._operator.choice((PauseState.PAUSED_ALL, PauseState.PAUSED_NEW))
            self.scheduler.set_pause_state(state)
            self._paused_until = self._step + self._operator.randrange(1, 6)
            self.counts["pauses"] += 1
        for request_id in [r for r in self.requests if self.arrivals[r].abort_at_step == self._step]:
            self._abort(request_id)
        if self._step in self.setup.reset_at_steps:
            self.scheduler.reset_prefix_cache(reset_running_requests=self._random.random() < 0.7)
            self.counts["resets"] += 1
            self.check_pages()

    def _abort(self, request_id: str) -> None:
        self.counts["aborts"] += len(
            self.scheduler.finish_requests(request_id, RequestStatus.FINISHED_ABORTED)
        )

    def _one_step(self) -> None:
        """As `EngineCore.step_with_batch_queue`: fill the queue first, then wait for its oldest."""
        if self.scheduler.has_requests():
            output = self.schedule()
            self._in_flight.append((output, self.runner.execute(output)))
            scheduled = output.total_num_scheduled_tokens > 0
            if len(self._in_flight) < self.setup.depth and (scheduled or self.scheduler.has_requests()):
                return
        if self._in_flight:
            self._update(*self._in_flight.popleft())

    def schedule(self) -> SchedulerOutput:
        output = self.scheduler.schedule(self.setup.restless and self._operator.random() < 0.3)
        due = self._due
        self._hear_orders()
        plan = plan_of(output)
        preempted = output.preempted_req_ids or set()
        planned = {round_.request_id for round_ in plan.rounds}
        by_token = [round_ for round_ in plan.rounds if isinstance(round_, TokenCompaction)]
        assert len(by_token) == (0 if self.setup.evicted_page_size else len(plan.rounds))
        assert set(self._known_to_be_due) - preempted <= planned <= set(due) - preempted, (
            f"{due} were due, {planned} are planned, {preempted} preempted"
        )
        self.counts["rounds that wait for drafts"] += len(set(due) - preempted - planned)
        self.counts["drafts"] += sum(map(len, output.scheduled_spec_decode_tokens.values()))
        self.counts["schedules"] += 1
        self.counts["preemptions"] += len(preempted)
        self.counts["compactions"] += len(plan.rounds)
        self.counts["evicted tokens"] += sum(round_.length - round_.keep for round_ in plan.rounds)
        self.counts["dropped compactions"] += len(set(due) & preempted)
        for compaction in by_token:
            for sources, targets in zip(compaction.source_pages, compaction.target_pages, strict=True):
                heads = zip(sources, targets, strict=False)
                self.counts["copied pages"] += sum(source != target for source, target in heads)
        for request_id in self._replayed_until.keys() & output.num_scheduled_tokens.keys():
            end, until = self.requests[request_id].num_computed_tokens, self._replayed_until[request_id]
            first = end - output.num_scheduled_tokens[request_id]
            self.counts["replayed tokens"] += max(min(end, until) - first, 0)
            if end >= until:
                del self._replayed_until[request_id]
        self.check_pages()
        if self._step % 16 == 0:  # as it travels to a worker in another process
            output = pickle.loads(pickle.dumps(output))
        return output

    def _watch_orders(self) -> None:
        """Who is due is known once requests with budget "auto" have their orders, before anything else."""
        order_switches = self.scheduler._planner.order_switches

        def watched(orders: Any) -> None:
            order_switches(orders)
            self._hear_orders()
            due = [each for each in self.scheduler.running if self._is_due(each)]
            self._due = [each.request_id for each in due]
            self._known_to_be_due = [each.request_id for each in due if self._is_known(each)]

        self.scheduler._planner.order_switches = watched  # type: ignore[method-assign]

    def _hear_orders(self) -> None:
        """Tells the models where requests with budget "auto" were ordered to switch, the one thing that does
        not follow from their counts; that it can be carried out is for the worker to find out."""
        for request_id, tracked in self.scheduler._tracked.items():
            model, lengths = self.models[request_id], tracked.lengths
            # One that is carried out in this step is none any more for the scheduler.
            if isinstance(lengths, AutoLengths) and lengths._done == model.switched:
                model.ordered = lengths._order

    def _is_due(self, request: Request) -> bool:
        """Whether the definition says that the request is compacted in the coming step."""
        model = self.models[request.request_id]
        due_now = model.due is not None and request.num_computed_tokens >= model.due
        due_now &= model.due == model.logical or not self.setup.drafts  # drafts may turn out to be wrong
        due_now &= not self._is_complete(request)
        self.counts["compactions that wait"] += due_now and model.awaited is not None
        return due_now and model.awaited is None

    def _is_known(self, request: Request) -> bool:
        """Whether the scheduler can know how many of its tokens are computed, rejected drafts left out."""
        in_flight = any(request.request_id in output.num_scheduled_tokens for output, _ in self._in_flight)
        past_known = request.num_computed_tokens > len(request.all_token_ids)
        return not (self.setup.drafts and in_flight and past_known)

    def _is_complete(self, request: Request) -> bool:
        """Whether the last token that it may have was computed, though it may not be known yet."""
        to_come = sum(
            len(answer.sampled_token_ids[answer.req_id_to_index[request.request_id]])
            for _, answer in self._in_flight
            if request.request_id in answer.req_id_to_index
        )
        arrival = self.arrivals[request.request_id]
        most = min(len(arrival.prompt) + arrival.max_tokens, MAX_MODEL_LEN)
        return len(request.all_token_ids) + to_come >= most

    def _update(self, output: SchedulerOutput, model_output: ModelRunnerOutput) -> None:
        for report in reports_of(model_output):
            model = self.models[report.request_id]
            held = report.request_id in self._manager.req_to_blocks and model.awaited == report.eviction_id
            self.counts["late reports"] += not held
            if model.awaited == report.eviction_id:
                model.awaited = None
        for client in self.scheduler.update_from_output(output, model_output).values():
            if client.scheduler_stats is not None:
                self._read_tally(take_tally(client.scheduler_stats))
            for answer in client.outputs:
                request_id = answer.request_id
                self.tokens[request_id] += answer.new_token_ids
                if answer.finish_reason is not None:
                    assert answer.kv_transfer_params is not None
                    self.results[request_id] = answer.kv_transfer_params[RESULT_KEY]
                    if REFUSAL_KEY in answer.kv_transfer_params:
                        self.refused.add(request_id)
                elif self._has_enough(request_id):
                    self._abort(request_id)
        if self.setup.drafts and self.setup.depth == 1:
            self.scheduler.update_draft_token_ids(self.runner.take_draft_token_ids())
        self.check_pages()

    def _has_enough(self, request_id: str) -> bool:
        limit = self.arrivals[request_id].abort_after_tokens
        return limit is not None and len(self.tokens[request_id]) >= limit

    def _read_tally(self, tally: dict[str, int]) -> None:
        for reading in read(tally):
            name = reading.metric.name
            if reading.metric.kind == "gauge":
                self._gauges[name, *reading.labels] = reading.value
            else:
                name += f" {reading.labels[1]}" if "outcome" in reading.metric.labels else ""
                amount = reading.value if reading.metric.kind == "counter" else 1.0
                self.shown[name] = self.shown.get(name, 0.0) + amount * reading.times

    # -- checks --------------------------------------------------------------------------------------------

    def check_pages(self) -> None:
        """Every page is in exactly one place, and counted by exactly its owners."""
        self.scheduler.check_integrity()
        pool = self.scheduler.kv_cache_manager.block_pool
        owners: Counter[int] = Counter()
        held: dict[str, list[int]] = {}
        for manager in self._managers:
            for request_id, pages in manager.req_to_blocks.items():
                held.setdefault(request_id, []).extend(page.block_id for page in pages if not page.is_null)
        for request_id, ids in held.items():
            assert len(set(ids)) == len(ids), f"{request_id} holds a page twice"
            owners.update(ids)
            compacted = self.scheduler._groups.num_pages(request_id)
            self.peak_pages[request_id] = max(self.peak_pages[request_id], compacted)
            most = self.models[request_id].max_slots_by_page
            assert most is None or compacted <= cdiv(most, self.setup.page_size), "too many pages are leaving"
        free = [page.block_id for page in pool.free_block_queue.get_all_free_blocks()]
        assert len(set(free)) == len(free) == pool.get_num_free_blocks(), "a page is free twice"
        assert not owners.keys() & set(free), "a page is free and owned"
        null = pool.null_block.block_id
        assert owners.keys() | set(free) | {null} == set(range(self.setup.num_pages)), "a page is lost"
        for page in pool.blocks:
            if not page.is_null:
                assert page.ref_cnt == owners[page.block_id], (
                    f"page {page.block_id} has {page.ref_cnt} references"
                )

    @property
    def _managers(self) -> Any:
        return self.scheduler.kv_cache_manager.coordinator.single_type_managers

    @property
    def _manager(self) -> Any:
        """That of the first group that is compacted."""
        return self.scheduler._groups._compacted[0]

    def check_cached_pages(self) -> None:
        """Every page that the prefix cache offers holds what its hash promises."""
        size = self.setup.page_size
        promised: dict[bytes, list[int]] = {}
        for request in self.requests.values():
            symbols = unshortened(request.all_token_ids, self.setup.window)
            for index, block_hash in enumerate(request.block_hashes):
                promised[block_hash] = symbols[index * size : (index + 1) * size]
        for page in self.scheduler.kv_cache_manager.block_pool.blocks:
            if page.block_hash is not None:
                found, group = self.memory.read([page.block_id], size), get_group_id(page.block_hash)
                expected = [stored(symbol, group) for symbol in promised[get_block_hash(page.block_hash)]]
                assert found == expected, f"a cached page of group {group} is not what its hash says"
                self.counts["cached pages checked"] += 1

    def _settled_points(self, request_id: str) -> list[int]:
        """Without those in steps that were scheduled before it was known that the request had ended."""
        arrival = self.arrivals[request_id]
        last = len(arrival.prompt) + len(self.tokens[request_id]) - 2
        return [point for point in self.models[request_id].reached() if point <= last]

    def _check_end(self) -> None:
        self.check_pages()
        self.check_cached_pages()
        pool = self.scheduler.kv_cache_manager.block_pool
        assert pool.get_num_free_blocks() == self.setup.num_pages - 1, "the pool is not whole again"
        assert not self.scheduler.requests and not self.scheduler._tracked
        assert not any(each._evicted or each._max_slots for each in self.scheduler._groups._compacted)
        rows = self.scheduler._query_rows
        assert len(rows._free) == rows.num_rows, "a query row was not given back"
        for model in self.models.values():
            self.counts["replayed compactions"] += sum(len(life) for life in model.lives[1:])
        for request_id, result in self.results.items():
            self._check_result(request_id, result)
        self._check_metrics()

    def _check_metrics(self) -> None:
        """What a server would show is what was seen from outside, and nothing is left over."""
        for name, count in {
            "rkv_compactions_total executed": "compactions",
            "rkv_evicted_tokens_total": "evicted tokens",
            "rkv_copied_pages_total": "copied pages",
            "rkv_replayed_tokens_total": "replayed tokens",
        }.items():
            assert self.shown.get(name, 0) == self.counts[count], f"{name} is not the number of {count}"
        assert self.shown.get("rkv_compactions_total cancelled", 0) <= self.counts["dropped compactions"]
        assert self.shown["rkv_requests_total"] == len(self.requests)
        budgets = sum(model.settings is not None for model in self.models.values())
        assert self.shown.get("rkv_request_kept_ratio", 0) == budgets
        autos = [r for r in self.results.values() if r["budget"] == "auto" and "full_cache_tokens" in r]
        assert self.shown.get("rkv_auto_switches_total", 0) >= len(autos)
        left = {key: value for key, value in self._gauges.items() if value and key[0] != "rkv_pool_pages"}
        assert not left, f"{left} when all requests are gone"

    def _check_result(self, request_id: str, result: CompactionResult) -> None:
        if request_id in self.refused:
            assert result["peak_pages"] == result["compactions"] == 0 and not self.tokens[request_id]
            return
        model = self.models[request_id]
        points = model.reached()
        settings = model.settings
        if settings and settings.auto:
            assert (result["budget"], result["min_budget"]) == ("auto", settings.budget)
            assert result.get("full_cache_tokens") == (points[0] if points else None)
            assert [switch.at for switch in model.switches] == points[: len(model.switches)]
            assert result.get("switches", []) == list(map(str, model.switches))
            self.counts["switches"] += bool(points)
            self.counts["full caches kept"] += not points
        else:
            assert result["budget"] == (settings.budget if settings else None)
        assert result["protect"] == ((settings.protect or None) if settings else None)
        assert result["compactions"] == len(points)
        assert result["evicted_tokens"] == model.most_evicted
        if settings and points and self.setup.evicted_page_size is None and not settings.auto:
            assert model.most_evicted == points[-1] - settings.budget
        assert (result["reason"] is None) == (result["compactions"] > 0)
        length = len(self.arrivals[request_id].prompt) + len(self.tokens[request_id]) - 1
        others = self.scheduler._groups.others.peak_pages(len(self.arrivals[request_id].prompt), length + 1)
        without = cdiv(length, self.setup.page_size) * self.setup.num_compacted + others
        peak = self.peak_pages[request_id] + others
        assert result["peak_pages"] == (without if settings is None else peak)
        assert result["pages_without_compaction"] == max(without, result["peak_pages"])
