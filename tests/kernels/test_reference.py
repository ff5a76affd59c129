"""The float64 reference against cases worked out by hand, and the tiled torch path against the reference."""

from __future__ import annotations

import math

import pytest
import torch

from rkv_vllm.kernels import naive, tiled

BOTH = pytest.mark.parametrize("module", [naive, tiled], ids=["naive", "tiled"])


def random_keys(*shape: int, shift: float = 0.0, seed: int = 0) -> torch.Tensor:
    """float64 [*, D] with a common direction, so that a larger shift makes more pairs similar."""
    generator = torch.Generator().manual_seed(seed)
    common = torch.randn(*shape[:-2], 1, shape[-1], generator=generator)
    return (torch.randn(*shape, generator=generator) + shift * common).double()


@BOTH
def test_importance_by_hand(module) -> None:  # type: ignore[no-untyped-def]
    """Proves the order of steps: maximum over the group, window dropped, softmax, mean, then pooling."""
    keys = torch.tensor([[[math.log(2.0)], [0.0], [0.0], [5.0]]])  # one head, three candidates, window 1
    queries = torch.tensor([[[1.0]], [[-1.0]]])  # two query heads of one group, one row
    plain = module.importance(queries, keys, window=1, pool_kernel=1, scale=1.0)
    torch.testing.assert_close(plain, torch.tensor([[0.5, 0.25, 0.25]]))
    pooled = module.importance(queries, keys, window=1, pool_kernel=3, scale=1.0)
    torch.testing.assert_close(pooled, torch.tensor([[0.5, 0.5, 0.25]]))


@BOTH
def test_importance_reads_the_head_of_its_group(module) -> None:  # type: ignore[no-untyped-def]
    """Proves that query head h * G + g reads key head h, whatever the order of the window's rows."""
    keys = random_keys(3, 20, 8)
    queries = random_keys(6, 4, 8, seed=1)
    whole = module.importance(queries, keys, window=4, pool_kernel=7)
    for head in range(3):
        alone = module.importance(
            queries[2 * head : 2 * head + 2].flip(1), keys[head : head + 1], window=4, pool_kernel=7
        )
        torch.testing.assert_close(whole[head : head + 1], alone)


@BOTH
def test_redundancy_by_hand(module) -> None:  # type: ignore[no-untyped-def]
    """Proves which link each row cuts: its newest match, newer keys included, or slot 0."""
    # Directions in degrees; cosines above 0.5 join slots 0 and 1 (50 degrees), 1 and 3 (40), 0 and 3 (10).
    angles = torch.tensor([0.0, 50.0, 180.0, 10.0], dtype=torch.float64) * math.pi / 180
    keys = torch.stack([angles.cos(), angles.sin()], dim=-1).unsqueeze(0) * 3.0
    cosine = torch.cos(angles[:, None] - angles[None, :]).fill_diagonal_(0.0)
    for row, cut in enumerate([3, 3, 0, 1]):
        cosine[row, cut] = 0.0
    expected = (cosine.sum(dim=0) / 4).softmax(dim=0).unsqueeze(0)
    actual = module.redundancy(keys, threshold=0.5)
    torch.testing.assert_close(actual, expected.to(actual.dtype), rtol=1e-6, atol=1e-7)


@BOTH
def test_newest_duplicate_is_spared(module) -> None:  # type: ignore[no-untyped-def]
    """Proves that the newest of a set of duplicates has the lowest redundancy, even in the window."""
    keys = torch.eye(16, dtype=torch.float64).unsqueeze(0)
    keys[0, [3, 7, 12, 15]] = keys[0, 3].clone()
    redundant = module.redundancy(keys, threshold=0.5)[0]
    assert redundant[15] < redundant[12] < redundant[7]  # slot 12 is the newest match of slot 15
    torch.testing.assert_close(redundant[7], redundant[3])


@BOTH
@pytest.mark.parametrize("value", [0.0, 2.0])
def test_equal_keys_stay_finite(module, value: float) -> None:  # type: ignore[no-untyped-def]
    """Proves zero keys and equal keys finite, redundancy summing to one over all keys."""
    keys = torch.full((2, 12, 4), value, dtype=torch.float64)
    redundant = module.redundancy(keys, threshold=0.5)
    torch.testing.assert_close(redundant.sum(dim=-1), torch.ones(2, dtype=redundant.dtype))
    scores = module.rkv_scores(keys[:, :3], keys, window=3, lam=0.1, threshold=0.5, pool_kernel=7)
    assert scores.isfinite().all()


@BOTH
def test_score_mixes_importance_and_redundancy(module) -> None:  # type: ignore[no-untyped-def]
    """Proves the score linear in lam, importance alone at 1, redundancy alone at 0, scale passed on."""
    keys, queries = random_keys(2, 30, 8, shift=0.5), random_keys(4, 8, 8, seed=1)
    settings = {"window": 8, "threshold": 0.5, "pool_kernel": 7, "scale": 0.3}
    ends = [module.rkv_scores(queries, keys, lam=lam, **settings) for lam in (0.0, 1.0)]
    mixed = module.rkv_scores(queries, keys, lam=0.25, **settings)
    torch.testing.assert_close(mixed, 0.75 * ends[0] + 0.25 * ends[1])
    torch.testing.assert_close(ends[0], -module.redundancy(keys, threshold=0.5)[:, :22])
    torch.testing.assert_close(ends[1], module.importance(queries, keys, window=8, pool_kernel=7, scale=0.3))


@BOTH
def test_selection_orders_and_breaks_ties(module) -> None:  # type: ignore[no-untyped-def]
    """Proves ascending order, ties to the lower index, NaN lowest, and the counts none and all."""
    scores = torch.tensor([[1.0, 3.0, 2.0, 2.0, 2.0, 0.0], [-0.0, 0.0, float("nan"), -1.0, 0.0, -0.0]])
    assert module.select(scores, 3).tolist() == [[1, 2, 3], [0, 1, 4]]
    assert module.select(scores, 5).tolist() == [[0, 1, 2, 3, 4], [0, 1, 3, 4, 5]]
    assert module.select(scores, 6).tolist() == [[0, 1, 2, 3, 4, 5]] * 2
    assert module.select(scores, 0).shape == (2, 0)
    with pytest.raises(ValueError, match="cannot select 7 of 6"):
        module.select(scores, 7)


@BOTH
def test_best_first_breaks_ties_too(module) -> None:  # type: ignore[no-untyped-def]
    """Proves the order of the scores: best first, equals and both zeros by the lower index, NaN last."""
    scores = torch.tensor([[1.0, 3.0, 2.0, 2.0, 2.0, 0.0], [-0.0, 0.0, float("nan"), -1.0, 0.0, -0.0]])
    assert module.select(scores, 3, "score").tolist() == [[1, 2, 3], [0, 1, 4]]
    assert module.select(scores, 6, "score").tolist() == [[1, 2, 3, 4, 0, 5], [0, 1, 4, 5, 3, 2]]
    assert module.select(scores, 0, "score").shape == (2, 0)


def test_shared_scores_by_hand() -> None:
    """Proves the mean over heads, the sum of means over layers, and that one NaN is everyone's."""
    scores = torch.tensor([[[1.0, 5.0, 0.0], [3.0, 5.0, 2.0]], [[8.0, math.nan, 1.0], [0.0, 1.0, 2.0]]])
    assert naive.shared_scores(scores, "head") is scores
    layer = naive.shared_scores(scores, "layer")
    assert layer.shape == scores.shape
    assert layer[0].tolist() == [[2.0, 5.0, 1.0]] * 2
    assert layer[1, :, ::2].tolist() == [[4.0, 1.5]] * 2 and layer[1, :, 1].isnan().all()
    every = naive.shared_scores(scores, "global")
    assert every.flatten(0, 1)[:, ::2].tolist() == [[6.0, 2.5]] * 4 and every[..., 1].isnan().all()


@BOTH
def test_impossible_arguments_are_refused(module) -> None:  # type: ignore[no-untyped-def]
    """Proves the refusal of no candidates, an even pooling kernel, and heads that do not divide."""
    keys, queries = random_keys(2, 8, 4), random_keys(4, 8, 4)
    with pytest.raises(ValueError, match="leave no candidate"):
        module.importance(queries, keys, window=8, pool_kernel=7)
    with pytest.raises(ValueError, match="must be odd"):
        module.importance(queries, keys, window=4, pool_kernel=6)
    with pytest.raises(ValueError, match="Hq must be a multiple of H"):
        module.importance(queries[:3], keys, window=4, pool_kernel=7)


def test_compaction_keeps_the_window_and_the_order() -> None:
    """Proves that the window survives, that order stays temporal, and that keeping all is identity."""
    scores = torch.tensor([[0.1, 0.9, 0.5], [0.9, 0.1, 0.5]])
    assert naive.kept_indices(scores, 4, 5).tolist() == [[1, 2, 3, 4], [0, 2, 3, 4]]
    assert naive.kept_indices(scores, 5, 5).tolist() == [[0, 1, 2, 3, 4]] * 2
    tokens = torch.arange(20.0).view(2, 5, 2)
    moved = naive.compact(tokens, naive.kept_indices(scores, 4, 5))
    assert moved[0, :, 0].tolist() == [2.0, 4.0, 6.0, 8.0] and moved[1, :, 0].tolist() == [
        10.0,
        14.0,
        16.0,
        18.0,
    ]


def test_page_masses_by_hand() -> None:
    """Proves page masses summed over heads, the last page in part."""
    assert naive.page_scores(torch.tensor([[1.0, 2.0, 3.0], [10.0, 20.0, 30.0]]), 2).tolist() == [33.0, 33.0]


@pytest.mark.parametrize("shift", [0.0, 0.5, 0.9, 3.0])
@pytest.mark.parametrize(
    "shape", [(2, 9, 16), (3, 37, 80), (1, 256, 64), (2, 513, 64), (1, 800, 32)], ids=str
)
def test_tiled_scores_equal_the_reference(shape: tuple[int, int, int], shift: float) -> None:
    """Proves the tiled path right over odd lengths, both of its searches, and a leading batch dimension."""
    keys = random_keys(2, *shape, shift=shift)
    queries = random_keys(2, 3 * shape[0], 8, shape[2], seed=1)
    settings = {"window": 8, "threshold": 0.5, "pool_kernel": 7}
    actual = tiled.rkv_scores(queries, keys, lam=0.1, **settings)
    flat, units = keys.flatten(0, 1), tiled._units(keys.flatten(0, 1), 1e-8)
    dense = tiled._search_dense(units, flat, 0, 0.5, 1e-8)
    assert torch.equal(dense, tiled._search_newest_first(units, flat, 0, 0.5, 1e-8))
    for layer in range(2):
        expected = naive.rkv_scores(queries[layer], keys[layer], lam=0.1, **settings)
        bound = 2e-5 / shape[1] + 2e-5 * expected.abs()
        assert ((actual[layer].double() - expected).abs() <= bound).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_tiled_accepts_every_float_dtype(dtype: torch.dtype) -> None:
    """Proves float32 accumulation: 16-bit inputs give the scores of the same numbers in float64."""
    keys = random_keys(2, 120, 64, shift=0.7).to(dtype)
    queries = random_keys(8, 8, 64, seed=1).to(dtype)
    settings = {"window": 8, "lam": 0.1, "threshold": 0.5, "pool_kernel": 7}
    actual = tiled.rkv_scores(queries, keys, **settings)
    expected = naive.rkv_scores(queries.double(), keys.double(), **settings)
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual.double(), expected, rtol=2e-5, atol=1e-7)


def test_tiles_of_any_size_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Proves that a long request, which is cut into tiles of rows and columns, scores as a short one does."""
    keys, queries = random_keys(3, 150, 16, shift=0.6), random_keys(6, 8, 16, seed=1)
    settings = {"window": 8, "lam": 0.1, "threshold": 0.5, "pool_kernel": 7}
    whole = tiled.rkv_scores(queries, keys, **settings)
    monkeypatch.setattr(tiled, "_TILE_ELEMENTS", 600)
    monkeypatch.setattr(tiled, "_COLUMNS", 20)
    torch.testing.assert_close(tiled.rkv_scores(queries, keys, **settings), whole, rtol=1e-5, atol=1e-8)


def test_temporaries_stay_within_their_bound() -> None:
    """Proves that no operation of the tiled path makes a tensor above the bound, at 20,000 tokens."""
    keys = random_keys(1, 20_000, 16, shift=2.0).float()
    queries = random_keys(4, 8, 16, seed=1).float()

    class Largest(torch.utils._python_dispatch.TorchDispatchMode):
        size = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            result = function(*args, **(kwargs or {}))
            for each in result if isinstance(result, tuple) else (result,):
                if isinstance(each, torch.Tensor):
                    self.size = max(self.size, each.numel() * each.element_size())
            return result

    with Largest() as largest:
        tiled.rkv_scores(queries, keys, window=8, lam=0.1, threshold=0.5, pool_kernel=7)
    assert 2**20 < largest.size <= tiled.TEMPORARY_BYTES


def test_tiled_selection_equals_the_reference() -> None:
    """Proves the exact tie rule of the tiled selection over leading dimensions, on scores full of ties."""
    generator = torch.Generator().manual_seed(3)
    scores = torch.randint(0, 4, (2, 3, 200), generator=generator).float()
    for count in (1, 77, 199):
        expected = naive.select(scores.flatten(0, 1), count).view(2, 3, count)
        assert torch.equal(tiled.select(scores, count), expected)
