"""KV cache groups that compaction leaves alone: windows, whose pages vLLM itself gives back."""

from __future__ import annotations

from collections.abc import Sequence

from vllm.v1.core.single_type_kv_cache_manager import SingleTypeKVCacheManager
from vllm.v1.kv_cache_interface import ChunkedLocalAttentionSpec, SlidingWindowSpec

from rkv_vllm.decisions.pages import num_pages


class OtherGroups:
    """What requests hold in groups of windows, from counts alone."""

    def __init__(
        self,
        managers: Sequence[SingleTypeKVCacheManager],
        specs: Sequence[SlidingWindowSpec | ChunkedLocalAttentionSpec],
        *,
        max_model_len: int,
        tokens_in_flight: int,
        prompt_tokens_in_flight: int,
    ) -> None:
        """
        Args:
            managers: vLLM's, of these groups.
            specs: of their layers.
            max_model_len: tokens of the longest request.
            tokens_in_flight: of a request that decodes, whose outcome the scheduler does not know yet.
            prompt_tokens_in_flight: likewise of one whose prompt is computed.
        """
        self._managers = managers
        self._decoding = self._limits(specs, tokens_in_flight, max_model_len)
        self._in_prompt = self._limits(specs, prompt_tokens_in_flight, max_model_len)

    @staticmethod
    def _limits(
        specs: Sequence[SlidingWindowSpec | ChunkedLocalAttentionSpec],
        tokens_in_flight: int,
        max_model_len: int,
    ) -> list[tuple[int, int]]:
        """Page size and most pages of a request, of each group."""
        return [
            (spec.block_size, spec.max_admission_blocks_per_request(tokens_in_flight, max_model_len))
            for spec in specs
        ]

    def num_pages(self, num_computed_tokens: int) -> int:
        """Pages of a request that decodes and has so many tokens."""
        return sum(
            num_pages(num_computed_tokens, manager.block_size)
            - manager.get_num_skipped_tokens(num_computed_tokens) // manager.block_size
            for manager in self._managers
        )

    def most_pages(self, length: int) -> int:
        """Pages of a request at most, while it decodes up to that length."""
        return _pages_up_to(length, self._decoding)

    def growth(self, num_computed_tokens: int, length: int) -> int:
        """Pages that a request which decodes has yet to take, up to a length."""
        return max(self.most_pages(length) - self.num_pages(num_computed_tokens), 0)

    def pages_of_many(self, tokens: int, requests: int) -> int:
        """Pages that so many more tokens take, at most, of so many requests."""
        return sum(num_pages(tokens, manager.block_size) + requests for manager in self._managers)

    def peak_pages(self, prompt: int, length: int) -> int:
        """The most pages that a request of that length, with a prompt of that length, ever had."""
        return max(self.needed_pages(prompt), self.most_pages(length))

    def needed_pages(self, length: int) -> int:
        """Pages without which vLLM cannot compute a request of that length, its prompt included."""
        return _pages_up_to(length, self._in_prompt)


def _pages_up_to(length: int, limits: Sequence[tuple[int, int]]) -> int:
    return sum(min(num_pages(length, page_size), most) for page_size, most in limits)
