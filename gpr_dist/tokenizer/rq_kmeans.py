"""Residual k-means (RQ-Kmeans, GPR §2 / Fig. 3): k-means on the embeddings, then on what each level leaves."""

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from gpr_dist.errors import TokenizerError
from gpr_dist.tokenizer.config import TokenizerConfig
from gpr_dist.tokenizer.kmeans import kmeans, nearest, resolve_device

# N items or points  D embedding dim  L levels  V codes per level


def fit_codebooks(points_ND: np.ndarray, config: TokenizerConfig) -> np.ndarray:
    """Fit one codebook per level on the residuals of the level before: R^1 = e, R^{l+1} = R^l - c^l_{z_l}.

    Args: points_ND: float32, finite, in memory.
    Returns: float32 [L, V, D]. Codes a level has no distinct residual for lie far outside the data, so that no item gets them.
    Raises: TokenizerError when there are fewer distinct embeddings than codes.
    """
    device = resolve_device(config.device)
    num_items = len(points_ND)
    points_ND, weights_N = _distinct(points_ND, np.ones(num_items))
    if len(points_ND) < config.codebook_size:
        raise TokenizerError(f"{len(points_ND)} distinct embeddings among {num_items} items are fewer than codebook_size "
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


def _pad(centroids_VD: Tensor, codebook_size: int, points_ND: Tensor, generator: torch.Generator) -> Tensor:
    """Fill the codebook up with far points: at 4 times the largest residual, no fitted item is nearer to them than to its own."""
    missing = codebook_size - len(centroids_VD)
    if not missing:
        return centroids_VD
    radius = 4 * float(points_ND.norm(dim=1).max()) or 1.0
    directions = torch.randn(missing, points_ND.shape[1], generator=generator).to(points_ND.device)
    return torch.cat([centroids_VD, radius * directions / directions.norm(dim=1, keepdim=True)])
