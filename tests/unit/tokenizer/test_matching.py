"""Matching codes of two fits: identity, permutations, clusters that split, merge or are replaced, and the dense assignment."""

import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment

from gpr_dist.errors import TokenizerError
from gpr_dist.tokenizer.matching import NO_CODE, format_matching, match_codes

N, L, V = 6000, 3, 32


def random_codes(seed: int = 0, size: int = V) -> np.ndarray:
    """Uneven clusters, every code in use."""
    rng = np.random.default_rng(seed)
    share = rng.dirichlet(np.full(size, 3.0), L)
    codes = np.stack([rng.choice(size, N, p=share[level]) for level in range(L)], axis=1)
    codes[:size] = np.arange(size)[:, None]
    return codes


def permuted(codes: np.ndarray, seed: int = 1, size: int = V) -> tuple[np.ndarray, np.ndarray]:
    order_LV = np.stack([np.random.default_rng(seed + level).permutation(size) for level in range(L)])
    return order_LV[np.arange(L), codes], order_LV


@pytest.mark.parametrize("min_jaccard", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("weighted", [False, True])
def test_the_same_fit_keeps_everything_where_it_is(min_jaccard, weighted):
    codes = random_codes()
    codes[:, 1] = np.minimum(codes[:, 1], V - 3)  # two codes of level 2 that no item has
    weight = np.random.default_rng(5).random(N) + 1e-6 if weighted else None
    matching = match_codes(codes, codes, V, V, min_jaccard, weight)
    for level in matching.levels:
        assert (level.source_V == np.arange(V)).all() and not level.moved_V.any()
        np.testing.assert_allclose(level.origin_VW.toarray(), np.diag(level.used_V), rtol=1e-12)
    assert matching.whole_frac == 1 and matching.weighted_whole_frac == pytest.approx(1) and matching.num_items == N
    assert [int((~level.used_V).sum()) for level in matching.levels] == [0, 2, 0]


def test_a_permutation_is_found():
    codes = random_codes()
    new, order_LV = permuted(codes)
    matching = match_codes(codes, new, V, V, 1.0)
    for level, order_V in zip(matching.levels, order_LV, strict=True):
        assert (level.source_V[order_V] == np.arange(V)).all() and (level.jaccard_V == 1).all()
        assert (level.moved_V == (level.source_V != np.arange(V))).all() and level.moved_V.sum() > V / 2
    assert matching.whole_frac == 1 and (matching.kept_frac_L == 1).all()


def test_split_merged_and_replaced_clusters_are_the_only_ones_that_change():
    codes = random_codes()
    new, order_LV = permuted(codes, size=V)
    rng = np.random.default_rng(2)
    split, merged_a, merged_b, *replaced = order_LV[0, :6]
    level = new[:, 0]
    members = np.flatnonzero(level == split)
    level[members[: len(members) // 2]] = V  # a new code takes half: neither half has more than half of the union
    level[level == merged_b] = merged_a
    mixed = np.isin(level, replaced)
    level[mixed] = rng.permutation(level[mixed])  # the items of three clusters are dealt anew
    matching = match_codes(codes, new, V, V + 1, 0.6)
    changed = {int(split), V, int(merged_a), int(merged_b), *map(int, replaced)}
    first = matching.levels[0]
    # merged_a keeps its meaning if it was the larger part of the union
    sizes = {int(code): int((codes[:, 0] == np.flatnonzero(order_LV[0] == code)[0]).sum()) for code in (merged_a, merged_b)}
    larger = max(sizes, key=sizes.get)
    if sizes[larger] >= 0.6 * sum(sizes.values()):
        changed.remove(int(merged_a))
        assert order_LV[0, first.source_V[merged_a]] == larger
    assert {code for code in range(V + 1) if not first.kept_V[code]} == changed
    untouched = [code for code in range(V) if code not in changed and code != merged_a]
    assert all(order_LV[0, first.source_V[code]] == code for code in untouched)
    for level_match in matching.levels[1:]:
        assert level_match.kept_V[:V].all() and not level_match.kept_V[V]
    assert not first.used_V[merged_b] and first.origin_VW[[merged_b]].nnz == 0
    origin = first.origin_VW.toarray()
    np.testing.assert_allclose(origin.sum(1)[first.used_V], 1)
    assert origin[V].argmax() == np.flatnonzero(order_LV[0] == split)[0] and origin[V].max() == 1
    kept_items = first.kept_V[new[:, 0]]
    assert matching.kept_frac_L[0] <= kept_items.mean() and matching.kept_frac_L[1] == 1 == matching.kept_frac_L[2]
    assert matching.whole_frac == pytest.approx((codes[:, 0] == first.source_V[new[:, 0]]).mean())


@pytest.mark.parametrize(("old_size", "new_size"), [(V, V + 9), (V + 9, V)])
def test_codebooks_may_grow_and_shrink(old_size, new_size):
    codes = random_codes(size=min(old_size, new_size))
    new, order_LV = permuted(codes, size=min(old_size, new_size))
    matching = match_codes(codes, new, old_size, new_size, 0.5)
    for level, order_V in zip(matching.levels, order_LV, strict=True):
        assert len(level.source_V) == new_size and level.origin_VW.shape == (new_size, old_size)
        assert (level.source_V[order_V] == np.arange(V)).all()
        assert not level.used_V[V:].any() and (level.source_V[V:] == NO_CODE).all()


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("min_jaccard", [0.05, 0.2, 0.5])
def test_as_good_as_the_dense_assignment(seed, min_jaccard):
    """scipy's on the whole table of overlaps, pairs below the threshold worth nothing; each code at most once on either side."""
    rng = np.random.default_rng(seed)
    old, flip = random_codes(seed), rng.random((N, L)) < rng.choice([0.1, 0.4, 0.7])
    new = np.where(flip, (old * 7 + rng.integers(0, 3, (N, L))) % V, (old + 5) % V)
    weight = rng.random(N) + 0.01
    matching = match_codes(old, new, V, V, min_jaccard, weight)
    for number, level in enumerate(matching.levels):
        shared = np.zeros((V, V))
        np.add.at(shared, (old[:, number], new[:, number]), weight)
        jaccard = shared / (shared.sum(1)[:, None] + shared.sum(0) - shared)
        worth = np.where(jaccard >= min_jaccard, shared, 0)
        best = worth[linear_sum_assignment(worth, maximize=True)].sum()
        kept = np.flatnonzero(level.kept_V)
        assert len(set(level.source_V[kept])) == len(kept)
        np.testing.assert_allclose(level.jaccard_V[kept], jaccard[level.source_V[kept], kept])
        assert (level.jaccard_V[kept] >= min_jaccard * (1 - 1e-9)).all()
        assert worth[level.source_V[kept], kept].sum() == pytest.approx(best)
        np.testing.assert_allclose(level.origin_VW.toarray(), (shared / shared.sum(0)).T)


def test_weights_decide_what_a_code_is():
    """One frequent item against many that nobody sees: by items the code stays, by weight it goes with the frequent one."""
    old = np.array([[0]] * 10 + [[1]] * 10)
    new = np.array([[1]] + [[0]] * 9 + [[1]] * 10)
    weight = np.array([1000.0] + [1.0] * 19)
    assert match_codes(old, new, 2, 2, 0.5).levels[0].source_V.tolist() == [0, 1]
    assert match_codes(old, new, 2, 2, 0.5, weight).levels[0].source_V.tolist() == [NO_CODE, 0]


def test_levels_must_agree_and_no_items_in_common_keeps_nothing():
    codes = random_codes()
    with pytest.raises(TokenizerError, match=r"old tokenizer has 3 levels, the new one 2"):
        match_codes(codes, codes[:, :2], V, V, 0.5)
    none = match_codes(codes[:0], codes[:0], V, V, 0.5)
    assert none.num_items == 0 and none.whole_frac == 0 and not any(level.used_V.any() for level in none.levels)


def test_table_counts_what_happened():
    codes = random_codes()
    new, _ = permuted(codes)
    new[new[:, 2] == 4, 2] = 5
    matching = match_codes(codes, new, V, V, 0.9)
    rows = [line.split() for line in format_matching(matching).splitlines()[1:-1]]
    for row, level in zip(rows, matching.levels, strict=True):
        in_place, moved, remade, unused = (int(row[column]) for column in (2, 3, 5, 6))
        assert in_place + moved + remade + unused == V == int(row[1])
        assert moved == level.moved_V.sum() and remade == (level.used_V & ~level.kept_V).sum()
    assert [row[6] for row in rows] == ["0", "0", "1"] and [row[5] for row in rows] == ["0", "0", "1"]
