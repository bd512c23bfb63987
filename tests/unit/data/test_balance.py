"""Laws of balance = work: every row once, steps that do not know the number of ranks, equal work for all of them, bounded planning."""

import time
import tracemalloc

import numpy as np
import pytest

from gpr_dist.data.balance import cut_by_work, work
from gpr_dist.data.sampler import EpochPlan, World, build_sampling, owned_streams, pack_ranks, pack_steps

QUADRATIC_AT, BUDGET = 4096, 16384
TAILS = {"lognormal": lambda rng, size: rng.lognormal(5, 1, size), "wide lognormal": lambda rng, size: rng.lognormal(5, 1.5, size),
         "pareto": lambda rng, size: 32 * (1 + rng.pareto(1.2, size))}


def lengths(num_rows, tail="lognormal", cap=2048, seed=0):
    return np.clip(TAILS[tail](np.random.default_rng(seed), num_rows), 2, cap).astype(np.int32)


def build_plan(num_tokens, batch_size, num_streams, shuffle_rows=256, seed=0, epoch=0, rows_per_batch=64, world_size=1):
    first_row = np.arange(0, len(num_tokens), rows_per_batch)
    num_rows = np.minimum(rows_per_batch, len(num_tokens) - first_row)
    sampling = build_sampling(seed, batch_size, world_size, BUDGET, num_streams, shuffle_rows, QUADRATIC_AT, "work")
    return EpochPlan(sampling, first_row, num_rows, num_tokens, epoch)


def epoch_steps(plan):
    steps = [step for number in range(plan.num_windows) for step in zip(*plan.window(number), strict=True)]
    assert len(steps) == plan.num_steps
    return steps


def work_of_ranks(tokens_CG, world_size):
    per_stream = work(tokens_CG, QUADRATIC_AT).sum(-1)
    return np.array([per_stream[..., owned_streams(per_stream.shape[-1], World(rank, world_size))].sum(-1) for rank in range(world_size)])


@pytest.mark.parametrize("num_rows", [1, 7, 64, 999, 1000, 4097])
@pytest.mark.parametrize("batch_size,num_streams,rows_per_batch", [(24, 8, 16), (24, 24, 1), (64, 4, 5000), (60, 15, 3)])
def test_every_row_once(num_rows, batch_size, num_streams, rows_per_batch):
    num_tokens = lengths(num_rows)
    plan = build_plan(num_tokens, batch_size, num_streams, 20, rows_per_batch=rows_per_batch)
    rows, tokens = (np.concatenate([step[i].ravel() for step in epoch_steps(plan)]) for i in (0, 1))
    assert sorted(rows[rows >= 0].tolist()) == list(range(num_rows))
    assert np.array_equal(tokens, np.where(rows >= 0, num_tokens[rows], 0))
    assert plan.num_steps == -(-num_rows // batch_size)  # the loader says so without a plan


def test_order_depends_on_seed_and_epoch_only():
    num_tokens = lengths(3000)
    base, again, ranks, seed, epoch = ([np.sort(rows.ravel()).tolist() for rows, _ in epoch_steps(build_plan(num_tokens, 64, 8, **change))]
                                       for change in ({}, {}, {"world_size": 8}, {"seed": 1}, {"epoch": 1}))
    assert base == again == ranks
    assert base != seed and base != epoch


@pytest.mark.parametrize("world_size", [1, 3, 4, 12])
def test_ranks_share_a_step_whatever_their_number(world_size):
    """Resuming on other ranks goes on with the same steps: a step is a function of the plan, and the ranks take all of it."""
    num_tokens = lengths(2000)
    plan = build_plan(num_tokens, 48, 12, 32)
    for number in range(plan.num_windows):
        rows, tokens = plan.window(number)
        packed = [pack_steps(rows, tokens, World(rank, world_size), 900, QUADRATIC_AT) for rank in range(world_size)]
        for step, of_ranks in zip(rows, zip(*packed, strict=True), strict=True):
            assert len({len(micro_batches) for micro_batches in of_ranks}) == 1
            together = [row for micro_batches in of_ranks for batch in micro_batches for row in batch.tolist()]
            assert sorted(together) == sorted(step[step >= 0].tolist())
            assert all(num_tokens[batch].sum() <= 900 or len(batch) == 1 for micro_batches in of_ranks for batch in micro_batches)


@pytest.mark.parametrize("tail,cap,rows_per_rank,window",
                         [("lognormal", 2048, 32, 256), ("wide lognormal", 4096, 32, 256), ("pareto", 4096, 64, 512)])
@pytest.mark.parametrize("world_size", [8, 64, 256, 1024])
def test_no_rank_has_more_than_its_share_at_any_step(world_size, tail, cap, rows_per_rank, window):
    """Heavy tails: the longest journey alone is 0.35, 0.46 and 0.79 of a rank's mean work in a step."""
    batch_size = world_size * rows_per_rank
    num_tokens = lengths(2 * window * world_size + 77, tail, cap)
    row_work = work(num_tokens, QUADRATIC_AT)
    assert 0.3 < row_work.max() / row_work.mean() / rows_per_rank < 0.9
    plan = build_plan(num_tokens, batch_size, world_size, window)
    for number in range(2):
        rows, tokens = plan.window(number)
        work_WS = work_of_ranks(tokens, world_size)
        assert (work_WS.max(0) / work_WS.mean(0)).max() < 1.05
        assert work_WS.sum(0).max() < 1.01 * work_WS.sum(0).mean()  # steps are alike too
        assert abs((rows >= 0).sum((1, 2)) / batch_size - 1).max() < 0.15


def test_fewer_ranks_than_streams_are_as_even():
    plan = build_plan(lengths(40_000), 2048, 64)
    _, tokens = plan.window(0)
    for world_size in (2, 8, 16, 32):
        work_WS = work_of_ranks(tokens, world_size)
        assert (work_WS.max(0) / work_WS.mean(0)).max() < 1.02


def test_forwards_are_even_too():
    """ZeRO-3 waits at every micro-batch: the sum over them of the slowest rank's work is what a step costs."""
    plan = build_plan(lengths(100_000), 4096, 16, 2048)
    _, tokens_SCg = plan.window(0)
    tokens_SWK, bins_SWK, num_bins_S = pack_ranks(tokens_SCg, 16, BUDGET, QUADRATIC_AT)
    for tokens_WK, bins_WK, num_bins in zip(tokens_SWK, bins_SWK, num_bins_S, strict=True):
        load_WP = np.array([np.bincount(*rank, num_bins) for rank in zip(bins_WK, work(tokens_WK, QUADRATIC_AT), strict=True)])
        assert load_WP.max(0).sum() < 1.05 * load_WP.sum(1).mean()
        assert num_bins <= np.ceil(tokens_WK.sum(1).max() / BUDGET) + 1


@pytest.mark.parametrize("world_size,rows_per_batch", [(4, 64), (16, 64), (64, 64), (64, 1000)])
def test_a_rank_reads_its_share_and_at_most_one_record_batch_more(world_size, rows_per_batch):
    plan = build_plan(lengths(64 * 1024), 2048, 64, 1024, rows_per_batch=rows_per_batch)
    assert plan.num_windows == 1
    rows, _ = plan.window(0)
    read = []
    for rank in range(world_size):
        mine = rows[:, owned_streams(64, World(rank, world_size))]
        read.append(set((mine[mine >= 0] // rows_per_batch).tolist()))
    num_batches = -(-64 * 1024 // rows_per_batch)
    assert set().union(*read) == set(range(num_batches))
    assert sum(map(len, read)) <= num_batches + world_size - 1


def test_streams_share_the_work_of_a_record_batch_that_holds_everything():
    row_work = work(lengths(10_000), QUADRATIC_AT)
    for edges in ([10_000], [1, 9_999, 10_000], [5_000, 10_000], list(range(1, 10_001))):
        load = np.bincount(cut_by_work(row_work, np.array(edges), 16), row_work, 16)
        slack = row_work.max() if len(edges) == 10_000 else 1e-4 * load.mean()  # a single row cannot be divided
        assert np.abs(load - load.mean()).max() <= slack


def test_a_journey_heavier_than_a_share_leaves_the_others_even():
    row_work = np.full(1000, 10.0)
    row_work[500] = 5000.0
    load = np.sort(np.bincount(cut_by_work(row_work, np.arange(50, 1001, 50), 8), row_work, 8))
    assert load[-1] >= 5000 and load.sum() == row_work.sum()
    plan = build_plan(np.where(np.arange(4096) == 77, 60_000, 100), 256, 8)
    assert sorted(row for rows, _ in epoch_steps(plan) for row in rows[rows >= 0].tolist()) == list(range(4096))


class DrawnLengths:
    """Lengths of any number of rows, made when asked for: a billion int32 would be 4 GB on disk."""

    def __init__(self, pool):
        self.pool, self.asked = pool, 0

    def __getitem__(self, rows):
        self.asked += len(rows)
        return self.pool[(rows * 2_654_435_761) % len(self.pool)]


def test_planning_scales():
    """A billion rows, 1,024 ranks: milliseconds a step, memory of one window, whatever the number of rows."""
    num_batches, rows_per_batch = 1_000_000, 1000
    num_tokens = DrawnLengths(lengths(65_536))
    sampling = build_sampling(0, 32_768, 1024, BUDGET, 1024, 256, QUADRATIC_AT, "work")
    plan = EpochPlan(sampling, np.arange(num_batches) * rows_per_batch, np.full(num_batches, rows_per_batch), num_tokens, 0)
    started = time.process_time()
    rows, tokens = plan.window(2000)
    steps = pack_steps(rows, tokens, World(513, 1024), BUDGET, QUADRATIC_AT)
    assert (time.process_time() - started) / len(steps) < 0.1
    assert num_tokens.asked == 1024 * 256 and len(steps) == 8
    tracemalloc.start()
    pack_steps(*plan.window(2001), World(513, 1024), BUDGET, QUADRATIC_AT)
    assert tracemalloc.get_traced_memory()[1] < 500 * num_tokens.asked / 2  # bytes a row of the window
    tracemalloc.stop()
