"""The cascade baseline: which ads reach the rankers, and in what order they leave them."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from journeys_fixture import NUM_ITEMS, random_journeys, stored_rows, write_split

from gpr_dist.data.collate import collate
from gpr_dist.data.eligibility import Eligibility
from gpr_dist.data.loader import LoaderConfig, iter_once
from gpr_dist.data.sampler import World
from gpr_dist.errors import DataError
from gpr_dist.rl.cascade import Retriever, RetrieverConfig, cascade_rank
from gpr_dist.schema import EVERY_AD

CODES_ML = np.zeros((NUM_ITEMS, 2), np.int32)
ADS = np.arange(45, dtype=np.int32)
GROUPS = [np.arange(0, 40, 2, dtype=np.int32), np.arange(30, dtype=np.int32), np.arange(7, dtype=np.int32), ADS[5:], ADS[:1]]
ELIGIBILITY = Eligibility(GROUPS, ADS, NUM_ITEMS)
CONFIG = RetrieverConfig(popularity=0.5, markov=2.0, personal=0.7, markov_items=3, smoothing=1.0)


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards") / "train"
    write_split(folder, random_journeys(60, seed=1))
    return folder


@pytest.fixture(scope="module")
def batch():
    return collate(stored_rows(random_journeys(20)).take(np.arange(20)), np.arange(20), CODES_ML, 1, 2, 3)


def whole(shards):
    return next(iter(iter_once(shards, LoaderConfig(micro_batch_tokens=10**6), World(0, 1), CODES_ML, 1)))


def past(batch, request):
    """Items before a request, latest first."""
    first, site = batch.offsets_B1[batch.request_row_R[request]], batch.request_token_R[request]
    return [item for item in batch.item_T[first : site + 1].tolist() if item >= 0][::-1]


def slow_masses(shards, batch):
    """Mass of every item at every request, by dictionaries."""
    train = whole(shards)
    shown, follows = np.zeros(NUM_ITEMS), np.zeros((NUM_ITEMS, NUM_ITEMS))
    for request, ad in zip(train.target_request_N.tolist(), train.target_item_N.tolist(), strict=True):
        shown[ad] += 1
        for item in past(train, request)[: CONFIG.markov_items]:
            follows[item, ad] += 1
    masses = []
    for request in range(len(batch.request_token_R)):
        mass = CONFIG.popularity * shown / shown.sum()
        seen = past(batch, request)
        for item in seen:
            mass[item] += CONFIG.personal / (len(seen) + 1)
        for item in seen[: CONFIG.markov_items]:
            mass += CONFIG.markov * follows[item] / (follows[item].sum() + CONFIG.smoothing) / len(seen[: CONFIG.markov_items])
        masses.append(mass)
    return np.array(masses)


def test_retrieval_is_that_of_a_slow_count(shards, batch):
    retriever = Retriever.fit(shards, CODES_ML, CONFIG)
    found_RK = retriever.retrieve(batch, ELIGIBILITY, 6)
    masses = slow_masses(shards, batch)
    for items, mass, group in zip(found_RK, masses, batch.request_eligibility_R.tolist(), strict=True):
        eligible = ELIGIBILITY.items(group)
        expected = np.sort(mass[eligible])[::-1][:6]
        assert (items[len(expected):] == -1).all()
        kept = items[: len(expected)]
        assert np.isin(kept, eligible).all() and len(set(kept.tolist())) == len(kept)
        np.testing.assert_allclose(mass[kept], expected, rtol=1e-4)


def test_few_neighbours_keep_the_most_frequent(shards):
    every, few = (Retriever.fit(shards, CODES_ML, CONFIG.model_copy(update={"neighbours": number})) for number in (1000, 2))
    for item in range(NUM_ITEMS):
        part = slice(every.offset_M1[item], every.offset_M1[item + 1])
        kept = slice(few.offset_M1[item], few.offset_M1[item + 1])
        assert kept.stop - kept.start == min(2, part.stop - part.start)
        np.testing.assert_allclose(np.sort(few.probability_P[kept]), np.sort(every.probability_P[part])[::-1][:2][::-1])


def test_saved_and_loaded_it_retrieves_the_same(shards, batch, tmp_path):
    retriever = Retriever.fit(shards, CODES_ML, CONFIG)
    with pytest.raises(DataError, match="has no retriever"):
        Retriever.load(tmp_path)
    retriever.save(tmp_path)
    loaded = Retriever.load(tmp_path)
    assert loaded.config == CONFIG
    assert np.array_equal(loaded.retrieve(batch, ELIGIBILITY, 9), retriever.retrieve(batch, ELIGIBILITY, 9))


def test_the_cascade_ranks_what_was_retrieved_by_expected_ecpm(shards, batch):
    worth = torch.rand(len(batch.request_token_R), NUM_ITEMS)
    table = SimpleNamespace(bid_M=torch.ones(NUM_ITEMS),
                            rewards=lambda _, request_N, item_N: SimpleNamespace(ecpm_N=worth[request_N, item_N]))
    retriever = Retriever.fit(shards, CODES_ML, CONFIG)
    retrieved_RK = retriever.retrieve(batch, ELIGIBILITY, 12)
    ranked_RK = cascade_rank(batch, table, retriever, ELIGIBILITY, 5, num_retrieved=12)
    assert ranked_RK.shape == (len(retrieved_RK), 5)
    for request, (ranked, retrieved) in enumerate(zip(ranked_RK.tolist(), retrieved_RK.tolist(), strict=True)):
        offered = [item for item in retrieved if item >= 0]
        assert ranked == (sorted(offered, key=lambda item: -worth[request, item]) + [-1] * 5)[:5]
    groups = set(batch.request_eligibility_R.tolist())
    assert EVERY_AD in groups and 4 in groups  # a group of one ad: the rest is -1
    everything = cascade_rank(batch, table, retriever, ELIGIBILITY, 3, num_retrieved=1)
    assert (everything[batch.request_eligibility_R != 4] >= 0).all()


def test_a_split_without_ads_is_refused(tmp_path):
    write_split(tmp_path / "train", random_journeys(0))
    with pytest.raises(DataError, match="no ads to count"):
        Retriever.fit(tmp_path / "train", CODES_ML, CONFIG)
