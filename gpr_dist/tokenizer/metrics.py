"""Quality of semantic IDs (GPR Table 1): how many items share one, how evenly codes are used, how alike the sharers are.

Pure functions of codes, codebooks and embeddings, in bounded memory beside the sort of the packed IDs; embeddings may be memory
maps. `measure` collects them in the report that is stored with the tokenizer and printed by launch/fit_tokenizer.py.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from pydantic import Field

from gpr_dist.config import Config
from gpr_dist.tokenizer.quantizer import Quantizer
from gpr_dist.tokenizer.residuals import measure_residuals

# N items  L levels  V codes per level  D embedding dim  G groups: distinct semantic IDs, in the order of their packed keys

_READ_ROWS = 65_536
_PAS_ITEMS = 2_000_000  # PAS is measured on whole colliding groups of at most about this many items
_GROUP_ITEMS = 65_536  # of a group larger than this, every k-th item stands for all


class Groups(NamedTuple):
    """Items by semantic ID, as CSR: group g holds `items_N[offsets_G1[g]:offsets_G1[g + 1]]`, ascending."""

    keys_G: np.ndarray  # int64, ascending
    offsets_G1: np.ndarray  # int64 [G+1]
    items_N: np.ndarray  # int64


class TokenizerReport(Config):
    """Measured on the whole catalogue. Lists have one entry per level."""

    num_items: int
    num_distinct: int
    """semantic IDs in use"""
    collision: float
    """1 - distinct semantic IDs / items (Table 1)"""
    not_alone_frac: float
    """share of the items that share their semantic ID with another item"""
    largest_group: int
    """items on the most crowded semantic ID"""
    cur: tuple[float, ...]
    """codebook utilisation rate: used codes / V (Table 1)"""
    entropy_bits: tuple[float, ...]
    """of the code distribution over items; log2(V) when all codes are equally frequent"""
    pas: float | None
    """mean cosine similarity of the item pairs that share a semantic ID (Table 1); none when no two items do"""
    reconstruction_error: tuple[float, ...]
    """squared error left after the level / squared distance of the embeddings to their mean (0 = exact, 1 = no better than the mean)"""
    variance: float
    """mean squared distance of the embeddings to their mean; with the next two, what a drift report compares later items with"""
    error_std: tuple[float, ...]
    """standard deviation over the items of squared error / variance"""
    distance_quantiles: tuple[tuple[float, ...], ...]
    """residuals.QUANTILES of the items' distances to their nearest code of the level"""
    history: dict[str, tuple[float, ...]] = Field(default_factory=dict)
    """curves of the fit by name, e.g. the loss of each epoch"""


def measure(embeddings_ND: np.ndarray, codes_NL: np.ndarray, quantizer: Quantizer,
            history: Mapping[str, Sequence[float]] | None = None) -> TokenizerReport:
    """All metrics of one tokenizer on one catalogue. Args: history: curves of the fit by name, kept as they are."""
    codebook_size = quantizer.config.codebook_size
    groups = group_items(codes_NL, codebook_size)
    sizes_G = np.diff(groups.offsets_G1)
    usage_LV = code_usage(codes_NL, codebook_size)
    residuals = measure_residuals(embeddings_ND, codes_NL, quantizer)
    return TokenizerReport(
        num_items=len(codes_NL),
        num_distinct=len(sizes_G),
        collision=1 - len(sizes_G) / len(codes_NL),
        not_alone_frac=float(sizes_G[sizes_G > 1].sum() / len(codes_NL)),
        largest_group=int(sizes_G.max()),
        cur=tuple(float(x) for x in (usage_LV > 0).mean(1)),
        entropy_bits=tuple(float(x) for x in entropy_bits(usage_LV)),
        pas=pairwise_similarity(embeddings_ND, groups),
        reconstruction_error=tuple(residuals.error_L.tolist()),
        variance=residuals.variance,
        error_std=tuple(residuals.error_std_L.tolist()),
        distance_quantiles=tuple(map(tuple, residuals.distance_LQ.tolist())),
        history={name: tuple(map(float, values)) for name, values in (history or {}).items()},
    )


def pack(codes_NL: np.ndarray, codebook_size: int) -> np.ndarray:
    """One int64 key per semantic ID, sum_l z_l V^(L-l): keys sort as the codes do, so a prefix of codes is a range of keys."""
    keys_N = np.zeros(len(codes_NL), np.int64)
    for level in range(codes_NL.shape[1]):
        keys_N = keys_N * codebook_size + codes_NL[:, level]
    return keys_N


def group_items(codes_NL: np.ndarray, codebook_size: int) -> Groups:
    """Sort the items by semantic ID."""
    keys_N = pack(codes_NL, codebook_size)
    items_N = np.argsort(keys_N, kind="stable")
    sorted_N = keys_N[items_N]
    starts_G = np.flatnonzero(np.r_[True, sorted_N[1:] != sorted_N[:-1]]) if len(keys_N) else np.zeros(0, np.int64)
    return Groups(sorted_N[starts_G], np.r_[starts_G, len(keys_N)], items_N)


def code_usage(codes_NL: np.ndarray, codebook_size: int) -> np.ndarray:
    """Items per code: int64 [L, V]."""
    return np.stack([np.bincount(codes_NL[:, level], minlength=codebook_size) for level in range(codes_NL.shape[1])])


def entropy_bits(usage_LV: np.ndarray) -> np.ndarray:
    """Shannon entropy of the codes of each level, bits [L]."""
    p_LV = usage_LV / usage_LV.sum(1, keepdims=True)
    return -np.sum(p_LV * np.log2(np.where(p_LV > 0, p_LV, 1)), axis=1)


def pairwise_similarity(embeddings_ND: np.ndarray, groups: Groups, max_items: int = _PAS_ITEMS, seed: int = 0) -> float | None:
    """PAS: mean cosine similarity over all pairs of items that share a semantic ID (Table 1); None when there is no such pair.

    Per group of n unit vectors the pairs' cosines sum to (‖Σu‖² - n) / 2, so nothing is quadratic. Embeddings of norm 0 have cosine 0.
    With more than `max_items` colliding items, a random choice of whole groups stands for all; of a huge group, _GROUP_ITEMS do.
    """
    sizes_G = np.diff(groups.offsets_G1)
    read_G = np.minimum(sizes_G, _GROUP_ITEMS)
    shared = np.flatnonzero(sizes_G > 1)
    if read_G[shared].sum() > max_items:
        shared = np.random.default_rng(seed).permutation(shared)
        shared = np.sort(shared[:max(1, np.searchsorted(np.cumsum(read_G[shared]), max_items, side="right"))])
    total, num_pairs = 0.0, 0
    batch_of_group = np.cumsum(read_G[shared]) // _READ_ROWS
    for batch in np.unique(batch_of_group):
        members = shared[batch_of_group == batch]
        sizes, read = sizes_G[members], read_G[members]
        ends = np.cumsum(read)
        within = (np.arange(ends[-1]) - np.repeat(ends - read, read)) * np.repeat(sizes, read) // np.repeat(read, read)
        items = groups.items_N[np.repeat(groups.offsets_G1[members], read) + within]
        unit_ND = np.asarray(embeddings_ND[items], np.float64)
        norm_N = np.linalg.norm(unit_ND, axis=1)
        unit_ND /= np.maximum(norm_N, 1e-30)[:, None]
        summed_GD = np.add.reduceat(unit_ND, ends - read, axis=0)
        ones_G = np.add.reduceat((norm_N > 0).astype(np.int64), ends - read)
        mean_G = (np.square(summed_GD).sum(1) - ones_G) / (read * (read - 1))
        total += float((mean_G * (sizes * (sizes - 1) // 2)).sum())
        num_pairs += int((sizes * (sizes - 1) // 2).sum())
    return total / num_pairs if num_pairs else None


def format_report(report: TokenizerReport) -> str:
    """The report as a small text table."""
    pas = "none collide" if report.pas is None else f"{report.pas:.4f}"
    lines = [
        f"items                  {report.num_items:,}",
        f"distinct semantic IDs  {report.num_distinct:,}",
        f"collision              {report.collision:.2%}",
        f"items not alone        {report.not_alone_frac:.2%}, at most {report.largest_group:,} on one semantic ID",
        f"PAS                    {pas}",
        "level   codes used   entropy   error left",
    ]
    rows = zip(report.cur, report.entropy_bits, report.reconstruction_error, strict=True)
    lines += [f"{level:>5}   {cur:>10.2%}   {bits:>7.2f}   {error:>10.4f}" for level, (cur, bits, error) in enumerate(rows, 1)]
    return "\n".join(lines)
