"""When requests got their tokens, and how many those that run have (pure)."""

from __future__ import annotations


class TokenClock:
    """Kept up to date token by token.

    Attributes:
        held: tokens of all requests that run, prompts included.
    """

    def __init__(self) -> None:
        self.held = 0
        self._last: dict[str, float] = {}
        self._lengths: dict[str, int] = {}
        self._running: set[str] = set()

    def came(self, request_id: str, prompt: int, count: int, at: float) -> float | None:
        """`count` tokens came. Returns the seconds since the ones before, None for the first."""
        length = self._lengths.get(request_id, prompt)
        if request_id not in self._running:  # a new one, or one that goes on after a preemption
            self._running.add(request_id)
            self.held += length
        self._lengths[request_id] = length + count
        self.held += count
        before = self._last.get(request_id)
        self._last[request_id] = at
        return None if before is None else at - before

    def preempted(self, request_id: str) -> None:
        """The request does not run until its next token comes."""
        if request_id in self._running:
            self._running.remove(request_id)
            self.held -= self._lengths[request_id]

    def ended(self, request_id: str) -> None:
        """Also for a request that got no token."""
        self.preempted(request_id)
        self._lengths.pop(request_id, None)
        self._last.pop(request_id, None)
