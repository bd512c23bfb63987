"""The streaming loader: endless steps of packed micro-batches for one rank, prefetched, resumable from a handful of integers.

Puts the other files together: `sampler.py` says which rows, `reader.py` fetches their record batches, `collate.py` packs them. A
rank holds the rows of its streams for one window at a time, and loads the next window meanwhile; steps are packed in threads, several
at a time, and handed out in order.
"""

import itertools
import logging
import math
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np
import pyarrow as pa
import torch
from pydantic import Field

from gpr_dist.config import Config
from gpr_dist.data.candidates import ItemCandidates
from gpr_dist.data.collate import JourneyColumns, collate
from gpr_dist.data.knowledge import KnowledgeVectors
from gpr_dist.data.legal import LegalCodes
from gpr_dist.data.past import PastItems
from gpr_dist.data.reader import ShardReader
from gpr_dist.data.rows import StoredRows
from gpr_dist.data.sampler import EpochPlan, Sampling, World, build_sampling, owned_streams, pack_in_order, pack_steps
from gpr_dist.data.storage import StorageConfig
from gpr_dist.errors import DataError
from gpr_dist.hashing import row_keys
from gpr_dist.schema import JOURNEY_SCHEMA, Batch

log = logging.getLogger(__name__)
T = TypeVar("T")
MakeBatch = Callable[[JourneyColumns, np.ndarray, int | None], Batch]
"""From the journeys of a micro-batch, their global row numbers and the number of the step (none = not for training) to the micro-batch."""
_ROWS_AT_ONCE = 2048
USED_COLUMNS = [name for name in JOURNEY_SCHEMA.names if name != "user_id"]


class LoaderConfig(Config):
    """How journeys are drawn, packed and fetched."""

    seed: int = 0
    """of the order of rows"""
    global_batch_size: int = Field(default=256, ge=1)
    """journeys per optimizer step over all ranks"""
    micro_batch_tokens: int = Field(default=16384, ge=1)
    """most tokens in one forward; a longer journey is alone in its micro-batch"""
    num_streams: int | None = Field(default=None, ge=1)
    """parallel reading positions, at least the number of ranks and a divisor of global_batch_size; none = its largest divisor <= 256, or
    with balance = work the largest that leaves a stream 32 journeys a step"""
    shuffle_rows: int = Field(default=256, ge=1)
    """journeys of one stream that are shuffled together; a rank holds about 2 x num_streams / ranks times as many in memory"""
    quadratic_at: int = Field(default=4096, ge=1)
    """journey length, in tokens, at which attention costs as much as the rest of a layer (about 6 x width); for balancing ranks"""
    balance: Literal["rows", "work"] = "rows"
    """what ranks have equally much of at every step; work = tokens and attention, for which num_streams should be a multiple of the ranks
    and shuffle_rows 1,000 or more"""
    verify: Literal["first_read", "never"] = "first_read"
    """when checksums are compared; of remote shards first_read means each read, as each is another transfer"""
    on_corrupt: Literal["stop", "skip"] = "stop"
    """a damaged record batch stops the run, or is skipped, logged and counted"""
    prefetch_steps: int = Field(default=2, ge=0)
    """steps prepared ahead in background threads; 0 = none, packed when asked for"""
    pack_threads: int = Field(default=2, ge=1)
    """steps packed at a time, each by one thread; the batches are the same for any number"""
    read_threads: int = Field(default=8, ge=1)
    """record batches fetched at a time, for remote shards"""
    cache_dir: str | None = None
    """where index and row statistics of remote shards are kept; none = the system's temporary folder"""
    storage: StorageConfig = StorageConfig()
    """how long to be patient with remote shards"""


@dataclass(frozen=True)
class Step:
    """One optimizer step's work for this rank: equally many micro-batches on every rank, some perhaps empty."""

    epoch: int
    step_in_epoch: int
    micro_batches: list[Batch]


class Loader:
    """Iterate for `Step`s, endlessly over epochs. `state_dict` always describes the next step the consumer will get."""

    def __init__(self, reader: ShardReader, sampling: Sampling, world: World, make_batch: MakeBatch, prefetch_steps: int,
                 read_threads: int, pack_threads: int, columns: Sequence[str] = USED_COLUMNS) -> None:
        """Args: make_batch: called from several threads; columns: those of JOURNEY_SCHEMA that it needs."""
        self.reader, self.sampling, self.world, self._make_batch = reader, sampling, world, make_batch
        self._prefetch_steps, self._read_threads, self._pack_threads, self._columns = prefetch_steps, read_threads, pack_threads, columns
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
        state = {"balance": "rows", **state}  # there was no other way when the oldest checkpoints were written
        for name, here in self._identity().items():
            if state.get(name) != here:
                what = "other shards" if name == "fingerprint" else "another order of the rows"
                raise DataError(f"cannot resume: the checkpoint was trained on {what}: {name} {state.get(name)}, but {self.reader.folder} "
                                f"and this config give {here}; restore them, or start a new run")
        self._epoch, self._step = int(state["epoch"]), int(state["step"])

    def __iter__(self) -> Iterator[Step]:
        for step in in_order(self._tasks(self._epoch, self._step), self._pack_threads, self._prefetch_steps):
            last = step.step_in_epoch + 1 == self.steps_per_epoch
            self._epoch, self._step = (step.epoch + 1, 0) if last else (step.epoch, step.step_in_epoch + 1)
            yield step

    def _identity(self) -> dict[str, int | str]:
        s = self.sampling
        return {"fingerprint": self.reader.manifest.fingerprint, "seed": s.seed, "global_batch_size": s.global_batch_size,
                "num_streams": s.num_streams, "window_rows": s.window_rows, "quadratic_at": s.quadratic_at, "balance": s.balance}

    def _tasks(self, epoch: int, first_step: int) -> Generator[Callable[[], Step]]:
        """What makes each step; may be called from several threads, and waits for its window."""
        with ThreadPoolExecutor(1, "window") as ahead, ThreadPoolExecutor(self._read_threads, "read") as readers:
            for plan, steps, window in self._windows(epoch, first_step, ahead, readers):
                for place, step in enumerate(steps):
                    yield partial(self._make_step, plan.epoch, step, window, place)

    def _make_step(self, epoch: int, step: int, window: Future, place: int) -> Step:
        draw = epoch * self.steps_per_epoch + step
        return Step(epoch, step, [self._make_batch(journeys, rows, draw) for rows, journeys in window.result().take(place)])

    def _windows(self, epoch: int, first_step: int, ahead: ThreadPoolExecutor, readers: ThreadPoolExecutor,
                 ) -> Iterator[tuple[EpochPlan, range, Future]]:
        """(epoch, its steps, their journeys) of windows, each loaded while the one before is used."""
        kept: dict[int, pa.RecordBatch] = {}
        sampling = self.sampling

        def load(plan: EpochPlan, number: int, done: int) -> WindowSteps:
            rows_SCg, tokens_SCg = plan.window(number)
            packed = pack_steps(rows_SCg[done:], tokens_SCg[done:], self.world, sampling.micro_batch_tokens, sampling.quadratic_at)
            mine = rows_SCg[:, owned_streams(sampling.num_streams, self.world)]
            return WindowSteps(packed, HeldRows.load(self.reader, np.sort(mine[mine >= 0]), self._columns, readers, kept))

        pending: tuple | None = None
        for current in itertools.count(epoch):
            plan = EpochPlan(sampling, self.reader.first_row, self.reader.num_rows, self.reader.num_tokens, current)
            first = first_step if current == epoch else 0
            for start in range(first - first % plan.steps_per_window, plan.num_steps, plan.steps_per_window):
                steps = range(max(first, start), min(start + plan.steps_per_window, plan.num_steps))
                following = plan, steps, ahead.submit(load, plan, start // plan.steps_per_window, steps.start - start)
                if pending is not None:
                    yield pending
                pending = following


@dataclass(frozen=True)
class HeldRows:
    """Rows of a split in memory, by their global row numbers."""

    first_row: np.ndarray
    """global row number at the start of each record batch, increasing, and one above all rows"""
    end_row: np.ndarray
    position: np.ndarray
    """of a batch's rows in `stored`, less their global row number"""
    stored: StoredRows
    """the batches' rows in order"""

    @classmethod
    def load(cls, reader: ShardReader, rows: np.ndarray, columns: Sequence[str] = USED_COLUMNS, readers: ThreadPoolExecutor | None = None,
             kept: dict[int, pa.RecordBatch] | None = None) -> "HeldRows":
        """Fetch the record batches of `rows` (sorted global row numbers).

        `kept` carries partly used record batches from one call to the next, so that a batch across two windows is fetched once.
        Rows of a damaged batch are left out under on_corrupt = skip.
        """
        kept = {} if kept is None else kept
        number_of_row = np.searchsorted(reader.first_row, rows, side="right") - 1
        numbers, start, length = np.unique(number_of_row, return_index=True, return_counts=True)
        high = rows[start + length - 1] + 1
        fetch = [number for number in numbers.tolist() if number not in kept]
        fetch_all = map if readers is None or reader.is_local else readers.map  # threads cost more than they gain on a memory map
        fetched = dict(zip(fetch, fetch_all(reader.read_batch_or_skip, fetch), strict=True))
        batches = [fetched.get(number, kept.get(number)) for number in numbers.tolist()]
        unfinished = high < reader.first_row[numbers] + reader.num_rows[numbers]
        kept.clear()
        kept |= {int(number): batch for number, batch, more in zip(numbers, batches, unfinished, strict=True) if more}
        present = numbers[[batch is not None for batch in batches]]
        stored = StoredRows.of([batch for batch in batches if batch is not None], columns)
        first_row, num_rows = reader.first_row[present], reader.num_rows[present].astype(np.int64)
        return cls(np.append(first_row, np.iinfo(np.int64).max), first_row + num_rows, np.cumsum(num_rows) - num_rows - first_row, stored)

    def take(self, micro_batches: list[np.ndarray]) -> list[tuple[np.ndarray, JourneyColumns]]:
        """For each of the arrays of global row numbers: those of the rows that are here, and their journeys.

        One copy for all of them: the micro-batches are views of the same memory.
        """
        rows, bounds = np.concatenate(micro_batches), [0, *itertools.accumulate(map(len, micro_batches))]
        at = self.end_row.searchsorted(rows, side="right")
        present = np.flatnonzero(rows >= self.first_row.take(at))
        if len(present) < len(rows):  # damaged batches were left out
            rows, at, bounds = rows[present], at[present], present.searchsorted(bounds).tolist()
        journeys = self.stored.take(rows + self.position.take(at))
        return [(rows[begin:end], journeys.slice(begin, end)) for begin, end in itertools.pairwise(bounds)]


class WindowSteps:
    """Journeys of the steps of a window, each asked for once. Several steps are copied at a time: for the few hundred rows of one, the
    calls cost as much as the bytes."""

    def __init__(self, packed: list[list[np.ndarray]], held: HeldRows) -> None:
        """Args: packed: global row numbers of each micro-batch of each step."""
        self._packed, self._held = packed, held
        rows_of_a_step = max(1, sum(map(len, packed[0])))
        self._at_once = max(1, _ROWS_AT_ONCE // rows_of_a_step)
        self._copied: dict[int, list[tuple[np.ndarray, JourneyColumns]]] = {}
        self._lock = threading.Lock()

    def take(self, place: int) -> list[tuple[np.ndarray, JourneyColumns]]:
        """As `HeldRows.take` for the micro-batches of one step; may be called from several threads."""
        with self._lock:
            if place not in self._copied:
                first = place - place % self._at_once
                steps = self._packed[first:first + self._at_once]
                micro_batches = iter(self._held.take(list(itertools.chain(*steps))))
                self._copied |= {first + at: list(itertools.islice(micro_batches, len(step))) for at, step in enumerate(steps)}
            return self._copied.pop(place)


class OnePass:
    """One unshuffled pass over a split for evaluation; iterate for `Batch`es, `len` is the same on every rank.

    The split is packed in order, whatever the number of ranks, and every rank takes a contiguous share; a rank without a share left
    gets empty batches.
    """

    def __init__(self, reader: ShardReader, world: World, make_batch: MakeBatch, micro_batch_tokens: int,
                 max_rows: int | None = None, prefetch_batches: int = 2) -> None:
        self.reader, self.world, self._make_batch, self._prefetch_batches = reader, world, make_batch, prefetch_batches
        self._bounds = pack_in_order(reader.num_tokens[:max_rows], micro_batch_tokens)

    def __len__(self) -> int:
        return -(-(len(self._bounds) - 1) // self.world.size)

    def __iter__(self) -> Iterator[Batch]:
        kept: dict[int, pa.RecordBatch] = {}  # goes from batch to batch, so one thread makes them
        numbers = range(self.world.rank * len(self), (self.world.rank + 1) * len(self))
        return in_order((partial(self._batch, number, kept) for number in numbers), 1, self._prefetch_batches)

    def _batch(self, number: int, kept: dict[int, pa.RecordBatch]) -> Batch:
        first, last = self._bounds[np.minimum([number, number + 1], len(self._bounds) - 1)]
        [(rows, journeys)] = HeldRows.load(self.reader, np.arange(first, last), kept=kept).take([np.arange(first, last)])
        return self._make_batch(journeys, rows, None)


def build_loader(folder: str | Path, config: LoaderConfig, world: World, codes_ML: np.ndarray, num_heads: int,
                 legal: LegalCodes | None = None, knowledge: Path | None = None, candidates: ItemCandidates | None = None,
                 past: PastItems | None = None, keyed: bool = False) -> Loader:
    """Open a split (path or URI) for training.

    Args: codes_ML: semantic ID of each catalogue item, [num_items, L]; num_heads: MTP heads; legal: adds what the training softmax runs
        over (none = all codes); knowledge: folder of external knowledge (none = batches have none); candidates: of the item head (none =
        the model has none); past: finds what requests may repeat (none = the model has no pointer); keyed: batches have
        keys for dropout (`GPRConfig.drops`), which cost a third of making a batch.
    Raises: ConfigError for sizes that do not fit; DataError for a damaged or empty split, or codes or knowledge of other data.
    """
    sampling = build_sampling(config.seed, config.global_batch_size, world.size, config.micro_batch_tokens, config.num_streams,
                              config.shuffle_rows, config.quadratic_at, config.balance)
    uneven = math.ceil(sampling.num_streams / world.size) * world.size / sampling.num_streams
    if config.balance == "work" and uneven > 1.05 and world.rank == 0:
        log.warning("%d streams on %d ranks: the slowest has %.2f times the mean work at every step; num_streams, which cannot change on "
                    "resume, should be a multiple of the ranks", sampling.num_streams, world.size, uneven)
    reader = ShardReader(folder, config.verify, config.on_corrupt, config.cache_dir, config.storage)
    if reader.manifest.num_rows == 0:
        raise DataError(f"{folder} has no journeys; check the time cut-offs of the build")
    _check_codes(reader, codes_ML)
    make_batch = _batch_maker(reader, codes_ML, num_heads, legal, knowledge, candidates, past, config, True, keyed)
    return Loader(reader, sampling, world, make_batch, config.prefetch_steps, config.read_threads, config.pack_threads)


def iter_once(folder: str | Path, config: LoaderConfig, world: World, codes_ML: np.ndarray, num_heads: int,
              max_rows: int | None = None, legal: LegalCodes | None = None, knowledge: Path | None = None,
              candidates: ItemCandidates | None = None, past: PastItems | None = None) -> OnePass:
    """Open a split for one deterministic pass, each row on exactly one rank; `max_rows`: only the first so many rows."""
    reader = ShardReader(folder, config.verify, config.on_corrupt, config.cache_dir, config.storage)
    _check_codes(reader, codes_ML)
    make_batch = _batch_maker(reader, codes_ML, num_heads, legal, knowledge, candidates, past, config, False, False)
    return OnePass(reader, world, make_batch, config.micro_batch_tokens, max_rows)


def _batch_maker(reader: ShardReader, codes_ML: np.ndarray, num_heads: int, legal: LegalCodes | None, knowledge: Path | None,
                 candidates: ItemCandidates | None, past: PastItems | None, config: LoaderConfig, counted: bool,
                 keyed: bool) -> MakeBatch:
    num_features = len(reader.manifest.user_features), len(reader.manifest.env_features)
    history = None if past is None else past.open_history(reader.manifest)
    vectors = None if knowledge is None else KnowledgeVectors(knowledge, reader.manifest, config.verify)

    def make(journeys: JourneyColumns, rows: np.ndarray, draw: int | None) -> Batch:
        batch = collate(journeys, rows, codes_ML, num_heads, *num_features, reader.locate)
        if vectors is not None:
            batch.knowledge_BmE = vectors.gather(rows)
        if keyed:
            batch.noise_T = _noise_keys(batch, config.seed * 1_000_000_007 + draw)
        if candidates is not None:
            batch = candidates.add_to(batch, draw or 0)
        if past is not None:
            batch = past.add_to(batch, history)
        return batch if legal is None else legal.add_to(batch, counted)

    return make


def _noise_keys(batch: Batch, seed: int) -> torch.Tensor:
    lengths_B = batch.offsets_B1.diff()
    position_T = torch.arange(batch.num_tokens) - batch.offsets_B1[:-1].repeat_interleave(lengths_B)
    return row_keys(batch.row_ids_B.repeat_interleave(lengths_B), position_T, seed)


def in_order(tasks: Generator[Callable[[], T]], num_threads: int, depth: int) -> Iterator[T]:
    """Yield what the tasks return, in their order, while threads work on the next `depth` of them; 0 = none ahead and no thread.

    An exception of a task is raised here, unchanged, where its result would have come. However this ends, no thread is left.
    """
    if depth == 0:
        yield from (task() for task in tasks)
        return
    pool = ThreadPoolExecutor(num_threads, "pack")
    running = deque(pool.submit(task) for task in itertools.islice(tasks, depth))
    try:
        while running:
            first = running.popleft()
            running.extend(pool.submit(task) for task in itertools.islice(tasks, 1))
            yield first.result()
    finally:
        for task in running:
            task.cancel()
        pool.shutdown()
        tasks.close()


def _check_codes(reader: ShardReader, codes_ML: np.ndarray) -> None:
    """More codes than items are welcome: a catalogue grows at its end, so shards built before keep their meaning."""
    if len(codes_ML) < reader.manifest.num_items:
        raise DataError(f"{reader.folder}: the shards' catalogue has {reader.manifest.num_items} items, the tokenizer {len(codes_ML)}; "
                        f"fit or extend the tokenizer on this catalogue, or rebuild the shards")
