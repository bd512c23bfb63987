"""What validation and evaluation read from a data folder: whether there is a split, popularity, and the same requests for every ranker."""

import numpy as np
import pytest
from journeys_fixture import NUM_ITEMS, random_journeys, write_split
from random_batches import random_batch

from gpr_dist.data.loader import LoaderConfig, iter_once
from gpr_dist.data.reader import ShardReader
from gpr_dist.data.sampler import World
from gpr_dist.errors import DataError
from gpr_dist.evaluation import validate
from gpr_dist.evaluation.baselines import BaselineConfig, popularity, weigh_counts
from gpr_dist.evaluation.journey_log import read_log
from gpr_dist.evaluation.validate import count_before, has_targets, open_journeys, save_popularity, seen_in_row

CODES = np.random.default_rng(0).integers(0, 32, (NUM_ITEMS, 3))


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    for seed, split in enumerate(("train", "validation")):
        write_split(folder / split, random_journeys(90, seed), num_parts=2)
    return {split: folder / split for split in ("train", "validation")}


def test_a_split_counts_only_with_something_to_predict(shards, tmp_path):
    assert has_targets(shards["validation"]) and not has_targets(tmp_path / "none")
    write_split(tmp_path / "empty", random_journeys(0))
    assert (tmp_path / "empty" / "manifest.json").exists() and not has_targets(tmp_path / "empty")
    (tmp_path / "empty" / "manifest.json").write_text("{}")
    with pytest.raises(DataError):
        has_targets(tmp_path / "empty")


def test_popularity_is_counted_in_shares_and_without_the_log_in_memory(shards, tmp_path):
    batches = {split: random_journeys(90, seed) for seed, split in enumerate(shards)}
    log = read_log({split: [batch] for split, batch in batches.items()}, "validation")
    counted = log.time_X[log.is_counted_X]
    # The manifest's last time is that of any token; of these random journeys it may be a look-ahead that no row has as its own.
    late = ShardReader(shards["train"]).manifest.last_timestamp - counted.max()
    config = BaselineConfig(recent_days=(late + 900) / 86_400)
    expected = popularity(log, NUM_ITEMS + 3, config.model_copy(update={"recent_days": 900 / 86_400}))
    assert 0 < (counted > counted.max() - 900).mean() < 1  # recent is some, not all
    for size in (1, 2, 5):
        counts = sum(count_before(shards, "validation", NUM_ITEMS + 3, config, World(rank, size)) for rank in range(size))
        np.testing.assert_array_equal(weigh_counts(counts, config), expected)
    assert expected.sum() > 0 and len(expected) == NUM_ITEMS + 3
    both = popularity(read_log({split: [batch] for split, batch in (batches | {"test": random_journeys(5, 7)}).items()}), NUM_ITEMS,
                      BaselineConfig(recent_days=0))
    ever = BaselineConfig(recent_days=0, recent_weight=0)
    np.testing.assert_array_equal(weigh_counts(count_before(shards, "test", NUM_ITEMS, ever, World(0, 1)), ever), both)


def test_popularity_survives_the_file_and_a_failed_write(tmp_path, monkeypatch):
    path, first = tmp_path / "run" / "popularity.npy", np.arange(5.0)
    save_popularity(path, first)
    monkeypatch.setattr(validate, "write_atomic", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError):
        save_popularity(path, first + 1)
    np.testing.assert_array_equal(np.load(path, allow_pickle=False), first)


@pytest.mark.parametrize("max_rows", [1, 13, 16, 40, 90, None])
def test_baselines_and_model_see_the_same_requests(shards, max_rows):
    """Compared as (eligibility, ad) of every target, and by the number of requests."""
    log = open_journeys(shards, "validation", max_rows)
    from_model, from_log = [], sorted(zip(log.request_group_R[log.target_request_N].tolist(), log.target_item_N.tolist(), strict=True))
    num_requests = 0
    for batch in iter_once(shards["validation"], LoaderConfig(micro_batch_tokens=200), World(), CODES, 4, max_rows):
        first = batch.target_head_N == 0
        from_model += zip(batch.request_eligibility_R[batch.target_request_N[first]].tolist(), batch.target_item_N[first].tolist(),
                          strict=True)
        num_requests += len(batch.request_eligibility_R)
    assert sorted(from_model) == from_log and num_requests == len(log.request_group_R) > 0
    everything = open_journeys(shards, "validation")
    np.testing.assert_array_equal(log.item_X, everything.item_X)  # history and counts do not depend on it
    np.testing.assert_array_equal(log.is_counted_X, everything.is_counted_X)


@pytest.mark.parametrize("seed", range(3))
def test_seen_in_a_row_are_its_items_up_to_the_site(seed):
    batch = random_batch(seed, num_rows=5)
    found = seen_in_row(batch)
    start, row, site = batch.offsets_B1.tolist(), batch.request_row_R.tolist(), batch.request_token_R.tolist()
    assert len(found.offset_R1) == len(row) + 1
    for request, (first, last) in enumerate(zip([start[r] for r in row], site, strict=True)):
        items = {item for item in batch.item_T[first:last + 1].tolist() if item >= 0}
        assert found.item_M[found.offset_R1[request]:found.offset_R1[request + 1]].tolist() == sorted(items)
