"""Which rows go to which rank at which step: pure arithmetic over the record-batch index and the row statistics.

An epoch permutes the record batches and lays their rows end to end. balance = rows: this sequence is cut into C equal streams, each is
dealt window by window, and a step takes the same number of rows from every stream. balance = work: the sequence is cut into windows, each
window into C streams of equal work, and a step takes equal work from every stream (`balance.py`). Either way a rank owns a contiguous
range of streams, so the rows of a step depend on (seed, data, global batch size) and never on the number of ranks, while a rank reads
only its own streams. Every rank computes the plan of all ranks, because all must run the same number of forwards. Nothing here opens a
shard or knows torch.
"""


from dataclasses import dataclass
from typing import Literal

import numpy as np

from gpr_dist.data.balance import by_step_and_stream, cut_by_work, deal_by_rows, deal_by_work, to_lightest, work
from gpr_dist.errors import ConfigError

# S steps  C streams  W ranks  n window rows per stream  g rows per stream and step  K rows of a rank in a step

_TAG_EPOCH, _TAG_WINDOW = 0, 1  # separate the random streams drawn from one seed


@dataclass(frozen=True)
class World:
    """This process among all data-parallel processes; a plain value, so that 1,000 ranks are tested without 1,000 processes."""

    rank: int = 0
    size: int = 1

    def __post_init__(self) -> None:
        assert 0 <= self.rank < self.size, (self.rank, self.size)


@dataclass(frozen=True)
class Sampling:
    """The numbers that, with the data, fix the order of rows. Only `micro_batch_tokens` may change on resume."""

    seed: int
    global_batch_size: int
    """rows per optimizer step over all ranks"""
    num_streams: int
    window_rows: int
    """rows per stream that are shuffled together, a multiple of the rows a step takes from a stream"""
    micro_batch_tokens: int
    quadratic_at: int
    """journey length, in tokens, at which attention costs as much as the rest of the layer"""
    balance: Literal["rows", "work"] = "rows"
    """what every stream has equally much of in a step; with `work`, a step has global_batch_size rows on average over a window"""

    @property
    def rows_per_stream(self) -> int:
        return self.global_batch_size // self.num_streams


def build_sampling(seed: int, global_batch_size: int, world_size: int, micro_batch_tokens: int, num_streams: int | None = None,
                   shuffle_rows: int = 256, quadratic_at: int = 4096, balance: Literal["rows", "work"] = "rows") -> Sampling:
    """Check the sizes against each other and fill in the number of streams: the largest divisor of the batch size up to 256, or to
    balance work the largest that leaves a stream 32 rows a step (at least 2 streams).

    Raises: ConfigError naming the nearest valid values.
    """
    if num_streams is None:
        most = 256 if balance == "rows" else max(2, global_batch_size // 32)
        num_streams = max(d for d in range(1, min(most, global_batch_size) + 1) if global_batch_size % d == 0)
    problems = []
    if global_batch_size % world_size:
        problems.append(f"global_batch_size={global_batch_size} is not divisible by the world size {world_size}; "
                        f"nearest: {_nearest_multiples(global_batch_size, world_size)}")
    if global_batch_size % num_streams:
        divisors = _divisors(global_batch_size)
        nearest = sorted(divisors, key=lambda d: abs(d - num_streams))[:2]
        problems.append(f"num_streams={num_streams} does not divide global_batch_size={global_batch_size}; nearest: {_either(nearest)}")
    if world_size > num_streams:
        enough = [d for d in _divisors(global_batch_size) if d >= world_size]
        remedy = f"set num_streams={min(enough)}" if enough else f"global_batch_size must be at least {world_size}"
        problems.append(f"world size {world_size} > num_streams={num_streams}: some ranks would never get a row; {remedy}")
    if problems:
        raise ConfigError("; ".join(problems))
    step_rows = global_batch_size // num_streams
    window_rows = max(1, round(shuffle_rows / step_rows)) * step_rows
    return Sampling(seed, global_batch_size, num_streams, window_rows, micro_batch_tokens, quadratic_at, balance)


class EpochPlan:
    """The order of one epoch. Building it costs O(record batches); a window costs O(C n), a step O(rows of the step)."""

    def __init__(self, sampling: Sampling, first_row: np.ndarray, num_rows: np.ndarray, num_tokens: np.ndarray, epoch: int) -> None:
        """Args: first_row, num_rows: per record batch; num_tokens: per row of the split (may be a memory map); epoch from 0."""
        self.sampling, self.epoch = sampling, epoch
        self._num_tokens = num_tokens
        order = np.random.default_rng([sampling.seed, _TAG_EPOCH, epoch]).permutation(len(num_rows))
        self._batch_first_row = first_row[order]
        self._ends = np.cumsum(num_rows[order], dtype=np.int64)
        total = int(self._ends[-1]) if len(order) else 0
        self._bounds = np.arange(sampling.num_streams + 1) * total // sampling.num_streams  # streams differ by at most one row
        longest = int(np.diff(self._bounds).max())
        self.num_steps = -(-longest // sampling.rows_per_stream)
        self.num_windows = -(-longest // sampling.window_rows)

    @property
    def steps_per_window(self) -> int:
        return self.sampling.window_rows // self.sampling.rows_per_stream

    def window(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Rows and tokens of the steps of window `number` of every stream, int64 [S, C, g]; row -1 has 0 tokens and is no row.

        Its first step is number * steps_per_window; the last window of an epoch may have fewer than steps_per_window.
        """
        return self._window_of_equal_work(number) if self.sampling.balance == "work" else self._window_of_equal_rows(number)

    def _window_of_equal_work(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        num_streams, size = self.sampling.num_streams, self.sampling.window_rows * self.sampling.num_streams
        start, stop = number * size, min((number + 1) * size, int(self._bounds[-1]))
        rows_N, tokens_N = (values[0] for values in self._rows(np.array([start]), np.array([stop - start])))
        inside = slice(np.searchsorted(self._ends, start, side="right"), np.searchsorted(self._ends, stop, side="left"))
        rng = np.random.default_rng([self.sampling.seed, _TAG_WINDOW, self.epoch, number])
        num_steps = -(-len(rows_N) // self.sampling.global_batch_size)
        work_N = work(tokens_N, self.sampling.quadratic_at)
        stream_N = cut_by_work(work_N, np.append(self._ends[inside] - start, len(rows_N)), num_streams)
        dealt_SCg = by_step_and_stream(deal_by_work(work_N, stream_N, num_streams, num_steps, rng), stream_N, num_steps, num_streams)
        return np.where(dealt_SCg < 0, -1, rows_N[dealt_SCg]), np.where(dealt_SCg < 0, 0, tokens_N[dealt_SCg])

    def _window_of_equal_rows(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        size, step_rows = self.sampling.window_rows, self.sampling.rows_per_stream
        start = np.minimum(self._bounds[:-1] + number * size, self._bounds[1:])
        count = np.minimum(self._bounds[1:] - start, size)
        rows_Cn, tokens_Cn = self._rows(start, count)
        rng = np.random.default_rng([self.sampling.seed, _TAG_WINDOW, self.epoch, number])
        dealt_Cn = deal_by_rows(work(tokens_Cn, self.sampling.quadratic_at), count, rng, step_rows)
        missing = -rows_Cn.shape[1] % step_rows
        by_step = []
        for values_Cn, nothing in ((rows_Cn, -1), (tokens_Cn, 0)):
            padded = np.pad(np.take_along_axis(values_Cn, dealt_Cn, 1), ((0, 0), (0, missing)), constant_values=nothing)
            by_step.append(np.ascontiguousarray(padded.reshape(len(padded), -1, step_rows).swapaxes(0, 1)))
        return by_step[0], by_step[1]

    def _rows(self, start: np.ndarray, count: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Rows start[c] .. start[c] + count[c] - 1 of the epoch's sequence, as [C, n] padded with row -1 and 0 tokens."""
        width = int(count.max(initial=0))
        rows_Cn = np.full((len(start), width), -1)
        tokens_Cn = np.zeros((len(start), width), np.int64)
        present_Cn = np.arange(width) < count[:, None]
        # The record batches each stream's range touches, then the rows of each of those pieces.
        first = np.searchsorted(self._ends, start, side="right")
        last = np.searchsorted(self._ends, start + count, side="left")
        touched = np.where(count > 0, last - first + 1, 0)
        stream = np.repeat(np.arange(len(start)), touched)
        batch = np.arange(len(stream)) - np.repeat(np.cumsum(touched) - touched, touched) + first[stream]
        begin = np.where(batch > 0, self._ends[batch - 1], 0)
        low = np.maximum(begin, start[stream])
        high = np.minimum(self._ends[batch], (start + count)[stream])
        lengths = high - low
        shift = self._batch_first_row[batch] + (low - begin) - (np.cumsum(lengths) - lengths)
        rows = np.repeat(shift, lengths) + np.arange(int(lengths.sum()))
        rows_Cn[present_Cn] = rows
        tokens_Cn[present_Cn] = self._num_tokens[rows]
        return rows_Cn, tokens_Cn


def owned_streams(num_streams: int, world: World) -> slice:
    """The contiguous range of streams a rank reads."""
    return slice(world.rank * num_streams // world.size, (world.rank + 1) * num_streams // world.size)


def pack_steps(rows_SCg: np.ndarray, tokens_SCg: np.ndarray, world: World, micro_batch_tokens: int,
               quadratic_at: int) -> list[list[np.ndarray]]:
    """This rank's micro-batches of some steps: arrays of global row numbers, in a step equally many on every rank.

    A micro-batch has at most `micro_batch_tokens` tokens, unless a single longer row is alone in it; a rank spreads its rows over all
    of them by work, and may be left with empty ones.
    """
    num_steps, num_streams, _ = rows_SCg.shape
    _, bins_SWK, num_bins_S = pack_ranks(tokens_SCg, world.size, micro_batch_tokens, quadratic_at)
    mine = owned_streams(num_streams, world)
    rows_SK, tokens_SK = (values_SCg[:, mine].reshape(num_steps, -1) for values_SCg in (rows_SCg, tokens_SCg))
    longest_first_SK = np.argsort(-tokens_SK, axis=1, kind="stable")
    bins_SK = bins_SWK[:, world.rank, :longest_first_SK.shape[1]]
    by_bin_SK = np.argsort(bins_SK, axis=1, kind="stable")
    rows_SK = np.take_along_axis(rows_SK, np.take_along_axis(longest_first_SK, by_bin_SK, 1), 1)
    bins_SK = np.sort(bins_SK, axis=1)
    return [[packed[packed >= 0] for packed in np.split(rows_K, np.searchsorted(bins_K, np.arange(1, num_bins)))]
            for rows_K, bins_K, num_bins in zip(rows_SK, bins_SK, num_bins_S, strict=True)]


def pack_ranks(tokens_SCg: np.ndarray, world_size: int, micro_batch_tokens: int,
               quadratic_at: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens of each rank's rows, longest first [S, W, K] (0 is no row), their micro-batches [S, W, K], and how many a step has [S].

    The number of micro-batches of a step is the smallest found for which the rows of every rank fit. All steps in one call, because a
    step of a few hundred rows costs more in calls than in arithmetic.
    """
    num_steps, num_streams, step_rows = tokens_SCg.shape
    bounds = np.arange(world_size + 1) * num_streams // world_size
    per_rank = np.diff(bounds) * step_rows
    slots_WK = np.arange(per_rank.max()) < per_rank[:, None]
    tokens_SWK = np.zeros((num_steps, *slots_WK.shape), np.int64)
    tokens_SWK[:, slots_WK] = tokens_SCg.reshape(num_steps, -1)
    longest_first_SWK = -np.sort(-tokens_SWK, axis=2)
    num_bins_S = _fewest_bins(longest_first_SWK, micro_batch_tokens)
    bins_SWK = np.zeros(longest_first_SWK.shape, np.int64)
    packed_S = np.zeros(num_steps, bool)
    while not packed_S.all():
        steps = np.flatnonzero(~packed_S)
        num_bins_X = np.repeat(num_bins_S[steps], world_size)
        bins_XK, fits_X = spread(np.concatenate(longest_first_SWK[steps]), num_bins_X, micro_batch_tokens, quadratic_at)
        bins_SWK[steps] = bins_XK.reshape(len(steps), world_size, -1)
        packed_S[steps] = fits = fits_X.reshape(len(steps), -1).all(1)
        num_bins_S[steps[~fits]] += np.maximum(1, num_bins_S[steps[~fits]] // 32)
    return longest_first_SWK, bins_SWK, num_bins_S


def spread(tokens_XK: np.ndarray, num_bins_X: np.ndarray, budget: int, quadratic_at: int) -> tuple[np.ndarray, np.ndarray]:
    """Deal the rows of every rank and step X to bins of nearly equal work, the longest row first, each to the lightest bin.

    Args: tokens_XK: longest first; 0 where there is no row. A row longer than the budget gets a bin of its own.
    Returns: bin of every row, int64 [X, K], and whether all bins keep the token budget, bool [X]; where not, the bins mean nothing.
    """
    too_long_XK = tokens_XK > budget
    num_bins = int(np.max(num_bins_X))
    shared_X = num_bins_X - too_long_XK.sum(1)  # bins for the rows that can share one; the others follow
    shared_tokens_XK = np.where(too_long_XK, 0, tokens_XK)
    load_XP = np.where(np.arange(num_bins) < shared_X[:, None], 0.0, np.inf)
    bins_XK, _ = to_lightest(work(shared_tokens_XK, quadratic_at), load_XP)
    bins_XK = np.where(too_long_XK, shared_X[:, None] + np.arange(tokens_XK.shape[1]), bins_XK)
    flat_XK = np.arange(len(tokens_XK))[:, None] * num_bins + np.clip(bins_XK, 0, num_bins - 1)
    used_XP = np.bincount(flat_XK.ravel(), shared_tokens_XK.ravel(), load_XP.size).reshape(load_XP.shape)
    return bins_XK, (used_XP <= budget).all(1) & ((shared_X > 0) | (shared_X == 0) & ~shared_tokens_XK.any(1))


def _fewest_bins(tokens_SWK: np.ndarray, budget: int) -> np.ndarray:
    """A lower bound on the micro-batches of each step: by volume, and because two rows above half the budget never share one."""
    too_long_SWK = tokens_SWK > budget
    volume_SW = too_long_SWK.sum(2) - (-np.where(too_long_SWK, 0, tokens_SWK).sum(2) // budget)
    return np.maximum(np.maximum(volume_SW, (2 * tokens_SWK > budget).sum(2)).max(1), 1)


def pack_in_order(num_tokens: np.ndarray, budget: int) -> np.ndarray:
    """Bounds of micro-batches of consecutive rows, each at most `budget` tokens or a single row; int64 [number + 1]."""
    ends = np.cumsum(num_tokens, dtype=np.int64)
    bounds = [0]
    while bounds[-1] < len(ends):
        used = ends[bounds[-1] - 1] if bounds[-1] else 0
        bounds.append(max(bounds[-1] + 1, int(np.searchsorted(ends, used + budget, side="right"))))
    return np.array(bounds)


def _divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]


def _nearest_multiples(number: int, of: int) -> str:
    below = number // of * of
    return _either([value for value in (below, below + of) if value > 0])


def _either(values: list[int]) -> str:
    return " or ".join(str(value) for value in values)
