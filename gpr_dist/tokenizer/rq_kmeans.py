"""Residual k-means (RQ-Kmeans, GPR §2 / Fig. 3): k-means on the rows, then on what each level leaves of them."""

from collections.abc import Callable
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from gpr_dist.errors import TokenizerError
from gpr_dist.tokenizer import points as points_module
from gpr_dist.tokenizer.collective import global_max, map_blocks, rank, share
from gpr_dist.tokenizer.config import TokenizerConfig
from gpr_dist.tokenizer.kmeans import kmeans, nearest

# F rows over all processes  n rows of a block  D dim of the rows  L levels  V codes per level


class Source(Protocol):
    """Rows as points.Points gives them: embeddings, or the latents an encoder makes of them."""

    num_rows: int
    dim: int
    device: torch.device

    def take(self, rows_n: np.ndarray) -> Tensor:
        """Rows by number: float32 [n, D]."""


def fit_codebooks(source: Source, config: TokenizerConfig) -> tuple[Tensor, dict[str, list[float]]]:
    """Fit one codebook per level on the residuals of the level before: R^1 = e, R^{l+1} = R^l - c^l_{z_l}.

    Every process calls it with the same arguments. At most `config.kmeans_items_per_code` · V rows are read, the same for all levels.
    Returns: float32 [L, V, D] on the source's device, the same bits on every process and on any number of them; codes a level has no
        distinct residual for lie far outside the data, so that no item gets them. And per level the mean squared error of a coordinate at
        every iteration.
    Raises: TokenizerError when there are fewer distinct rows than codes.
    """
    generator = torch.Generator().manual_seed(config.seed)
    residuals = Residuals(source, config)
    codebooks, history = [], {}
    with tqdm(total=config.num_levels * config.iterations, desc="fit codebooks", unit="iter", mininterval=0.5, disable=rank() != 0) as bar:
        for level in range(config.num_levels):
            fitted = kmeans(residuals, config.codebook_size, config.iterations, config.tolerance, generator, bar)
            num_codes = len(fitted.centroids_VD)
            if level == 0 and num_codes < config.codebook_size:
                raise TokenizerError(f"{num_codes} distinct embeddings among {residuals.num_rows} items are fewer than codebook_size "
                                     f"{config.codebook_size}; lower tokenizer.codebook_size or give embeddings that tell the items apart")
            history[f"k-means error, level {level + 1}"] = [error / (residuals.num_rows * residuals.dim) for error in fitted.inertia]
            codebooks.append(_pad(fitted.centroids_VD, config.codebook_size, residuals.largest, generator))
            if level + 1 < config.num_levels:
                residuals.subtract(codebooks[-1])
            bar.update((level + 1) * config.iterations - bar.n)  # a level may converge early
    return torch.stack(codebooks), history


class Residuals:
    """What the levels so far leave of a sample of the rows (kmeans.Rows); in memory, or made again at every pass from codes."""

    def __init__(self, source: Source, config: TokenizerConfig) -> None:
        self._source, self.dim, self.device = source, source.dim, source.device
        self._rows_F = None  # all
        self.num_rows = source.num_rows
        if config.kmeans_items_per_code is not None and source.num_rows > (most := config.kmeans_items_per_code * config.codebook_size):
            self._rows_F = np.sort(np.random.default_rng(config.seed).choice(source.num_rows, most, replace=False, shuffle=False))
            self.num_rows = most
        block_rows = points_module.BLOCK_ROWS
        blocks = share(-(-self.num_rows // block_rows))
        self.lo, self.hi = min(blocks.start * block_rows, self.num_rows), min(blocks.stop * block_rows, self.num_rows)
        self.starts = range(self.lo, self.hi, block_rows)
        self._codebooks: list[Tensor] = []
        self._codes: list[Tensor] = []  # int32 per own row and level, when the residuals are not held
        held = (self.hi - self.lo) * self.dim * 4 <= config.fit_memory_gb / 2 * 2**30
        self._held_FD = torch.empty(self.hi - self.lo, self.dim, device=self.device) if held else None
        self.largest = self._pass(self._first)

    def block(self, start: int) -> Tensor:
        """As kmeans.Rows."""
        rows = slice(start - self.lo, min(start + self.starts.step, self.hi) - self.lo)
        return self._make(rows) if self._held_FD is None else self._held_FD[rows]

    def own(self, rows_n: Tensor) -> Tensor:
        """As kmeans.Rows."""
        index_n = (rows_n - self.lo).to(self.device)
        return self._make(index_n) if self._held_FD is None else self._held_FD[index_n]

    def subtract(self, codebook_VD: Tensor) -> None:
        """One level further: every row minus its nearest code."""
        codes_F = torch.empty(self.hi - self.lo, dtype=torch.int32, device=self.device) if self._held_FD is None else None

        def subtract_block(start: int) -> float:
            block_nD = self.block(start)
            codes_n, _ = nearest(block_nD, codebook_VD)
            if codes_F is not None:
                codes_F[start - self.lo:start - self.lo + len(codes_n)] = codes_n
                return _largest(block_nD - codebook_VD[codes_n])
            return _largest(block_nD.sub_(codebook_VD[codes_n]))

        self.largest = self._pass(subtract_block)
        self._codebooks.append(codebook_VD)
        self._codes.append(codes_F)

    def _first(self, start: int) -> float:
        rows = slice(start - self.lo, min(start + self.starts.step, self.hi) - self.lo)
        block_nD = self._make(rows)
        if self._held_FD is not None:
            self._held_FD[rows] = block_nD
        return _largest(block_nD)

    def _make(self, own: slice | Tensor) -> Tensor:
        """Own rows, from the source; the same operations in the same order as when they are held."""
        rows = self.lo + (np.arange(own.start, own.stop) if isinstance(own, slice) else own.cpu().numpy())
        made_nD = self._source.take(rows if self._rows_F is None else self._rows_F[rows])
        for codebook_VD, codes_F in zip(self._codebooks, self._codes, strict=True):
            made_nD = made_nD - codebook_VD[codes_F[own].long()]
        return made_nD

    def _pass(self, largest_of_block: Callable[[int], float]) -> float:
        mine = max(map_blocks(largest_of_block, self.starts, self.device), default=0.0)
        return float(global_max(torch.tensor(mine, device=self.device)))


def _largest(values: Tensor) -> float:
    return max(float(values.amax()), -float(values.amin()))


def _pad(centroids_VD: Tensor, codebook_size: int, largest: float, generator: torch.Generator) -> Tensor:
    """Fill the codebook up with far points: at 4 times the largest residual, no fitted item is nearer to them than to its own."""
    missing = codebook_size - len(centroids_VD)
    if not missing:
        return centroids_VD
    radius = 4 * largest * centroids_VD.shape[1] ** 0.5 or 1.0
    directions = torch.randn(missing, centroids_VD.shape[1], generator=generator).to(centroids_VD.device)
    return torch.cat([centroids_VD, radius * directions / directions.norm(dim=1, keepdim=True)])
