"""What the codes leave of the embeddings: one streaming pass over a memory map of any length.

Per level the reconstruction error and the distance to the nearest code, as moments and quantiles; and how many embeddings differ at
all. Everything that needs the codes only is metrics.py's.
"""

from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from gpr_dist.errors import TokenizerError
from gpr_dist.tokenizer.quantizer import Quantizer, finite

# N items  n items of a chunk  D embedding dim  K latent dim  L levels  V codes per level  Q quantiles

QUANTILES = (0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99)
_READ_ROWS = 8_192  # a chunk and its residuals stay in the cache
_QUANTILE_ITEMS = 1_000_000  # quantiles are those of every k-th item, at most about this many
_CHECKED_ITEMS = 4096
_SAME_CODES = 0.95  # two devices may round a tie differently, which can change a few codes


class Residuals(NamedTuple):
    """Error and distance after each level. Errors are in units of `variance`: 1 = no better than the mean of the embeddings."""

    variance: float  # mean squared distance of the embeddings to their mean
    error_L: np.ndarray  # mean of ‖e - ê_l‖² / variance, ê_l what the first l codes stand for
    error_std_L: np.ndarray  # standard deviation of the same over the items
    part_error_L: np.ndarray | None  # error_L of the items of `part_N`
    distance_LQ: np.ndarray  # QUANTILES of ‖R^l - c^l‖, the distance to the nearest code, in the space the codes live in
    sampled_distance_nL: np.ndarray  # float32, of every `stride`-th item
    stride: int
    hash_N: np.ndarray  # uint64; equal for items whose embeddings are equal


def measure_residuals(embeddings_ND: np.ndarray, codes_NL: np.ndarray, quantizer: Quantizer, part_N: np.ndarray | None = None,
                      variance: float | None = None) -> Residuals:
    """Read every embedding once.

    Args:
        codes_NL: of the same items, by this quantizer.
        part_N: bool, items (e.g. the ads) whose error is wanted on its own.
        variance: unit of the errors; none = that of these embeddings. To compare two sets of items both need the same.
    Raises: TokenizerError for a wrong dimension or values that are not finite.
    """
    if embeddings_ND.shape != (len(codes_NL), quantizer.dim):
        raise TokenizerError(f"embeddings have shape {embeddings_ND.shape}, codes and tokenizer need {(len(codes_NL), quantizer.dim)}; "
                             "give the embeddings that the items were encoded from")
    num_items, num_levels = codes_NL.shape
    device = quantizer.codebooks_LVK.device
    stride = -(-num_items // _QUANTILE_ITEMS)
    spread, summed_D = 0.0, torch.zeros(quantizer.dim, dtype=torch.float64, device=device)
    moments_2L, part_L = np.zeros((2, num_levels)), np.zeros(num_levels)
    sampled, hash_N = [], np.empty(num_items, np.uint64)
    with tqdm(total=num_items, desc="measure items", unit="item", unit_scale=True, mininterval=0.5) as bar, torch.no_grad():
        for lo in range(0, num_items, _READ_ROWS):
            rows_nD = finite(embeddings_ND[lo:lo + _READ_ROWS], lo)
            hash_N[lo:lo + _READ_ROWS] = _hash_rows(rows_nD)
            codes_nL = torch.from_numpy(np.asarray(codes_NL[lo:lo + _READ_ROWS], np.int64)).to(device)
            distance_nL, error_nL, centred_nD = _chunk(torch.from_numpy(rows_nD).to(device), codes_nL, quantizer)
            spread += float(centred_nD.square().sum(dtype=torch.float64))
            summed_D += centred_nD.sum(0, dtype=torch.float64)
            moments_2L += np.stack([error_nL.sum(0), np.square(error_nL).sum(0)])
            if part_N is not None:
                part_L += error_nL[part_N[lo:lo + _READ_ROWS]].sum(0)
            sampled.append(distance_nL[-lo % stride::stride])
            bar.update(len(rows_nD))
    own = (spread - float(summed_D.square().sum()) / num_items) / num_items
    unit = own if variance is None else variance
    unit = unit if unit > 0 else 1.0
    mean_L, square_L = moments_2L / num_items
    sampled_nL = np.concatenate(sampled)
    return Residuals(
        variance=own,
        error_L=mean_L / unit,
        error_std_L=np.sqrt(np.maximum(square_L - mean_L**2, 0)) / unit,
        part_error_L=part_L / max(1, int(part_N.sum())) / unit if part_N is not None else None,
        distance_LQ=np.quantile(sampled_nL, QUANTILES, axis=0).T,
        sampled_distance_nL=sampled_nL,
        stride=stride,
        hash_N=hash_N,
    )


def check_codes(embeddings_ND: np.ndarray, codes_NL: np.ndarray, quantizer: Quantizer, where: str, seed: int = 0) -> None:
    """Refuse embeddings that the codes were not made from, judged by a random sample of the rows.

    Args: where: what brings the embeddings, e.g. the file's path. Raises: TokenizerError.
    """
    rows = np.random.default_rng(seed).permutation(len(codes_NL))[:_CHECKED_ITEMS] if len(codes_NL) > _CHECKED_ITEMS else slice(None)
    with torch.no_grad():
        sample_nD = torch.from_numpy(finite(embeddings_ND[rows], 0)).to(quantizer.codebooks_LVK.device)
        found_nL = quantizer.assign(quantizer.latent(quantizer.normalise(sample_nD))).cpu().numpy()
    same = float((found_nL == codes_NL[rows]).all(1).mean())
    if same < _SAME_CODES:
        raise TokenizerError(f"{where}: only {same:.1%} of {len(found_nL):,} rows looked at encode to the codes that the tokenizer has, "
                             "so these are other embeddings or in another order; give those it was fitted on, or fit it again")


def _chunk(rows_nD: torch.Tensor, codes_nL: torch.Tensor, quantizer: Quantizer) -> tuple[np.ndarray, np.ndarray, torch.Tensor]:
    """Distances float32 [n, L], squared errors float64 [n, L], and the rows less the fit items' mean."""
    centred_nD = rows_nD - quantizer.mean_D
    latent_nK = quantizer.latent(quantizer.normalise(rows_nD))
    residual_nK = latent_nK.clone()
    squares, errors = [], []
    for codebook_VK, codes_n in zip(quantizer.codebooks_LVK, codes_nL.T, strict=True):
        residual_nK -= codebook_VK[codes_n]
        squares.append(residual_nK.square().sum(1))
        if quantizer.decoder is None:  # what is left of the embedding is the residual, but for the scale
            errors.append(squares[-1].double() * quantizer.scale.double().square())
        else:
            decoded_nD = quantizer.decode(latent_nK - residual_nK) * quantizer.scale
            errors.append((centred_nD - decoded_nD).square().sum(1, dtype=torch.float64))
    return torch.stack(squares, 1).sqrt_().cpu().numpy(), torch.stack(errors, 1).cpu().numpy(), centred_nD


def _hash_rows(rows_nD: np.ndarray) -> np.ndarray:
    """A 64-bit hash of each row's values, uint64 [n]; -0.0 and 0.0 are one value."""
    bits_Dn = np.ascontiguousarray((rows_nD + np.float32(0)).view(np.uint32).T)
    mix_D = np.random.default_rng(0).integers(1 << 63, size=rows_nD.shape[1], dtype=np.uint64) * 2 + 1
    hash_n = np.zeros(len(rows_nD), np.uint64)
    for column_n, mix in zip(bits_Dn, mix_D, strict=True):
        hash_n ^= hash_n >> np.uint64(29)
        hash_n += column_n * mix
    return hash_n
