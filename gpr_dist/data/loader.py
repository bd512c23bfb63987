"""The streaming loader: endless steps of packed micro-batches for one rank, prefetched, resumable from a handful of integers.

Puts the other files together: `sampler.py` says which rows, `reader.py` fetches their record batches, `collate.py` packs them. A
rank holds the rows of its streams for one window at a time, and loads the next window meanwhile.
"""

import itertools
import math
import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import pyarrow as pa
from pydantic import Field

from gpr_dist.config import Config
from gpr_dist.data.collate import JourneyColumns, collate
from gpr_dist.data.legal import LegalCodes
from gpr_dist.data.reader import ShardReader
from gpr_dist.data.sampler import EpochPlan, Sampling, World, build_sampling, owned_streams, pack_in_order, pack_step
from gpr_dist.errors import DataError
from gpr_dist.schema import JOURNEY_SCHEMA, Batch

T = TypeVar("T")
_USED_COLUMNS = [name for name in JOURNEY_SCHEMA.names if name != "user_id"]


class LoaderConfig(Config):
    """How journeys are drawn, packed and fetched."""

    seed: int = 0
    """of the order of rows"""
    global_batch_size: int = Field(default=256, ge=1)
    """journeys per optimizer step over all ranks"""
    micro_batch_tokens: int = Field(default=16384, ge=1)
    """most tokens in one forward; a longer journey is alone in its micro-batch"""
    num_streams: int | None = Field(default=None, ge=1)
    """parallel reading positions, at least the number of ranks and a divisor of global_batch_size; none = its largest divisor <= 256"""
    shuffle_rows: int = Field(default=256, ge=1)
    """journeys of one stream that are shuffled together; a rank holds about 2 x num_streams / ranks times as many in memory"""
    quadratic_at: int = Field(default=4096, ge=1)
    """journey length, in tokens, at which attention costs as much as the rest of a layer (about 6 x width); for balancing ranks"""
    verify: Literal["first_read", "never"] = "first_read"
    """when checksums are compared"""
    on_corrupt: Literal["stop", "skip"] = "stop"
    """a damaged record batch stops the run, or is skipped, logged and counted"""
    prefetch_steps: int = Field(default=2, ge=0)
    """steps prepared ahead in a background thread; 0 = none and no thread"""
    read_threads: int = Field(default=8, ge=1)
    """record batches fetched at a time, for remote shards"""
    cache_dir: str | None = None
    """where index and row statistics of remote shards are kept; none = the system's temporary folder"""


@dataclass(frozen=True)
class Step:
    """One optimizer step's work for this rank: equally many micro-batches on every rank, some perhaps empty."""

    epoch: int
    step_in_epoch: int
    micro_batches: list[Batch]


class Loader:
    """Iterate for `Step`s, endlessly over epochs. `state_dict` always describes the next step the consumer will get."""

    def __init__(self, reader: ShardReader, sampling: Sampling, world: World, make_batch: "Callable[[HeldRows, np.ndarray], Batch]",
                 prefetch_steps: int, read_threads: int) -> None:
        """Args: make_batch: from the rows in memory and the global row numbers of a micro-batch to the micro-batch."""
        self.reader, self.sampling, self.world, self._make_batch = reader, sampling, world, make_batch
        self._prefetch_steps, self._read_threads = prefetch_steps, read_threads
        self._epoch = self._step = 0

    @property
    def steps_per_epoch(self) -> int:
        """The last step of an epoch may have fewer rows."""
        longest_stream = math.ceil(self.reader.manifest.num_rows / self.sampling.num_streams)
        return math.ceil(longest_stream / self.sampling.rows_per_stream)

    def state_dict(self) -> dict[str, int | str]:
        """Position and everything that fixes the order; the same on every rank, JSON-able, independent of the number of ranks."""
        return {"epoch": self._epoch, "step": self._step, **self._identity()}

    def load_state_dict(self, state: dict[str, int | str]) -> None:
        """Continue where `state` was taken, on any number of ranks. Raises: DataError when data, seed or batch size changed."""
        for name, here in self._identity().items():
            if state.get(name) != here:
                what = "other shards" if name == "fingerprint" else "another order of the rows"
                raise DataError(f"cannot resume: the checkpoint was trained on {what}: {name} {state.get(name)}, but {self.reader.folder} "
                                f"and this config give {here}; restore them, or start a new run")
        self._epoch, self._step = int(state["epoch"]), int(state["step"])

    def __iter__(self) -> Iterator[Step]:
        for step in prefetch(self._steps(self._epoch, self._step), self._prefetch_steps):
            last = step.step_in_epoch + 1 == self.steps_per_epoch
            self._epoch, self._step = (step.epoch + 1, 0) if last else (step.epoch, step.step_in_epoch + 1)
            yield step

    def _identity(self) -> dict[str, int | str]:
        s = self.sampling
        return {"fingerprint": self.reader.manifest.fingerprint, "seed": s.seed, "global_batch_size": s.global_batch_size,
                "num_streams": s.num_streams, "window_rows": s.window_rows, "quadratic_at": s.quadratic_at}

    def _steps(self, epoch: int, first_step: int) -> Iterator[Step]:
        with ThreadPoolExecutor(1, "window") as ahead, ThreadPoolExecutor(self._read_threads, "read") as readers:
            windows = self._windows(epoch, first_step, ahead, readers)
            for plan, number, window, rows in windows:
                start = max(number * plan.steps_per_window, first_step if plan.epoch == epoch else 0)
                for step in range(start, min((number + 1) * plan.steps_per_window, plan.num_steps)):
                    rows_Cg, tokens_Cg = plan.step_rows(window, step)
                    packed = pack_step(rows_Cg, tokens_Cg, self.world, self.sampling.micro_batch_tokens, self.sampling.quadratic_at)
                    yield Step(plan.epoch, step, [self._make_batch(rows, chosen) for chosen in packed])

    def _windows(self, epoch: int, first_step: int, ahead: ThreadPoolExecutor, readers: ThreadPoolExecutor) -> Iterator[tuple]:
        """(epoch plan, window number, window, this rank's rows of it), each loaded while the one before is used."""
        kept: dict[int, pa.RecordBatch] = {}

        def load(plan: EpochPlan, number: int) -> tuple:
            window = plan.window(number)
            mine = window.rows_Cn[owned_streams(self.sampling.num_streams, self.world)]
            return plan, number, window, HeldRows.load(self.reader, np.sort(mine[mine >= 0]), readers, kept)

        pending: Future | None = None
        for current in itertools.count(epoch):
            plan = EpochPlan(self.sampling, self.reader.first_row, self.reader.num_rows, self.reader.num_tokens, current)
            first = first_step // plan.steps_per_window if current == epoch else 0
            for number in range(first, plan.num_windows):
                following = ahead.submit(load, plan, number)
                if pending is not None:
                    yield pending.result()
                pending = following


@dataclass(frozen=True)
class HeldRows:
    """Rows of a split in memory, laid end to end so that gathering a micro-batch is one vectorised pass."""

    reader: ShardReader
    first_row: np.ndarray
    """global row number at the start of each contiguous run, increasing"""
    num_rows: np.ndarray
    journeys: JourneyColumns | None
    """the runs' rows in order; None when there are no rows"""

    @classmethod
    def load(cls, reader: ShardReader, rows: np.ndarray, readers: ThreadPoolExecutor | None = None,
             kept: dict[int, pa.RecordBatch] | None = None) -> "HeldRows":
        """Fetch the record batches of `rows` (sorted global row numbers).

        `kept` carries partly used record batches from one call to the next, so that a batch across two windows is fetched once.
        Rows of a damaged batch are left out under on_corrupt = skip.
        """
        if len(rows) == 0:
            return cls(reader, rows, rows, None)
        kept = {} if kept is None else kept
        number_of_row = np.searchsorted(reader.first_row, rows, side="right") - 1
        numbers, start = np.unique(number_of_row, return_index=True)
        low, high = rows[start], rows[np.append(start[1:], len(rows)) - 1] + 1
        fetch = [number for number in numbers.tolist() if number not in kept]
        fetch_all = map if readers is None or reader.is_local else readers.map  # threads cost more than they gain on a memory map
        fetched = dict(zip(fetch, fetch_all(reader.read_batch_or_skip, fetch), strict=True))
        batches = [fetched.get(number, kept.get(number)) for number in numbers.tolist()]
        unfinished = high < reader.first_row[numbers] + reader.num_rows[numbers]
        kept.clear()
        kept |= {int(number): batch for number, batch, more in zip(numbers, batches, unfinished, strict=True) if more}
        present = np.array([batch is not None for batch in batches], bool)
        pieces = [batch.slice(begin, length).select(_USED_COLUMNS)
                  for batch, begin, length in zip(batches, low - reader.first_row[numbers], high - low, strict=True) if batch is not None]
        journeys = JourneyColumns.of(pa.concat_batches(pieces)) if pieces else None
        return cls(reader, low[present], (high - low)[present], journeys)

    def collate(self, rows: np.ndarray, codes_ML: np.ndarray, num_heads: int) -> Batch:
        """The micro-batch of these global rows, in this order; rows that were not read are left out."""
        manifest = self.reader.manifest
        rows, position = self.find(rows)
        return collate([] if self.journeys is None else [(self.journeys, position)], rows, codes_ML, num_heads,
                       len(manifest.user_features), len(manifest.env_features), self.reader.locate)

    def find(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Those of the global rows that are here, and their places in `journeys`."""
        if self.journeys is None:
            return rows[:0], rows[:0]
        run = np.searchsorted(self.first_row, rows, side="right") - 1
        here = (run >= 0) & (rows < self.first_row[run] + self.num_rows[run])
        rows, run = rows[here], run[here]
        return rows, rows - self.first_row[run] + (np.cumsum(self.num_rows) - self.num_rows)[run]


class OnePass:
    """One unshuffled pass over a split for evaluation; iterate for `Batch`es, `len` is the same on every rank.

    The split is packed in order, whatever the number of ranks, and every rank takes a contiguous share; a rank without a share left
    gets empty batches.
    """

    def __init__(self, reader: ShardReader, world: World, make_batch: "Callable[[HeldRows, np.ndarray], Batch]", micro_batch_tokens: int,
                 max_rows: int | None = None, prefetch_batches: int = 2) -> None:
        self.reader, self.world, self._make_batch, self._prefetch_batches = reader, world, make_batch, prefetch_batches
        self._bounds = pack_in_order(reader.num_tokens[:max_rows], micro_batch_tokens)

    def __len__(self) -> int:
        return -(-(len(self._bounds) - 1) // self.world.size)

    def __iter__(self) -> Iterator[Batch]:
        return prefetch(self._batches(), self._prefetch_batches)

    def _batches(self) -> Iterator[Batch]:
        kept: dict[int, pa.RecordBatch] = {}
        for number in range(self.world.rank * len(self), (self.world.rank + 1) * len(self)):
            first, last = self._bounds[np.minimum([number, number + 1], len(self._bounds) - 1)]
            rows = np.arange(first, last)
            yield self._make_batch(HeldRows.load(self.reader, rows, kept=kept), rows)


def build_loader(folder: str | Path, config: LoaderConfig, world: World, codes_ML: np.ndarray, num_heads: int,
                 legal: LegalCodes | None = None) -> Loader:
    """Open a split (path or URI) for training.

    Args: codes_ML: semantic ID of each catalogue item, [num_items, L]; num_heads: MTP heads; legal: adds what the training softmax runs
        over (none = all codes).
    Raises: ConfigError for sizes that do not fit; DataError for a damaged or empty split, or codes of another catalogue.
    """
    sampling = build_sampling(config.seed, config.global_batch_size, world.size, config.micro_batch_tokens, config.num_streams,
                              config.shuffle_rows, config.quadratic_at)
    reader = ShardReader(folder, config.verify, config.on_corrupt, config.cache_dir)
    if reader.manifest.num_rows == 0:
        raise DataError(f"{folder} has no journeys; check the time cut-offs of the build")
    _check_codes(reader, codes_ML)
    make_batch = _batch_maker(codes_ML, num_heads, legal, counted=True)
    return Loader(reader, sampling, world, make_batch, config.prefetch_steps, config.read_threads)


def iter_once(folder: str | Path, config: LoaderConfig, world: World, codes_ML: np.ndarray, num_heads: int,
              max_rows: int | None = None, legal: LegalCodes | None = None) -> OnePass:
    """Open a split for one deterministic pass, each row on exactly one rank; `max_rows`: only the first so many rows."""
    reader = ShardReader(folder, config.verify, config.on_corrupt, config.cache_dir)
    _check_codes(reader, codes_ML)
    return OnePass(reader, world, _batch_maker(codes_ML, num_heads, legal, counted=False), config.micro_batch_tokens, max_rows)


def _batch_maker(codes_ML: np.ndarray, num_heads: int, legal: LegalCodes | None,
                 counted: bool) -> "Callable[[HeldRows, np.ndarray], Batch]":
    def make(held: HeldRows, rows: np.ndarray) -> Batch:
        batch = held.collate(rows, codes_ML, num_heads)
        return batch if legal is None else legal.add_to(batch, counted)

    return make


def prefetch(items: Iterable[T], depth: int) -> Iterator[T]:
    """Yield `items`, computed up to `depth` ahead in a background thread; an exception there is raised here, unchanged."""
    if depth == 0:
        yield from items
        return
    ready: queue.Queue[tuple[str, Any]] = queue.Queue(depth)
    stop = threading.Event()

    def put(kind: str, value: Any) -> bool:
        while not stop.is_set():
            try:
                ready.put((kind, value), timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def work() -> None:
        try:
            for item in items:
                if not put("item", item):
                    return
            put("end", None)
        except BaseException as error:
            put("error", error)

    thread = threading.Thread(target=work, name="prefetch", daemon=True)
    thread.start()
    try:
        while True:
            kind, value = ready.get()
            if kind == "end":
                return
            if kind == "error":
                raise value
            yield value
    finally:
        stop.set()
        thread.join()


def _check_codes(reader: ShardReader, codes_ML: np.ndarray) -> None:
    """More codes than items are welcome: a catalogue grows at its end, so shards built before keep their meaning."""
    if len(codes_ML) < reader.manifest.num_items:
        raise DataError(f"{reader.folder}: the shards' catalogue has {reader.manifest.num_items} items, the tokenizer {len(codes_ML)}; "
                        f"fit or extend the tokenizer on this catalogue, or rebuild the shards")
