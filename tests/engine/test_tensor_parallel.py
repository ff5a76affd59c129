"""Workers that share each layer, some of its heads each."""

from __future__ import annotations

from collections.abc import Callable

import texts
from engine_process import Ask, Engine, Settings
from support.identical import assert_alike

from rkv_vllm.settings.config import POLICY_NAMES

#: SmolLM2 has three KV heads.
RANKS = 3
#: `random` draws for the heads that a worker has, and comes last.


def test_ranks_together_decode_as_one(
    rkv: Engine, start_engine: Callable[[Settings], Engine], encode: texts.Encode
) -> None:
    """Tokens, compactions and pages are those of one worker, and the pool is whole.

    Sums over ranks round differently, so that of two tokens with nearly the same score either may stay.
    """
    asks = [Ask(encode(texts.multiples(9)), 75, {"rkv_budget": 0})] + [
        Ask(
            encode(texts.multiples(n + 2)),
            75,
            {"rkv_budget": 48 + 8 * n, "rkv_buffer": 16, "rkv_policy": name},
        )
        for n, name in enumerate(POLICY_NAMES)
    ]
    in_ranks = start_engine(Settings(ranks=RANKS)).submit(asks)
    expected = rkv.run(asks)
    found = in_ranks.result()
    assert [answer.result for answer in found.answers] == [answer.result for answer in expected.answers]
    assert all(expected.compactions(index) >= 2 for index in range(1, len(asks)))
    assert len(found.answers) == len(expected.answers)
    assert_alike(found.answers[:-1], expected.answers[:-1], within=1e-2)
