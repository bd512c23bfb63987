"""Laws of the step plan, by arithmetic: no shard is opened, 1,024 ranks are values."""

import itertools
import time

import numpy as np
import pytest

from gpr_dist.data.sampler import EpochPlan, World, build_sampling, owned_streams, pack_in_order, pack_steps, spread, work
from gpr_dist.errors import ConfigError


def lengths(num_rows, cap=512, seed=0):
    return np.clip(np.random.default_rng(seed).lognormal(5, 1, num_rows), 2, cap).astype(np.int32)


def build_plan(sampling, num_tokens, rows_per_batch=16, epoch=0):
    first_row = np.arange(0, len(num_tokens), rows_per_batch)
    num_rows = np.minimum(rows_per_batch, len(num_tokens) - first_row)
    return EpochPlan(sampling, first_row, num_rows, num_tokens, epoch)


def epoch_steps(plan):
    for number in range(plan.num_windows):
        yield from zip(*plan.window(number), strict=True)


def pack_step(rows, tokens, world, budget):
    return pack_steps(rows[None], tokens[None], world, budget, 4096)[0]


@pytest.mark.parametrize("num_rows", [1, 7, 64, 999, 1000, 1001, 4097])
@pytest.mark.parametrize("batch_size,num_streams", [(24, 8), (24, 24), (64, 4), (60, 15)])
def test_every_row_once_and_only_the_last_step_is_short(num_rows, batch_size, num_streams):
    plan = build_plan(build_sampling(3, batch_size, 1, 1000, num_streams, shuffle_rows=20), lengths(num_rows))
    steps = [rows[rows >= 0] for rows, _ in epoch_steps(plan)]
    assert sorted(np.concatenate(steps).tolist()) == list(range(num_rows))
    assert all(len(rows) == batch_size for rows in steps[:num_rows // batch_size - 1])
    full = [len(rows) == batch_size for rows in steps]
    assert all(full[:-1]) or num_rows % batch_size  # uneven streams: at most the last step is incomplete
    assert sum(not whole for whole in full) <= 1


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 6, 8, 12])
def test_ranks_share_a_step_whatever_their_number(world_size):
    num_tokens, budget = lengths(2000), 900
    plan = build_plan(build_sampling(1, 48, world_size, budget, 24, 32), num_tokens)
    for rows, tokens in epoch_steps(plan):
        packed = [pack_step(rows, tokens, World(rank, world_size), budget) for rank in range(world_size)]
        assert len({len(micro_batches) for micro_batches in packed}) == 1
        together = np.concatenate([row for micro_batches in packed for row in micro_batches])
        assert sorted(together.tolist()) == sorted(rows[rows >= 0].tolist())
        for rank, micro_batches in enumerate(packed):
            mine = set(rows[owned_streams(24, World(rank, world_size))].ravel().tolist())
            assert {row for rows_of_one in micro_batches for row in rows_of_one.tolist()} <= mine
            assert all(num_tokens[rows_of_one].sum() <= budget or len(rows_of_one) == 1 for rows_of_one in micro_batches)


def test_journeys_longer_than_the_budget_are_alone():
    tokens = np.array([[50, 3000, 20, 10, 2000, 30]])
    bins = pack_step(np.arange(6)[None], tokens, World(), 100)
    assert sorted(sorted(rows.tolist()) for rows in bins if tokens[0, rows].max() > 100) == [[1], [4]]
    assert sorted(row for rows in bins if tokens[0, rows].max() <= 100 for row in rows) == [0, 2, 3, 5]
    assert all(tokens[0, rows].sum() <= 100 or len(rows) == 1 for rows in bins)


def test_packing_is_near_the_lower_bound():
    rng = np.random.default_rng(0)
    for _ in range(20):
        tokens = lengths(512, seed=int(rng.integers(1000)))[None]
        bins = pack_step(np.arange(512)[None], tokens.astype(np.int64), World(), 4096)
        lower = int(np.ceil(tokens.sum() / 4096))
        assert len(bins) <= lower + 1
        loads = np.array([work(tokens[0, rows], 4096).sum() for rows in bins])
        assert loads.max() / loads.mean() < 1.01


def test_spread_refuses_too_few_bins():
    rows = np.array([[60, 60, 60], [90, 50, 40], [500, 90, 0], [500, 90, 50], [500, 500, 0], [500, 500, 500]])
    assert spread(rows, 2, 100, 4096)[1].tolist() == [False, True, True, False, True, False]
    bins, fits = spread(rows, 3, 100, 4096)
    assert fits.all() and sorted(bins[0].tolist()) == sorted(bins[3].tolist()) == sorted(bins[5].tolist()) == [0, 1, 2]


@pytest.mark.parametrize("world_size", [1, 3, 4])
@pytest.mark.parametrize("budget", [300, 900, 4000])
def test_steps_are_packed_together_as_each_alone(world_size, budget):
    plan = build_plan(build_sampling(1, 60, 1, budget, 12, 40), lengths(500, cap=1000))
    for number in range(plan.num_windows):
        rows, tokens = plan.window(number)
        for rank in range(world_size):
            world = World(rank, world_size)
            for packed, *step in zip(pack_steps(rows, tokens, world, budget, 4096), rows, tokens, strict=True):
                assert [batch.tolist() for batch in packed] == [batch.tolist() for batch in pack_step(*step, world, budget)]


def test_order_depends_on_seed_and_epoch_only():
    num_tokens = lengths(1000)
    steps = {}
    for name, seed, world, epoch in [("base", 1, 1, 0), ("ranks", 1, 8, 0), ("seed", 2, 1, 0), ("epoch", 1, 1, 1)]:
        plan = build_plan(build_sampling(seed, 64, world, 1000, 16), num_tokens, epoch=epoch)
        steps[name] = np.concatenate([rows.ravel() for rows, _ in epoch_steps(plan)])
    assert np.array_equal(steps["base"], steps["ranks"])
    assert not np.array_equal(steps["base"], steps["seed"])
    assert not np.array_equal(steps["base"], steps["epoch"])


def test_neighbours_on_disk_are_spread_over_the_epoch():
    """The mean distance in steps between rows that follow each other on disk is near that of a perfect shuffle (a third)."""
    plan = build_plan(build_sampling(0, 64, 1, 1000, 32, 64), np.full(20_000, 100))
    step_of = np.zeros(20_000)
    for step, (rows, _) in enumerate(epoch_steps(plan)):
        step_of[rows[rows >= 0]] = step
    first = np.arange(0, 19_000, 16)  # of different record batches: within one, rows stay within a window
    assert abs(np.abs(step_of[first] - step_of[first + 16]).mean() / plan.num_steps - 1 / 3) < 0.03
    inside = np.abs(step_of[first] - step_of[first + 1])
    assert (inside > 0).mean() > 0.9


@pytest.mark.parametrize("batch_size,cap,world_size,limit",
                         [(256, 512, 8, 1.02), (1024, 512, 64, 1.08), (4096, 512, 64, 1.08), (4096, 2048, 64, 1.2)])
def test_ranks_have_nearly_the_same_work(batch_size, cap, world_size, limit):
    num_tokens = lengths(100_000, cap)
    plan = build_plan(build_sampling(1, batch_size, world_size, 8192), num_tokens, 64)
    ratios, shuffled = [], []
    for rows, tokens in epoch_steps(plan):
        if (rows < 0).any():
            continue
        per_row = work(tokens, 4096)
        for found, values in ((ratios, per_row.ravel()), (shuffled, np.random.default_rng(0).permutation(per_row.ravel()))):
            per_rank = values.reshape(world_size, -1).sum(1)
            found.append(per_rank.max() / per_rank.mean())
    assert np.mean(ratios) < limit
    assert np.mean(ratios) - 1 < 0.4 * (np.mean(shuffled) - 1)


def test_planning_scales():
    """4 million record batches, 1,024 ranks: an epoch in seconds, a step in milliseconds, nothing that grows with the rows."""
    num_batches, rows_per_batch = 4_000_000, 256
    num_tokens = np.broadcast_to(np.int32(200), num_batches * rows_per_batch)  # a billion rows in four bytes
    sampling = build_sampling(0, 4096, 1024, 16384, 1024)
    started = time.process_time()
    plan = EpochPlan(sampling, np.arange(num_batches) * rows_per_batch, np.full(num_batches, rows_per_batch), num_tokens, 0)
    assert time.process_time() - started < 10
    started = time.process_time()
    steps = pack_steps(*plan.window(1000), World(513, 1024), 16384, 4096)
    assert len(steps) == plan.steps_per_window and all(sum(map(len, packed)) == 4 for packed in steps)
    assert (time.process_time() - started) / plan.steps_per_window < 0.02


@pytest.mark.parametrize("sizes,message", [
    ({"global_batch_size": 100, "world_size": 8}, r"global_batch_size=100 is not divisible by the world size 8; nearest: 96 or 104"),
    ({"global_batch_size": 64, "world_size": 4, "num_streams": 24},
     r"num_streams=24 does not divide global_batch_size=64; nearest: 16 or 32"),
    ({"global_batch_size": 64, "world_size": 32, "num_streams": 16}, r"world size 32 > num_streams=16.*set num_streams=32"),
    ({"global_batch_size": 8, "world_size": 16}, r"global_batch_size must be at least 16"),
])
def test_sizes_that_do_not_fit(sizes, message):
    with pytest.raises(ConfigError, match=message):
        build_sampling(0, sizes["global_batch_size"], sizes["world_size"], 1000, sizes.get("num_streams"))


def test_pack_in_order_keeps_the_order_and_the_budget():
    num_tokens = np.concatenate([lengths(300), [5000], lengths(50)])
    bounds = pack_in_order(num_tokens, 1000)
    assert bounds[0] == 0 and bounds[-1] == len(num_tokens) and (np.diff(bounds) > 0).all()
    for low, high in itertools.pairwise(bounds):
        assert num_tokens[low:high].sum() <= 1000 or high == low + 1
        assert high == len(num_tokens) or num_tokens[low:high + 1].sum() > 1000
    assert pack_in_order(np.zeros(0, np.int32), 1000).tolist() == [0]
