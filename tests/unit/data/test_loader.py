"""Invariants of the streaming loader over real shards."""

import dataclasses
import itertools
import json
import threading
import time
from functools import partial

import numpy as np
import pytest
import torch
from journeys_fixture import NUM_ITEMS, random_journeys, write_split

from data_pipeline.shards import ShardConfig
from gpr_dist.data import loader as loader_module
from gpr_dist.data.loader import LoaderConfig, build_loader, in_order, iter_once
from gpr_dist.data.sampler import World
from gpr_dist.errors import DataError
from gpr_dist.schema import Batch
from gpr_dist.tokenizer.config import TokenizerConfig
from gpr_dist.tokenizer.fit import fit_tokenizer

CODES = np.random.default_rng(0).integers(0, 32, (NUM_ITEMS, 3))
CONFIG = LoaderConfig(seed=5, global_batch_size=24, num_streams=8, shuffle_rows=12, micro_batch_tokens=300)
BY_WORK = CONFIG.model_copy(update={"balance": "work"})
JOURNEYS = random_journeys(403, seed=1)

PLAIN_FIELDS = [field for field in dataclasses.fields(Batch) if field.default is dataclasses.MISSING]  # others are added after collate


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("split")
    write_split(path, JOURNEYS, num_parts=3)
    return path


def loaders(folder, world_size, config=CONFIG):
    return [build_loader(folder, config, World(rank, world_size), CODES, 4) for rank in range(world_size)]


def run(ranks, num_steps):
    """Sorted row ids of the next steps over all ranks; checks that all ranks agree on position and number of micro-batches."""
    steps = []
    for parts in itertools.islice(zip(*ranks, strict=True), num_steps):
        assert len({(part.epoch, part.step_in_epoch, len(part.micro_batches)) for part in parts}) == 1
        steps.append(sorted(row for part in parts for batch in part.micro_batches for row in batch.row_ids_B.tolist()))
    return steps


def equal(a, b):
    return all(torch.equal(torch.nan_to_num(getattr(a, f.name)), torch.nan_to_num(getattr(b, f.name))) for f in PLAIN_FIELDS)


@pytest.mark.parametrize("config,world_size", [*((CONFIG, size) for size in (1, 2, 3, 4, 8)), (BY_WORK, 2), (BY_WORK, 8)])
def test_every_row_once_per_epoch_and_steps_alike_for_any_number_of_ranks(folder, config, world_size):
    ranks = loaders(folder, world_size, config)
    num_steps = ranks[0].steps_per_epoch
    steps = run(ranks, 2 * num_steps)
    for epoch in range(2):
        rows = itertools.chain(*steps[epoch * num_steps:(epoch + 1) * num_steps])
        assert sorted(rows) == list(range(403))
    assert steps[:num_steps] != steps[num_steps:]
    assert steps == run(loaders(folder, 1, config), 2 * num_steps)
    assert ranks[0].state_dict()["epoch"] == 2 and ranks[0].state_dict()["step"] == 0


@pytest.mark.parametrize("world_size", [2, 4, 8])
def test_a_rank_reads_its_share_only(folder, world_size):
    config = CONFIG.model_copy(update={"prefetch_steps": 0})
    for loader in loaders(folder, world_size, config):
        epoch = itertools.islice(loader, loader.steps_per_epoch)
        read = set()
        fetch = loader.reader.read_batch
        loader.reader.read_batch = lambda number, fetch=fetch, read=read: (read.add(number), fetch(number))[1]
        assert sum(batch.num_rows for step in epoch for batch in step.micro_batches) in range(403 // world_size - 8, 403 // world_size + 9)
        streams = 8 // world_size
        ahead = 2 * streams * 3  # the next epoch's first windows may be on their way
        assert len(read) <= loader.reader.num_batches / world_size + streams + 1 + ahead


def test_a_tokenizer_that_has_grown_reads_older_shards_and_a_smaller_one_does_not(folder):
    rng = np.random.default_rng(3)
    bundle = fit_tokenizer(rng.normal(size=(NUM_ITEMS, 4)).astype(np.float32), TokenizerConfig(codebook_size=8, device="cpu"), "c0ffee")
    grown = bundle.append(rng.normal(size=(7, 4)).astype(np.float32), "beef")
    assert grown.num_items == NUM_ITEMS + 7
    old, new = (next(iter(build_loader(folder, CONFIG, World(), ids.codes_NL, 4))).micro_batches for ids in (bundle, grown))
    assert all(equal(a, b) for a, b in zip(old, new, strict=True))
    old, new = (list(iter_once(folder, CONFIG, World(), ids.codes_NL, 4)) for ids in (bundle, grown))
    assert all(equal(a, b) for a, b in zip(old, new, strict=True))
    for open_split in (build_loader, iter_once):
        with pytest.raises(DataError, match=f"has {NUM_ITEMS} items, the tokenizer {NUM_ITEMS - 1}"):
            open_split(folder, CONFIG, World(), bundle.codes_NL[:-1], 4)


def test_first_step_comes_before_a_pass_over_the_data(folder):
    loader = build_loader(folder, CONFIG.model_copy(update={"prefetch_steps": 0}), World(0, 1), CODES, 4)
    next(iter(loader))
    assert loader.reader.num_batches_read < loader.reader.num_batches


@pytest.mark.parametrize("config,before,after",
                         [*((CONFIG, *ranks) for ranks in ((1, 1), (2, 1), (1, 4), (4, 8), (3, 2))), (BY_WORK, 1, 4), (BY_WORK, 8, 2)])
@pytest.mark.parametrize("stop_at", [1, 7, 17, 20])
def test_resume_anywhere_on_any_number_of_ranks(folder, config, before, after, stop_at):
    straight = run(loaders(folder, 1, config), stop_at + 20)
    first = loaders(folder, before, config)
    assert run(first, stop_at) == straight[:stop_at]
    states = [json.loads(json.dumps(loader.state_dict())) for loader in first]
    assert all(state == states[0] for state in states) and len(states[0]) < 10
    second = loaders(folder, after, config)
    for loader in second:
        loader.load_state_dict(states[0])
    assert run(second, 20) == straight[stop_at:]


@pytest.mark.parametrize("config,world_size,warns", [(BY_WORK, 6, True), (BY_WORK, 4, False), (CONFIG, 6, False)])
def test_streams_that_ranks_cannot_share_evenly_are_pointed_out_once(folder, caplog, config, world_size, warns):
    loaders(folder, world_size, config)
    assert ["8 streams on 6 ranks: the slowest has 1.50 times the mean" in record.message for record in caplog.records] == [True] * warns


def test_resume_on_the_same_ranks_is_bit_identical(folder):
    straight = list(itertools.islice(build_loader(folder, CONFIG, World(1, 2), CODES, 4), 12))
    loader = build_loader(folder, CONFIG, World(1, 2), CODES, 4)
    loader.load_state_dict({**loader.state_dict(), "epoch": 0, "step": 5})
    for a, b in zip(straight[5:], loader, strict=False):
        assert len(a.micro_batches) == len(b.micro_batches)
        assert all(equal(x, y) for x, y in zip(a.micro_batches, b.micro_batches, strict=True))


@pytest.mark.parametrize("pack_threads,prefetch_steps", [(1, 1), (1, 4), (4, 1), (4, 6)])
def test_prefetch_and_threads_change_nothing(folder, pack_threads, prefetch_steps):
    plain = build_loader(folder, CONFIG.model_copy(update={"prefetch_steps": 0, "read_threads": 1}), World(), CODES, 4)
    ahead = CONFIG.model_copy(update={"prefetch_steps": prefetch_steps, "pack_threads": pack_threads})
    ahead = build_loader(folder, ahead, World(), CODES, 4)
    for a, b in itertools.islice(zip(plain, ahead, strict=False), 40):
        assert (a.epoch, a.step_in_epoch) == (b.epoch, b.step_in_epoch)
        assert all(equal(x, y) for x, y in zip(a.micro_batches, b.micro_batches, strict=True))
        assert plain.state_dict() == ahead.state_dict()


@pytest.mark.parametrize("rows_at_once,pack_threads", [(1, 1), (30, 1), (30, 4)])
def test_steps_copied_together_are_those_copied_alone(folder, monkeypatch, rows_at_once, pack_threads):
    config = CONFIG.model_copy(update={"prefetch_steps": 3, "pack_threads": pack_threads})

    def batches():
        steps = itertools.islice(build_loader(folder, config, World(1, 2), CODES, 4), 25)
        return [batch for step in steps for batch in step.micro_batches]

    expected = batches()
    monkeypatch.setattr(loader_module, "_ROWS_AT_ONCE", rows_at_once)  # 1 = every step alone; else some together, the last fewer
    assert all(equal(a, b) for a, b in zip(expected, batches(), strict=True))


def test_both_containers_give_the_same_batches(tmp_path):
    for container in ("arrow", "webdataset"):
        config = ShardConfig(container=container, compression="zstd", rows_per_batch=8, rows_per_shard=40)
        write_split(tmp_path / container, JOURNEYS, config, num_parts=2)
    a, b = (build_loader(tmp_path / container, CONFIG, World(), CODES, 4) for container in ("arrow", "webdataset"))
    assert a.state_dict() == b.state_dict()  # a run may go on from the other container
    for x, y in itertools.islice(zip(a, b, strict=False), 8):
        assert all(equal(*pair) for pair in zip(x.micro_batches, y.micro_batches, strict=True))


def test_changed_data_seed_or_batch_size_is_refused(folder, tmp_path):
    state = loaders(folder, 1)[0].state_dict()
    rows = JOURNEYS.to_pylist()
    rows[0]["action"][-1] = 1 + rows[0]["action"][-1] % 4  # same counts, same times: only the content differs
    edited = type(JOURNEYS).from_pylist(rows, JOURNEYS.schema)
    write_split(tmp_path, edited, num_parts=3)
    other = build_loader(tmp_path, CONFIG, World(), CODES, 4)
    with pytest.raises(DataError, match=rf"fingerprint {state['fingerprint']}, but .* give {other.state_dict()['fingerprint']}"):
        other.load_state_dict(state)
    for change in ({"seed": 6}, {"global_batch_size": 48}, {"num_streams": 4}, {"shuffle_rows": 24}, {"balance": "work"}):
        with pytest.raises(DataError, match="cannot resume"):
            loaders(folder, 1, CONFIG.model_copy(update=change))[0].load_state_dict(state)
    loaders(folder, 2, CONFIG.model_copy(update={"micro_batch_tokens": 999, "prefetch_steps": 0}))[0].load_state_dict(state)
    del state["balance"]  # as checkpoints were before there was a choice
    loaders(folder, 1)[0].load_state_dict(state)


@pytest.mark.parametrize("world_size", [1, 2, 3, 5, 40])
def test_one_pass_sees_every_row_once_in_the_same_batches(folder, world_size):
    passes = [iter_once(folder, CONFIG, World(rank, world_size), CODES, 4) for rank in range(world_size)]
    assert len({len(one) for one in passes}) == 1
    batches = [list(one) for one in passes]
    assert all(len(b) == len(one) for one, b in zip(passes, batches, strict=True))
    rows = [row for b in batches for batch in b for row in batch.row_ids_B.tolist()]
    assert rows == list(range(403))
    whole = [batch for b in batches for batch in b if batch.num_rows]
    assert all(equal(*pair) for pair in zip(whole, iter_once(folder, CONFIG, World(), CODES, 4), strict=True))
    assert all(batch.num_tokens <= 300 or batch.num_rows == 1 for batch in whole)
    assert sum(batch.num_targets for batch in whole) == passes[0].reader.manifest.num_targets
    assert sum(batch.num_tokens for batch in whole) == passes[0].reader.manifest.num_tokens


def test_one_pass_of_a_part_and_of_nothing(folder, tmp_path):
    part = iter_once(folder, CONFIG, World(), CODES, 4, max_rows=20)
    assert [row for batch in part for row in batch.row_ids_B.tolist()] == list(range(20))
    write_split(tmp_path, JOURNEYS.slice(0, 0), num_parts=1)
    assert list(iter_once(tmp_path, CONFIG, World(0, 2), CODES, 4)) == []
    with pytest.raises(DataError, match="has no journeys"):
        build_loader(tmp_path, CONFIG, World(), CODES, 4)


def test_counts_in_the_manifest_are_those_of_the_batches(folder):
    loader = loaders(folder, 1)[0]
    for step in itertools.islice(loader, 5):
        for batch in step.micro_batches:
            assert batch.num_tokens == loader.reader.num_tokens[batch.row_ids_B].sum()
            assert batch.num_targets == loader.reader.num_targets[batch.row_ids_B].sum()


def test_a_damaged_batch_stops_or_is_skipped_alike(tmp_path):
    write_split(tmp_path, JOURNEYS)
    probe = loaders(tmp_path, 1)[0].reader
    path = tmp_path / probe.manifest.shards[2].name
    content = bytearray(path.read_bytes())
    content[int(probe._index["offset"][12]) + 900] ^= 4
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"part-00000-0002.arrow batch 2 is damaged"):
        run(loaders(tmp_path, 1), 17)
    skipping = CONFIG.model_copy(update={"on_corrupt": "skip"})
    one, three = loaders(tmp_path, 1, skipping), loaders(tmp_path, 3, skipping)
    steps = run(one, one[0].steps_per_epoch)
    assert steps == run(three, one[0].steps_per_epoch)
    assert sorted(itertools.chain(*steps)) == [row for row in range(403) if not 96 <= row < 104]


@pytest.mark.parametrize(("damage", "problem"), [
    (lambda path: path.unlink(), r"part-0000\d-\d{4}.arrow batch \d cannot be read \(.*No such file"),
    (lambda path: path.write_bytes(b"\xff" * path.stat().st_size), r"part-0000\d-\d{4}.arrow batch \d is damaged: checksum")])
def test_a_shard_that_goes_while_the_loader_runs_stops_or_is_skipped(tmp_path, damage, problem, caplog):
    """Removed or overwritten after the first step, before it was opened: an opened one lives on in memory."""
    for on_corrupt in ("stop", "skip"):
        split = tmp_path / on_corrupt
        write_split(split, JOURNEYS, num_parts=3)
        loader, = loaders(split, 1, CONFIG.model_copy(update={"on_corrupt": on_corrupt, "prefetch_steps": 0}))
        reader, steps = loader.reader, iter(loader)
        seen = [row for batch in next(steps).micro_batches for row in batch.row_ids_B.tolist()]
        with reader._lock:  # the next window is being read meanwhile
            shard = max(set(range(len(reader.manifest.shards))) - set(reader._mapped))
            damage(split / reader.manifest.shards[shard].name)
        rest = itertools.islice(steps, loader.steps_per_epoch - 1)
        if on_corrupt == "stop":
            with pytest.raises(DataError, match=problem) as raised:
                list(rest)
            assert "\n" not in str(raised.value)
            continue
        seen += [row for step in rest for batch in step.micro_batches for row in batch.row_ids_B.tolist()]
        gone = reader._index["shard"] == shard
        lost = np.concatenate([np.arange(first, first + num) for first, num in zip(reader.first_row[gone], reader.num_rows[gone],
                                                                                    strict=True)])
        assert len(lost) and sorted([*seen, *lost]) == list(range(403))
        # more, if the next epoch's first window has been read
        assert reader.num_skipped_batches >= gone.sum() and reader.num_skipped_rows >= len(lost)
        assert f"{reader.manifest.shards[shard].name} batch" in caplog.text


def test_codes_of_another_catalogue_are_refused(folder):
    with pytest.raises(DataError, match=rf"catalogue has {NUM_ITEMS} items, the tokenizer 7"):
        build_loader(folder, CONFIG, World(), CODES[:7], 4)


def threads_named(name):
    return [thread for thread in threading.enumerate() if thread.name.startswith(name)]


def test_a_loader_that_is_left_leaves_no_thread(folder):
    before = set(threading.enumerate())  # a test before this one may have left a loader to the garbage collector
    steps = iter(build_loader(folder, CONFIG, World(), CODES, 4))
    next(steps)
    assert set(threads_named("pack")) - before and set(threads_named("window")) - before
    steps.close()
    assert not set(threading.enumerate()) - before


def test_tasks_run_together_and_their_results_come_in_order():
    together = threading.Barrier(3, timeout=60)  # passed only when three tasks run at the same time
    finished = []

    def task(number):
        together.wait()
        if number % 3 == 0:
            while len(finished) < number + 2:  # the first of three finishes last
                time.sleep(0.001)
        finished.append(number)
        return number

    assert list(in_order((partial(task, number) for number in range(9)), 3, 3)) == list(range(9))
    assert [number % 3 for number in finished[2::3]] == [0, 0, 0]


@pytest.mark.parametrize("depth", [1, 2, 5])
def test_no_more_tasks_are_started_than_asked_for(depth):
    started = []
    results = in_order((partial(started.append, number) for number in itertools.count()), 8, depth)
    for taken in range(1, 20):
        next(results)
        assert len(started) <= taken + depth
    results.close()


@pytest.mark.parametrize("depth", [0, 1, 4])
def test_an_exception_comes_in_its_place_and_ends_all_threads(depth):
    def task(number):
        if number in (2, 3):
            raise DataError(f"part-{number} is gone")
        return number

    before = set(threading.enumerate())
    results = in_order((partial(task, number) for number in itertools.count()), 4, depth)
    assert [next(results), next(results)] == [0, 1]
    with pytest.raises(DataError, match="part-2 is gone"):
        next(results)
    assert not set(threading.enumerate()) - before
    with pytest.raises(StopIteration):
        next(results)


def test_keys_for_dropout_are_made_where_they_are_asked_for(folder):
    with_keys, without = (next(iter(build_loader(folder, CONFIG, World(), CODES, 4, keyed=keyed))).micro_batches for keyed in (True, False))
    assert all(len(batch.noise_T.unique()) == batch.num_tokens for batch in with_keys)
    assert all(batch.noise_T is None for batch in without)
