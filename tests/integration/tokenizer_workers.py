"""What the rank processes of test_tokenizer_processes.py run."""

import hashlib

import numpy as np
import torch

from gpr_dist.errors import GPRError
from gpr_dist.tokenizer import kmeans as kmeans_module
from gpr_dist.tokenizer import points as points_module
from gpr_dist.tokenizer import quantizer as quantizer_module
from gpr_dist.tokenizer.collective import process_group, rank, world_size
from gpr_dist.tokenizer.config import RQVAEConfig, TokenizerConfig
from gpr_dist.tokenizer.fit import _fit, fit_tokenizer
from gpr_dist.tokenizer.kmeans import kmeans
from gpr_dist.tokenizer.points import Points, open_embeddings
from gpr_dist.tokenizer.rq_kmeans import Residuals

CPU = torch.device("cpu")


def fit_cases(path: str, cases: dict[str, dict]) -> dict:
    """Per case: fingerprint and curves on every rank, and the hash of all codes on rank 0."""
    _small_blocks()
    with process_group(CPU):
        results = {name: _fit_case(path, settings) for name, settings in cases.items()}
        results["restarts"] = _restarts(path)
    return results


def failures(cases: dict[str, dict]) -> dict:
    """Per case the error of this rank."""
    _small_blocks()
    with process_group(CPU):
        return {name: _failure(**case) for name, case in cases.items()}


def _small_blocks() -> None:
    torch.set_num_threads(1)
    points_module.BLOCK_ROWS = quantizer_module.READ_ROWS = 128


def _config(settings: dict) -> TokenizerConfig:
    return TokenizerConfig(**{"num_levels": 3, "codebook_size": 16, "iterations": 8, "device": "cpu",
                              "rq_vae": RQVAEConfig(hidden=(16,), epochs=1, batch_size=256, micro_batch_size=64), **settings})


def _fit_case(path: str, settings: dict) -> list:
    embeddings = open_embeddings(path)
    quantizer, history = _fit(embeddings, _config(settings))
    codes = quantizer.encode(embeddings, all_processes=True)
    assert (codes is None) == (rank() != 0)
    assert codes is None or np.array_equal(codes, quantizer.encode(embeddings))  # alone, while the others are elsewhere
    curves = {name: list(map(float, values)) for name, values in history.items()}
    return [quantizer.fingerprint, curves, None if codes is None else hashlib.sha256(codes.tobytes()).hexdigest()]


def _restarts(path: str) -> list:
    """A start far away leaves most clusters empty; they restart at the worst-served rows of all processes."""
    config = _config({"kmeans_items_per_code": None})
    rows = Residuals(Points(open_embeddings(path), config, CPU), config)
    start = torch.cat([torch.zeros(1, rows.dim), 50 + torch.arange(19.0)[:, None].expand(19, rows.dim)])
    original, kmeans_module._seed = kmeans_module._seed, lambda *_: start
    try:
        result = kmeans(rows, 20, 8, 0.0, torch.Generator())
    finally:
        kmeans_module._seed = original
    assert len(result.centroids_VD.unique(dim=0)) == 20 and float(result.centroids_VD.abs().max()) < 50
    return [hashlib.sha256(result.centroids_VD.numpy().tobytes()).hexdigest(), result.inertia]


def _failure(path: str, settings: dict, encode: str | None = None) -> str:
    """Args: encode: other embeddings that a quantizer fitted on `path` is to encode."""
    try:
        if encode is None:
            fit_tokenizer(open_embeddings(path), _config(settings), "catalogue")
        else:
            quantizer, _ = _fit(open_embeddings(path), _config(settings))
            quantizer.encode(open_embeddings(encode), all_processes=True)
    except GPRError as error:
        return f"{type(error).__name__}: {error}"
    return f"no error on rank {rank()} of {world_size()}"
