"""The embeddings a tokenizer is fitted on: a sample of a memory map of any length, in fixed blocks, spread over the processes.

Owns reading (npy, Arrow), the sample, the check that values are finite, the normalisation, and what is held in memory. Blocks and
their contents do not depend on the number of processes or on the memory; what is computed of them is kmeans.py's and rq_vae.py's.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor
from tqdm import tqdm

from gpr_dist.errors import TokenizerError
from gpr_dist.tokenizer.collective import exact_sum, map_blocks, rank, share, together
from gpr_dist.tokenizer.config import TokenizerConfig

# N items  F fit rows: the sample, in catalogue order  B blocks of this process  n rows of a block  D embedding dim

BLOCK_ROWS = 8192
"""fit rows of a block; a power of two, so that every block begins at an aligned address"""


class ArrowRows:
    """A fixed-size-list column of a memory-mapped Arrow file, read like a [N, D] array: by slice and by row numbers."""

    def __init__(self, path: str | Path, column: str = "embedding") -> None:
        """Raises: TokenizerError when the file or the column cannot be used, e.g. for a row without a vector."""
        try:
            table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
            chunks = [chunk for chunk in table[column].chunks if len(chunk)]
        except (OSError, pa.ArrowInvalid, KeyError) as error:
            raise TokenizerError(f"{path}: column {column!r} cannot be read ({error}); give an Arrow IPC file with it") from None
        if not chunks or not pa.types.is_fixed_size_list(kind := chunks[0].type) or not pa.types.is_floating(kind.value_type):
            raise TokenizerError(f"{path}: column {column!r} is {table[column].type}, expected a fixed_size_list of floats with rows in it")
        if any(chunk.null_count or chunk.flatten().null_count for chunk in chunks):
            raise TokenizerError(f"{path}: column {column!r} has rows without a vector; give every item one")
        self._chunks = [chunk.flatten().to_numpy(zero_copy_only=True).reshape(len(chunk), kind.list_size) for chunk in chunks]
        self._ends = np.cumsum([len(chunk) for chunk in self._chunks])
        self.shape, self.dtype, self.ndim = (int(self._ends[-1]), kind.list_size), self._chunks[0].dtype, 2

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice | np.ndarray) -> np.ndarray:
        if isinstance(rows, slice):
            lo, hi, step = rows.indices(len(self))
            chunk = int(np.searchsorted(self._ends, lo, side="right"))
            if step == 1 and lo < hi <= self._ends[chunk]:  # within one chunk: no copy
                first = self._ends[chunk] - len(self._chunks[chunk])
                return self._chunks[chunk][lo - first:hi - first]
            rows = np.arange(lo, hi, step)
        rows_n = np.asarray(rows)
        out_nD = np.empty((len(rows_n), self.shape[1]), self.dtype)
        chunk_n = np.searchsorted(self._ends, rows_n, side="right")
        for chunk in np.unique(chunk_n):
            here = chunk_n == chunk
            out_nD[here] = self._chunks[chunk][rows_n[here] - (self._ends[chunk] - len(self._chunks[chunk]))]
        return out_nD


def open_embeddings(path: str | Path, column: str = "embedding") -> np.ndarray | ArrowRows:
    """Memory-map [N, D] embeddings: a .npy, or the fixed-size-list column of an Arrow file. Raises: TokenizerError."""
    if Path(path).suffix != ".npy":
        return ArrowRows(path, column)
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise TokenizerError(f"{path} cannot be read ({error}); give a .npy of [items, dim]") from None


def to_float32(rows_nD: np.ndarray) -> Tensor:
    """A float32 copy in memory of torch's own, whose alignment is always the same."""
    return torch.empty(rows_nD.shape, dtype=torch.float32).copy_(torch.from_numpy(np.array(rows_nD)))


class Points:
    """The normalised fit rows. Every process makes one with the same arguments and owns a contiguous run of its blocks.

    Attributes:
        num_rows: fit rows (F) of all processes together.
        dim: D.
        mean_D, scale: float32; points are (embedding - mean) / scale: mean 0 and mean variance 1 over the fit rows, see
            Quantizer.normalise. The same bits on every process, whatever their number.
        held: whether this process's rows are in (GPU) memory, else they are read again from the map at every pass.
    """

    def __init__(self, embeddings_ND: np.ndarray | ArrowRows, config: TokenizerConfig, device: torch.device) -> None:
        """Draw the sample and read it once. Raises: TokenizerError, the same on every process, for unusable embeddings."""
        if embeddings_ND.ndim != 2 or 0 in embeddings_ND.shape:
            raise TokenizerError(f"embeddings have shape {embeddings_ND.shape}; expected [items, dim], neither of them 0")
        self._embeddings_ND, self.device = embeddings_ND, device
        num_items, self.dim = embeddings_ND.shape
        self._rows_F = None  # all
        if num_items > config.max_fit_items:
            self._rows_F = np.random.default_rng(config.seed).choice(num_items, config.max_fit_items, replace=False, shuffle=False)
            self._rows_F.sort()  # a memory map is read front to back
        self.num_rows = min(num_items, config.max_fit_items)
        blocks = share(-(-self.num_rows // BLOCK_ROWS))
        self._lo, self._hi = (min(block * BLOCK_ROWS, self.num_rows) for block in (blocks.start, blocks.stop))
        self.held = (self._hi - self._lo) * self.dim * 4 <= config.fit_memory_gb / 2 * 2**30  # the other half is for residuals
        self._held_FD = torch.empty(self._hi - self._lo, self.dim, device=device) if self.held else None
        self.mean_D, self.scale = self._normalisation()
        if self.held:
            for lo in range(0, len(self._held_FD), BLOCK_ROWS):
                self._held_FD[lo:lo + BLOCK_ROWS] = self._normalise(self._held_FD[lo:lo + BLOCK_ROWS])

    def blocks(self) -> Iterator[tuple[int, Tensor]]:
        """This process's blocks in order: number of the first fit row, and the points float32 [n, D] on the device; read-only."""
        for lo in range(self._lo, self._hi, BLOCK_ROWS):
            hi = min(lo + BLOCK_ROWS, self._hi)
            if self.held:
                yield lo, self._held_FD[lo - self._lo:hi - self._lo]
            else:
                yield lo, self._normalise(self._read(slice(lo, hi)))

    def take(self, rows_n: np.ndarray | Tensor) -> Tensor:
        """Points of any fit rows, also of other processes' (from the map): float32 [n, D] on the device.

        Args: rows_n: int64 in [0, num_rows), in any order. Ascending rows are read fastest.
        """
        rows_n = torch.as_tensor(rows_n, dtype=torch.int64).cpu()
        here_n = (rows_n >= self._lo) & (rows_n < self._hi)
        if self.held and bool(here_n.all()):
            return self._held_FD[(rows_n - self._lo).to(self.device)]
        points_nD = torch.empty(len(rows_n), self.dim, device=self.device)
        if self.held:
            points_nD[here_n.to(self.device)] = self._held_FD[(rows_n[here_n] - self._lo).to(self.device)]
        missing_n = ~here_n if self.held else torch.ones_like(here_n)
        points_nD[missing_n.to(self.device)] = self._normalise(self._read(rows_n[missing_n].numpy()))
        return points_nD

    def _read(self, fit_rows: slice | np.ndarray) -> Tensor:
        """Embeddings as they are, float32 on the device. Raises: TokenizerError for a value that is not finite."""
        if not isinstance(fit_rows, slice) and len(fit_rows) and fit_rows[-1] - fit_rows[0] + 1 == len(fit_rows):
            fit_rows = slice(int(fit_rows[0]), int(fit_rows[-1]) + 1) if (np.diff(fit_rows) == 1).all() else fit_rows
        items = fit_rows if self._rows_F is None else self._rows_F[fit_rows]
        rows_nD = to_float32(self._embeddings_ND[items])
        good_n = rows_nD.square().sum(1).isfinite()
        if not bool(good_n.all()):
            bad = int(good_n.int().argmin())
            item = items.start + bad if isinstance(items, slice) else items[bad]
            raise TokenizerError(f"embedding of item {item} is not finite, or its squares are not ({int((~good_n).sum())} of "
                                 f"{len(good_n)} rows read with it); repair the embeddings")
        return rows_nD.to(self.device)

    def _normalise(self, rows_nD: Tensor) -> Tensor:
        return (rows_nD - self.mean_D) / self.scale

    def _normalisation(self) -> tuple[Tensor, Tensor]:
        """One pass: mean and scale, order-independent; fills what is held, not normalised yet."""
        starts = range(self._lo, self._hi, BLOCK_ROWS)
        # made at once, as results kept one by one would break the heap into pieces
        sums_BD = torch.zeros(len(starts), self.dim, dtype=torch.float64, device=self.device)
        squares_B = torch.zeros(len(starts), dtype=torch.float64, device=self.device)
        with together():
            # any row near the data keeps the sums of squares from cancelling when they are far from the origin
            shift_D = self._read(slice(0, 1))[0].double()

            def sum_block(start: int) -> int:
                rows_nD = self._read(slice(start, min(start + BLOCK_ROWS, self._hi)))
                if self.held:
                    self._held_FD[start - self._lo:start - self._lo + len(rows_nD)] = rows_nD
                shifted_nD = rows_nD - shift_D
                block = (start - self._lo) // BLOCK_ROWS
                sums_BD[block] = shifted_nD.sum(0)
                squares_B[block] = shifted_nD.square_().sum()
                return len(rows_nD)

            with tqdm(total=self._hi - self._lo, desc="read embeddings", unit="item", unit_scale=True, mininterval=0.5,
                      disable=rank() != 0) as bar:
                for done in map_blocks(sum_block, starts, self.device):
                    bar.update(done)
        summed_D = exact_sum(sums_BD) / self.num_rows
        squares = exact_sum(squares_B) / self.num_rows
        variance = float((squares - summed_D.square().sum()) / self.dim)
        mean_D = (shift_D + summed_D).float()
        # what rounding leaves of a constant must not be blown up to variance 1
        relative = variance / max(float(mean_D.double().square().mean()), 1e-300)
        scale = variance ** 0.5 if relative > 1e-13 else 1.0
        return mean_D, torch.tensor(scale, dtype=torch.float32, device=self.device)

