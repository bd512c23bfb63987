"""Weighted k-means on points in memory (CPU or CUDA), seeded: greedy k-means++ and Lloyd iterations.

A run is reproducible for one machine, thread count and device; matrix products round differently on another.
"""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor
from tqdm import tqdm

from gpr_dist.errors import TokenizerError

# N points  D their dim  V clusters  C candidates of one k-means++ step

_SCORES = {"cpu": 1 << 22, "cuda": 1 << 27}  # point-to-centroid scores held at once: 16 MB stay in a CPU cache, more do not


@dataclass
class KMeans:
    """A fitted clustering."""

    centroids_VD: Tensor
    inertia: list[float] = field(default_factory=list)  # weighted squared error before each centroid update; never increases


def kmeans(points_ND: Tensor, weights_N: Tensor, num_codes: int, iterations: int, tolerance: float, generator: torch.Generator,
           bar: tqdm | None = None) -> KMeans:
    """Weighted Lloyd k-means from greedy k-means++; a cluster that runs empty restarts at the worst-served point.

    Args:
        points_ND: float32, distinct rows, at least `num_codes` of them.
        weights_N: float32 > 0, how many items share the row.
        generator: on the CPU whatever the device, so that the draws do not depend on it.
    """
    assert len(points_ND) >= num_codes, (len(points_ND), num_codes)
    if len(points_ND) == num_codes:
        return KMeans(points_ND.clone(), [0.0])
    result = KMeans(_plus_plus(points_ND, weights_N, num_codes, generator))
    for _ in range(iterations):
        codes_N, distance_N = nearest(points_ND, result.centroids_VD)
        cost_N = distance_N * weights_N
        result.inertia.append(float(cost_N.sum(dtype=torch.float64)))
        sums_VD, mass_V = _cluster_sums(points_ND, weights_N, codes_N, num_codes)
        empty_V = mass_V == 0
        num_empty = int(empty_V.sum())
        if len(result.inertia) > 1 and not num_empty:
            before, now = result.inertia[-2:]
            if before - now <= tolerance * before:
                break
        result.centroids_VD = torch.where(empty_V[:, None], result.centroids_VD, (sums_VD / mass_V[:, None]).float())
        if num_empty:
            result.centroids_VD[empty_V] = points_ND[cost_N.topk(num_empty).indices]
        if bar is not None:
            bar.update()
    return result


def nearest(points_ND: Tensor, centroids_VD: Tensor) -> tuple[Tensor, Tensor]:
    """Index of and squared distance to the nearest centroid: int64 [N], float32 [N]; never holds more than a chunk of the scores.

    Both sides are shifted to the centroids' mean first, so that data far from the origin do not lose their differences in
    ‖x‖² - 2x·c + ‖c‖².
    """
    shift_D = centroids_VD.mean(0)
    centred_VD = centroids_VD - shift_D
    bias_V = -0.5 * centred_VD.square().sum(1)
    codes_N = torch.empty(len(points_ND), dtype=torch.int64, device=points_ND.device)
    distance_N = torch.empty(len(points_ND), dtype=torch.float32, device=points_ND.device)
    chunk = max(1, _SCORES[points_ND.device.type] // len(centroids_VD))
    for lo in range(0, len(points_ND), chunk):
        x_nD = points_ND[lo:lo + chunk] - shift_D
        best_n, codes_N[lo:lo + chunk] = torch.addmm(bias_V, x_nD, centred_VD.T).max(1)
        distance_N[lo:lo + chunk] = (x_nD.square().sum(1) - 2 * best_n).clamp_min_(0)
    return codes_N, distance_N


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


def _plus_plus(points_ND: Tensor, weights_N: Tensor, num_codes: int, generator: torch.Generator) -> Tensor:
    """Greedy k-means++ (the best of a few D²-weighted draws per step) on at most 64 points per code: centroids [V, D]."""
    keep = torch.randperm(len(points_ND), generator=generator)[:64 * num_codes].to(points_ND.device)
    points_ND, weights_N = points_ND[keep], weights_N[keep]
    centred_ND = points_ND - points_ND.mean(0)  # see `nearest`
    norm_N = centred_ND.square().sum(1)
    chosen_V = torch.empty(num_codes, dtype=torch.int64, device=points_ND.device)
    free_N = torch.ones(len(points_ND), dtype=torch.bool, device=points_ND.device)
    cost_N = torch.full_like(norm_N, torch.inf)
    candidates_C = _draw(weights_N, 1, generator)
    for code in range(num_codes):
        cost_NC = norm_N[:, None] + norm_N[candidates_C] - 2 * centred_ND @ centred_ND[candidates_C].T
        cost_NC = torch.minimum(cost_NC.clamp_min_(0), cost_N[:, None])
        best = (weights_N @ cost_NC).argmin()
        chosen_V[code] = candidates_C[best]
        free_N[chosen_V[code]] = False
        cost_N = cost_NC[:, best] * free_N
        draw_N = cost_N * weights_N
        if not float(draw_N.sum()) > 0:  # rounding hides what still tells the points apart, so any free one will do
            draw_N = free_N.float()
        if code + 1 < num_codes:
            candidates_C = _draw(draw_N, 2 + int(math.log(num_codes)), generator)
    return points_ND[chosen_V]


def _draw(weights_N: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """`count` indices drawn with replacement in proportion to the weights; never one of weight 0."""
    cumulative_N = weights_N.double().cumsum(0)
    uniform_C = torch.rand(count, dtype=torch.float64, generator=generator).to(weights_N.device)
    index_C = torch.searchsorted(cumulative_N, uniform_C * cumulative_N[-1], right=True)
    return index_C.clamp_max(int(weights_N.nonzero()[-1]))


def _cluster_sums(points_ND: Tensor, weights_N: Tensor, codes_N: Tensor, num_codes: int) -> tuple[Tensor, Tensor]:
    """Weighted sum of the points of each cluster [V, D] and its weight [V], in float64 and in an order that never changes."""
    sums_VD = torch.zeros(num_codes, points_ND.shape[1], dtype=torch.float64, device=points_ND.device)
    mass_V = torch.zeros(num_codes, dtype=torch.float64, device=points_ND.device)
    chunk = max(1, (1 << 25) // (num_codes if points_ND.is_cuda else points_ND.shape[1]))
    for lo in range(0, len(points_ND), chunk):
        codes_n, weights_n = codes_N[lo:lo + chunk], weights_N[lo:lo + chunk].double()
        if points_ND.is_cuda:  # index_add_ uses atomics there, whose order changes from run to run
            member_nV = torch.nn.functional.one_hot(codes_n, num_codes).double() * weights_n[:, None]
            sums_VD += member_nV.T @ points_ND[lo:lo + chunk].double()
            mass_V += member_nV.sum(0)
        else:
            sums_VD.index_add_(0, codes_n, points_ND[lo:lo + chunk].double() * weights_n[:, None])
            mass_V.index_add_(0, codes_n, weights_n)
    return sums_VD, mass_V
