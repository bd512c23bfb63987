"""`bench.py tokenizer`: residual k-means of ours beside faiss, semantic-id and scikit-learn on the same vectors, repetitions interleaved.

Every contender learns L codebooks of V centroids and encodes all items with them; the error is what the codes leave of the vectors'
variance. Peers run with their own defaults, except that those which start k-means several times start it once, and that scikit-learn's
k-means and semantic-id stop after as many iterations as ours may take: with their defaults they are slower still. faiss fits on
256 items per centroid by default; "all items" lifts that. A contender with beam search encodes with a lower error at a higher cost, so
that the last column compares like with like: the time of the fastest contender whose error is at most 1 % above this one's.
"""

import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from pydantic import Field
from tqdm import tqdm

from gpr_dist.config import Config
from gpr_dist.errors import ConfigError
from gpr_dist.tokenizer.config import TokenizerConfig
from gpr_dist.tokenizer.fit import fit_quantizer

# N items  D dim  L levels  V centroids per level


class TokenizerBenchConfig(Config):
    """What is measured."""

    data: Path | None = None
    """.npy file with item embeddings [items, dim]; none = generated"""
    num_items: int = Field(1_000_000, ge=2)
    """generated items"""
    dim: int = Field(128, ge=1)
    """of generated items"""
    num_clusters: int = Field(20_000, ge=1)
    """generated items lie around as many centres, whose sizes follow Zipf's law"""
    num_levels: int = Field(3, ge=1)
    """codes per item"""
    codebook_size: int = Field(256, ge=2)
    """codes per level"""
    iterations: int = Field(25, ge=1)
    """most Lloyd iterations per level"""
    threads: int = Field(0, ge=0)
    """of every contender; 0 = one per core"""
    repetitions: int = Field(3, ge=1)
    """of each contender; the median counts"""
    seed: int = 0
    """of the generated items and of the fits"""
    contenders: tuple[str, ...] = ()
    """names to run; empty = all"""
    out: Path | None = None
    """JSON file for the results"""


class Fitted(NamedTuple):
    """What a contender learnt."""

    encode: Callable[[np.ndarray], np.ndarray]
    """[N, D] -> codes in the contender's own form"""
    decode: Callable[[np.ndarray], np.ndarray]
    """codes -> float32 [N, D]"""


def run_bench(config: TokenizerBenchConfig) -> None:
    """Fit and encode in turn, print a table."""
    threads = config.threads or len(os.sched_getaffinity(0))
    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as folder:
        path = config.data or _generate(config, Path(folder) / "embeddings.npy")
        vectors_ND = np.ascontiguousarray(np.load(path, allow_pickle=False), np.float32)
        contenders, absent = _contenders(config, threads)
        measured: dict[str, list[tuple[float, float, float]]] = {name: [] for name in contenders}
        runs = [(name, fit) for _ in range(config.repetitions) for name, fit in contenders.items()]
        for name, fit in tqdm(runs, desc="fits", file=sys.stderr, mininterval=0.5):
            measured[name].append(_measure(fit, vectors_ND))
    _report(config, measured, absent, vectors_ND.shape, threads)


def _generate(config: TokenizerBenchConfig, path: Path) -> Path:
    rng = np.random.default_rng(config.seed)
    centres = rng.normal(size=(config.num_clusters, config.dim)).astype(np.float32)
    share = 1 / np.arange(1, config.num_clusters + 1)
    cluster_N = rng.choice(config.num_clusters, config.num_items, p=share / share.sum())
    np.save(path, centres[cluster_N] + 0.5 * rng.standard_normal((config.num_items, config.dim), np.float32))
    return path


def _measure(fit: Callable[[np.ndarray], Fitted], vectors_ND: np.ndarray) -> tuple[float, float, float]:
    """Fit seconds, encode seconds, error left."""
    started = time.perf_counter()
    fitted = fit(vectors_ND)
    fit_seconds = time.perf_counter() - started
    started = time.perf_counter()
    codes = fitted.encode(vectors_ND)
    encode_seconds = time.perf_counter() - started
    left = sum(float(np.square(vectors_ND[lo:lo + 65536] - fitted.decode(codes[lo:lo + 65536])).sum(dtype=np.float64))
               for lo in range(0, len(vectors_ND), 65536))
    return fit_seconds, encode_seconds, left / (float(vectors_ND.var(0, dtype=np.float64).sum()) * len(vectors_ND))


def _contenders(config: TokenizerBenchConfig, threads: int) -> tuple[dict[str, Callable[[np.ndarray], Fitted]], dict[str, str]]:
    makers = {
        "ours, rq_kmeans": lambda: lambda x: _ours(config, x),
        "faiss ResidualQuantizer, beam 1": lambda: _faiss_rq(config, threads, beam=1),
        "faiss ResidualQuantizer": lambda: _faiss_rq(config, threads, beam=None),
        "faiss k-means per level": lambda: _faiss_kmeans(config, threads, every_item=False),
        "faiss k-means per level, all items": lambda: _faiss_kmeans(config, threads, every_item=True),
        "semantic-id RQKMeans": lambda: _semantic_id(config),
        "scikit-learn KMeans per level": lambda: _sklearn(config, mini_batch=False),
        "scikit-learn MiniBatchKMeans per level": lambda: _sklearn(config, mini_batch=True),
    }
    if unknown := set(config.contenders) - set(makers):
        raise ConfigError(f"contenders: unknown {', '.join(sorted(unknown))}; there is: {'; '.join(makers)}")
    found, absent = {}, {}
    for name in config.contenders or makers:
        try:
            found[name] = makers[name]()
        except ImportError as error:
            absent[name] = " ".join(str(error).split())[:200]
    return found, absent


def _ours(config: TokenizerBenchConfig, x_ND: np.ndarray) -> Fitted:
    settings = TokenizerConfig(num_levels=config.num_levels, codebook_size=config.codebook_size, iterations=config.iterations,
                               seed=config.seed, device="cpu")
    quantizer = fit_quantizer(x_ND, settings)
    return Fitted(quantizer.encode, quantizer.reconstruct)


def _faiss_rq(config: TokenizerBenchConfig, threads: int, beam: int | None) -> Callable[[np.ndarray], Fitted]:
    import faiss

    faiss.omp_set_num_threads(threads)
    bits = (config.codebook_size - 1).bit_length()
    if 1 << bits != config.codebook_size:
        raise ConfigError(f"codebook_size={config.codebook_size}: faiss's ResidualQuantizer needs a power of two")

    def fit(x_ND: np.ndarray) -> Fitted:
        quantizer = faiss.ResidualQuantizer(x_ND.shape[1], config.num_levels, bits)
        quantizer.cp.seed = config.seed + 1
        if beam is not None:
            quantizer.max_beam_size = beam
        quantizer.train(x_ND)
        return Fitted(quantizer.compute_codes, quantizer.decode)

    return fit


def _faiss_kmeans(config: TokenizerBenchConfig, threads: int, every_item: bool) -> Callable[[np.ndarray], Fitted]:
    import faiss

    faiss.omp_set_num_threads(threads)
    limit = {"max_points_per_centroid": 1 << 30} if every_item else {}

    def one(residual_ND: np.ndarray, level: int) -> np.ndarray:
        kmeans = faiss.Kmeans(residual_ND.shape[1], config.codebook_size, niter=config.iterations, seed=config.seed + level + 1, **limit)
        kmeans.train(residual_ND)
        return kmeans.centroids

    def assign(residual_ND: np.ndarray, centroids_VD: np.ndarray) -> np.ndarray:
        index = faiss.IndexFlatL2(centroids_VD.shape[1])
        index.add(centroids_VD)
        return index.search(residual_ND, 1)[1][:, 0]

    return lambda x_ND: _by_level(config, x_ND, one, assign)


def _sklearn(config: TokenizerBenchConfig, mini_batch: bool) -> Callable[[np.ndarray], Fitted]:
    from sklearn.cluster import KMeans, MiniBatchKMeans
    from sklearn.metrics import pairwise_distances_argmin

    def one(residual_ND: np.ndarray, level: int) -> np.ndarray:
        seed = config.seed + level
        if mini_batch:
            return MiniBatchKMeans(config.codebook_size, n_init=1, random_state=seed).fit(residual_ND).cluster_centers_
        return KMeans(config.codebook_size, n_init=1, max_iter=config.iterations, random_state=seed).fit(residual_ND).cluster_centers_

    return lambda x_ND: _by_level(config, x_ND, one, pairwise_distances_argmin)


def _by_level(config: TokenizerBenchConfig, x_ND: np.ndarray, one: Callable[[np.ndarray, int], np.ndarray],
              assign: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> Fitted:
    """Residual k-means out of somebody's k-means."""
    codebooks, residual_ND = [], x_ND
    for level in range(config.num_levels):
        codebooks.append(one(residual_ND, level))
        if level + 1 < config.num_levels:
            residual_ND = residual_ND - codebooks[-1][assign(residual_ND, codebooks[-1])]

    def encode(rows_ND: np.ndarray) -> np.ndarray:
        codes = []
        for codebook in codebooks:
            codes.append(assign(rows_ND, codebook))
            rows_ND = rows_ND - codebook[codes[-1]]
        return np.stack(codes, 1)

    return Fitted(encode, lambda codes_nL: sum(codebook[codes_nL[:, level]] for level, codebook in enumerate(codebooks)))


def _semantic_id(config: TokenizerBenchConfig) -> Callable[[np.ndarray], Fitted]:
    from semantic_id import RQKMeans

    def fit(x_ND: np.ndarray) -> Fitted:
        model = RQKMeans(n_levels=config.num_levels, n_clusters=config.codebook_size, max_iter=config.iterations, n_init=1,
                         random_state=config.seed)
        model.fit(x_ND)
        return Fitted(lambda rows_ND: model.encode(rows_ND, batch_size=65536), lambda codes_nL: model.decode(codes_nL))

    return fit


def _report(config: TokenizerBenchConfig, measured: dict[str, list[tuple[float, float, float]]], absent: dict[str, str],
            shape: tuple[int, ...], threads: int) -> None:
    medians = {name: [statistics.median(column) for column in zip(*runs, strict=True)] for name, runs in measured.items()}
    print(f"{shape[0]:,} items x {shape[1]} dimensions, {config.num_levels} levels of {config.codebook_size} codes, {threads} threads, "
          f"median of {config.repetitions} interleaved runs")
    print(f"{'':40} {'fit s':>8} {'encode items/s':>15} {'error left':>11} {'fit s of the fastest with this error':>38}")
    results = {}
    for name, (fit_seconds, encode_seconds, error) in sorted(medians.items(), key=lambda item: item[1][0]):
        rival = min((m[0], other) for other, m in medians.items() if m[2] <= 1.01 * error)
        results[name] = {"fit_s": fit_seconds, "encode_items_per_s": shape[0] / encode_seconds, "error": error, "runs": measured[name]}
        print(f"{name:40} {fit_seconds:8.2f} {shape[0] / encode_seconds:15,.0f} {error:11.5f} {rival[0]:8.2f}  {rival[1]}")
    for name, reason in absent.items():
        print(f"{name:40} not installed here: {reason}")
    if config.out:
        everything = {"config": config.model_dump(mode="json"), "results": results, "absent": absent}
        config.out.write_text(json.dumps(everything, indent=1))
