"""`bench.py loader`: our loader beside others over the same journeys, one process each, repetitions interleaved.

Every contender delivers packed micro-batches of at most `micro_batch_tokens` tokens in shuffled order as torch tensors: offsets,
num_context, and token_type, block, item, action, scene, timestamp, value end to end, in the types of the schema, which is what
training's collate is handed, or with `types=int64` for all of them in int64 and float32. Ours runs with the loader's defaults, and
verifies checksums and balances work in every row of the table; its journeys lie in record batches of 64, those of StatefulDataLoader all
in one, which is its best case. "Full batch" is what training gets, with semantic IDs, requests and the targets of four MTP heads made by
our `collate`; a peer that is to deliver it reads the other columns too and is followed by the same `collate`. MB/s counts the raw bytes
of the journeys' columns for everybody. Peers do the work in their usual way; where an expert could write something faster with the same
library, that runs too. Opening is not timed, whole epochs are; ours verifies its checksums again in each. All have the same cores: ours
reads in one background thread and packs in `pack_threads` as in training, StatefulDataLoader also runs with two worker processes that
make whole micro-batches. Wall time shows that on an idle machine with more than one core; "rows per CPU s" counts all threads and worker
processes. `core=0` binds everything to one core. Contenders in EXPERT are code of our own over the peer's storage, faster than its usual
way; the table compares with the fastest peer without and with them.
"""

import itertools
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np
import psutil
import pyarrow as pa
import torch
from pydantic import Field
from tqdm import tqdm

from data_pipeline.shards import ShardConfig, ShardWriter, write_manifest
from gpr_dist.config import Config
from gpr_dist.data.collate import SIDE_COLUMNS, STORED, TOKEN_COLUMNS, JourneyColumns, collate
from gpr_dist.data.loader import Loader, LoaderConfig, build_loader
from gpr_dist.data.sampler import World, pack_in_order
from gpr_dist.schema import EVERY_AD, JOURNEY_SCHEMA, NO_ITEM, Action, Batch, TokenType

COLUMNS = ("token_type", "block", "item", "action", "scene", "timestamp", "value")
OUR_COLUMNS = ["num_context", "num_lookahead", *COLUMNS]  # a loader of ours counts tokens without look-ahead
NUM_HEADS = 4
EXPERT = ("datasets, arrow format", "StatefulDataLoader, numpy views", "StatefulDataLoader, numpy views, 2 workers")
_IDLE_SECONDS = 0.05  # so long without work is the end of it
_POLL_CPU_SECONDS = 0.0003  # in a millisecond; to look costs a part of that
T = TypeVar("T")
Epoch = Callable[[], tuple[int, int]]
"""Runs one epoch; returns rows and tokens delivered."""


class LoaderBenchConfig(Config):
    """What is measured."""

    num_rows: int = Field(default=20_000, ge=1)
    """journeys"""
    median_tokens: int = Field(default=150, ge=2)
    """of the log-normal journey lengths (sigma 0.8; the mean is 1.4 times as much)"""
    max_tokens: int = Field(default=2048, ge=2)
    """journeys are cut there"""
    num_items: int = Field(default=100_000, ge=1)
    """catalogue size"""
    micro_batch_tokens: int = Field(default=16384, ge=1)
    """tokens of a packed micro-batch"""
    repetitions: int = Field(default=5, ge=1)
    """epochs of each contender; the median counts"""
    types: Literal["int64", "stored"] = "stored"
    """of the token columns that every contender delivers: as they are stored (1 to 8 bytes), or all integers int64"""
    shuffle_buffer: int = Field(default=1000, ge=1)
    """rows in the shuffle buffer of webdataset; the others shuffle the whole epoch"""
    seed: int = 0
    """of the journeys and of the order"""
    prefetch_steps: int = Field(default=2, ge=0)
    """of our loader; 0 = its batches are made in the consumer's thread"""
    pack_threads: int = Field(default=2, ge=1)
    """threads of our loader that pack steps"""
    core: int | None = None
    """CPU core this process is bound to; none = free, so that threads of a loader help it"""
    contenders: tuple[str, ...] = ()
    """names to run; empty = all"""
    out: str | None = None
    """JSON file for the results"""


def run_bench(config: LoaderBenchConfig) -> None:
    """Write the journeys once in each contender's format, time them in turn, print a table."""
    if config.core is not None:
        os.sched_setaffinity(0, {config.core})
    torch.set_num_threads(1)
    pa.set_cpu_count(1)
    journeys = generate_journeys(config)
    row_bytes = sum(column.nbytes for column in journeys.columns) / journeys.num_rows
    num_tokens = len(journeys.column("token_type").flatten())
    with tempfile.TemporaryDirectory() as folder:
        epochs, absent = _open_all(config, journeys, Path(folder))
        seconds: dict[str, list[float]] = {name: [] for name in epochs}
        cpu_seconds: dict[str, list[float]] = {name: [] for name in epochs}
        runs = [(name, epoch) for _ in range(config.repetitions + 1) for name, epoch in epochs.items()]  # the first round warms up
        for name, epoch in tqdm(runs, desc="epochs", file=sys.stderr, mininterval=0.5):
            started, started_cpu = time.perf_counter(), _cpu_seconds()
            delivered = epoch()
            ended, ended_cpu = _idle_since()
            seconds[name].append(ended - started)
            cpu_seconds[name].append(ended_cpu - started_cpu)
            assert delivered == (journeys.num_rows, num_tokens), f"{name} delivered {delivered}, not {(journeys.num_rows, num_tokens)}"
    medians = {name: (statistics.median(seconds[name][1:]), statistics.median(cpu_seconds[name][1:])) for name in epochs}
    _report(config, medians, seconds, absent, row_bytes, num_tokens)


def generate_journeys(config: LoaderBenchConfig) -> pa.RecordBatch:
    """Requests of one organic item, an environment and an ad, repeated to log-normal lengths; no context, no look-ahead."""
    rng = np.random.default_rng(config.seed)
    length = np.clip(rng.lognormal(np.log(config.median_tokens), 0.8, config.num_rows), 3, config.max_tokens).astype(np.int64)
    offsets = np.append(0, np.cumsum(length))
    total = int(offsets[-1])
    position = np.arange(total) - np.repeat(offsets[:-1], length)
    token_type = np.array([TokenType.O, TokenType.E, TokenType.I])[position % 3]
    has_item, is_ad = token_type != TokenType.E, token_type == TokenType.I
    block = position // 3
    num_envs = np.add.reduceat(token_type == TokenType.E, offsets[:-1])
    num_blocks = -(-length // 3)
    nan = np.full(total, np.nan)
    ad_action = rng.integers(Action.IMPRESSION, Action.CONVERSION + 1, total)
    values = {
        "token_type": token_type, "block": block, "item": np.where(has_item, rng.integers(0, config.num_items, total), NO_ITEM),
        "action": np.where(is_ad, ad_action, np.where(has_item, Action.CONSUME, Action.NONE)),
        "scene": rng.integers(0, 1000, total), "timestamp": 1_700_000_000 + position * 60, "value": np.where(is_ad, rng.random(total), nan),
        "pctr": np.where(is_ad, rng.random(total), nan), "pcvr": np.where(is_ad, rng.random(total), nan),
        "user_features": np.zeros(0), "env_features": rng.integers(0, 2**31, 4 * num_envs.sum()),
        "eligibility": np.full(num_blocks.sum(), EVERY_AD)}
    ends = {"user_features": 0 * offsets, "env_features": np.append(0, np.cumsum(4 * num_envs)),
            "eligibility": np.append(0, np.cumsum(num_blocks))}
    zeros = pa.array(np.zeros(config.num_rows, np.int32))
    columns = [pa.array([f"user-{i}" for i in range(config.num_rows)]), zeros, zeros]
    for field in list(JOURNEY_SCHEMA)[3:]:
        flat = pa.array(values[field.name].astype(field.type.value_type.to_pandas_dtype()), field.type.value_type)
        columns.append(pa.ListArray.from_arrays(pa.array(ends.get(field.name, offsets).astype(np.int32)), flat))
    return pa.RecordBatch.from_arrays(columns, schema=JOURNEY_SCHEMA)


def _open_all(config: LoaderBenchConfig, journeys: pa.RecordBatch, folder: Path) -> tuple[dict[str, Epoch], dict[str, str]]:
    """Epoch functions by name, and the reason for every contender that cannot run here."""
    builders = {
        "ours, arrow": lambda at: _ours(config, journeys, at, "arrow", "none"),
        "ours, webdataset": lambda at: _ours(config, journeys, at, "webdataset", "none"),
        "ours, arrow, full batch": lambda at: _ours(config, journeys, at, "arrow", "none", full=True),
        "ours, webdataset, full batch": lambda at: _ours(config, journeys, at, "webdataset", "none", full=True),
        "ours, arrow zstd, full batch": lambda at: _ours(config, journeys, at, "arrow", "zstd", full=True),
        "webdataset, msgpack per sample": lambda at: _webdataset(config, journeys, at),
        "datasets, numpy format": lambda at: _datasets(config, journeys, at, "numpy"),
        "datasets, arrow format": lambda at: _datasets(config, journeys, at, "arrow"),
        "mosaicml-streaming": lambda at: _mosaic(config, journeys, at),
        "StatefulDataLoader, arrow rows": lambda at: _stateful(config, journeys, at, _ArrowRows),
        "StatefulDataLoader, arrow rows, full batch": lambda at: _stateful_full(config, journeys, at),
        "StatefulDataLoader, 2 workers": lambda at: _stateful_workers(config, journeys, at, 2, _ArrowRows),
        "StatefulDataLoader, numpy views": lambda at: _stateful(config, journeys, at, _RowViews),
        "StatefulDataLoader, numpy views, 2 workers": lambda at: _stateful_workers(config, journeys, at, 2, _RowViews),
    }
    epochs, absent = {}, {}
    for number, (name, build) in enumerate(builders.items()):
        if config.contenders and name not in config.contenders:
            continue
        at = folder / str(number)
        at.mkdir()
        try:
            epochs[name] = build(at)
        except ImportError as error:
            absent[name] = " ".join(str(error).split())[:200]
    return epochs, absent


def _ours(config: LoaderBenchConfig, journeys: pa.RecordBatch, folder: Path, container: str, compression: str, full: bool = False) -> Epoch:
    with ShardWriter(folder, 0, ShardConfig(container=container, compression=compression, rows_per_shard=4096)) as writer:
        writer.write(journeys)
    write_manifest(folder, "train", (), ("a", "b", "c", "d"), "bench", config.num_items)
    # the loader's defaults: 65,536 rows from 256 places of the epoch are shuffled together
    settings = LoaderConfig(seed=config.seed, global_batch_size=512, micro_batch_tokens=config.micro_batch_tokens,
                            prefetch_steps=config.prefetch_steps, pack_threads=config.pack_threads)
    loader = build_loader(folder, settings, World(), _codes(config), NUM_HEADS)
    if not full:
        loader = Loader(loader.reader, loader.sampling, World(), partial(_columns_only, types=config.types), settings.prefetch_steps,
                        settings.read_threads, settings.pack_threads, OUR_COLUMNS)
    steps = iter(loader)  # one iterator over all repetitions: it reads ahead into the next epoch, as in training

    def epoch() -> tuple[int, int]:
        loader.reader.forget_verified()
        batches = (batch for step in itertools.islice(steps, loader.steps_per_epoch) for batch in step.micro_batches)
        return _count(map(_counted, batches) if full else batches)

    return epoch


def _codes(config: LoaderBenchConfig) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 2048, (config.num_items, 3)).astype(np.int32)


def _counted(batch: Batch) -> dict[str, torch.Tensor]:
    return {"num_context": batch.row_ids_B, "token_type": batch.token_type_T}


def _columns_only(journeys: JourneyColumns, *_: object, types: str = "int64") -> dict[str, torch.Tensor]:
    """The tensors that every contender delivers."""
    if types == "stored":
        tokens = {name: torch.from_numpy(values) for name, values in journeys.tokens.items()}
    else:
        tokens = {name: torch.from_numpy(values.astype(_dtype(name, types), copy=False)) for name, values in journeys.tokens.items()}
    return {"offsets": torch.from_numpy(journeys.token_offsets), "num_context": torch.from_numpy(journeys.num_context), **tokens}


def _dtype(column: str, types: str) -> np.dtype:
    stored = STORED[column]
    return np.dtype(np.int64) if types == "int64" and stored.kind != "f" else stored


def _webdataset(config: LoaderBenchConfig, journeys: pa.RecordBatch, folder: Path) -> Epoch:
    import msgpack
    import webdataset

    with webdataset.ShardWriter(f"{folder}/%05d.tar", maxcount=4096, verbose=0) as writer:
        for number, row in enumerate(_rows(journeys)):
            packed = msgpack.packb({name: value.tobytes() if isinstance(value, np.ndarray) else value for name, value in row.items()})
            writer.write({"__key__": f"{number:08d}", "msgpack": packed})
    urls = sorted(str(path) for path in folder.glob("*.tar"))
    types = {name: JOURNEY_SCHEMA.field(name).type.value_type.to_pandas_dtype() for name in COLUMNS}

    def decode(sample: dict) -> dict:
        row = msgpack.unpackb(sample["msgpack"])
        return {"num_context": row["num_context"], **{name: np.frombuffer(row[name], types[name]) for name in COLUMNS}}

    def epoch() -> tuple[int, int]:
        samples = webdataset.WebDataset(urls, shardshuffle=len(urls), seed=config.seed).shuffle(config.shuffle_buffer).map(decode)
        return _count(pack(samples, config.micro_batch_tokens, partial(_tensors, types=config.types)))

    return epoch


def _datasets(config: LoaderBenchConfig, journeys: pa.RecordBatch, folder: Path, form: str) -> Epoch:
    import datasets

    datasets.disable_progress_bars()
    datasets.Dataset(pa.Table.from_batches([journeys]).select(["num_context", *COLUMNS])).save_to_disk(folder / "data")
    data = datasets.load_from_disk(str(folder / "data")).with_format(form)

    def rows(order: Iterable) -> Iterator[dict]:
        for chunk in order:
            if form == "numpy":
                for number, context in enumerate(chunk["num_context"]):
                    yield {"num_context": context, **{name: chunk[name][number] for name in COLUMNS}}
            else:
                yield from _rows(chunk.combine_chunks().to_batches()[0])

    def epoch() -> tuple[int, int]:
        shuffled = rows(data.shuffle(seed=config.seed).iter(batch_size=256))
        return _count(pack(shuffled, config.micro_batch_tokens, partial(_tensors, types=config.types)))

    return epoch


def _mosaic(config: LoaderBenchConfig, journeys: pa.RecordBatch, folder: Path) -> Epoch:
    from streaming import MDSWriter, StreamingDataset

    types = {name: f"ndarray:{np.dtype(JOURNEY_SCHEMA.field(name).type.value_type.to_pandas_dtype()).name}" for name in COLUMNS}
    with MDSWriter(out=str(folder / "mds"), columns={"num_context": "int", **types}) as writer:
        for row in _rows(journeys):
            writer.write(row)
    data = StreamingDataset(local=str(folder / "mds"), shuffle=True, shuffle_seed=config.seed, batch_size=64)
    return lambda: _count(pack(data, config.micro_batch_tokens, partial(_tensors, types=config.types)))


def _stateful(config: LoaderBenchConfig, journeys: pa.RecordBatch, folder: Path, kind: type) -> Epoch:
    from torchdata.stateful_dataloader import StatefulDataLoader

    rows = kind(_mapped(journeys, folder))

    def epoch() -> tuple[int, int]:
        loader = StatefulDataLoader(rows, batch_size=64, shuffle=True, collate_fn=lambda samples: samples)
        rows_in_order = (row for samples in loader for row in samples)
        return _count(pack(rows_in_order, config.micro_batch_tokens, partial(_tensors, types=config.types)))

    return epoch


def _stateful_full(config: LoaderBenchConfig, journeys: pa.RecordBatch, folder: Path) -> Epoch:
    """As `_stateful` over Arrow rows with all columns; each packed micro-batch is handed to our `collate`."""
    from torchdata.stateful_dataloader import StatefulDataLoader

    rows, codes = _ArrowRows(_mapped(journeys, folder), OUR_COLUMNS[:2], tuple(STORED)), _codes(config)

    def full(samples: list[dict]) -> Batch:
        offsets = {name: np.append(0, np.cumsum([len(row[name]) for row in samples])) for name in ("token_type", *SIDE_COLUMNS)}
        values = {name: np.concatenate([row[name] for row in samples]) for name in STORED}
        columns = JourneyColumns(*(np.array([row[name] for row in samples], np.int64) for name in OUR_COLUMNS[:2]), offsets["token_type"],
                                 {name: values[name] for name in TOKEN_COLUMNS},
                                 {name: (offsets[name], values[name]) for name in SIDE_COLUMNS})
        return collate(columns, np.arange(len(samples)), codes, NUM_HEADS, 0, 4)

    def epoch() -> tuple[int, int]:
        loader = StatefulDataLoader(rows, batch_size=64, shuffle=True, collate_fn=lambda samples: samples)
        return _count(map(_counted, pack((row for samples in loader for row in samples), config.micro_batch_tokens, full)))

    return epoch


def _stateful_workers(config: LoaderBenchConfig, journeys: pa.RecordBatch, folder: Path, num_workers: int, kind: type) -> Epoch:
    from torchdata.stateful_dataloader import StatefulDataLoader

    batches = _TokenBatches(journeys.column("token_type").value_lengths().to_numpy(), config.micro_batch_tokens, config.seed)
    loader = StatefulDataLoader(kind(_mapped(journeys, folder)), batch_sampler=batches, collate_fn=partial(_tensors, types=config.types),
                                num_workers=num_workers, persistent_workers=True)
    iter(loader)  # starts the workers: now, while this process has no other threads
    return lambda: _count(loader)


class _TokenBatches:
    """A batch sampler: shuffled row numbers, as many as fit a micro-batch."""

    def __init__(self, lengths: np.ndarray, budget: int, seed: int) -> None:
        self.lengths, self.budget, self.rng = lengths, budget, np.random.default_rng(seed)

    def __iter__(self) -> Iterator[list[int]]:
        order = self.rng.permutation(len(self.lengths))
        for low, high in itertools.pairwise(pack_in_order(self.lengths[order], self.budget)):
            yield order[low:high].tolist()


def _mapped(journeys: pa.RecordBatch, folder: Path) -> pa.RecordBatch:
    with pa.OSFile(str(folder / "journeys.arrow"), "wb") as sink, pa.ipc.new_file(sink, JOURNEY_SCHEMA) as writer:
        writer.write_batch(journeys)
    with pa.memory_map(str(folder / "journeys.arrow")) as file:
        return pa.ipc.open_file(file).get_batch(0)


class _ArrowRows:
    """A map-style data set over memory-mapped Arrow through pyarrow's own row access."""

    def __init__(self, batch: pa.RecordBatch, numbers: Sequence[str] = ("num_context",), lists: Sequence[str] = COLUMNS) -> None:
        self.numbers = {name: batch.column(name) for name in numbers}
        self.columns = {name: batch.column(name) for name in lists}

    def __len__(self) -> int:
        return len(self.columns["token_type"])

    def __getitem__(self, number: int) -> dict:
        return {**{name: column[number].as_py() for name, column in self.numbers.items()},
                **{name: column[number].values.to_numpy(zero_copy_only=True) for name, column in self.columns.items()}}


class _RowViews:
    """A map-style data set whose rows are views of memory-mapped Arrow buffers: the cheapest row a user can write in Python."""

    def __init__(self, batch: pa.RecordBatch) -> None:
        self.offsets = batch.column("token_type").offsets.to_numpy()
        self.context = batch.column("num_context").to_numpy()
        self.columns = {name: batch.column(name).flatten().to_numpy() for name in COLUMNS}

    def __len__(self) -> int:
        return len(self.context)

    def __getitem__(self, number: int) -> dict:
        low, high = self.offsets[number], self.offsets[number + 1]
        return {"num_context": int(self.context[number]), **{name: values[low:high] for name, values in self.columns.items()}}


def _rows(batch: pa.RecordBatch) -> Iterator[dict]:
    views = _RowViews(batch)
    return (views[number] for number in range(len(views)))


def pack(rows: Iterable[dict], budget: int, make: Callable[[list[dict]], T]) -> Iterator[T]:
    """Rows in the order they come, as packed micro-batches: what all the peers share."""
    held: list[dict] = []
    used = 0
    for row in rows:
        size = len(row["token_type"])
        if held and used + size > budget:
            yield make(held)
            held, used = [], 0
        held.append(row)
        used += size
    if held:
        yield make(held)


def _tensors(rows: list[dict], types: str) -> dict[str, torch.Tensor]:
    lengths = [len(row["token_type"]) for row in rows]
    out = {"offsets": torch.from_numpy(np.append(0, np.cumsum(lengths))),
           "num_context": torch.from_numpy(np.array([row["num_context"] for row in rows], np.int64))}
    for name in COLUMNS:
        out[name] = torch.from_numpy(np.concatenate([row[name] for row in rows], dtype=_dtype(name, types), casting="unsafe"))
    return out


def _idle_since() -> tuple[float, float]:
    """Wait until nothing works any more: a loader that reads ahead pays for what it read for its next epoch.

    Returns: `perf_counter` and CPU seconds at that moment.
    """
    idle_since = time.perf_counter()
    idle_cpu = used = _cpu_seconds()
    while time.perf_counter() < idle_since + _IDLE_SECONDS:
        time.sleep(0.001)
        before, used = used, _cpu_seconds()
        if used - before > _POLL_CPU_SECONDS:
            idle_since, idle_cpu = time.perf_counter(), used
    return idle_since, idle_cpu


def _cpu_seconds() -> float:
    """Of this process and its workers."""
    workers = multiprocessing.active_children()
    return time.process_time() + sum(sum(psutil.Process(worker.pid).cpu_times()[:2]) for worker in workers)


def _count(batches: Iterable[dict[str, torch.Tensor]]) -> tuple[int, int]:
    rows = tokens = 0
    for batch in batches:
        rows, tokens = rows + len(batch["num_context"]), tokens + len(batch["token_type"])
    return rows, tokens


def _report(config: LoaderBenchConfig, medians: dict[str, tuple[float, float]], seconds: dict[str, list[float]],
            absent: dict[str, str], row_bytes: float, num_tokens: int) -> None:
    peers = {name: wall for name, (wall, _) in medians.items() if not name.startswith("ours")}
    fastest = min(peers.values(), default=float("nan"))
    fastest_usual = min((wall for name, wall in peers.items() if name not in EXPERT), default=float("nan"))
    leanest_usual = min((cpu for name, (_, cpu) in medians.items() if name in peers and name not in EXPERT), default=float("nan"))
    print(f"{config.num_rows} journeys, {num_tokens / config.num_rows:.0f} tokens and {row_bytes / 1000:.1f} kB each on average; "
          f"one process, {len(os.sched_getaffinity(0))} cores, median of {config.repetitions} interleaved epochs")
    print(f"{'':42} {'rows/s':>9} {'MB/s':>7} {'x fastest peer':>15} {'x usual ways':>13} {'rows per CPU s':>15} {'x usual ways':>13}")
    results = {}
    for name, (median, cpu) in sorted(medians.items(), key=lambda item: item[1]):
        rate = config.num_rows / median
        results[name] = {"rows_per_s": rate, "mb_per_s": rate * row_bytes / 1e6, "times_fastest_peer": fastest / median,
                         "times_fastest_usual_way": fastest_usual / median, "seconds": seconds[name],
                         "rows_per_cpu_s": config.num_rows / cpu, "times_leanest_usual_way": leanest_usual / cpu}
        print(f"{name:42} {rate:9.0f} {rate * row_bytes / 1e6:7.0f} {fastest / median:15.2f} {fastest_usual / median:13.2f} "
              f"{config.num_rows / cpu:15.0f} {leanest_usual / cpu:13.2f}")
    for name, reason in absent.items():
        print(f"{name:42} not installed here: {reason}")
    if config.out:
        everything = {"config": config.model_dump(mode="json"), "results": results, "absent": absent}
        Path(config.out).write_text(json.dumps(everything, indent=1))
