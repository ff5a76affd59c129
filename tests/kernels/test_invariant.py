"""Policy ``invariant``'s kernels against the float64 reference, and what its scores do not depend on."""

from __future__ import annotations

import pytest
import torch
from support.paged_cache import DEVICE, GPU, WINDOW, PagedCache

from rkv_vllm.kernels import naive, naive_invariant
from rkv_vllm.kernels.batch import CompactionBatch
from rkv_vllm.kernels.cache_layout import FP8
from rkv_vllm.kernels.compaction_round import CompactionRound
from rkv_vllm.kernels.invariant_scorer import InvariantScorer
from rkv_vllm.kernels.rotary_pairs import UNROTATED, RotaryPairs
from rkv_vllm.settings.policy_table import RING_SIZE

POOL = 3


class Cache(PagedCache):
    """A random cache whose requests are scored by some of their newest queries."""

    def __init__(self, lengths: list[int], pairs: RotaryPairs, looked_at: int = RING_SIZE, **shape: object):
        super().__init__(lengths, **shape)  # type: ignore[arg-type]
        self.pairs = pairs
        self.looked_at = looked_at

    def scorer(self, lam: list[float]) -> InvariantScorer:
        weights = torch.tensor(lam, device=DEVICE)
        return InvariantScorer(self.queries, self.factors, weights, pairs=self.pairs, pool_kernel=POOL)

    def score(self, lam: list[float], **settings: object) -> torch.Tensor:
        shape = (self.kv.num_layers, len(self.lengths), self.kv.num_heads, max(self.lengths))
        scores = torch.full(shape, float("nan"), device=DEVICE)
        rounds = CompactionRound(self.kv, window=WINDOW, **settings)  # type: ignore[arg-type]
        rounds.score(self.scorer(lam), self.batch(self.lengths, looked_at=self.looked_at), scores)
        return scores

    def reference(self, layer: int, request: int, lam: float) -> torch.Tensor:
        return naive_invariant.invariant_scores(
            self.newest_queries(layer, request, self.looked_at).double(),
            self.keys(layer, request).double(),
            self.pairs,
            window=WINDOW,
            lam=lam,
            pool_kernel=POOL,
            scale=self.kv.head_size**-0.5,
        )

    def check_scores(self, lam: list[float], **settings: object) -> None:
        scores = self.score(lam, **settings)
        for layer in range(self.kv.num_layers):
            for request, weight in enumerate(lam):
                candidates = self.lengths[request] - WINDOW
                found = scores[layer, request, :, :candidates].double()
                expected = self.reference(layer, request, weight)
                torch.testing.assert_close(found, expected, rtol=2e-4, atol=2e-4)
                assert scores[layer, request, :, candidates:].isnan().all()


DTYPES = [torch.float32, torch.float16, *FP8] + ([torch.bfloat16] if GPU else [])
SHAPES = [
    # head size, rotated, interleaved, group, queries, page size, lengths
    (64, 64, False, 4, 16, 16, [150, 33, 9]),
    (80, 40, False, 3, 5, 48, [97, 12]),  # half of a head is rotated
    (64, 32, True, 12, 16, 16, [70]),  # neighbours are rotated together; more queries than one product takes
    (32, 0, False, 1, 13, 16, [129]),  # nothing is rotated
    (16, 16, False, 2, 16, 16, [1300, 1025]),  # two spans
]
if GPU:
    SHAPES += [
        (128, 128, False, 4, 16, 16, [1152, 127, 2000]),
        (128, 128, False, 8, 16, 64, [1153, 513]),
        (128, 64, False, 16, 15, 128, [900, 1280]),
        (128, 128, True, 1, 8, 16, [4224]),
        (96, 96, False, 2, 16, 32, [257, 128, 129]),
        (256, 256, False, 8, 16, 48, [700, 65]),
        (256, 64, False, 16, 16, 16, [129]),
        (64, 64, False, 4, 16, 16, [17000]),  # as many spans as there may be, longer than the shortest
    ]


def shape_id(shape: tuple[int, int, bool, int, int, int, list[int]]) -> str:
    head_size, rotated, _, group, looked_at, _, _ = shape
    return f"D{head_size}-R{rotated}-G{group}-Q{looked_at}"


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize(
    "shape", SHAPES, ids=lambda shape: f"D{shape[0]}-R{shape[1]}-G{shape[3]}-Q{shape[4]}"
)
def test_scores_equal_the_float64_reference(
    shape: tuple[int, int, bool, int, int, int, list[int]], dtype: torch.dtype
) -> None:
    """Proves scores right over head sizes, kinds of rotation, groups, numbers of queries and dtypes."""
    head_size, rotated, interleaved, group, looked_at, page_size, lengths = shape
    cache = Cache(
        lengths,
        RotaryPairs(rotated, interleaved),
        looked_at,
        layers=2,
        heads=2,
        group=group,
        head_size=head_size,
        page_size=page_size,
        dtype=dtype,
        apart=dtype == torch.float16,
        token_major=dtype == torch.float32,
    )
    cache.check_scores([(0.5, 1.0, 0.0)[index % 3] for index in range(len(lengths))])


def test_scores_do_not_depend_on_what_is_scored_beside_them() -> None:
    """Proves a request's scores bit for bit the same alone, and in a batch with longer and shorter ones."""
    lengths = [1100, 90, 2100 if GPU else 1300]
    together = Cache(lengths, RotaryPairs(32), layers=1, heads=1, group=2, head_size=32)
    scores = together.score([0.5] * len(lengths))
    for request, length in enumerate(lengths):
        pages = [together.source[request]]
        batch = CompactionBatch.build(
            lengths=[length],
            keeps=[length],
            source_pages=pages,
            target_pages=pages,
            page_size=together.kv.page_size,
            device=DEVICE,
            queries=[together.query_windows(together.looked_at)[request]],
        )
        alone = torch.zeros(1, 1, 1, length, device=DEVICE)
        CompactionRound(together.kv, window=WINDOW).score(together.scorer([0.5]), batch, alone)
        candidates = length - WINDOW
        assert torch.equal(alone[0, 0, 0, :candidates], scores[0, request, 0, :candidates])


def test_equal_keys_and_zero_keys() -> None:
    """Proves that nothing becomes NaN where all keys are equal, zero, or some of them are."""
    for fill in ("equal", "zero", "some zero"):
        cache = Cache([40] if fill == "some zero" else [40, WINDOW], RotaryPairs(64))
        keys = cache.layers[0][..., :64]
        if fill == "equal":
            keys.copy_(keys[0, 0, 0].clone().expand_as(keys))
        elif fill == "zero":
            keys.zero_()
        else:
            keys[:, :, ::3] = 0.0
        if fill == "some zero":
            cache.check_scores([0.5])
        else:
            assert cache.score([0.5, 0.5])[0, 0, 0, : 40 - WINDOW].isfinite().all()


def test_rounds_leave_exactly_the_selected_tokens() -> None:
    """Proves whole rounds: the tokens of the highest scores and the window stay, in both sizes of memory."""
    lengths, keeps = ([900, 400, 700], [500, 300, 699]) if GPU else ([60, 130, 50], [30, 100, 49])
    results = []
    for scratch_bytes in (64 << 20, 80_000 if GPU else 15_000):
        cache = Cache(lengths, RotaryPairs(64), layers=3, heads=2, group=2, seed=4)
        scores = cache.score([0.5] * 3)
        before = [
            [cache.tokens(layer, pages, length) for pages, length in zip(cache.source, lengths, strict=True)]
            for layer in range(3)
        ]
        rounds = CompactionRound(cache.kv, window=WINDOW, scratch_bytes=scratch_bytes)
        rounds.run(cache.scorer([0.5] * 3), cache.batch(keeps, looked_at=cache.looked_at))
        for layer, tokens in enumerate(before):
            for request, (length, keep) in enumerate(zip(lengths, keeps, strict=True)):
                own = scores[layer, request, :, : length - WINDOW]
                expected = naive.compact(tokens[request], naive.kept_indices(own, keep, length))
                assert torch.equal(cache.tokens(layer, cache.source[request], keep), expected)
        results.append(torch.stack(cache.layers))
    assert torch.equal(results[0], results[1])


def test_page_scores_sum_layers_and_heads() -> None:
    """Proves page scores equal to the reference's scores summed over slots, heads and layers."""
    lengths = [1000, 77] if GPU else [75, 20]
    cache = Cache(lengths, RotaryPairs(64), layers=2, heads=2, page_size=48, seed=8)
    scores = CompactionRound(cache.kv, window=WINDOW).page_scores(
        cache.scorer([0.5, 0.5]), cache.batch(lengths, looked_at=cache.looked_at)
    )
    for request in range(2):
        pages = -(-(lengths[request] - WINDOW) // 48)
        by_layer = [cache.reference(layer, request, 0.5) for layer in range(2)]
        expected = torch.stack([naive.page_scores(own, 48) for own in by_layer]).sum(0)
        torch.testing.assert_close(scores[request, :pages].double(), expected, rtol=1e-3, atol=1e-2)
        assert not scores[request, pages:].any()


def rotated(keys: torch.Tensor, positions: torch.Tensor, pairs: RotaryPairs) -> torch.Tensor:
    """Keys [H, N, D] after rotary embedding at positions [N]."""
    half = pairs.rotated // 2
    angles = positions.double()[:, None] * 10_000.0 ** (-torch.arange(half) / half)  # [N, half]
    first, second = (
        (slice(0, pairs.rotated, 2), slice(1, pairs.rotated, 2))
        if pairs.interleaved
        else (slice(0, half), slice(half, pairs.rotated))
    )
    turned = keys.clone()
    turned[..., first] = keys[..., first] * angles.cos() - keys[..., second] * angles.sin()
    turned[..., second] = keys[..., second] * angles.cos() + keys[..., first] * angles.sin()
    return turned


@pytest.mark.parametrize(
    "pairs", [RotaryPairs(64), RotaryPairs(32), RotaryPairs(48, True), UNROTATED], ids=str
)
def test_redundancy_is_the_same_wherever_keys_stand(pairs: RotaryPairs) -> None:
    """Proves that a rotation by any positions, repeated ones too, changes no feature and so no redundancy."""
    generator = torch.Generator().manual_seed(1)
    keys = torch.randn(2, 90, 64, dtype=torch.float64, generator=generator)
    positions = torch.randint(0, 100_000, (90,), generator=generator)
    turned = rotated(keys, positions, pairs)
    assert pairs.features(keys).shape[-1] == pairs.num_features(64)
    torch.testing.assert_close(pairs.features(turned), pairs.features(keys))
    torch.testing.assert_close(
        naive_invariant.redundancy(turned, pairs), naive_invariant.redundancy(keys, pairs)
    )
    if pairs.rotated:
        other = RotaryPairs(pairs.rotated, not pairs.interleaved)
        assert not torch.allclose(other.features(turned), other.features(keys))


def test_what_most_tokens_are_like_is_redundant() -> None:
    """Proves that keys like most others count as redundant, and those far from them as worth keeping."""
    generator = torch.Generator().manual_seed(2)
    common, rare = torch.randn(2, 1, 1, 64, dtype=torch.float64, generator=generator)
    keys = common + 0.3 * torch.randn(1, 100, 64, dtype=torch.float64, generator=generator)
    is_rare = torch.arange(100) % 5 == 3
    keys[:, is_rare] += 2 * rare
    pairs = RotaryPairs(64)
    found = naive_invariant.redundancy(rotated(keys, torch.arange(100), pairs), pairs)[0]
    assert found[~is_rare].min() > found[is_rare].max()


def test_wrong_calls_are_refused() -> None:
    """Proves that arguments that do not fit are refused before anything is moved."""
    cache = Cache([40], RotaryPairs(64), layers=2)
    rounds, lam = CompactionRound(cache.kv, window=WINDOW), torch.ones(1, device=DEVICE)
    for queries, weights, pairs, message in (
        (cache.queries[:1], lam, RotaryPairs(64), "does not fit 2 layers"),
        (cache.queries, lam.double(), RotaryPairs(64), "lam must be"),
        (cache.queries, lam, RotaryPairs(66), "66 rotated dimensions"),
        (cache.queries, lam, RotaryPairs(33), "33 rotated dimensions"),
    ):
        with pytest.raises(ValueError, match=message):
            scorer = InvariantScorer(queries, cache.factors, weights, pairs=pairs)
            rounds.run(scorer, cache.batch([20]))
    with pytest.raises(ValueError, match="pool_kernel"):
        InvariantScorer(cache.queries, cache.factors, lam, pairs=UNROTATED, pool_kernel=2)
