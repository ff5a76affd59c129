"""The Triton kernels against the float64 reference: in Triton's interpreter on a CPU, in full on a GPU."""

from __future__ import annotations

import pytest
import torch
from support.paged_cache import DEVICE, GPU, WINDOW, PagedCache

from rkv_vllm.kernels import naive
from rkv_vllm.kernels.cache_layout import FP8
from rkv_vllm.kernels.compaction_round import CompactionRound
from rkv_vllm.kernels.options import Order, Scope
from rkv_vllm.kernels.rkv_scorer import RkvScorer
from rkv_vllm.kernels.scorer import GivenScores
from rkv_vllm.kernels.shared_scores import add_layers, share_in_layer

THRESHOLD = 0.5
POOL = 7


class Cache(PagedCache):
    """A random cache, and rounds over it that are checked against the reference."""

    def round(self, **settings: object) -> CompactionRound:
        return CompactionRound(self.kv, window=WINDOW, **settings)  # type: ignore

    def scorer(self, lam: list[float]) -> RkvScorer:
        return RkvScorer(
            self.queries,
            self.factors,
            torch.tensor(lam, device=DEVICE),
            threshold=THRESHOLD,
            pool_kernel=POOL,
        )

    def score(self, lam: list[float], **settings: object) -> torch.Tensor:
        shape = (self.kv.num_layers, len(self.lengths), self.kv.num_heads, max(self.lengths))
        scores = torch.full(shape, float("nan"), device=DEVICE)
        self.round(**settings).score(self.scorer(lam), self.batch(self.lengths), scores)
        return scores

    def run(self, keeps: list[int], lam: list[float], **settings: object) -> None:
        """Compact in place, and check every token of every layer against the reference's order of scores."""
        self.check_moves(keeps, self.source, self.score(lam, **settings), lam, **settings)

    def check_moves(
        self,
        keeps: list[int],
        targets: list[list[int]],
        scores: torch.Tensor,
        lam: list[float] | None,
        *,
        scope: Scope = "head",
        order: Order = "temporal",
        protects: list[int] | None = None,
        **settings: object,
    ) -> None:
        """Run a round; exactly the tokens that the scores select have to lie in the target pages, in order.

        Everything outside the slots that may be written has to stay as it is.
        """
        stored = [bits(layer) for layer in self.layers]
        before = [layer.clone() for layer in stored]
        expected = [layer.clone() for layer in stored]
        batch = self.batch(keeps, targets, order, protects)
        for layer, data in enumerate(expected):
            for request, (length, keep) in enumerate(zip(self.lengths, keeps, strict=True)):
                own = naive.shared_scores(scores[:, request, :, : length - WINDOW], scope)[layer]
                chosen = naive.kept_indices(own, keep, length, order, batch.protects[request])
                moved = naive.compact(bits(self.tokens(layer, self.source[request], length)), chosen)
                for index in range(-(-keep // self.kv.page_size)):
                    piece = moved[:, index * self.kv.page_size : (index + 1) * self.kv.page_size]
                    data[targets[request][index], :, : piece.shape[1]] = piece
        assert all(map(torch.equal, stored, before))
        scorer = GivenScores(lambda layer: scores[layer]) if lam is None else self.scorer(lam)
        self.round(scope=scope, **settings).run(scorer, batch)
        for layer, data in zip(stored, expected, strict=True):
            assert torch.equal(layer, data)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """What torch compares and gathers: FP8 as bytes."""
    return tensor.view(torch.uint8) if tensor.dtype in FP8 else tensor


def reference(cache: Cache, layer: int, request: int, lam: float) -> torch.Tensor:
    return naive.rkv_scores(
        cache.newest_queries(layer, request).double(),
        cache.keys(layer, request).double(),
        window=WINDOW,
        lam=lam,
        threshold=THRESHOLD,
        pool_kernel=POOL,
    )


def assert_scores(cache: Cache, lam: list[float], **settings: object) -> None:
    """Every score within float32 rounding of the float64 reference, keys near the threshold's edge apart.

    A pair of keys whose similarity lies within rounding of the threshold may be a match or none. That changes
    two columns' sums by at most one: scores of a head with such pairs are compared with that allowance.
    """
    scores = cache.score(lam, **settings)
    for layer in range(cache.kv.num_layers):
        for request, weight in enumerate(lam):
            length = cache.lengths[request]
            expected = reference(cache, layer, request, weight)
            actual = scores[layer, request, :, : length - WINDOW].double()
            assert scores[layer, request, :, length - WINDOW :].isnan().all()
            similar = naive.similarity(cache.keys(layer, request).double())
            on_edge = ((similar - THRESHOLD).abs() < 2e-6).sum(dim=(1, 2), keepdim=True)[..., 0]
            error = (actual - expected).abs()
            bound = 2e-5 / length + 2e-5 * expected.abs() + on_edge / length**2
            assert (error <= bound).all(), f"layer {layer}, request {request}: {(error / bound).max()}"


DTYPES = [torch.float32, torch.float16, *FP8] + ([torch.bfloat16] if GPU else [])
SHAPES = [
    # head size, group, page size, lengths
    (64, 4, 16, [150, 33, 9]),
    (80, 3, 48, [97, 12]),
]
if GPU:
    SHAPES += [
        (64, 1, 16, [1, 8, 9, 10, 15, 16, 17, 700]),
        (64, 7, 32, [640, 641, 1000]),
        (80, 5, 16, [333, 1152]),
        (96, 2, 32, [257, 128, 129]),
        (128, 1, 16, [300]),
        (128, 4, 16, [1152, 127, 2000]),
        (128, 8, 64, [1153, 513]),
        (128, 16, 128, [900, 1280]),
        (192, 3, 16, [511, 400]),
        (256, 8, 48, [700, 65]),
        (256, 16, 16, [129]),
    ]


def shape_id(shape: tuple[int, int, int, list[int]]) -> str:
    head_size, group, page_size, lengths = shape
    return f"B{len(lengths)}-T{max(lengths)}-G{group}-D{head_size}-P{page_size}"


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("shape", SHAPES, ids=shape_id)
def test_scores_equal_the_float64_reference(
    shape: tuple[int, int, int, list[int]], dtype: torch.dtype
) -> None:
    """Proves joint scores right over head sizes, groups, page sizes, dtypes, ragged lengths and mixed lam."""
    head_size, group, page_size, lengths = shape
    lengths = [length for length in lengths if length > WINDOW]
    layers, heads = (3, 2) if GPU else (2, 2)
    cache = Cache(
        lengths,
        layers=layers,
        heads=heads,
        group=group,
        head_size=head_size,
        page_size=page_size,
        dtype=dtype,
        apart=dtype == torch.float16,
        token_major=dtype == torch.float32,
    )
    assert_scores(cache, [(0.1, 1.0, 0.0, 0.5)[index % 4] for index in range(len(lengths))])


@pytest.mark.parametrize("shift", [0.0, 0.3, 3.0])
def test_scores_with_few_and_with_many_matches(shift: float) -> None:
    """Proves the search for matches right when no row, some rows, or every row has one."""
    lengths = [3000, 1500] if GPU else [190]
    dtype = torch.bfloat16 if GPU else torch.float32
    assert_scores(Cache(lengths, heads=2, layers=2, shift=shift, dtype=dtype), [0.0] * len(lengths))


def test_matches_that_only_older_tokens_offer() -> None:
    """Proves matches found on both sides: old keys match the newest one, newer keys only old ones."""
    length = 2000 if GPU else 150
    cache = Cache([length], head_size=64, shift=0.0)
    keys = cache.layers[0][..., :64]
    generator = torch.Generator().manual_seed(5)
    common = torch.randn(64, generator=generator).to(DEVICE)
    page_size = cache.kv.page_size
    for slot in [
        *range(length // 3),
        length - 1,
    ]:  # all alike: the newest tile is enough
        noise = 0.1 * torch.randn(64, generator=generator).to(DEVICE)
        keys[cache.source[0][slot // page_size], 0, slot % page_size] = common + noise
    for slot in range(length // 2, length - 20, 7):  # each the twin of one old key outside the common set
        twin = length // 3 + slot % (length // 6)
        keys[cache.source[0][slot // page_size], 0, slot % page_size] = keys[
            cache.source[0][twin // page_size], 0, twin % page_size
        ]
    assert_scores(cache, [0.0])


@pytest.mark.parametrize(
    "pair", [(3, 128), (127, 128), (0, 1), (60, 64), (5, 149)], ids="{0[0]}-{0[1]}".format
)
def test_the_only_pair_is_found_from_both_of_its_keys(pair: tuple[int, int]) -> None:
    """Proves that no tile with a pair is passed over: two equal keys among random ones, at blocks' edges."""
    for dtype in DTYPES:
        cache = Cache([150, 90], heads=2, shift=0.0, dtype=dtype)
        old, new = ((cache.source[0][slot // 16], 0, slot % 16) for slot in pair)
        cache.layers[0][new] = cache.layers[0][old]
        assert_scores(cache, [0.0, 0.1])


def test_equal_keys_and_zero_keys() -> None:
    """Proves the degenerate cases finite and right: all keys equal, all zero, and some zero."""
    for fill in ("equal", "zero", "some zero"):
        cache = Cache([40], head_size=64)
        keys = cache.layers[0][..., :64]
        if fill == "equal":
            keys.copy_(keys[0, 0, 0].clone().expand_as(keys))
        elif fill == "zero":
            keys.zero_()
        else:
            keys[:, :, ::3] = 0.0
        assert_scores(cache, [0.1])
        cache.run([20], [0.1])


def test_rounds_leave_exactly_the_selected_tokens() -> None:
    """Proves selection and movement in place: ragged lengths, one token over, and nothing to evict."""
    lengths = [1152, 700, 129, 40] if GPU else [70, 33, 41, 24]
    keeps = [1024, 699, 40, 40] if GPU else [50, 32, 9, 24]
    for dtype in DTYPES:
        cache = Cache(lengths, layers=2 if GPU else 1, heads=2, group=2, dtype=dtype, seed=1)
        cache.run(keeps, [0.1, 1.0, 0.0, 0.5])


def test_repeated_rounds_give_the_same_bytes() -> None:
    """Proves a round deterministic: two runs from the same cache leave identical bytes."""
    lengths = [1152, 600] if GPU else [60, 40]
    results = []
    for _ in range(2):
        cache = Cache(lengths, layers=2, heads=2 if GPU else 1, group=2, seed=2)
        keeps = [length // 2 for length in lengths]
        cache.round().run(cache.scorer([0.1, 0.1]), cache.batch(keeps))
        results.append(torch.stack([layer.clone() for layer in cache.layers]))
    assert torch.equal(results[0], results[1])


def test_target_pages_anywhere() -> None:
    """Proves movement race free into fresh pages, shared fronts replaced, and any order of the own pages."""
    lengths = [1200, 800, 640, 300] if GPU else [70, 50, 64, 30]
    keeps = [1000, 640, 630, 100] if GPU else [60, 40, 63, 20]
    cache = Cache(lengths, layers=2, heads=2 if GPU else 1, seed=3, page_size=16)
    targets = [
        list(reversed(cache.source[0])),  # own pages backwards
        [cache.free[0], cache.free[1], *cache.source[1][2:]],  # two shared pages replaced
        [*cache.source[2][1:], cache.source[2][0]],  # own pages shifted by one
        cache.free[2 : 2 + len(cache.source[3])],
    ]
    targets = [pages[: -(-keep // 16)] for pages, keep in zip(targets, keeps, strict=True)]
    assert cache.batch(keeps, targets).staged == [0, 2]
    cache.check_moves(keeps, targets, cache.score([0.1] * 4), [0.1] * 4)


def test_small_scratch_memory_changes_nothing() -> None:
    """Proves that splitting a batch by requests and by layers leaves scores and movement as they are."""
    lengths = [900, 400, 700] if GPU else [60, 130, 50]
    keeps = [500, 300, 699] if GPU else [30, 100, 49]
    cache = Cache(lengths, layers=3 if GPU else 2, heads=2 if GPU else 1, seed=4)
    small = 80_000 if GPU else 12_000
    assert torch.equal(
        cache.score([0.1] * 3).nan_to_num(7.0), cache.score([0.1] * 3, scratch_bytes=small).nan_to_num(7.0)
    )
    targets = [list(reversed(pages)) for pages in cache.source]
    targets = [pages[: -(-keep // 16)] for pages, keep in zip(targets, keeps, strict=True)]
    cache.check_moves(keeps, targets, cache.score([0.1] * 3), [0.1] * 3, scratch_bytes=small)


def test_given_scores_with_ties_and_odd_values() -> None:
    """Proves that ties go to the lower slot, and where infinities, both zeros and NaN are ordered."""
    length = 5000 if GPU else 120
    cache = Cache([length, length - 7], layers=2, heads=2, seed=5)
    generator = torch.Generator().manual_seed(6)
    scores = torch.randint(-2, 3, (2, 2, 2, length + 5), generator=generator).float() * 0.25
    kinds = torch.rand(scores.shape, generator=generator)
    scores[kinds < 0.05] = float("nan")
    scores[(kinds > 0.05) & (kinds < 0.1)] = float("inf")
    scores[(kinds > 0.1) & (kinds < 0.15)] = -float("inf")
    scores[(kinds > 0.15) & (kinds < 0.25)] = -0.0
    scores = scores.to(DEVICE)[..., 3:]
    for share in (0.97, 0.5, 0.1):
        keeps = [int(share * length), length - 30]
        cache.check_moves(keeps, cache.source, scores, None)


def test_nothing_but_the_window_is_kept() -> None:
    """Proves that keeping the window alone, or a request that is the window alone, works."""
    cache = Cache([60, WINDOW, WINDOW + 1], seed=7)
    cache.run([WINDOW, WINDOW, WINDOW + 1], [0.1, 0.1, 1.0])


def test_page_scores_sum_layers_and_heads() -> None:
    """Proves page scores equal to the reference's scores summed over slots, heads and layers."""
    lengths = [3000, 77] if GPU else [75, 20]
    cache = Cache(lengths, layers=2, heads=2, group=2, page_size=48, seed=8)
    lam = [0.1, 1.0]
    scores = cache.round().page_scores(cache.scorer(lam), cache.batch(lengths))
    for request in range(2):
        pages = -(-(lengths[request] - WINDOW) // 48)
        by_layer = [reference(cache, layer, request, lam[request]) for layer in range(2)]
        expected = torch.stack([naive.page_scores(own, 48) for own in by_layer]).sum(0)
        torch.testing.assert_close(scores[request, :pages].double(), expected, rtol=1e-4, atol=2e-6)
        assert not scores[request, pages:].any()


VARIANTS = [
    (scope, order)
    for scope in ("head", "layer", "global")
    for order in ("temporal", "score")
    if (scope, order) != ("head", "temporal")
]


@pytest.mark.parametrize(("scope", "order"), VARIANTS)
def test_given_scores_are_shared_and_ordered(scope: Scope, order: Order) -> None:
    """Proves sharing and order exact where sums are: ties, infinities and NaN, ragged lengths, odd pages."""
    length = 5000 if GPU else 90
    cache = Cache([length, length - 7, 40, WINDOW + 1], layers=3, heads=2, page_size=48, seed=5)
    generator = torch.Generator().manual_seed(6)
    scores = torch.randint(-2, 3, (3, 4, 2, length), generator=generator).float() * 0.25
    kinds = torch.rand(scores.shape, generator=generator)
    scores[kinds < 0.02] = float("nan")
    scores[(kinds > 0.02) & (kinds < 0.05)] = float("inf")
    scores[(kinds > 0.05) & (kinds < 0.08)] = -float("inf")
    scores[(kinds > 0.08) & (kinds < 0.2)] = -0.0
    scores = scores.to(DEVICE)
    given = scores.clone()
    targets = [cache.free, cache.source[1][::-1], cache.source[2], cache.source[3]]
    keeps = [length // 2, length - 30, 20, WINDOW]
    targets = [pages[: -(-keep // 48)] for pages, keep in zip(targets, keeps, strict=True)]
    cache.check_moves(keeps, targets, scores, None, scope=scope, order=order)
    assert torch.equal(scores.view(torch.int32), given.view(torch.int32))


@pytest.mark.parametrize(
    ("scope", "order"),
    [("head", "temporal"), *(VARIANTS if GPU else [("layer", "score"), ("global", "score")])],
)
def test_protected_tokens_stay_whatever_their_scores(scope: Scope, order: Order) -> None:
    """Proves that the first tokens stay and come first: none, one, over pages, all that is kept."""
    lengths = [9000, 5000, 2000, 300] if GPU else [90, 70, 41, 33]
    cache = Cache(lengths, layers=3, heads=2, seed=11)
    generator = torch.Generator().manual_seed(12)
    scores = torch.randint(-2, 3, (3, 4, 2, max(lengths)), generator=generator).float() * 0.25
    kinds = torch.rand(scores.shape, generator=generator)
    scores[kinds < 0.05] = float("nan")
    scores[(kinds > 0.05) & (kinds < 0.1)] = float("inf")
    scores[..., :20] = -float("inf")
    keeps = [length // 2 for length in lengths]
    protects = [17, keeps[1] - WINDOW, 1, 0]
    cache.check_moves(
        keeps, cache.source, scores.to(DEVICE), None, scope=scope, order=order, protects=protects
    )


@pytest.mark.parametrize(
    ("scope", "order"), VARIANTS if GPU else [("layer", "temporal"), ("global", "score")]
)
def test_rounds_share_scores_in_parts_of_any_size(scope: Scope, order: Order) -> None:
    """Proves whole rounds, and that cutting them by requests and by layers changes no byte of the result."""
    lengths = [900, 400, 700] if GPU else [30, 130, 25]
    keeps = [500, 300, 699] if GPU else [20, 100, 24]
    lam = [0.1, 1.0, 0.0]
    results = []
    for scratch_bytes in (64 << 20, 80_000 if GPU else 15_000):
        cache = Cache(lengths, layers=3, heads=2, group=2, seed=4)
        scores = cache.score(lam)
        cache.check_moves(
            keeps, cache.source, scores, lam, scope=scope, order=order, scratch_bytes=scratch_bytes
        )
        results.append(torch.stack(cache.layers))
    assert torch.equal(results[0], results[1])


def test_shared_scores_equal_the_float64_reference() -> None:
    """Proves means over an odd number of heads and sums over layers, in one part and in several."""
    lengths = [3000, 1025] if GPU else [150, 70]
    cache = Cache(lengths, layers=3, heads=5, seed=9)
    generator = torch.Generator().manual_seed(1)
    scores = torch.randn(3, 2, 5, max(lengths), generator=generator).to(DEVICE)
    rounding = {"rtol": 0.0, "atol": 15 * 5 * 2.0**-24}  # float32 sums of 15 numbers below 5
    assert scores.abs().max() < 5
    for scratch_bytes in (64 << 20, 700_000 if GPU else 40_000):
        rounds = cache.round(scope="global", scratch_bytes=scratch_bytes)
        most_slices = 0
        for slices in rounds.scratch.slices(cache.batch(lengths)):
            most_slices = max(most_slices, len(slices))
            for work in slices:
                own = scores[work.first_layer :, work.first_request :][: work.layers, : work.requests]
                layer = share_in_layer(work, own, window=WINDOW).clone()
                add_layers(work, own, window=WINDOW)
                for request in range(work.requests):
                    candidates = lengths[work.first_request + request] - WINDOW
                    expected = naive.shared_scores(own[:, request, :, :candidates].double(), "layer")
                    found = layer[:, request, :, :candidates].double()
                    torch.testing.assert_close(found, expected, **rounding)
            tables = slices[0].shared.view(slices[0].requests, slices[0].capacity)
            for request, table in enumerate(tables, slices[0].first_request):
                candidates = lengths[request] - WINDOW
                expected = naive.shared_scores(scores[:, request, :, :candidates].double(), "global")[0, 0]
                torch.testing.assert_close(table[:candidates].double(), expected, **rounding)
        assert (most_slices == 1) == (scratch_bytes == 64 << 20)


@pytest.mark.parametrize(("scope", "order"), [("head", "temporal"), ("layer", "score"), ("global", "score")])
def test_warm_up_leaves_the_cache_as_it_is(scope: Scope, order: Order) -> None:
    """Proves that compiling the kernels at start changes no byte of the cache."""
    cache = Cache([30], layers=2, heads=2, group=2)
    before = [layer.clone() for layer in cache.layers]
    cache.round(scope=scope).warm_up([cache.scorer([0.5])], order)
    assert all(map(torch.equal, cache.layers, before))


def test_wrong_calls_are_refused() -> None:
    """Proves that arguments that do not fit are refused before anything is moved."""
    cache = Cache([40], layers=2)
    rounds, lam = cache.round(), torch.ones(1, device=DEVICE)
    scorer, batch = cache.scorer([1.0]), cache.batch([20])
    with pytest.raises(ValueError, match="fewer than the window"):
        rounds.run(scorer, cache.batch([WINDOW - 1]))
    with pytest.raises(ValueError, match="protects more tokens than it keeps"):
        rounds.run(scorer, cache.batch([20], protects=[20 - WINDOW + 1]))
    with pytest.raises(ValueError, match="does not fit 2 layers"):
        rounds.run(RkvScorer(cache.queries[:1], cache.factors, lam), batch)
    with pytest.raises(ValueError, match=f"does not fit 2 layers, {WINDOW} tokens"):
        rounds.run(RkvScorer(cache.queries[:, :, : WINDOW - 1], cache.factors, lam), batch)
    with pytest.raises(ValueError, match="lam must be"):
        rounds.run(RkvScorer(cache.queries, cache.factors, lam.double()), batch)
    with pytest.raises(ValueError, match=r"factors must be float32 \[2, 1\]"):
        rounds.run(RkvScorer(cache.queries, cache.factors[:1], lam), batch)
    with pytest.raises(ValueError, match="query ring must be contiguous float32"):
        rounds.run(RkvScorer(cache.queries.half(), cache.factors, lam), batch)
    with pytest.raises(ValueError, match="does not exist"):
        rounds.run(scorer, cache.batch([20], [[cache.num_pages, 0]]))
    with pytest.raises(ValueError, match="scratch memory"):
        cache.round(scratch_bytes=2048).run(scorer, batch)
    with pytest.raises(ValueError, match="do not fit the batch"):
        rounds.run(GivenScores(lambda layer: torch.zeros(1, 1, 10, device=DEVICE)), batch)
    with pytest.raises(ValueError, match="threshold"):
        RkvScorer(cache.queries, cache.factors, lam, threshold=1.5)
    with pytest.raises(ValueError, match="pool_kernel"):
        RkvScorer(cache.queries, cache.factors, lam, pool_kernel=2)
