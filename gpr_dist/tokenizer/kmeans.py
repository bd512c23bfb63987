"""k-means over blocks of rows, on any number of processes and threads: greedy k-means++ on a sample, then Lloyd iterations.

The codebooks are the same bits on 1 or 1000 processes: a block's result does not depend on who computes it, and blocks are added
exactly (collective.py). They do depend on the kind of machine and device, whose matrix products round differently. What the rows are
(embeddings, residuals, latents) and where they lie is the caller's.
"""

import math
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from gpr_dist.errors import TokenizerError
from gpr_dist.tokenizer.collective import ExactSum, broadcast, gather_rows, map_blocks

# F rows over all processes  n rows of a block  S rows of the sample  D their dim  P dim of the projection  V clusters  C candidates of
# one k-means++ step

SEED_ROWS = 128
"""rows per code that k-means++ chooses from; more iterations do not make up for fewer"""
_SEED_DIM = 128  # k-means++ sees a random projection to this many dimensions, which keeps distances well enough to choose by
_THREADED_STEP = 1 << 25  # products of one k-means++ step from which threads gain more than they lose by waiting for each other
_SCORES = {"cpu": 1 << 18, "cuda": 1 << 27}  # row-to-centroid scores held at once: 1 MB stays in the cache of a CPU core
_PARALLEL_ROWS = 8192  # `nearest` gives every thread blocks of this many rows


class Rows(Protocol):
    """Rows to be clustered; every process owns a contiguous run of fixed blocks."""

    num_rows: int  # of all processes
    dim: int
    device: torch.device
    starts: range  # first rows of this process's blocks
    lo: int  # this process's rows are lo..hi-1
    hi: int
    largest: float  # of all coordinates' absolute values, over all processes

    def block(self, start: int) -> Tensor:
        """float32 [n, D]; read-only. Threads call it at the same time."""

    def own(self, rows_n: Tensor) -> Tensor:
        """Some of this process's rows by number, float32 [n, D]."""


@dataclass
class KMeans:
    """A fitted clustering, the same on every process."""

    centroids_VD: Tensor  # fewer than asked for when there are not that many distinct rows
    inertia: list[float] = field(default_factory=list)  # squared error before each centroid update; never increases


def kmeans(rows: Rows, num_codes: int, iterations: int, tolerance: float, generator: torch.Generator, bar: tqdm | None = None) -> KMeans:
    """Lloyd's k-means from greedy k-means++; a cluster that runs empty restarts at the worst-served rows.

    Args:
        tolerance: stop when an iteration lowers the squared error by less than this share.
        generator: on the CPU, in the same state on every process.
    """
    result = KMeans(_seed(rows, num_codes, generator))
    if len(result.centroids_VD) < num_codes or rows.num_rows == num_codes:  # every distinct row is a centroid
        return result
    for _ in range(iterations):
        sums_VD, count_V, distance_n = _assign(rows, result)
        empty_V = count_V == 0
        num_empty = int(empty_V.sum())
        if len(result.inertia) > 1 and not num_empty:
            before, now = result.inertia[-2:]
            if before - now <= tolerance * before:
                break
        result.centroids_VD = torch.where(empty_V[:, None], result.centroids_VD, (sums_VD / count_V[:, None]).float())
        if num_empty:
            worst_eD = _worst_served(rows, distance_n, num_empty)
            result.centroids_VD[empty_V.nonzero()[:len(worst_eD), 0]] = worst_eD
        if bar is not None:
            bar.update()
    return result


@torch.no_grad()
def nearest(points_ND: Tensor, centroids_VD: Tensor) -> tuple[Tensor, Tensor]:
    """Index of and squared distance to the nearest centroid: int64 [N], float32 [N]; never holds more than a chunk of the scores."""
    starts = range(0, len(points_ND), _PARALLEL_ROWS if points_ND.device.type == "cpu" else max(1, len(points_ND)))
    if len(starts) <= 1:
        return _nearest(points_ND, centroids_VD)
    parts = list(map_blocks(lambda lo: _nearest(points_ND[lo:lo + starts.step], centroids_VD), starts, points_ND.device))
    codes, distances = zip(*parts, strict=True)
    return torch.cat(codes), torch.cat(distances)


def resolve_device(name: str) -> torch.device:
    """`auto` → CUDA where there is one. Raises: TokenizerError for a device this machine does not have."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise TokenizerError(f"tokenizer.device={name} is not a device; use cpu, cuda, cuda:<n> or auto") from None
    if device.type not in _SCORES or (device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count()):
        raise TokenizerError(f"tokenizer.device={name} is not available here; use cpu or auto")
    return device


def _nearest(points_nD: Tensor, centroids_VD: Tensor) -> tuple[Tensor, Tensor]:
    """`nearest` in this thread.

    Both sides are shifted to the centroids' mean first, so that data far from the origin do not lose their differences in
    ‖x‖² - 2x·c + ‖c‖².
    """
    shift_D = centroids_VD.mean(0)
    centred_VD = centroids_VD - shift_D
    bias_V = -0.5 * centred_VD.square().sum(1)
    codes_n = torch.empty(len(points_nD), dtype=torch.int64, device=points_nD.device)
    distance_n = torch.empty(len(points_nD), dtype=torch.float32, device=points_nD.device)
    chunk = 1 << max(7, (_SCORES[points_nD.device.type] // len(centroids_VD)).bit_length() - 1)  # a power of two keeps chunks aligned
    for lo in range(0, len(points_nD), chunk):
        x_cD = points_nD[lo:lo + chunk] - shift_D
        scores_cV = torch.addmm(bias_V, x_cD, centred_VD.T)
        if scores_cV.is_cuda:
            best_c, codes_n[lo:lo + chunk] = scores_cV.max(1)
        else:  # NumPy's argmax is vectorised; torch's max with indices costs half the matrix product
            code_c = torch.from_numpy(scores_cV.numpy().argmax(1))
            codes_n[lo:lo + chunk] = code_c
            best_c = scores_cV.gather(1, code_c[:, None])[:, 0]
        distance_n[lo:lo + chunk] = (x_cD.square().sum(1) - 2 * best_c).clamp_min_(0)
    return codes_n, distance_n


def _assign(rows: Rows, result: KMeans) -> tuple[Tensor, Tensor, Tensor]:
    """One pass: sums of the clusters' rows float64 [V, D] and their numbers [V], over all processes; own rows' squared distances.

    Appends to `result.inertia`.
    """
    num_codes = len(result.centroids_VD)
    sums = ExactSum((num_codes, rows.dim), rows.num_rows * rows.largest, rows.device)
    counts = ExactSum((num_codes,), rows.num_rows, rows.device)
    inertia = ExactSum((), rows.num_rows * rows.dim * (2 * rows.largest) ** 2, rows.device)

    distance_F = torch.empty(rows.hi - rows.lo, device=rows.device)  # results kept one by one would break the heap into pieces

    def assign_block(start: int) -> None:
        block_nD = rows.block(start)
        codes_n, distance_n = _nearest(block_nD, result.centroids_VD)
        if block_nD.is_cuda:
            sums.add_rows(codes_n, block_nD)
        else:
            sums.add(torch.zeros(num_codes, rows.dim).index_add_(0, codes_n, block_nD))
        counts.add(torch.bincount(codes_n, minlength=num_codes))
        inertia.add(distance_n.sum(dtype=torch.float64))
        distance_F[start - rows.lo:start - rows.lo + len(distance_n)] = distance_n

    for _ in map_blocks(assign_block, rows.starts, rows.device):
        pass
    result.inertia.append(float(inertia.total()))
    return sums.total(), counts.total(), distance_F


def _worst_served(rows: Rows, distance_n: Tensor, count: int) -> Tensor:
    """At most `count` different rows with the largest distances, among 4 times as many: float32 [≤ count, D]."""
    def worst(distances: Tensor) -> Tensor:
        return distances.sort(descending=True, stable=True).indices[:4 * count]  # stable: ties in the order of the rows

    mine = worst(distance_n)
    candidates, distances = gather_rows(rows.own(rows.lo + mine)), gather_rows(distance_n[mine])
    order = worst(distances)
    order = order[distances[order] > 0]
    return candidates[order][_distinct(candidates[order])[:count]]


def _seed(rows: Rows, num_codes: int, generator: torch.Generator) -> Tensor:
    """Start centroids [V, D], all different; all distinct rows when they are fewer."""
    random = np.random.default_rng(int(torch.randint(1 << 62, (), generator=generator)))
    size = min(rows.num_rows, SEED_ROWS * num_codes)
    chosen = np.sort(random.choice(rows.num_rows, size, replace=False, shuffle=False))
    mine = torch.from_numpy(chosen[(chosen >= rows.lo) & (chosen < rows.hi)])
    sample_SD = gather_rows(rows.own(mine))
    sample_SD = sample_SD[_distinct(sample_SD)]
    if len(sample_SD) < num_codes and size < rows.num_rows:  # many rows repeat: look at all
        sample_SD = _first_distinct(rows, num_codes)
    if len(sample_SD) <= num_codes:
        return sample_SD
    threads = torch.get_num_threads()
    step = len(sample_SD) * min(rows.dim, _SEED_DIM) * _num_candidates(num_codes)
    torch.set_num_threads(threads if step > _THREADED_STEP else 1)
    try:
        return broadcast(sample_SD[_plus_plus(sample_SD, num_codes, generator)])
    finally:
        torch.set_num_threads(threads)


def _first_distinct(rows: Rows, count: int) -> Tensor:
    """The first `count` rows that are not repetitions, or all."""
    found_nD = torch.zeros(0, rows.dim, device=rows.device)
    for start in rows.starts:
        found_nD = torch.cat([found_nD, rows.block(start)])
        found_nD = found_nD[_distinct(found_nD)[:count]]
        if len(found_nD) == count:
            break
    found_nD = gather_rows(found_nD)
    return found_nD[_distinct(found_nD)[:count]]


def _distinct(points_SD: Tensor) -> Tensor:
    """Indices of the first of every group of equal rows, ascending."""
    bits_SD = (points_SD + 0.0).cpu().numpy().view(np.uint32)  # -0.0 and 0.0 are one point
    chunks = [slice(lo, lo + _PARALLEL_ROWS) for lo in range(0, len(bits_SD), _PARALLEL_ROWS)]
    for seed in range(8):
        mix_D = np.random.default_rng(seed).integers(1 << 63, size=bits_SD.shape[1], dtype=np.uint64) * 2 + 1
        hash_S = np.empty(len(bits_SD), np.uint64)
        for rows in chunks:
            hash_nD = bits_SD[rows] * mix_D
            hash_nD ^= hash_nD >> np.uint64(32)
            hash_S[rows] = (hash_nD * mix_D[::-1]).sum(1)
        _, first, inverse = np.unique(hash_S, return_index=True, return_inverse=True)
        if all(np.array_equal(bits_SD[first[inverse[rows]]], bits_SD[rows]) for rows in chunks):  # no hash is shared by accident
            return torch.from_numpy(np.sort(first)).to(points_SD.device)
    raise AssertionError("eight hash functions in a row had collisions")


def _plus_plus(sample_SD: Tensor, num_codes: int, generator: torch.Generator) -> Tensor:
    """Greedy k-means++ (the best of a few D²-weighted draws per step) on different rows: indices [V], all different."""
    centred_SP = sample_SD - sample_SD.mean(0)  # see `_nearest`
    if sample_SD.shape[1] > _SEED_DIM:
        projection_DP = torch.randn(sample_SD.shape[1], _SEED_DIM, generator=generator) / math.sqrt(_SEED_DIM)
        centred_SP = centred_SP @ projection_DP.to(sample_SD.device)
    norm_S = centred_SP.square().sum(1)
    chosen_V = torch.empty(num_codes, dtype=torch.int64, device=sample_SD.device)
    free_S = torch.ones(len(sample_SD), device=sample_SD.device)
    cost_S = torch.full_like(norm_S, torch.inf)
    candidates_C = _draw(free_S, 1, generator)
    for code in range(num_codes):
        points_CP = centred_SP[candidates_C]
        cost_CS = torch.addmm(norm_S[candidates_C][:, None], points_CP, centred_SP.T, alpha=-2).add_(norm_S).clamp_min_(0)
        torch.minimum(cost_CS, cost_S, out=cost_CS)
        best = cost_CS.sum(1).argmin()
        chosen_V[code] = candidates_C[best]
        free_S[chosen_V[code]] = 0
        cost_S = cost_CS[best] * free_S
        if code + 1 < num_codes:
            # rounding may hide what still tells the rows apart; any free one will do then
            candidates_C = _draw(cost_S if float(cost_S.amax()) > 0 else free_S, _num_candidates(num_codes), generator)
    return chosen_V


def _num_candidates(num_codes: int) -> int:
    return 2 + int(math.log(num_codes))


def _draw(weights_S: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """`count` indices drawn with replacement in proportion to the weights; never one of weight 0."""
    cumulative_S = weights_S.double().cumsum(0)
    uniform_C = torch.rand(count, dtype=torch.float64, generator=generator).to(weights_S.device)
    index_C = torch.searchsorted(cumulative_S, uniform_C * cumulative_S[-1], right=True)
    last = torch.searchsorted(cumulative_S, cumulative_S[-1])  # the last one with a weight
    return index_C.clamp_max_(last)
