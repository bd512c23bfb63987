"""Residual k-means (RQ-Kmeans, GPR §2 / Fig. 3): fits the codebooks of the semantic IDs and assigns codes with them.

Owns the numerics only: k-means on in-memory points (CPU or CUDA, bounded memory, seeded) and streaming assignment over a memory
map of any length. What a fitted tokenizer is and how it is stored belongs to semantic_ids.py, its quality to metrics.py. A run is
reproducible for one machine, thread count and device; matrix products round differently on another.
"""

import math
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor
from tqdm import tqdm

from gpr_dist.config import Config
from gpr_dist.errors import TokenizerError

# N items or points  D embedding dim  L levels  V codes per level  C candidates of one k-means++ step

_READ_ROWS = 262_144  # rows of the memory map held in memory at once
_SCORES = {"cpu": 1 << 22, "cuda": 1 << 27}  # point-to-centroid scores held at once: 16 MB stay in a CPU cache, more do not


class RQKMeansConfig(Config):
    """Settings of the tokenizer fit."""

    method: Literal["rq_kmeans"] = "rq_kmeans"
    """how the codebooks are fitted"""
    num_levels: int = Field(3, ge=1)
    """codes per item (L)"""
    codebook_size: int = Field(256, ge=2)
    """codes per level (V); the paper's team uses 2048, which suits catalogues of millions"""
    iterations: int = Field(25, ge=1)
    """most Lloyd iterations per level"""
    tolerance: float = Field(1e-4, ge=0)
    """a level stops when one iteration lowers its squared error by less than this share"""
    max_fit_items: int = Field(1_000_000, ge=2)
    """items the codebooks are fitted on, drawn at random when the catalogue has more; every item is encoded"""
    seed: int = 0
    """of the sample and of k-means++"""
    device: str = "auto"
    """cpu | cuda | cuda:<n> | auto (CUDA where there is one)"""

    @model_validator(mode="after")
    def _semantic_id_fits_int64(self) -> "RQKMeansConfig":
        bits = self.num_levels * math.log2(self.codebook_size)
        if bits >= 63:
            raise ValueError(f"codebook_size ** num_levels needs {bits:.0f} bits, a packed semantic ID has 63; lower one of them")
        return self


@dataclass
class KMeans:
    """A fitted level."""

    centroids_VD: Tensor
    inertia: list[float] = field(default_factory=list)  # weighted squared error before each centroid update; never increases


def fit_codebooks(embeddings_ND: np.ndarray, config: RQKMeansConfig) -> np.ndarray:
    """Fit one codebook per level on the residuals of the level before: R^1 = e, R^{l+1} = R^l - c^l_{z_l}.

    Args: embeddings_ND: float array or memory map, finite; at most `config.max_fit_items` random rows of it are read.
    Returns: float32 [L, V, D]. Codes a level has no distinct residual for lie far outside the data, so that no item gets them.
    Raises: TokenizerError for values that are not finite, and when there are fewer distinct embeddings than codes.
    """
    device = resolve_device(config.device)
    sample_ND = _sample(embeddings_ND, config)
    points_ND, weights_N = _distinct(sample_ND, np.ones(len(sample_ND)))
    if len(points_ND) < config.codebook_size:
        raise TokenizerError(f"{len(points_ND)} distinct embeddings among {len(sample_ND)} items are fewer than codebook_size "
                             f"{config.codebook_size}; lower tokenizer.codebook_size or give embeddings that tell the items apart")
    generator = torch.Generator().manual_seed(config.seed)
    codebooks = []
    with tqdm(total=config.num_levels * config.iterations, desc="fit codebooks", unit="iter", mininterval=0.5) as bar:
        for level in range(config.num_levels):
            points = torch.from_numpy(points_ND).to(device)
            weights = torch.from_numpy(weights_N).to(device, torch.float32)
            num_codes = min(config.codebook_size, len(points))
            fitted = kmeans(points, weights, num_codes, config.iterations, config.tolerance, generator, bar)
            codebook_VD = _pad(fitted.centroids_VD, config.codebook_size, points, generator)
            codebooks.append(codebook_VD.cpu().numpy())
            codes_N, _ = nearest(points, codebook_VD)
            residual_ND = (points - codebook_VD[codes_N]).cpu().numpy()
            points_ND, weights_N = _distinct(residual_ND, weights_N)
            bar.update((level + 1) * config.iterations - bar.n)  # a level may converge early
    return np.stack(codebooks)


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


def encode(embeddings_ND: np.ndarray, codebooks_LVD: np.ndarray, device: str = "auto") -> np.ndarray:
    """Codes z_l = argmin_k ‖R^l - c^l_k‖ of every row: int32 [N, L], read from a memory map chunk by chunk.

    Raises: TokenizerError for a wrong dimension and for values that are not finite.
    """
    num_levels, _, dim = codebooks_LVD.shape
    if embeddings_ND.ndim != 2 or embeddings_ND.shape[1] != dim:
        raise TokenizerError(f"embeddings have shape {embeddings_ND.shape}, the codebooks need [items, {dim}]; "
                             "encode with embeddings of the same kind as those the tokenizer was fitted on")
    where = resolve_device(device)
    codebooks = torch.from_numpy(np.ascontiguousarray(codebooks_LVD)).to(where)
    codes_NL = np.empty((len(embeddings_ND), num_levels), np.int32)
    with tqdm(total=len(embeddings_ND), desc="encode items", unit="item", unit_scale=True, mininterval=0.5) as bar:
        for lo in range(0, len(embeddings_ND), _READ_ROWS):
            residual_nD = torch.from_numpy(_finite(embeddings_ND[lo:lo + _READ_ROWS], lo)).to(where)
            for level in range(num_levels):
                codes_n, _ = nearest(residual_nD, codebooks[level])
                residual_nD = residual_nD - codebooks[level][codes_n]
                codes_NL[lo:lo + _READ_ROWS, level] = codes_n.cpu().numpy()
            bar.update(len(residual_nD))
    return codes_NL


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


def _finite(rows: np.ndarray, first_row: int) -> np.ndarray:
    """A float32 copy. Raises: TokenizerError naming the first row that is not finite."""
    rows = np.array(rows, dtype=np.float32, order="C")
    good = np.isfinite(rows).all(1)
    if not good.all():
        bad = int(np.argmin(good))
        raise TokenizerError(f"embedding of item {first_row + bad} is not finite ({int((~good).sum())} of {len(rows)} rows read with it); "
                             "repair the embeddings")
    return rows


def _sample(embeddings_ND: np.ndarray, config: RQKMeansConfig) -> np.ndarray:
    if embeddings_ND.ndim != 2 or 0 in embeddings_ND.shape:
        raise TokenizerError(f"embeddings have shape {embeddings_ND.shape}; expected [items, dim], neither of them 0")
    num_items = len(embeddings_ND)
    if num_items <= config.max_fit_items:
        return _finite(embeddings_ND, 0)
    rows = np.random.default_rng(config.seed).choice(num_items, config.max_fit_items, replace=False, shuffle=False)
    rows.sort()  # a memory map is read front to back
    sample_ND = np.array(embeddings_ND[rows], dtype=np.float32)
    good = np.isfinite(sample_ND).all(1)
    if not good.all():
        raise TokenizerError(f"embedding of item {rows[np.argmin(good)]} is not finite; repair the embeddings")
    return sample_ND


def _distinct(points_ND: np.ndarray, weights_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Distinct rows and the summed weight of each; a catalogue repeats texts, and k-means++ must not draw the same point twice."""
    points_ND = points_ND + np.float32(0)  # -0.0 and 0.0 are one point
    bits_ND = points_ND.view(np.uint32)
    for seed in range(8):
        mix_D = np.random.default_rng(seed).integers(1 << 63, size=points_ND.shape[1], dtype=np.uint64) * 2 + 1
        hash_N = np.zeros(len(points_ND), np.uint64)
        for column, mix in zip(bits_ND.T, mix_D, strict=True):
            hash_N ^= hash_N >> np.uint64(29)
            hash_N += column * mix
        _, first, inverse = np.unique(hash_N, return_index=True, return_inverse=True)
        if np.array_equal(points_ND[first][inverse], points_ND):  # no two rows share a hash by accident
            return points_ND[first], np.bincount(inverse, weights_N)
    raise AssertionError("eight hash functions in a row had collisions")


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


def _pad(centroids_VD: Tensor, codebook_size: int, points_ND: Tensor, generator: torch.Generator) -> Tensor:
    """Fill the codebook up with far points: at 4 times the largest residual, no fitted item is nearer to them than to its own."""
    missing = codebook_size - len(centroids_VD)
    if not missing:
        return centroids_VD
    radius = 4 * float(points_ND.norm(dim=1).max()) or 1.0
    directions = torch.randn(missing, points_ND.shape[1], generator=generator).to(points_ND.device)
    return torch.cat([centroids_VD, radius * directions / directions.norm(dim=1, keepdim=True)])
