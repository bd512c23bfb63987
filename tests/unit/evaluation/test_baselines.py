"""The baselines against dictionaries and loops, on random journeys that are cut into overlapping rows as in the shards."""

from collections import Counter, defaultdict

import numpy as np
import pytest
from journey_logs import ADS, NUM_ITEMS, eligibility, eligible_items, events_of, random_users, split_of, to_batches

from gpr_dist.errors import DataError
from gpr_dist.evaluation import baselines
from gpr_dist.evaluation.baselines import BASELINES, DAY_S, BaselineConfig, popularity, rank_baselines, rank_requests
from gpr_dist.evaluation.journey_log import read_log

K = 6
CONFIG = BaselineConfig(recent_weight=3, recent_days=15, organic_weight=0.1, markov_smoothing=2.0)


def rank(name, log, popular):
    return rank_requests(log, eligibility(), popular, BASELINES[name](log, popular, CONFIG), K).item_RK


def ranked_by_key(log, ranked_RK):
    """(user, time) of each request -> its ranking without padding."""
    users = log.user_ids[log.request_user_R]
    assert all((row[np.argmin(row >= 0) :] == -1).all() for row in ranked_RK if (row < 0).any())
    return {(user, int(time)): row[row >= 0].tolist() for user, time, row in zip(users, log.request_time_R, ranked_RK, strict=True)}


def slow_popularity(users, splits=("train", "validation")):
    counted = [event for event in events_of(users) if event[4] in splits]
    end, score = max(event[2] for event in counted), Counter()
    for _, item, time, is_ad, _ in counted:
        score[item] += 0.1 + is_ad * (1 + 3 * (time > end - 15 * DAY_S))
    return score


def expected_ranking(users, score, split="test"):
    """score(user, moment, item) -> rankings by score, then popularity, then item."""
    popular = slow_popularity(users, {"test": ("train", "validation"), "validation": ("train",)}[split])
    return {(user, moment): sorted(eligible_items(group), key=lambda item, u=user, m=moment:
                                   (-round(score(u, m, item), 9), -round(popular[item], 9), item))[:K]
            for user, requests in users.items() for moment, group, organic, ads in requests if split_of(moment) == split}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("split", ["test", "validation"])
def test_log_holds_every_event_and_request_once(seed, split):
    users = random_users(seed)
    log = read_log(to_batches(users), split)
    splits = ["train", "validation", "test"] if split == "test" else ["train", "validation"]
    found = Counter(zip(log.user_ids[log.user_X], log.item_X.tolist(), log.time_X.tolist(), log.is_ad_X.tolist(), log.is_counted_X.tolist(),
                        strict=True))
    assert found == Counter((*event[:4], event[4] != split) for event in events_of(users) if event[4] in splits)
    keys = list(zip(log.request_user_R.tolist(), log.request_time_R.tolist(), strict=True))
    assert len(set(keys)) == len(keys)
    expected = {(user, moment): (group, sorted(ads)) for user, requests in users.items() for moment, group, _, ads in requests
                if split_of(moment) == split}
    assert {(log.user_ids[user], time): (int(log.request_group_R[row]), sorted(log.target_item_N[log.target_request_N == row].tolist()))
            for row, (user, time) in enumerate(keys)} == expected


def test_a_request_without_a_prediction_site_is_left_out():
    users = {"a": [(90 * DAY_S, 0, [], [3]), (91 * DAY_S, 0, [], [5, 5])], "b": [(10 * DAY_S, 0, [(1, 5)], [2])]}
    log = read_log(to_batches(users, with_env=False))
    assert log.request_time_R.tolist() == [91 * DAY_S] and log.target_item_N.tolist() == [5, 5] and log.target_request_N.tolist() == [0, 0]
    assert sorted(log.item_X.tolist()) == [1, 2, 3, 5, 5]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("scores_per_chunk", [1, 1 << 20])
def test_popularity_and_personal_frequency_equal_counting(seed, scores_per_chunk, monkeypatch):
    monkeypatch.setattr(baselines, "SCORES_PER_CHUNK", scores_per_chunk)
    users = random_users(seed)
    for split in ("test", "validation"):
        log = read_log(to_batches(users), split)
        popular = popularity(log, NUM_ITEMS, CONFIG)
        ranked = ranked_by_key(log, rank("popularity", log, popular))
        assert ranked == expected_ranking(users, lambda *_: 0, split)

        events = list(events_of(users))

        def met(user, moment, item, events=events):
            return sum(event[:2] == (user, item) and event[2] < moment for event in events)

        ranked = ranked_by_key(log, rank("personal frequency", log, popular))
        assert ranked == expected_ranking(users, met, split)


@pytest.mark.parametrize("seed", range(3))
def test_markov_chain_equals_counting(seed):
    users = random_users(seed)
    history = defaultdict(list)
    for user, item, time, _, _ in events_of(users):
        history[user].append((time, item))

    def last_items(user, moment):
        earlier = [event for event in history[user] if event[0] < moment]
        latest = max((time for time, _ in earlier), default=None)
        return [item for time, item in earlier if time == latest]

    transitions = defaultdict(Counter)
    for user, item, time, is_ad, split in events_of(users):
        if is_ad and split != "test":
            for predecessor in last_items(user, time):
                transitions[predecessor][item] += 1
    popular = slow_popularity(users)

    def score(user, moment, item):
        share = popular[item] / sum(popular.values())
        predecessors = last_items(user, moment)
        return sum((transitions[p][item] + 2 * share) / (sum(transitions[p].values()) + 2) for p in predecessors) if predecessors else share

    log = read_log(to_batches(users))
    ranked = rank("Markov chain", log, popularity(log, NUM_ITEMS, CONFIG))
    assert ranked_by_key(log, ranked) == expected_ranking(users, score)


def all_rankings(users):
    log = read_log(to_batches(users))
    popular = popularity(log, NUM_ITEMS, CONFIG)
    return [ranked_by_key(log, rank(name, log, popular)) for name in BASELINES]


@pytest.mark.parametrize("seed", range(3))
def test_events_at_or_after_a_request_change_none_of_its_rankings(seed):
    users, rng = random_users(seed), np.random.default_rng(99)
    before = all_rankings(users)
    moments = sorted({moment for _, moment in before[0]})
    for now in moments[:: max(1, len(moments) // 4)]:
        changed = {user: [(moment, group, [(item if time < now else int(rng.integers(NUM_ITEMS)), time) for item, time in organic],
                           ads if moment < now else rng.choice(ADS, rng.integers(1, 4)).tolist())
                          for moment, group, organic, ads in requests] for user, requests in users.items()}
        for one, other in zip(before, all_rankings(changed), strict=True):
            known = [key for key in one if key[1] <= now]
            assert known and all(one[key] == other[key] for key in known)
    earlier = {user: [(moment, group, organic, [(ad + 1) % 20 for ad in ads]) for moment, group, organic, ads in requests]
               for user, requests in users.items()}
    assert all(one != other for one, other in zip(before, all_rankings(earlier), strict=True))  # the past does matter


@pytest.mark.parametrize("name", list(BASELINES))
def test_scores_are_log_probabilities_among_the_candidates(name):
    """With room for every candidate they add up to 1, and they fall along the list; seen items are no candidates."""
    log = read_log(to_batches(random_users(4)))
    popular = popularity(log, NUM_ITEMS, CONFIG)
    for seen in (None, log.seen()):
        ranking = rank_requests(log, eligibility(), popular, BASELINES[name](log, popular, CONFIG), NUM_ITEMS + 2, seen)
        probability_RK = np.exp(ranking.score_RK.astype(np.float64))
        assert (np.diff(probability_RK, axis=1) <= 1e-7).all() and ((ranking.item_RK >= 0) == (ranking.score_RK > -np.inf)).all()
        for request, row in enumerate(ranking.item_RK):
            candidates = set(np.asarray(eligible_items(log.request_group_R[request])).tolist())
            if seen is not None:
                candidates -= set(seen.of(request, request + 1).item_M.tolist())
            assert set(row[row >= 0].tolist()) == candidates
            assert probability_RK[request].sum() == pytest.approx(1 if candidates else 0, abs=1e-5)


def test_excluding_seen_items_leaves_the_order_of_the_others():
    log = read_log(to_batches(random_users(1)))
    popular, seen = popularity(log, NUM_ITEMS, CONFIG), log.seen()
    for name in BASELINES:
        whole = rank_baselines((name,), log, eligibility(), popular, CONFIG, NUM_ITEMS, progress=False)[name].item_RK
        left = rank_baselines((name,), log, eligibility(), popular, CONFIG, K, seen, progress=False)[name].item_RK
        for request, (before, after) in enumerate(zip(whole, left, strict=True)):
            out = seen.of(request, request + 1).item_M
            assert after[after >= 0].tolist() == [item for item in before[before >= 0] if item not in out][:K]


def test_missing_splits_and_requests_are_named():
    batches = to_batches(random_users(0))
    with pytest.raises(DataError, match="needs the splits train, validation, test; missing: validation"):
        read_log({split: batches[split] for split in ("train", "test")})
    with pytest.raises(DataError, match="split test holds no request"):
        read_log(batches | {"test": []})
