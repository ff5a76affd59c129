"""A worker without a model: vLLM's bookkeeping of the V1 runner, rkv-vllm's own adapter, and symbols for KV.

Each step is run when it is scheduled, in the order in which a device would run it: this is what the stream
sees, however far ahead the scheduler is.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import CellType, FunctionType, SimpleNamespace
from typing import Any

import numpy as np
import torch
from request_model import (
    VOCABULARY,
    RequestModel,
    Window,
    attend,
    leaving_pages,
    sampled_token,
    stored,
    survivors,
    symbol_of,
)
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.outputs import EMPTY_MODEL_RUNNER_OUTPUT, DraftTokenIds, ModelRunnerOutput
from vllm.v1.worker.utils import AttentionGroup

from rkv_vllm.decisions.messages import Compaction, PageCompaction, PageReport, TokenCompaction
from rkv_vllm.execution.attention_groups import make_physical
from rkv_vllm.execution.compactor import GroupCompactors
from rkv_vllm.execution.cpu.compactor import CpuTables
from rkv_vllm.execution.cpu.group_table import CpuGroupTable
from rkv_vllm.execution.cpu.runner import CompactingCpuRunner
from rkv_vllm.execution.layer_groups import LayerGroup
from rkv_vllm.execution.stopwatch import CpuStopwatch
from rkv_vllm.settings.policy_table import RING_SIZE

#: In a slot, or at an index of a query ring, that nobody wrote.
UNWRITTEN = -1
#: No token: a draft that is rejected.
WRONG = -1


class Memory:
    """The pages of the pool, with what one layer of their owner's group has there, and the query ring."""

    def __init__(self, num_pages: int, page_size: int, num_query_rows: int) -> None:
        self.page_size = page_size
        self.slots = [UNWRITTEN] * (num_pages * page_size)
        self.queries = [UNWRITTEN] * (num_query_rows * RING_SIZE)

    def read(self, pages: list[int] | tuple[int, ...], length: int) -> list[int]:
        contents: list[int] = []
        for page in pages:
            contents += self.slots[page * self.page_size : (page + 1) * self.page_size]
        assert length <= len(contents), f"{length} tokens do not fit on pages {pages}"
        return contents[:length]

    def write(self, pages: tuple[int, ...], symbols: list[int]) -> None:
        for index, symbol in enumerate(symbols):
            self.slots[pages[index // self.page_size] * self.page_size + index % self.page_size] = symbol


class SymbolicQueryRing:
    """Stands for `QueryRing`: a token's query is its symbol."""

    def __init__(self, memory: Memory) -> None:
        self._memory = memory
        self._tokens: list[int] = []
        self._ring_indices: list[int] = []

    def begin_step(self, tokens: list[int], ring_indices: list[int]) -> None:
        assert len(set(ring_indices)) == len(ring_indices), "two queries at one index"
        self._tokens, self._ring_indices = tokens, ring_indices

    def capture(self, queries: list[int]) -> None:
        for token, index in zip(self._tokens, self._ring_indices, strict=True):
            self._memory.queries[index] = queries[token]
        self._tokens, self._ring_indices = [], []


class SymbolicCompactor:
    """Stands for the compactor of a group, and compares what it finds with the request's model.

    All groups keep the same slots; `is_last` has the model go on behind the round.
    """

    def __init__(
        self, memory: Memory, models: dict[str, RequestModel], group: LayerGroup, is_last: bool
    ) -> None:
        self._memory = memory
        self._models = models
        self._group = group
        self._is_last = is_last
        self._evicted: list[PageReport] = []

    def warm_up(self) -> None:
        """There is nothing to compile."""

    def run(self, rounds: list[Compaction], tables: CpuTables) -> None:
        """Newest first, to show that the order does not matter: a device runs them side by side."""
        self._check_apart([round_ for round_ in rounds if isinstance(round_, TokenCompaction)])
        for round_ in reversed(rounds):
            if isinstance(round_, TokenCompaction):
                self._move(round_)
                tables.replace_pages(round_.request_id, round_.target_pages[self._group.place])
            else:
                assert isinstance(round_, PageCompaction)
                self._evict(round_, tables)

    def take_evicted(self) -> list[PageReport]:
        evicted, self._evicted = self._evicted, []
        return evicted

    def _move(self, compaction: TokenCompaction) -> None:
        symbols, queries = self._find(compaction, compaction.source_pages[self._group.place])
        kept = survivors(symbols, queries, compaction.keep, compaction.protect)
        contents = [stored(symbols[slot], self._group.group_id) for slot in kept]
        self._memory.write(compaction.target_pages[self._group.place], contents)
        if self._is_last:
            self._models[compaction.request_id].compact()

    def _evict(self, compaction: PageCompaction, tables: CpuTables) -> None:
        pages = tables.pages_of(compaction.request_id)
        symbols, queries = self._find(compaction, tuple(pages))
        size, model = self._memory.page_size, self._models[compaction.request_id]
        protected = -(-compaction.protect // size)
        evicted = leaving_pages(symbols, queries, -(-compaction.keep // size), size, protected)
        model.compact()
        assert len(model.symbols) == compaction.keep
        model.awaited = compaction.eviction_id
        stay = [page for index, page in enumerate(pages) if index not in evicted]
        tables.replace_pages(compaction.request_id, stay)
        ids = tuple(pages[index] for index in evicted)
        self._evicted.append(PageReport(compaction.request_id, compaction.eviction_id, ids))

    def _find(self, round_: Compaction, pages: tuple[int, ...]) -> tuple[list[int], list[int] | None]:
        """Contents and queries of the request, which are what its model has."""
        model = self._models[round_.request_id]
        who = f"{round_.request_id} at logical length {model.logical}"
        assert round_.logical_length == model.logical, f"{who}: {round_}"
        assert model.settings is not None and round_.policy == model.settings.policy
        symbols = list(model.symbols)
        expected = [stored(symbol, self._group.group_id) for symbol in symbols]
        assert self._memory.read(pages, round_.length) == expected, f"{who}: its pages hold something else"
        return symbols, self._queries(round_, model, who) if round_.num_queries else None

    @staticmethod
    def _check_apart(compactions: list[TokenCompaction]) -> None:
        apart = [
            (one.request_id, place, set(one.source_pages[place]), set(one.target_pages[place]))
            for one in compactions
            for place in range(len(one.source_pages))
        ]
        for name, place, _, targets in apart:
            for other, other_place, other_sources, other_targets in apart:
                if (name, place) != (other, other_place):
                    both = targets & (other_sources | other_targets)
                    assert not both, f"{name} writes pages {both} of {other} in group {place}"

    def _queries(self, round_: Compaction, model: RequestModel, who: str) -> list[int]:
        """The newest queries, oldest first, found where position modulo `RING_SIZE` says."""
        assert round_.query_row >= 0, f"{who}: no query row"
        newest = range(model.logical - round_.num_queries, model.logical)
        queries = [self._memory.queries[round_.query_row * RING_SIZE + p % RING_SIZE] for p in newest]
        expected = model.newest_queries()
        assert queries == expected, f"{who}: the query row does not hold its newest queries"
        return queries


class BlockTable:
    """vLLM's block table of a group in lists."""

    def __init__(self, page_size: int) -> None:
        self._page_size = page_size
        self.rows: list[list[int]] = []
        self.slot_mapping: list[int] = []

    def add_row(self, block_ids: list[int], row_idx: int) -> None:
        self.rows[row_idx] = list(block_ids)

    def append_row(self, block_ids: list[int], row_idx: int) -> None:
        self.rows[row_idx] += block_ids

    def compute_slot_mapping(
        self, num_reqs: int, query_start_loc: torch.Tensor, positions: torch.Tensor
    ) -> None:
        starts, where = query_start_loc.tolist(), positions.tolist()
        self.slot_mapping = []
        for row in range(num_reqs):
            for position in where[starts[row] : starts[row + 1]]:
                page, offset = divmod(position, self._page_size)
                # Before it is made physical, a position may lie behind the request's pages.
                pages = self.rows[row]
                self.slot_mapping.append(
                    pages[page] * self._page_size + offset if page < len(pages) else UNWRITTEN
                )


class BlockTables:
    """Those of all groups: rows follow the batch, as they do in `MultiGroupBlockTable`."""

    def __init__(self, page_size: int, groups: int) -> None:
        self.tables = [BlockTable(page_size) for _ in range(groups)]

    def __getitem__(self, group: int) -> BlockTable:
        return self.tables[group]

    def append_row(self, block_ids: tuple[list[int], ...], row_idx: int) -> None:
        for table, ids in zip(self.tables, block_ids, strict=True):
            table.append_row(ids, row_idx)

    def push_row(self, block_ids: tuple[list[int], ...]) -> None:
        """Behind all others."""
        for table, ids in zip(self.tables, block_ids, strict=True):
            table.rows.append(list(ids))

    def close_gap(self, row_idx: int) -> None:
        """Moves the last row where a request has left, unless it is its own."""
        for table in self.tables:
            last = table.rows.pop()
            if row_idx < len(table.rows):
                table.rows[row_idx] = last

    def compute_slot_mapping(
        self, num_reqs: int, query_start_loc: torch.Tensor, positions: torch.Tensor
    ) -> None:
        for table in self.tables:
            table.compute_slot_mapping(num_reqs, query_start_loc, positions)


@dataclass
class RequestState:
    """`tokens` are those that the worker knows: the ones it was sent, and the ones it sampled since."""

    tokens: list[int]
    block_ids: tuple[list[int], ...]
    num_computed_tokens: int
    drafts: list[int] = field(default_factory=list)
    generator: None = None  # no request has a seed


class Drafter:
    """Guesses what a request will say, each token right with some chance."""

    def __init__(self, count: int, luck: float, seed: int) -> None:
        self._count = count
        self._luck = luck
        self._chance = random.Random(seed)

    def guess(self, model: RequestModel, sampled: int, *, as_many_as_can_be: bool) -> list[int]:
        """What follows the token that was sampled last, as long as no round comes between."""
        count = self._count if as_many_as_can_be else self._chance.randint(0, self._count)
        drafts: list[int] = []
        attended, token = model.attended, sampled
        for position in range(model.logical, model.logical + count):
            attended = attend(attended, symbol_of(token, position, attended))
            token = sampled_token(attended)
            if self._chance.random() > self._luck:
                token = self._chance.randrange(VOCABULARY)
            drafts.append(token)
        return drafts


class HostRunner:
    """What vLLM's V1 runner does about requests, rows and lengths, and in which order."""

    def __init__(self, page_size: int, groups: int, runs_ahead: bool, drafter: Drafter | None) -> None:
        self._runs_ahead = runs_ahead
        self._drafter = drafter
        self.requests: dict[str, RequestState] = {}
        self.attn_groups = [
            [AttentionGroup(None, [], None, group, metadata_builders=[Handing()])] for group in range(groups)
        ]
        self.input_batch = SimpleNamespace(
            req_ids=[],
            req_id_to_index={},
            num_computed_tokens_cpu=[],
            block_table=BlockTables(page_size, groups),
        )

    def _update_states(self, scheduler_output: SchedulerOutput) -> None:
        for request_id in scheduler_output.finished_req_ids:
            self.requests.pop(request_id, None)
        assert not scheduler_output.kv_cache_block_copies and not scheduler_output.new_block_ids_to_zero
        cached = scheduler_output.scheduled_cached_reqs
        staying = scheduler_output.num_scheduled_tokens.keys() - cached.resumed_req_ids
        staying -= {new.req_id for new in scheduler_output.scheduled_new_reqs}
        self._keep_in_batch(staying)

        to_add: list[str] = []
        for new in scheduler_output.scheduled_new_reqs:
            assert new.prompt_token_ids is not None
            # Under the V2 runner a resumed request comes back as a new one.
            tokens = new.prefill_token_ids or new.prompt_token_ids
            self.requests[new.req_id] = RequestState(list(tokens), new.block_ids, new.num_computed_tokens)
            to_add.append(new.req_id)
        for index, request_id in enumerate(cached.req_ids):
            state = self.requests[request_id]
            told = cached.num_computed_tokens[index]
            if self._runs_ahead and self._drafter and request_id not in cached.resumed_req_ids:
                # The scheduler takes the drafts in flight for right; how many were is known here alone.
                assert told >= state.num_computed_tokens
            else:
                state.num_computed_tokens = told
            new_block_ids = cached.new_block_ids[index]
            row = self.input_batch.req_id_to_index.get(request_id)
            if request_id in cached.resumed_req_ids:
                assert row is None and new_block_ids is not None
                state.block_ids = new_block_ids
                state.drafts = []
                if self._runs_ahead or request_id in cached.all_token_ids:
                    state.tokens = list(cached.all_token_ids[request_id])
            elif new_block_ids is not None:
                for block_ids, new_ids in zip(state.block_ids, new_block_ids, strict=True):
                    block_ids.extend(new_ids)
            if row is None:
                to_add.append(request_id)
            elif new_block_ids is not None:
                self.input_batch.block_table.append_row(new_block_ids, row)
        for request_id in to_add:
            self._add_to_batch(request_id)

    def _keep_in_batch(self, staying: set[str]) -> None:
        """Removes all others and moves rows of the end into the gaps."""
        batch = self.input_batch
        row = 0
        while row < len(batch.req_ids):
            if batch.req_ids[row] in staying:
                row += 1
                continue
            last_id = batch.req_ids.pop()
            if row < len(batch.req_ids):
                batch.req_ids[row] = last_id
            batch.block_table.close_gap(row)
        batch.req_id_to_index = {request_id: row for row, request_id in enumerate(batch.req_ids)}

    def _add_to_batch(self, request_id: str) -> None:
        batch = self.input_batch
        batch.req_id_to_index[request_id] = len(batch.req_ids)
        batch.req_ids.append(request_id)
        batch.block_table.push_row(self.requests[request_id].block_ids)

    def _prepare_inputs(self, scheduler_output: SchedulerOutput, num_scheduled_tokens: np.ndarray) -> None:
        states = [self.requests[request_id] for request_id in self.input_batch.req_ids]
        counts = num_scheduled_tokens.tolist()
        self.input_batch.num_computed_tokens_cpu = [state.num_computed_tokens for state in states]
        starts = np.concatenate(([0], num_scheduled_tokens.cumsum())).astype(np.int32)
        self.query_start_loc = SimpleNamespace(np=starts, gpu=torch.from_numpy(starts))
        self.seq_lens = torch.tensor(
            [state.num_computed_tokens + n for state, n in zip(states, counts, strict=True)],
            dtype=torch.int32,
        )
        self.optimistic_seq_lens_cpu = self.seq_lens.clone()
        self.positions = torch.tensor(
            [
                state.num_computed_tokens + i
                for state, n in zip(states, counts, strict=True)
                for i in range(n)
            ],
            dtype=torch.int64,
        )
        self.input_batch.block_table.compute_slot_mapping(
            len(states), self.query_start_loc.gpu, self.positions
        )


class Handing:
    """Stands for vLLM's metadata builders: hands on what they are given."""

    def build(self, common_prefix_len: int, common: CommonAttentionMetadata) -> CommonAttentionMetadata:
        return common


def over(host: type, adapter: type) -> type:
    """The adapter's methods on top of another class: what `super()` finds hangs on their `__class__` cell."""
    cell = CellType()
    methods: dict[str, Any] = {}
    for name, member in vars(adapter).items():
        if isinstance(member, FunctionType):
            closure = member.__closure__ and tuple(
                cell if variable == "__class__" else old
                for variable, old in zip(member.__code__.co_freevars, member.__closure__, strict=True)
            )
            methods[name] = FunctionType(
                member.__code__, member.__globals__, name, member.__defaults__, closure
            )
    cell.cell_contents = type(adapter.__name__, (host,), methods)
    return cell.cell_contents


class SymbolicRunner(over(HostRunner, CompactingCpuRunner)):  # type: ignore[misc]
    """rkv-vllm's adapter, as it stands, over `HostRunner`."""

    def __init__(
        self,
        memory: Memory,
        models: dict[str, RequestModel],
        runs_ahead: bool,
        drafter: Drafter | None = None,
        groups: Sequence[Window | None] = (None,),
    ) -> None:
        """`groups`: of layers; None: they are compacted."""
        HostRunner.__init__(self, memory.page_size, len(groups), runs_ahead, drafter)
        self._evicted = {}
        self._evicted_of_batch = None
        self._memory = memory
        self._models = models
        self._windows = {group: window for group, window in enumerate(groups) if window is not None}
        compacted = [group for group, window in enumerate(groups) if window is None]
        self._groups = [LayerGroup(group, place, (place,)) for place, group in enumerate(compacted)]
        for group in compacted:
            make_physical(self.attn_groups[group], self._physical)
        self._query_ring: Any = SymbolicQueryRing(memory)
        compactors: list[Any] = [
            (
                SymbolicCompactor(memory, models, group, is_last=group is self._groups[-1]),
                CpuGroupTable(self.requests, self.input_batch, group.group_id),
            )
            for group in self._groups
        ]
        self._compactors = GroupCompactors(compactors, CpuStopwatch())

    def execute(self, scheduler_output: SchedulerOutput) -> ModelRunnerOutput:
        self._update_states(scheduler_output)
        for new in scheduler_output.scheduled_new_reqs:
            self._start_model(new.req_id)
        for request_id in scheduler_output.scheduled_cached_reqs.resumed_req_ids:
            self._start_model(request_id)
        request_ids = self.input_batch.req_ids
        if not request_ids:
            return self._report(EMPTY_MODEL_RUNNER_OUTPUT)
        counts = [scheduler_output.num_scheduled_tokens[request_id] for request_id in request_ids]
        self._prepare_inputs(scheduler_output, np.array(counts, dtype=np.int32))
        return self._report(
            ModelRunnerOutput(
                req_ids=list(request_ids),
                req_id_to_index=dict(self.input_batch.req_id_to_index),
                sampled_token_ids=self._forward(counts, scheduler_output.scheduled_spec_decode_tokens),
            )
        )

    def _start_model(self, request_id: str) -> None:
        state = self.requests[request_id]
        self._models[request_id].start(state.tokens[: state.num_computed_tokens])

    def _forward(self, counts: list[int], drafts: dict[str, list[int]]) -> list[list[int]]:
        """Writes each scheduled token at its slot, then reads every slot of every request."""
        request_ids, starts = self.input_batch.req_ids, self.query_start_loc.np.tolist()
        positions, tables = self.positions.tolist(), self.input_batch.block_table.tables
        queries: list[int] = []
        sampled: list[list[int]] = []
        for row, request_id in enumerate(request_ids):
            new, tokens = self._compute(request_id, counts[row], drafts.get(request_id, []))
            assert (
                len(new) == counts[row]
                and positions[starts[row]] == self.input_batch.num_computed_tokens_cpu[row]
            )
            for group, table in enumerate(tables):
                slots = table.slot_mapping[starts[row] : starts[row + 1]]
                for symbol, slot in zip(new, slots, strict=True):
                    assert slot != UNWRITTEN, f"{request_id}: a token lies behind its pages"
                    self._memory.slots[slot] = stored(symbol, group)
            queries += new
            sampled.append(tokens)
        self._query_ring.capture(queries)

        lengths = [self._attended_lengths(group) for group in range(len(tables))]
        for row, request_id in enumerate(request_ids):
            state = self.requests[request_id]
            for group, table in enumerate(tables):
                assert state.block_ids[group] == table.rows[row], f"{request_id}: batch and state disagree"
            rejected = max(len(drafts.get(request_id, [])) + 1 - len(sampled[row]), 0) if sampled[row] else 0
            for compacted in self._groups:
                group = compacted.group_id
                self._read(request_id, group, tables[group].rows[row], lengths[group][row] - rejected)
            for group, window in self._windows.items():
                length = lengths[group][row]
                self._look_through(request_id, group, window, tables[group].rows[row], length, counts[row])
        return sampled

    def _read(self, request_id: str, group: int, pages: list[int], length: int) -> None:
        """Reads every slot of a request in a compacted group."""
        expected = [stored(symbol, group) for symbol in self._models[request_id].symbols]
        found = self._memory.read(pages, length)
        wrong = [slot for slot, pair in enumerate(zip(found, expected, strict=False)) if pair[0] != pair[1]]
        assert found == expected, (
            f"{request_id}: wrong KV at slots {wrong} of group {group}; {len(found)} slots, "
            f"{len(expected)} expected"
        )

    def _look_through(
        self, request_id: str, group: int, window: Window, pages: list[int], length: int, count: int
    ) -> None:
        """Reads what each of the newest `count` tokens sees through its window, by positions in the text."""
        text = self._models[request_id].text
        assert length == len(text), f"{request_id}: a window group reads {length} tokens of {len(text)}"
        first = window.first(length - count)
        size = self._memory.page_size
        for position in range(first, length):
            found = self._memory.slots[pages[position // size] * size + position % size]
            assert found == stored(text[position], group), (
                f"{request_id}: wrong KV at position {position} of window group {group}, from {first} on"
            )

    def _attended_lengths(self, group: int) -> list[int]:
        """How many slots of each request a group reads, by the metadata that vLLM builds of its batch."""
        logical = CommonAttentionMetadata(
            query_start_loc=self.query_start_loc.gpu,
            query_start_loc_cpu=self.query_start_loc.gpu,
            seq_lens=self.seq_lens,
            num_reqs=len(self.seq_lens),
            num_actual_tokens=len(self.positions),
            max_query_len=0,
            max_seq_len=int(self.optimistic_seq_lens_cpu.max()),
            block_table_tensor=self.positions,
            slot_mapping=self.positions,
            seq_lens_cpu_upper_bound=self.optimistic_seq_lens_cpu,
        )
        [attention] = self.attn_groups[group]
        metadata = attention.build_metadata(logical)
        lengths: list[int] = metadata.seq_lens.tolist()
        assert lengths == metadata.seq_lens_cpu_upper_bound.tolist() and metadata.max_seq_len == max(lengths)
        return lengths

    def _compute(self, request_id: str, count: int, drafts: list[int]) -> tuple[list[int], list[int]]:
        """Symbols of the request's next tokens, rejected drafts included, and the tokens that it says."""
        state, model = self.requests[request_id], self._models[request_id]
        first = state.num_computed_tokens
        assert first == model.logical, f"{request_id} is at {model.logical}, the scheduler at {first}"
        if self._runs_ahead:  # the scheduler does not know them
            drafts = (state.drafts + [WRONG] * len(drafts))[: len(drafts)]
        known = state.tokens[first : first + count - len(drafts)]
        assert len(known) == count - len(drafts)
        model.compute(known)
        new = model.symbols[len(model.symbols) - len(known) :]
        sampled: list[int] = []
        if model.logical == len(state.tokens):  # no prefill chunk
            sampled.append(sampled_token(model.attended))
        assert sampled or not drafts, f"{request_id}: drafts before all of its tokens are computed"
        for draft in drafts:
            if draft != sampled[-1]:
                break
            model.compute([draft])
            new.append(model.symbols[-1])
            sampled.append(sampled_token(model.attended))
        attended = model.attended
        for draft in drafts[len(sampled) - 1 :] if drafts else ():
            new.append(symbol_of(draft, first + len(new), attended))
            attended = attend(attended, new[-1])
        state.tokens += sampled
        state.num_computed_tokens = model.logical
        if sampled and self._drafter:
            state.drafts = self._drafter.guess(model, sampled[-1], as_many_as_can_be=self._runs_ahead)
        return new, sampled

    def take_draft_token_ids(self) -> DraftTokenIds:
        """As vLLM's runner after a step: of the requests that were in it."""
        request_ids = list(self.input_batch.req_ids)
        return DraftTokenIds(request_ids, [list(self.requests[each].drafts) for each in request_ids])
