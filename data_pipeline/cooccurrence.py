"""Behavioural embeddings: which items stand near each other in the training journeys (PPMI of co-occurrence, truncated SVD).

Content alone leaves most products of a shop on a shared semantic ID; what users do with them tells them apart. Only the training
split is read, and only its fresh tokens count, so that segments that overlap count no pair twice and nothing is learnt from later
splits. Items no journey shows have a zero vector; their content decides alone.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import scipy.sparse as sp
from pydantic import Field
from tqdm import tqdm

from data_pipeline.shards import iter_record_batches
from gpr_dist.config import Config
from gpr_dist.errors import DataError

# N catalogue items  M items with a vector  D dim  T tokens of one chunk

_CHUNK_TOKENS = 1 << 20


class CooccurrenceConfig(Config):
    """How behaviour joins the content embeddings; 0 dimensions = not at all."""

    dim: int = Field(0, ge=0)
    """dimensions of the behavioural part, which precedes the content part; 0 = content only"""
    window: int = Field(5, ge=1)
    """items at most that many items apart in a journey co-occur, with weight 1/distance"""
    content_weight: float = Field(0.7, gt=0)
    """factor on the content part; the behavioural part has norm 1"""
    max_tokens: int = Field(10_000_000, ge=1)
    """journey tokens read, in whole record batches drawn at random when there are more; bounds the memory, up to ~120 bytes a token"""
    max_items: int = Field(1_000_000, ge=2)
    """most frequent items that get a behavioural vector; bounds the memory of the SVD"""
    seed: int = 0
    """of the sample and of the randomised SVD"""


def cooccurrence_svd(shards: Path, num_items: int, config: CooccurrenceConfig) -> tuple[np.ndarray, np.ndarray]:
    """Vectors of the items seen near other items.

        PPMI_ab = max(0, log(n_ab n / (n_a n_b))),  n_ab = Σ over pairs within the window of 1/distance;  rows of U √S of its SVD

    Args: shards: a split folder, normally shards/train, of either container.
    Returns: ascending catalogue indices int64 [M] and float32 [M, D] of norm 1.
    Raises: DataError when the shards are missing or show fewer than D items near others.
    """
    counts_NN = _count(shards, num_items, config)
    mass_N = np.asarray(counts_NN.sum(1)).ravel()
    items_M = np.flatnonzero(mass_N)
    if len(items_M) > config.max_items:
        items_M = np.sort(np.argsort(-mass_N, kind="stable")[:config.max_items])
    if len(items_M) <= config.dim:
        raise DataError(f"{shards}: only {len(items_M)} items co-occur, too few for cooccurrence.dim={config.dim}; lower it or set it to 0")
    pairs = counts_NN[items_M][:, items_M].tocoo()
    pmi = np.log(pairs.data * mass_N.sum() / (mass_N[items_M[pairs.row]] * mass_N[items_M[pairs.col]]))
    positive = pmi > 0
    ppmi_MM = sp.csr_matrix((pmi[positive].astype(np.float32), (pairs.row[positive], pairs.col[positive])), shape=pairs.shape)
    from sklearn.decomposition import TruncatedSVD  # here: a second of every training job's start otherwise

    svd = TruncatedSVD(config.dim, random_state=config.seed)
    vectors_MD = svd.fit_transform(ppmi_MM) / np.sqrt(np.maximum(svd.singular_values_, 1e-12))
    norm_M = np.linalg.norm(vectors_MD, axis=1)
    known = norm_M > 1e-12
    return items_M[known], (vectors_MD[known] / norm_M[known, None]).astype(np.float32)


def join(content_ND: np.ndarray, items_M: np.ndarray, vectors_MD: np.ndarray, content_weight: float, out: Path) -> np.ndarray:
    """Write [behaviour ; content_weight · content] of every item to `out` (.npy). Returns: it, as a read-only memory map."""
    behaviour_dim = vectors_MD.shape[1]
    shape = (len(content_ND), behaviour_dim + content_ND.shape[1])
    temporary = out.with_name(out.name + ".tmp")
    try:
        joined = np.lib.format.open_memmap(temporary, mode="w+", dtype=np.float32, shape=shape)
        joined[items_M, :behaviour_dim] = vectors_MD
        for lo in range(0, len(content_ND), _CHUNK_TOKENS):
            joined[lo:lo + _CHUNK_TOKENS, behaviour_dim:] = content_weight * content_ND[lo:lo + _CHUNK_TOKENS]
        joined.flush()
        temporary.replace(out)
    except OSError as error:
        raise DataError(f"cannot write embeddings {out}: {error}") from error
    finally:
        temporary.unlink(missing_ok=True)
    return np.load(out, mmap_mode="r", allow_pickle=False)


def _count(shards: Path, num_items: int, config: CooccurrenceConfig) -> sp.csr_matrix:
    """Symmetric weighted pair counts [N, N], diagonal empty."""
    counts_NN = sp.csr_matrix((num_items, num_items), dtype=np.float32)
    for item_T, row_T, fresh_T in _chunks(shards, config):
        if len(item_T) and item_T.max() >= num_items:
            raise DataError(f"{shards}: item {item_T.max()} of a catalogue of {num_items}; rebuild the shards")
        first, second, weight = [], [], []
        for distance in range(1, config.window + 1):
            pair = (row_T[distance:] == row_T[:-distance]) & fresh_T[distance:] & (item_T[distance:] != item_T[:-distance])
            first.append(item_T[:-distance][pair])
            second.append(item_T[distance:][pair])
            weight.append(np.full(len(first[-1]), 1 / distance, np.float32))
        pairs = (np.concatenate(weight), (np.concatenate(first), np.concatenate(second)))
        counts_NN = counts_NN + sp.csr_matrix(pairs, shape=counts_NN.shape)
    return counts_NN + counts_NN.T


def _chunks(shards: Path, config: CooccurrenceConfig) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Item tokens of whole record batches: catalogue index, row and whether fresh, int64 / int64 / bool [T]."""
    held, num_held, num_read = [], 0, 0
    with tqdm(desc="count co-occurrences", unit="token", unit_scale=True, mininterval=0.5) as bar:
        for number, batch in enumerate(iter_record_batches(shards, config.seed, ", or set cooccurrence.dim=0")):
            items = batch.column("item")
            lengths = np.diff(items.offsets.to_numpy())
            row_T = np.repeat(np.arange(len(lengths)), lengths)
            position_T = np.arange(len(row_T)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
            item_T = items.flatten().to_numpy()
            own_T = (item_T >= 0) & (position_T < (lengths - batch.column("num_lookahead").to_numpy())[row_T])
            fresh_T = position_T >= batch.column("num_context").to_numpy()[row_T]
            held.append((item_T[own_T].astype(np.int64), row_T[own_T] + (number << 32), fresh_T[own_T]))
            num_held += len(held[-1][0])
            num_read += len(row_T)
            bar.update(len(row_T))
            if num_held >= _CHUNK_TOKENS or num_read >= config.max_tokens:
                yield tuple(map(np.concatenate, zip(*held, strict=True)))
                held, num_held = [], 0
            if num_read >= config.max_tokens:
                return
        if held:
            yield tuple(map(np.concatenate, zip(*held, strict=True)))
