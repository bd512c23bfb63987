"""What a code meant before a refit and what means the same now: per level, old codes are matched to new codes by their items.

A code is the set of items that carry it at its level, whatever their codes at the other levels: that is how a model reads it, with one
table row per level and code. So two codes of different fits are the same as far as their item sets agree (Jaccard index), and centroids,
whose space may have changed too, do not enter. Pure: two arrays of codes in, maps and counts out; what is done with them is
training/migrate.py's.
"""

from dataclasses import dataclass

import numpy as np
from scipy.optimize import linear_sum_assignment
from scipy.sparse import coo_array, csr_array, diags_array
from scipy.sparse.csgraph import connected_components

from gpr_dist.errors import TokenizerError

# N items that both fits have  L levels  V new codes per level  W old codes per level  E candidate pairs

NO_CODE = -1
_ITEMS_AT_ONCE = 4_194_304


@dataclass(frozen=True)
class LevelMatch:
    """What each new code of one level was before."""

    source_V: np.ndarray  # int64, the old code it continues, NO_CODE = none; no old code twice
    jaccard_V: np.ndarray  # float64, |old ∩ new| / |old ∪ new| with that code, by weight; 0 where there is none
    used_V: np.ndarray  # bool, whether any of the N items carries the new code
    origin_VW: csr_array  # float64, shares of the new code's items by the old code they had; rows add up to 1, or 0 where not used

    @property
    def kept_V(self) -> np.ndarray:
        """New codes that continue an old one."""
        return self.source_V != NO_CODE

    @property
    def moved_V(self) -> np.ndarray:
        """Kept under another number."""
        return self.kept_V & (self.source_V != np.arange(len(self.source_V)))


@dataclass(frozen=True)
class Matching:
    """All levels, and what becomes of the items."""

    levels: tuple[LevelMatch, ...]
    num_items: int  # N
    kept_frac_L: np.ndarray  # share of the items whose code of the level continues their old one
    whole_frac: float  # share of the items for which that holds at every level
    weighted_kept_frac_L: np.ndarray  # the same two by weight
    weighted_whole_frac: float


def match_codes(old_NL: np.ndarray, new_NL: np.ndarray, old_size: int, new_size: int, min_jaccard: float,
                weight_N: np.ndarray | None = None) -> Matching:
    """Match the codes of two fits over the same items, each level by itself.

    A pair is a candidate when its Jaccard index is at least `min_jaccard`; among the candidates, the assignment (each code at most once)
    with the largest total weight of shared items is taken. Above 0.5 the candidates are an assignment already: two sets that each share
    more than half of their union with a third overlap. A code has at most 1 / min_jaccard candidates, so the assignment falls into
    small independent parts, and no V x V table is made (half a gigabyte for 8192 codes).

    Args:
        old_NL, new_NL: int [N, L], row = item, the same items in both.
        old_size, new_size: codes per level W and V; they may differ.
        min_jaccard: 0 < min_jaccard <= 1.
        weight_N: how much each item counts, > 0; none = all the same. With the items' frequency in the training data, a code is what the
            model mostly met under it.
    Raises: TokenizerError when the numbers of levels differ.
    Codes that no item carries in either fit keep their number: nothing says that they changed.
    """
    assert len(old_NL) == len(new_NL) and 0 < min_jaccard <= 1, (old_NL.shape, new_NL.shape, min_jaccard)
    if old_NL.shape[1] != new_NL.shape[1]:
        raise TokenizerError(f"the old tokenizer has {old_NL.shape[1]} levels, the new one {new_NL.shape[1]}: no code means the same in "
                             "both; refit with the same num_levels, or train a new model")
    num_items, num_levels = old_NL.shape
    weight_N = np.ones(num_items) if weight_N is None else np.asarray(weight_N, np.float64)
    assert weight_N.shape == (num_items,) and (num_items == 0 or weight_N.min() > 0), "weights must be positive, one per item"
    levels, kept_NL = [], np.zeros((num_items, num_levels), bool)
    for level in range(num_levels):
        levels.append(_match_level(old_NL[:, level], new_NL[:, level], old_size, new_size, min_jaccard, weight_N))
        kept_NL[:, level] = levels[-1].source_V[new_NL[:, level]] == old_NL[:, level]
    total = max(weight_N.sum(), 1e-300)
    whole_N = kept_NL.all(1)
    return Matching(tuple(levels), num_items, kept_NL.sum(0) / max(1, num_items), float(whole_N.sum() / max(1, num_items)),
                    weight_N @ kept_NL / total, float(weight_N @ whole_N / total))


def shared_weight(old_N: np.ndarray, new_N: np.ndarray, old_size: int, new_size: int, weight_N: np.ndarray) -> csr_array:
    """Weight of the items under each pair of an old and a new code: float64 [W, V], one stored value per pair that occurs."""
    shared_WV = csr_array((old_size, new_size), dtype=np.float64)
    for lo in range(0, len(old_N), _ITEMS_AT_ONCE):
        part = slice(lo, lo + _ITEMS_AT_ONCE)
        shared_WV += coo_array((weight_N[part], (old_N[part], new_N[part])), shape=(old_size, new_size)).tocsr()
    return shared_WV


def _match_level(old_N: np.ndarray, new_N: np.ndarray, old_size: int, new_size: int, min_jaccard: float,
                 weight_N: np.ndarray) -> LevelMatch:
    shared_WV = shared_weight(old_N, new_N, old_size, new_size, weight_N)
    old_mass_W, new_mass_V = shared_WV.sum(1), shared_WV.sum(0)
    pairs = shared_WV.tocoo()
    old_E, new_E = pairs.coords
    jaccard_E = pairs.data / (old_mass_W[old_E] + new_mass_V[new_E] - pairs.data)
    candidate_E = jaccard_E >= min_jaccard * (1 - 1e-9)  # sums of weights round
    old_E, new_E, jaccard_E, weight_E = (values[candidate_E] for values in (old_E, new_E, jaccard_E, pairs.data))
    source_V, jaccard_V = np.full(new_size, NO_CODE, np.int64), np.zeros(new_size)
    chosen = _assign(old_E, new_E, weight_E, old_size, new_size)
    source_V[new_E[chosen]], jaccard_V[new_E[chosen]] = old_E[chosen], jaccard_E[chosen]
    used_V = new_mass_V > 0
    idle = np.flatnonzero((old_mass_W[:new_size] == 0) & ~used_V[:old_size])
    source_V[idle] = idle
    origin_VW = csr_array(diags_array(1 / np.where(used_V, new_mass_V, 1)) @ shared_WV.T)
    return LevelMatch(source_V, jaccard_V, used_V, origin_VW)


def _assign(old_E: np.ndarray, new_E: np.ndarray, weight_E: np.ndarray, old_size: int, new_size: int) -> np.ndarray:
    """Indices of the candidate pairs of the assignment with the largest total weight."""
    contested_E = (np.bincount(old_E, minlength=old_size)[old_E] > 1) | (np.bincount(new_E, minlength=new_size)[new_E] > 1)
    # A pair next to a contested one is contested itself, so what is left out here meets nobody.
    chosen = [np.flatnonzero(~contested_E)]
    rest = np.flatnonzero(contested_E)
    graph = coo_array((np.ones(len(rest)), (old_E[rest], old_size + new_E[rest])), shape=(old_size + new_size,) * 2)
    part_E = connected_components(graph, directed=False)[1][old_E[rest]] if len(rest) else np.zeros(0, np.int64)
    order = np.argsort(part_E, kind="stable")
    for edges in np.split(rest[order], np.flatnonzero(np.diff(part_E[order])) + 1):
        olds, row = np.unique(old_E[edges], return_inverse=True)
        news, column = np.unique(new_E[edges], return_inverse=True)
        weights, number = np.zeros((len(olds), len(news))), np.full((len(olds), len(news)), NO_CODE)
        weights[row, column], number[row, column] = weight_E[edges], edges
        found = number[linear_sum_assignment(weights, maximize=True)]
        chosen.append(found[found != NO_CODE])  # the solver fills up with pairs that are no candidates
    return np.concatenate(chosen)


def format_matching(matching: Matching) -> str:
    """The statistics as a small text table; "by weight" where items count by their frequency."""
    lines = ["level   codes   kept: in place   moved   Jaccard   re-initialised   unused   items on kept codes   by weight"]
    for number, level in enumerate(matching.levels, 1):
        kept, moved, used = level.kept_V & level.used_V, level.moved_V, level.used_V
        jaccard = f"{level.jaccard_V[kept].mean():.3f}" if kept.any() else "-"
        lines.append(f"{number:>5}   {len(used):>5}   {int((kept & ~moved).sum()):>14}   {int(moved.sum()):>5}   {jaccard:>7}   "
                     f"{int((used & ~kept).sum()):>14}   {int((~used).sum()):>6}   {matching.kept_frac_L[number - 1]:>19.2%}   "
                     f"{matching.weighted_kept_frac_L[number - 1]:>9.2%}")
    lines.append(f"{matching.whole_frac:.2%} of the {matching.num_items:,} items of both keep the meaning of their whole semantic ID, "
                 f"{matching.weighted_whole_frac:.2%} by weight")
    return "\n".join(lines)
