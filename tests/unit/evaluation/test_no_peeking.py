"""No ranker may see the future: with everything at and after a request replaced, for all users, its answer is the same bit for bit."""

import numpy as np
import pytest
from journey_logs import ADS, NUM_ITEMS, eligibility, random_users, split_of, to_batches
from tiny_model import V, tiny_model

from data_pipeline.shards import ShardConfig, ShardWriter, write_manifest
from gpr_dist.data.loader import LoaderConfig, iter_once
from gpr_dist.data.sampler import World
from gpr_dist.decoding.model_decoder import ModelDecoder
from gpr_dist.errors import ConfigError
from gpr_dist.evaluation.compare import (
    ALL_BASELINES,
    GENERATIVE,
    MIX,
    SASREC,
    CompareConfig,
    check_choices,
    leaves,
    open_requests,
    rank_all,
)
from gpr_dist.evaluation.evaluate import GenerativeRanker
from gpr_dist.evaluation.intervals import BootstrapConfig
from gpr_dist.evaluation.mix import MixConfig
from gpr_dist.evaluation.rankings import count_illegal, eligible_target_frac
from gpr_dist.evaluation.report import build_report, format_text
from gpr_dist.evaluation.report_page import report_page
from gpr_dist.evaluation.sasrec import SASRecConfig
from gpr_dist.evaluation.segments import target_features
from gpr_dist.evaluation.validate import ValidationConfig, open_catalogue

K = 6
CODES = np.random.default_rng(5).integers(0, V, (NUM_ITEMS, 3))
SETTINGS = ValidationConfig(ks=(2, K), beam_width=24)
COMPARE = CompareConfig(baselines=ALL_BASELINES, mix=(GENERATIVE, *ALL_BASELINES), weights=MixConfig(metric="ndcg@2", grid=0.5),
                        sasrec=SASRecConfig(width=8, epochs=2, max_events=4, batch_events=64))


class Codes:
    """What open_catalogue and iter_once need of a tokenizer."""

    codes_NL, codebook_size, num_items = CODES, V, NUM_ITEMS


def rank(folder, users, compare=COMPARE):
    """Everything launch/evaluate.py does up to the rankings. Returns: (requests, parts of the mix)."""
    shards = {}
    for split, batches in to_batches(users).items():
        shards[split] = folder / "shards" / split
        with ShardWriter(shards[split], 0, ShardConfig(rows_per_batch=8, rows_per_shard=40)) as writer:
            for batch in batches:
                writer.write(batch)
        write_manifest(shards[split], split, (), ("weekday",), "c0ffee", NUM_ITEMS)
    requests = open_requests(shards, "test", NUM_ITEMS, SETTINGS, compare.exclude_seen, None)
    catalogue = open_catalogue(Codes, eligibility(), requests.popularity_I, "cpu")
    model = tiny_model(num_user_features=0, num_env_features=1).eval()
    ranker = GenerativeRanker(ModelDecoder(model, "cpu"), catalogue.trie, catalogue.eligibility, catalogue.item_weight, K, 24, "prior",
                              chunk_requests=1)  # alone: other requests' candidates must not change the shapes of its products

    def batches(split, max_rows=None):
        return iter_once(shards[split], LoaderConfig(micro_batch_tokens=60), World(), CODES, 4, max_rows)

    parts = check_choices(compare, SETTINGS, "test", [GENERATIVE])
    chosen = rank_all(requests, "test", {GENERATIVE: ranker}, parts, shards, batches, catalogue, SETTINGS, compare, folder)
    return requests, chosen, leaves(catalogue)


def answers(requests):
    """ranker -> (user, time) -> bytes of its list."""
    keys = list(zip(requests.log.user_ids[requests.log.request_user_R], requests.log.request_time_R.tolist(), strict=True))
    return {name: {key: ranking.item_RK[row].tobytes() + ranking.score_RK[row].tobytes() for row, key in enumerate(keys)}
            for name, ranking in requests.rankings.items()}


def replace(users, is_changed, seed):
    """Other items, ads and candidates wherever is_changed(time)."""
    random = np.random.default_rng(seed)
    return {user: [(moment, int(random.integers(-1, 4)) if is_changed(moment + 1) else group,
                    [(int(random.integers(NUM_ITEMS)) if is_changed(time) else item, time) for item, time in organic],
                    random.choice(ADS, len(ads)).tolist() if is_changed(moment) else ads)
                   for moment, group, organic, ads in requests] for user, requests in users.items()}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    users = random_users(11)
    return users, *rank(tmp_path_factory.mktemp("before"), users)


def test_what_comes_at_or_after_a_request_changes_no_ranker(world, tmp_path):
    users, requests, chosen, _ = world
    before = answers(requests)
    assert list(before) == [GENERATIVE, MIX, *ALL_BASELINES]
    moments = np.unique(requests.log.request_time_R)
    for number, now in enumerate(moments[[0, len(moments) // 2, -1]].tolist()):
        changed = {user: [(moment, group if moment <= now else new, organic, ads) for (moment, new, organic, ads), (_, group, _, _)
                          in zip(after, users[user], strict=True)]
                   for user, after in replace(users, lambda time, now=now: time >= now, number).items()}
        assert changed != users
        other, chosen_then, _ = rank(tmp_path / str(number), changed)
        assert chosen_then["weights"] == chosen["weights"]
        for name, found in answers(other).items():
            known = [key for key in found if key[1] <= now]
            assert known and all(found[key] == before[name][key] for key in known), name


def test_what_came_before_matters_to_every_ranker(world, tmp_path):
    users, requests, _, _ = world
    earlier = {user: [(moment, group, organic, [(ad + 1) % 20 for ad in ads] if split_of(moment) != "test" else ads)
                      for moment, group, organic, ads in each] for user, each in users.items()}
    other, _, _ = rank(tmp_path, earlier)
    for name, found in answers(other).items():
        assert found != answers(requests)[name], name


def test_seen_items_are_no_candidates_of_any_ranker(world, tmp_path):
    users, requests, _, _ = world
    excluding, _, _ = rank(tmp_path, users, COMPARE.model_copy(update={"exclude_seen": True}))
    seen = excluding.log.seen()
    for name, ranking in excluding.rankings.items():
        assert count_illegal(excluding.log, ranking, eligibility(), seen) == 0, name
        whole = requests.rankings[name]
        assert count_illegal(requests.log, whole, eligibility()) == 0 < count_illegal(requests.log, whole, eligibility(), seen), name
    left = [set(seen.of(row, row + 1).item_M.tolist()) for row in range(excluding.log.num_requests)]
    generative = excluding.rankings[GENERATIVE].item_RK
    for row, (items, out) in enumerate(zip(requests.rankings[GENERATIVE].item_RK.tolist(), left, strict=True)):
        if not out & set(items):
            assert generative[row].tolist() == items
    assert eligible_target_frac(excluding.log, eligibility(), seen) < eligible_target_frac(excluding.log, eligibility())


def test_weights_of_the_mix_are_of_the_validation_split_and_its_rankings_of_the_test_split(world):
    _, requests, chosen, _ = world
    assert list(chosen["weights"]) == [GENERATIVE, *ALL_BASELINES] and sum(chosen["weights"].values()) == pytest.approx(1)
    assert 0 < chosen["num_requests"] != requests.log.num_requests
    with pytest.raises(ConfigError, match="chosen on the validation split; use split=test"):
        check_choices(COMPARE, SETTINGS, "validation", [GENERATIVE])
    with pytest.raises(ConfigError, match="did you mean item head"):
        check_choices(CompareConfig(mix=("item-head",)), SETTINGS, "test", [GENERATIVE, "item head"])
    with pytest.raises(ConfigError, match="from 1 to 6"):
        check_choices(CompareConfig(mix=("popularity",)), SETTINGS, "test", [GENERATIVE])
    assert check_choices(CompareConfig(), SETTINGS, "test", [GENERATIVE]) == ()
    default = CompareConfig(weights=MixConfig(metric="hitr@6"))
    assert check_choices(default, SETTINGS, "test", [GENERATIVE, "item head"]) == (GENERATIVE, "item head", "Markov chain")


def test_report_says_the_same_in_json_text_and_page(world):
    _, requests, chosen, leaf_I = world
    models, log = [GENERATIVE, MIX], requests.log
    features, scores = target_features(log, (), ("weekday",), ("weekday",)), {"value head": np.arange(len(log.target_item_N)) * 1.0}
    np.testing.assert_array_equal(features["weekday"], log.request_time_R[log.target_request_N] // 86_400 % 7)
    found = build_report(requests, models, eligibility(), leaf_I, SETTINGS.ks, BootstrapConfig(replicates=50), features,
                         np.arange(NUM_ITEMS) % 3, scores)
    result = found["results"][MIX]
    assert result["num_requests"] == log.num_requests and result["illegal_items"] == 0
    low, high = found["intervals"][MIX]["hitr@6"]
    assert low <= result["hitr@6"] <= high and found["curves"][MIX][5] == pytest.approx(result["hitr@6"])
    difference = found["differences"][MIX][SASREC]["hitr@6"]
    assert difference[0] == pytest.approx(result["hitr@6"] - found["results"][SASREC]["hitr@6"]) and difference[1] <= difference[2]
    assert set(found["exposure"]) == {*requests.rankings, "ads shown"} and found["exposure"][MIX]["advertisers"] == 3
    assert "value head" in found["value_order"]
    text = format_text(found, models, SETTINGS.ks)
    assert f"{result['hitr@6']:.4f}" in text and "mix minus" in text
    page = report_page({**found, "checkpoint": "runs/a<b", "data": "d", "split": "test", "models": models, "ks": SETTINGS.ks, "level": 0.95,
                        "exclude_seen": False, "values": None, "mix": chosen, "settings": {"a": {"b": 1}}})
    assert f"{result['hitr@6']:.4f}" in page and "a&lt;b" in page and "<script" not in page and page.count("<svg") >= 4
