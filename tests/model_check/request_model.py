"""What a request's cache has to hold, worked out from its tokens alone: no pages, no scheduler, no others.

A token's KV is one number, its symbol: a hash of the token, its logical position and all that it attended
to. Two caches with equal symbols were therefore built from equal contents in equal order, and prefix sharing
is legal exactly where symbols agree. The next token is a hash of the same, so that a single wrong slot
anywhere changes what the request says from there on.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

from rkv_vllm.settings.config import WINDOW, CompactionSettings
from rkv_vllm.settings.policy_table import NUM_QUERIES
from rkv_vllm.settings.values import Switch

VOCABULARY = 97
#: Sampled like any other token, and ends a request that does not ignore it.
STOP_TOKEN = 0
#: The attention state of an empty cache.
NOTHING = 1


def symbol_of(token: int, position: int, attended: int) -> int:
    return hash((token, position, attended))


def attend(attended: int, symbol: int) -> int:
    """The attention state after one more slot."""
    return hash((attended, symbol))


def attend_all(symbols: Sequence[int]) -> int:
    attended = NOTHING
    for symbol in symbols:
        attended = attend(attended, symbol)
    return attended


def sampled_token(attended: int) -> int:
    return attended % VOCABULARY


def survivors(symbols: Sequence[int], queries: Sequence[int] | None, keep: int, protect: int) -> list[int]:
    """Slots that stay, ascending: the protected, candidates chosen by contents and queries, the window."""
    length = len(symbols)
    chooser = random.Random(hash((tuple(symbols), tuple(queries or ()))))
    chosen = sorted(chooser.sample(range(protect, length - WINDOW), keep - WINDOW - protect))
    return list(range(protect)) + chosen + list(range(length - WINDOW, length))


def kept_pages(settings: CompactionSettings, page_size: int) -> int:
    """Pages that stay in a round by page: as many as the budget fills, and at least those that have to."""
    most_of_the_window = next(n for n in range(1, 99) if (n - 1) * page_size >= WINDOW - 1)
    return max(-(-settings.budget // page_size), protected_pages(settings, page_size) + most_of_the_window)


def protected_pages(settings: CompactionSettings, page_size: int) -> int:
    """First pages that never leave: those with a protected token in them."""
    return len({token // page_size for token in range(settings.protect)})


def leaving_pages(
    symbols: Sequence[int], queries: Sequence[int] | None, keep: int, page_size: int, protected: int
) -> list[int]:
    """Indices of the pages that leave, so that `keep` stay: none protected, none that the window touches."""
    num_pages, candidates = -(-len(symbols) // page_size), (len(symbols) - WINDOW) // page_size
    chooser = random.Random(hash((tuple(symbols), tuple(queries or ()))))
    return sorted(chooser.sample(range(protected, candidates), num_pages - keep))


@dataclass(frozen=True)
class Window:
    """What layers see that are not compacted: the newest `size` tokens, or those of a chunk of `size`."""

    size: int
    chunked: bool = False

    def first(self, position: int) -> int:
        """The first position that a token sees; the last is its own."""
        return position // self.size * self.size if self.chunked else max(position - self.size + 1, 0)


def seen(attended: int, text: Sequence[int], window: Window | None) -> int:
    """What the next token attends to in all groups of layers.

    Args:
        attended: the attention state of compacted groups.
        text: symbols of all tokens before it, by position.
        window: of the other groups; None: there are none.
    """
    if window is None:
        return attended
    return hash((attended, tuple(text[window.first(len(text)) :])))


def stored(symbol: int, group: int) -> int:
    """What a token leaves in a group of layers: no group can take another one's for its own."""
    return hash((symbol, group)) if group else symbol


def unshortened(tokens: Sequence[int], window: Window | None = None) -> list[int]:
    """The symbols of tokens that were computed with nothing evicted, as the prefix cache holds them."""
    symbols: list[int] = []
    attended = NOTHING
    for position, token in enumerate(tokens):
        symbols.append(symbol_of(token, position, seen(attended, symbols, window)))
        attended = attend(attended, symbols[-1])
    return symbols


def due_slots(settings: CompactionSettings, page_size: int | None) -> int:
    """Physical length of the next round in decode, straight from the definition."""
    if page_size is None:
        return settings.threshold
    looked_at = min(NUM_QUERIES[settings.policy], settings.buffer)
    return max(settings.threshold, kept_pages(settings, page_size) * page_size + max(WINDOW, looked_at))


@dataclass
class RequestModel:
    """One request from its start, or its last preemption, on.

    `page_size` is that of an engine which evicts whole pages, and None of one which evicts tokens. `symbols`
    are the slots in order, `text` what was computed for each position, and `window` that of groups of layers
    which are not compacted; `points` the logical lengths at which it was compacted since it last started from
    nothing, the last of its `lives`; `awaited` the sequence of the page eviction whose report has not come
    back, if any; `most_evicted` tokens over all lives. With budget "auto", `ordered` is where the scheduler
    says that it has to switch next, `switches` where it did in any life, `switched` how many of these it has
    made in this one, and `held` what the last of them has left. `state` is the attention state of what is
    compacted.
    """

    num_prompt_tokens: int
    settings: CompactionSettings | None
    page_size: int | None = None
    window: Window | None = None
    symbols: list[int] = field(default_factory=list)
    text: list[int] = field(default_factory=list)
    logical: int = 0
    state: int = NOTHING
    points: list[int] = field(default_factory=list)
    lives: list[list[int]] = field(default_factory=list)
    awaited: int | None = None
    most_evicted: int = 0
    ordered: Switch | None = None
    switches: list[Switch] = field(default_factory=list)
    switched: int = 0
    held: int | None = None

    @property
    def attended(self) -> int:
        """What the next token attends to."""
        return seen(self.state, self.text, self.window)

    @property
    def due(self) -> int | None:
        """Logical length of the next compaction, straight from the definition."""
        if self.settings is None:
            return None
        evicted = self.logical - len(self.symbols)
        due = max(self.num_prompt_tokens, evicted + due_slots(self.settings, self.page_size))
        if self.settings.auto is None or self.held == self.settings.budget:
            return due
        told, bound = self.settings.auto.switch_at, self.settings.auto.max_budget
        at = evicted + bound if bound is not None and told is None else None
        if self._switch is not None:
            at = self._switch.at
        if at is None:
            return None
        looked_at = max(min(NUM_QUERIES[self.settings.policy], self.settings.buffer), 1)
        last = 0 if self.held is None else evicted + self.held + looked_at
        return max(due, at, last)

    @property
    def _switch(self) -> Switch | None:
        """The next one that is known or ordered."""
        assert self.settings is not None and self.settings.auto is not None
        told = self.settings.auto.switch_at
        known = self.switches if told is None else told
        if self.switched < len(known):
            return known[self.switched]
        return self.ordered if told is None else None

    @property
    def max_slots_by_page(self) -> int | None:
        """Slots that it may hold, of pages that are leaving too: one page more than at its largest."""
        if self.settings is None or self.page_size is None:
            return None
        return max(self.num_prompt_tokens, due_slots(self.settings, self.page_size)) + self.page_size

    def start(self, cached: Sequence[int]) -> None:
        """From nothing, with these tokens adopted from the prefix cache."""
        self.symbols = unshortened(cached, self.window)
        self.text = list(self.symbols)
        self.logical = len(cached)
        self.state = attend_all(self.symbols)
        self.lives.append([])
        self.points = self.lives[-1]
        self.awaited = None
        self.switched, self.held, self.ordered = 0, None, None

    def compute(self, tokens: Sequence[int]) -> None:
        for token in tokens:
            symbol = symbol_of(token, self.logical, self.attended)
            self.symbols.append(symbol)
            self.text.append(symbol)
            self.state = attend(self.state, symbol)
            self.logical += 1

    def newest_queries(self) -> list[int] | None:
        """What the policy looks at, and no more than came since the last compaction; None: nothing."""
        assert self.settings is not None
        count = min(NUM_QUERIES[self.settings.policy], self.settings.buffer)
        return self.symbols[-count:] if count else None

    def compact(self) -> None:
        assert self.settings is not None
        assert self.logical == self.due, f"compacted at {self.logical}, but it was due at {self.due}"
        self.points.append(self.logical)
        queries = self.newest_queries()
        if self.page_size is None:
            kept = survivors(self.symbols, queries, self._keep(), self.settings.protect)
        else:
            keep = kept_pages(self.settings, self.page_size)
            protected = protected_pages(self.settings, self.page_size)
            left = leaving_pages(self.symbols, queries, keep, self.page_size, protected)
            kept = [slot for slot in range(len(self.symbols)) if slot // self.page_size not in left]
            assert len(kept) <= keep * self.page_size
        assert kept[: self.settings.protect] == list(range(self.settings.protect))
        self.symbols = [self.symbols[slot] for slot in kept]
        self.state = attend_all(self.symbols)
        self.most_evicted = max(self.most_evicted, self.logical - len(self.symbols))

    def _keep(self) -> int:
        """Slots that a round by token leaves; a switch that nobody ordered leaves a half."""
        assert self.settings is not None
        if self.settings.auto is None or self.held == self.settings.budget:
            return self.settings.budget
        wanted = len(self.symbols) // 2 if self._switch is None else self._switch.kept
        self.held = max(min(wanted, len(self.symbols) - 1), self.settings.budget)
        if self.switched == len(self.switches):
            self.switches.append(Switch(self.logical, self.held))
            self.ordered = None
        self.switched += 1
        return self.held

    def reached(self) -> list[int]:
        """The compaction points of all its lives, each of which began as the longest one did."""
        longest = max(self.lives, key=len, default=[])
        for life in self.lives:
            assert life == longest[: len(life)], f"a replay compacted at {life}, the first time at {longest}"
        return longest
