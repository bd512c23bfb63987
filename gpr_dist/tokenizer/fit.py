"""From item embeddings to a measured tokenizer, in memory. Where embeddings come from and where the bundle goes is the caller's."""

import numpy as np

from gpr_dist.tokenizer.metrics import measure
from gpr_dist.tokenizer.rq_kmeans import RQKMeansConfig, encode, fit_codebooks
from gpr_dist.tokenizer.semantic_ids import SemanticIds


def fit_tokenizer(embeddings_ND: np.ndarray, config: RQKMeansConfig, catalogue_fingerprint: str) -> SemanticIds:
    """Fit the codebooks, encode every item and measure the result.

    Args:
        embeddings_ND: float [N, D], finite, row = catalogue index; may be a memory map of any length.
        catalogue_fingerprint: of the catalogue the rows belong to.
    Raises: TokenizerError for unusable embeddings.
    """
    codebooks_LVD = fit_codebooks(embeddings_ND, config)
    codes_NL = encode(embeddings_ND, codebooks_LVD, config.device)
    report = measure(embeddings_ND, codes_NL, codebooks_LVD)
    return SemanticIds(codes_NL, codebooks_LVD, config, (catalogue_fingerprint,), report)
