"""From item embeddings to a measured tokenizer, in memory. Where embeddings come from and where the bundle goes is the caller's."""

import numpy as np
import torch

from gpr_dist.errors import TokenizerError
from gpr_dist.tokenizer.config import TokenizerConfig
from gpr_dist.tokenizer.metrics import measure
from gpr_dist.tokenizer.quantizer import Quantizer, finite
from gpr_dist.tokenizer.rq_kmeans import fit_codebooks
from gpr_dist.tokenizer.semantic_ids import SemanticIds

# N items or points  D embedding dim


def fit_tokenizer(embeddings_ND: np.ndarray, config: TokenizerConfig, catalogue_fingerprint: str) -> SemanticIds:
    """Fit the quantizer, encode every item and measure the result.

    Args:
        embeddings_ND: float [N, D], finite, row = catalogue index; may be a memory map of any length.
        catalogue_fingerprint: of the catalogue the rows belong to.
    Raises: TokenizerError for unusable embeddings.
    """
    quantizer = fit_quantizer(embeddings_ND, config)
    codes_NL = quantizer.encode(embeddings_ND)
    return SemanticIds(codes_NL, quantizer, (catalogue_fingerprint,), measure(embeddings_ND, codes_NL, quantizer))


def fit_quantizer(embeddings_ND: np.ndarray, config: TokenizerConfig) -> Quantizer:
    """Fit on at most `config.max_fit_items` random rows. Raises: TokenizerError for unusable embeddings."""
    points_ND = _sample(embeddings_ND, config)
    quantizer = Quantizer(config, points_ND.shape[1])
    quantizer.mean_D.copy_(torch.from_numpy(points_ND.mean(0, dtype=np.float64)))
    points_ND = points_ND - quantizer.mean_D.numpy()
    quantizer.scale.fill_(float(np.sqrt(np.square(points_ND).mean(dtype=np.float64))) or 1.0)
    points_ND /= quantizer.scale.numpy()
    quantizer.codebooks_LVK.data.copy_(torch.from_numpy(fit_codebooks(points_ND, config)))
    return quantizer


def _sample(embeddings_ND: np.ndarray, config: TokenizerConfig) -> np.ndarray:
    if embeddings_ND.ndim != 2 or 0 in embeddings_ND.shape:
        raise TokenizerError(f"embeddings have shape {embeddings_ND.shape}; expected [items, dim], neither of them 0")
    num_items = len(embeddings_ND)
    if num_items <= config.max_fit_items:
        return finite(embeddings_ND, 0)
    rows = np.random.default_rng(config.seed).choice(num_items, config.max_fit_items, replace=False, shuffle=False)
    rows.sort()  # a memory map is read front to back
    sample_ND = np.array(embeddings_ND[rows], dtype=np.float32)
    good = np.isfinite(sample_ND).all(1)
    if not good.all():
        raise TokenizerError(f"embedding of item {rows[np.argmin(good)]} is not finite; repair the embeddings")
    return sample_ND
