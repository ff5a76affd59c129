"""What `rkv-vllm inspect` finds out, as JSON. No vLLM, no torch.

Per setting one number for each layer, KV head and token says when the token left, because a token that left
never comes back: 16,384 tokens in 36 layers of 8 heads are 4.7 MB, and less than that compressed.
"""

from __future__ import annotations

import base64
import gzip
from collections.abc import Sequence
from typing import Literal

import numpy as np
from pydantic import BaseModel

from rkv_vllm.settings.config import Granularity, PolicyName


class Packed(BaseModel):
    """An array of unsigned integers.

    Attributes:
        dtype: of the elements, little-endian.
        shape: the last dimension is the one whose elements lie side by side.
        data: base64 of gzip of the elements.
    """

    dtype: Literal["uint8", "uint16", "uint32"]
    shape: tuple[int, ...]
    data: str

    @classmethod
    def pack(cls, values: np.ndarray, missing: int | None = None) -> Packed:
        """The smallest type that holds all values.

        Args:
            values: integers from 0 on, or `missing`.
            missing: a negative number that becomes the type's largest one.
        """
        if missing is not None:
            values = values.astype(np.int64)
        most = int(values.max(initial=0)) + (missing is not None)
        dtype: Literal["uint8", "uint16", "uint32"] = (
            "uint8" if most < 1 << 8 else "uint16" if most < 1 << 16 else "uint32"
        )
        if missing is not None:
            values = np.where(values == missing, np.iinfo(dtype).max, values)
        stored = np.ascontiguousarray(values, dtype=np.dtype(dtype).newbyteorder("<"))
        data = base64.b64encode(gzip.compress(stored.tobytes(), mtime=0)).decode()
        return cls(dtype=dtype, shape=values.shape, data=data)

    def unpack(self) -> np.ndarray:
        """The array that was packed, with the type's largest number in place of what was missing."""
        stored = np.frombuffer(
            gzip.decompress(base64.b64decode(self.data)), np.dtype(self.dtype).newbyteorder("<")
        )
        return stored.reshape(self.shape)


class Setting(BaseModel):
    """How a request keeps its cache."""

    policy: PolicyName
    budget: int
    buffer: int
    protect: int


class Forgotten(BaseModel):
    """What became of the tokens: arrays [layers, KV heads, tokens], of all tokens whose keys were cached.

    Attributes:
        rounds: tokens that the request had at each round.
        left: the round in which a token left, the first one being 1; 0: it was there to the end.
        importance, redundancy: percent of the candidates of its head that had less of it, in the last round
            in which the token was a candidate; 255: it never was one.
        match: position of the newest token whose key was similar then; the type's largest number: none was.

    null is what the policy does not look at, or what was not asked for.
    """

    rounds: list[int]
    left: Packed
    importance: Packed | None
    redundancy: Packed | None
    match: Packed | None


class Run(BaseModel):
    """One request.

    Attributes:
        setting: null is the full cache.
        tokens: the text of each token, of prompt and answer; a character of several tokens is the last one's.
        first_difference: index of the first token that is not the full cache's; null: there is none.
        forgotten: null with the full cache.
        kl: of each token of the answer: KL divergence of the full cache's prediction from this one's, over
            the same text, in nats; null where it was not measured.
    """

    setting: Setting | None
    tokens: list[str]
    first_difference: int | None
    forgotten: Forgotten | None
    kl: list[float] | None


class Inspection(BaseModel):
    """One prompt, answered with the full cache, which is the first of the runs, and with every setting.

    Attributes:
        command: that was given.
        prompt_tokens: of every run, its first ones.
        layers, heads: of the model; KV heads.
    """

    format: Literal["rkv-vllm inspect 1"] = "rkv-vllm inspect 1"
    command: str
    model: str
    device: str
    dtype: str
    versions: dict[str, str]
    granularity: Granularity
    scope: str
    order: str
    mix_lambda: float
    prompt_tokens: int
    layers: int
    heads: int
    runs: list[Run]


def first_difference(tokens: Sequence[int], others: Sequence[int]) -> int | None:
    """Index of the first token that is another one, or has none beside it; None where all are equal."""
    for index, (token, other) in enumerate(zip(tokens, others, strict=False)):
        if token != other:
            return index
    shorter = min(len(tokens), len(others))
    return None if len(tokens) == len(others) else shorter
