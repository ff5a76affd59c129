"""A random generator for a request with a seed, whose last draw can be taken back."""

from __future__ import annotations

import torch


class RewindableGenerator(torch.Generator):
    """Survives a split prompt, for which vLLM takes a draw back.

    vLLM samples for every request of a step, and takes the draw back where the prompt is not complete. It
    does so by the offset of a CUDA generator, which a CPU generator has not: asking for it would end the
    engine.
    """

    _before: torch.Tensor

    def remember(self) -> None:
        """To be called before each draw."""
        self._before = self.get_state()

    def get_offset(self) -> int:
        return 0

    def set_offset(self, offset: int) -> None:
        """Takes back the last draw, whatever the offset."""
        self.set_state(self._before)
