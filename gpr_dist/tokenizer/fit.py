"""From item embeddings to a measured tokenizer. Where embeddings come from and where the bundle goes is the caller's.

With torch.distributed every process calls the same function with the same arguments; see collective.process_group.
"""

from collections.abc import Sequence

import numpy as np
import torch

from gpr_dist.tokenizer.collective import rank
from gpr_dist.tokenizer.config import TokenizerConfig
from gpr_dist.tokenizer.kmeans import resolve_device
from gpr_dist.tokenizer.metrics import measure
from gpr_dist.tokenizer.points import ArrowRows, Points
from gpr_dist.tokenizer.quantizer import Quantizer
from gpr_dist.tokenizer.rq_kmeans import fit_codebooks
from gpr_dist.tokenizer.rq_vae import Latents, RQVAELoss, train_rq_vae
from gpr_dist.tokenizer.semantic_ids import SemanticIds

# N items  D embedding dim


def fit_tokenizer(embeddings_ND: np.ndarray | ArrowRows, config: TokenizerConfig, catalogue_fingerprint: str) -> SemanticIds | None:
    """Fit the quantizer, encode every item and measure the result.

    Args:
        embeddings_ND: float [N, D], finite, row = catalogue index; may be a memory map of any length (points.open_embeddings).
        catalogue_fingerprint: of the catalogue the rows belong to.
    Returns: on rank 0; None on other processes, which have done their share by then.
    Raises: TokenizerError for unusable embeddings, the same on every process.
    """
    quantizer, history = _fit(embeddings_ND, config)
    codes_NL = quantizer.encode(embeddings_ND, all_processes=True)
    if rank() != 0:
        return None
    return SemanticIds(codes_NL, quantizer, (catalogue_fingerprint,), measure(embeddings_ND, codes_NL, quantizer, history))


def fit_quantizer(embeddings_ND: np.ndarray | ArrowRows, config: TokenizerConfig) -> Quantizer:
    """Fit on at most `config.max_fit_items` random rows; the same quantizer on every process. Raises: as `fit_tokenizer`."""
    return _fit(embeddings_ND, config)[0]


def _fit(embeddings_ND: np.ndarray | ArrowRows, config: TokenizerConfig) -> tuple[Quantizer, dict[str, Sequence[float]]]:
    """Also returns the curves of the fit, by name."""
    device = resolve_device(config.device)
    points = Points(embeddings_ND, config, device)
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)  # encoder and decoder begin alike on every process
        quantizer = Quantizer(config, points.dim).to(device)
    quantizer.mean_D.copy_(points.mean_D)
    quantizer.scale.copy_(points.scale)
    history = {}
    if config.method != "rq_vae" or config.rq_vae.init == "kmeans":
        source = Latents(quantizer, points) if config.method == "rq_vae" else points
        codebooks_LVK, history = fit_codebooks(source, config)
        quantizer.codebooks_LVK.data.copy_(codebooks_LVK)
    if config.method != "rq_kmeans":
        losses_E3 = train_rq_vae(quantizer, points).losses_E3
        history |= {f"RQ-VAE {name} loss": losses_E3[:, column] for column, name in enumerate(RQVAELoss._fields)}
    return quantizer, history
