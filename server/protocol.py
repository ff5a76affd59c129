"""What this package adds to the bodies of OpenAI answers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from rkv_vllm.result import RESULT_KEY

#: Name of the object in an answer, beside `usage`.
FIELD = "kv_cache"


class KvCacheReport(BaseModel):
    """What happened to the KV cache of one request.

    `budget` tokens were kept per layer and KV head after each compaction ("full": never compacted, and no
    buffer and no policy then). Page counts are of one request; `pages_without_compaction` is what its length
    would have filled. `reason` says why nothing was compacted and is absent where something was.
    """

    model_config = ConfigDict(extra="ignore")

    budget: int | Literal["full"]
    policy: str | None = None
    buffer: int | None = None
    compactions: int
    evicted_tokens: int
    peak_pages: int
    pages_without_compaction: int
    reason: str | None = None

    @classmethod
    def from_kv_transfer_params(cls, params: Mapping[str, Any] | None) -> KvCacheReport | None:
        """The report inside a finished `RequestOutput.kv_transfer_params`; None if the engine sent none."""
        result = (params or {}).get(RESULT_KEY)
        if result is None:
            return None
        return cls.model_validate({**result, "budget": result["budget"] or "full"})

    def to_json(self) -> bytes:
        return self.model_dump_json(exclude_none=True).encode()
