"""`bench.py balance`: how evenly the loader's plan deals work to 8 ... 1,024 ranks, what planning costs, and what two ranks measure.

Arithmetic: a window of the epoch's plan over `num_rows` journeys of drawn lengths, or over a split's own (`shards=PATH`), for
balance = rows and = work. "slowest / mean" is a rank's work in a step, T (1 + T / quadratic_at) summed over its journeys, the largest of
all ranks over the mean; "forwards" adds up the slowest rank of each micro-batch, at which ZeRO-3 makes all ranks wait; "read" is bytes
that all ranks fetch over those of the window, and the most of any rank over its share of them. Planning is CPU time of one rank, and the
most memory it takes on top of the index. "fair share" is the longest journey over a rank's mean work in a step: above 1 no plan can help.

Measured: two gloo processes train a small model on generated journeys, and compare the CPU seconds of their forwards and backwards.
"""

import itertools
import json
import statistics
import tempfile
import time
import tracemalloc
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
from bench_loader import LoaderBenchConfig, generate_journeys
from pydantic import Field
from tqdm import tqdm

from data_pipeline.shards import ShardConfig, ShardWriter, write_manifest
from gpr_dist.config import Config
from gpr_dist.data.balance import work
from gpr_dist.data.loader import LoaderConfig, build_loader
from gpr_dist.data.reader import ShardReader
from gpr_dist.data.sampler import EpochPlan, World, build_sampling, pack_ranks, pack_steps
from gpr_dist.model.flops import forward_flops, work_of
from gpr_dist.model.gpr import GPR, GPRConfig
from gpr_dist.objectives.mtp import mtp_loss, uniform_head_weights
from gpr_dist.schema import Batch

# S steps  W ranks  C streams  K rows of a rank in a step  P micro-batches

MODES: tuple[Literal["rows", "work"], ...] = ("rows", "work")
NUM_HEADS, NUM_LEVELS, CODES, NUM_ITEMS = 4, 3, 32, 1000


class MeasureConfig(Config):
    """The two ranks that are timed; 0 steps = none."""

    steps: int = Field(12, ge=0)
    """optimizer steps of each mode, after two that warm up"""
    rows_per_rank: int = Field(32, ge=1)
    """journeys of a step"""
    median_tokens: int = Field(60, ge=3)
    """of the log-normal journey lengths (sigma 0.8)"""
    max_tokens: int = Field(1024, ge=3)
    """journeys are cut there"""
    width: int = Field(64, ge=8)
    """of the model"""


class BalanceBenchConfig(Config):
    """What is planned and measured."""

    shards: str | None = None
    """split folder whose journeys are planned for; none = drawn lengths"""
    lengths: Literal["lognormal", "pareto"] = "lognormal"
    """of drawn journeys: log-normal with median 148, or Pareto from 32 tokens on"""
    tail: float = Field(1.0, gt=0)
    """sigma of the log-normal, or exponent of the Pareto: smaller is heavier"""
    max_tokens: int = Field(2048, ge=2)
    """drawn journeys are cut there"""
    num_rows: int = Field(1_000_000_000, ge=1)
    """drawn journeys"""
    rows_per_batch: int = Field(64, ge=1)
    """of a record batch of drawn journeys"""
    ranks: tuple[int, ...] = (8, 64, 256, 1024)
    """numbers of ranks"""
    rows_per_rank: int = Field(64, ge=1)
    """journeys per rank and step"""
    streams_per_rank: int | None = Field(1, ge=1)
    """of balance = work; none = the loader's default"""
    shuffle_rows: int = Field(1024, ge=1)
    """journeys of a stream that are shuffled together"""
    micro_batch_tokens: int = Field(16384, ge=1)
    """most tokens of a forward"""
    quadratic_at: int = Field(4096, ge=1)
    """journey length at which attention costs as much as the rest"""
    seed: int = 0
    """of lengths and order"""
    measure: MeasureConfig = MeasureConfig()
    """the timed part"""
    out: str | None = None
    """JSON file for the results"""


class DrawnLengths:
    """Lengths of a billion rows without a file: row numbers are hashed into a drawn pool."""

    def __init__(self, pool: np.ndarray) -> None:
        self.pool = pool

    def __getitem__(self, rows: np.ndarray) -> np.ndarray:
        return self.pool[(rows.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) >> np.uint64(32)) % np.uint64(len(self.pool))]


def run_bench(config: BalanceBenchConfig) -> dict[str, Any]:
    """Print both tables. Returns: {"planned": {mode: {ranks: numbers}}, "measured": {mode: numbers}}."""
    first_row, num_rows, num_tokens = open_lengths(config)
    print(f"{int(num_rows.sum()):,} journeys in {len(num_rows):,} record batches, {config.rows_per_rank} per rank and step\n"
          "ranks  balance  slowest / mean: worst  average  forwards  read: all  most   plan: ms/step  MB   fair share")
    planned: dict[str, dict[int, dict[str, float]]] = {mode: {} for mode in MODES}
    for world_size, mode in tqdm(list(itertools.product(config.ranks, MODES)), desc="plans", mininterval=0.5):
        found = planned[mode][world_size] = plan_numbers(config, mode, world_size, first_row, num_rows, num_tokens)
        tqdm.write(f"{world_size:5}  {mode:7}  {found['worst']:21.3f}  {found['average']:7.3f}  {found['forwards']:8.3f}  "
                   f"{found['read_all']:9.3f}  {found['read_most']:4.2f}  {found['plan_ms']:14.1f}  {found['plan_mb']:3.0f}  "
                   f"{found['fair_share']:11.2f}")
    result: dict[str, Any] = {"planned": planned, "measured": measure(config) if config.measure.steps else {}}
    if config.out:
        Path(config.out).write_text(json.dumps(result, indent=1))
    return result


def open_lengths(config: BalanceBenchConfig) -> tuple[np.ndarray, np.ndarray, Any]:
    """First row and number of rows of each record batch, and what gives the tokens of rows."""
    if config.shards:
        reader = ShardReader(config.shards, "never")
        return reader.first_row, reader.num_rows, reader.num_tokens
    rng = np.random.default_rng(config.seed)
    drawn = rng.lognormal(5, config.tail, 2**20) if config.lengths == "lognormal" else 32 * (1 + rng.pareto(config.tail, 2**20))
    first_row = np.arange(0, config.num_rows, config.rows_per_batch)
    num_rows = np.minimum(config.rows_per_batch, config.num_rows - first_row).astype(np.int32)
    return first_row, num_rows, DrawnLengths(np.clip(drawn, 2, config.max_tokens).astype(np.int32))


def plan_numbers(config: BalanceBenchConfig, mode: Literal["rows", "work"], world_size: int, first_row: np.ndarray, num_rows: np.ndarray,
                 num_tokens: Any) -> dict[str, float]:
    """One line of the table, from a window in the middle of the epoch."""
    streams = config.streams_per_rank and config.streams_per_rank * world_size
    if mode == "rows" and world_size <= 256:
        streams = None
    sampling = build_sampling(config.seed, world_size * config.rows_per_rank, world_size, config.micro_batch_tokens, streams,
                              config.shuffle_rows, config.quadratic_at, mode)
    plan = EpochPlan(sampling, first_row, num_rows, num_tokens, 0)
    number = max(0, min(plan.num_windows // 2, plan.num_windows - 2))  # a whole one in the middle, if there is
    before = plan.window(number - 1)[0] if number else np.zeros((0, sampling.num_streams, 0), np.int64)
    started = time.process_time()
    rows, tokens = plan.window(number)
    pack_steps(rows, tokens, World(0, world_size), config.micro_batch_tokens, config.quadratic_at)
    seconds = time.process_time() - started
    tracemalloc.start()
    pack_steps(*plan.window(number), World(0, world_size), config.micro_batch_tokens, config.quadratic_at)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    tokens_SWK, bins_SWK, num_bins_S = pack_ranks(tokens, world_size, config.micro_batch_tokens, config.quadratic_at)
    work_SWK = work(tokens_SWK, config.quadratic_at)
    work_SW = work_SWK.sum(2)
    flat = (np.arange(work_SW.size).reshape(work_SW.shape)[..., None] * num_bins_S.max() + bins_SWK).ravel()
    work_SWP = np.bincount(flat, work_SWK.ravel(), work_SW.size * num_bins_S.max()).reshape(*work_SW.shape, -1)
    slowest_S = work_SW.max(1) / work_SW.mean(1)
    read_W, whole = bytes_read(before, rows, world_size, first_row, num_rows, num_tokens)
    return {"worst": float(slowest_S.max()), "average": float(slowest_S.mean()),
            "forwards": float((work_SWP.max(1).sum(1) / work_SW.mean(1)).max()), "read_all": float(read_W.sum() / whole),
            "read_most": float(read_W.max() * world_size / whole), "plan_ms": 1e3 * seconds / len(rows), "plan_mb": peak / 2**20,
            "fair_share": float(work_SWK.max() / work_SW.mean())}


def bytes_read(before: np.ndarray, rows: np.ndarray, world_size: int, first_row: np.ndarray, num_rows: np.ndarray,
               num_tokens: Any) -> tuple[np.ndarray, int]:
    """Tokens that each rank fetches for a window, whole record batches, but for those it holds from the window before; tokens used."""
    fetched = np.setdiff1d(_batches_of(rows, world_size, first_row), _batches_of(before, world_size, first_row))
    rank, number = np.divmod(fetched, len(first_row))
    length = num_rows[number].astype(np.int64)
    ends = np.cumsum(length)
    of_rows = num_tokens[np.repeat(first_row[number] - (ends - length), length) + np.arange(ends[-1])]
    read_W = np.bincount(rank, np.add.reduceat(of_rows, ends - length), world_size)
    return read_W, int(num_tokens[rows[rows >= 0]].sum())


def _batches_of(rows_SCg: np.ndarray, world_size: int, first_row: np.ndarray) -> np.ndarray:
    num_streams = rows_SCg.shape[1]
    rank_C = np.repeat(np.arange(world_size), np.diff(np.arange(world_size + 1) * num_streams // world_size))
    number_SCg = np.searchsorted(first_row, rows_SCg, side="right") - 1
    return np.unique((rank_C[None, :, None] * len(first_row) + number_SCg)[rows_SCg >= 0])


def measure(config: BalanceBenchConfig) -> dict[str, dict[str, float]]:
    """CPU seconds of two processes, step by step, on the same journeys in both modes."""
    measured, settings = {}, config.measure
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows = (settings.steps + 2) * 2 * settings.rows_per_rank
        journeys = generate_journeys(LoaderBenchConfig(num_rows=rows, median_tokens=settings.median_tokens, seed=config.seed,
                                                       max_tokens=settings.max_tokens, num_items=NUM_ITEMS))
        with ShardWriter(folder / "split", 0, ShardConfig(rows_per_batch=16)) as writer:
            writer.write(journeys)
        write_manifest(folder / "split", "train", (), ("a", "b", "c", "d"), "bench", NUM_ITEMS)
        torch.multiprocessing.spawn(train_rank, (folder, config), nprocs=2)
        ranks = [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(2)]
    for mode in MODES:
        seconds_SW, work_SW = (np.array([rank[mode][name] for rank in ranks]).T for name in ("seconds", "work"))
        slowest_S = seconds_SW.max(1) / seconds_SW.mean(1)
        measured[mode] = {"over_all": float(seconds_SW.max(1).sum() / seconds_SW.mean(1).sum()), "median": statistics.median(slowest_S),
                          "worst": float(slowest_S.max()), "planned_worst": float((work_SW.max(1) / work_SW.mean(1)).max())}
        print("2 gloo ranks, balance = {}, {} steps: slowest / mean CPU seconds of forward and backward {over_all:.3f} over all steps, "
              "{median:.3f} in the median step, {worst:.3f} in the worst; by plan at most {planned_worst:.3f}"
              .format(mode, len(slowest_S), **measured[mode]))
    return measured


def train_rank(rank: int, folder: Path, config: BalanceBenchConfig) -> None:
    """One of the two processes: a forward and backward per micro-batch, gradients summed over ranks as data parallelism does."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2, timeout=timedelta(minutes=5))
    torch.manual_seed(config.seed)
    model = GPR(GPRConfig(width=config.measure.width, codebook_size=CODES, num_env_features=4, hsd={"num_layers": 2},
                          ptd={"num_layers": 1}))
    codes = np.random.default_rng(0).integers(0, CODES, (NUM_ITEMS, NUM_LEVELS)).astype(np.int32)
    quadratic_at = quadratic_length(model.config, folder / "split", codes)
    found: dict[str, dict[str, list[float]]] = {}
    for mode in MODES:
        settings = LoaderConfig(seed=config.seed, global_batch_size=2 * config.measure.rows_per_rank, quadratic_at=quadratic_at,
                                balance=mode, num_streams=2 if mode == "work" else None)
        loader = build_loader(folder / "split", settings, World(rank, 2), codes, NUM_HEADS)
        steps = [(spent_on(model, step.micro_batches), sum(work(batch.offsets_B1.diff().numpy(), quadratic_at).sum()
                                                           for batch in step.micro_batches))
                 for step in itertools.islice(loader, config.measure.steps + 2)]
        found[mode] = {"seconds": [seconds for seconds, _ in steps[2:]], "work": [float(total) for _, total in steps[2:]]}
    (folder / f"rank-{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def spent_on(model: GPR, micro_batches: list[Batch]) -> float:
    """CPU seconds of this thread, beside which the loader's work; the sum of the gradients over ranks, which waits, is not counted."""
    weights = uniform_head_weights(NUM_HEADS)
    started = time.thread_time()
    for batch in micro_batches:
        if batch.num_targets:
            mtp_loss(model(batch).nll_NL, batch.target_head_N, weights, batch.num_targets).backward()
    seconds = time.thread_time() - started
    dist.all_reduce(torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in model.parameters()]))
    model.zero_grad(set_to_none=True)
    return seconds


def quadratic_length(model: GPRConfig, split: Path, codes: np.ndarray) -> int:
    """The length at which a journey's quadratic operations equal its linear ones, fitted to a few hundred journeys of the split."""
    one_by_one = LoaderConfig(global_batch_size=1, micro_batch_tokens=1, prefetch_steps=0)
    alone = [step.micro_batches[0] for step in itertools.islice(build_loader(split, one_by_one, World(), codes, NUM_HEADS), 200)]
    tokens = np.array([batch.num_tokens for batch in alone], np.float64)
    flops = np.array([sum(forward_flops(model, work_of(batch, NUM_HEADS, model.ptd.intent_window)).values()) for batch in alone])
    linear, quadratic = np.linalg.lstsq(np.stack([tokens, tokens**2], 1), flops, rcond=None)[0]
    return max(1, round(linear / quadratic))
