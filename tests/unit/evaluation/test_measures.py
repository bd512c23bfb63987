"""Metrics against loops over targets and requests, intervals against the textbook, orders and exposures by hand."""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
from journey_logs import NUM_ITEMS, eligibility, random_users, to_batches

from gpr_dist.errors import DataError
from gpr_dist.evaluation import intervals, measures, value_order
from gpr_dist.evaluation.baselines import BaselineConfig, Ranking, popularity, rank_baselines
from gpr_dist.evaluation.exposure import count_exposure, find_candidates, measure_exposure
from gpr_dist.evaluation.intervals import BootstrapConfig, interval, replicate
from gpr_dist.evaluation.journey_log import read_log
from gpr_dist.evaluation.measures import Sums, UserSums, leaf_ranks, measure_ranking, measure_segments, user_groups
from gpr_dist.evaluation.names import read_value_names
from gpr_dist.evaluation.segments import find_segments
from gpr_dist.evaluation.value_order import order_by_value

KS = (2, 5)
LEAF = np.array([item // 3 if item % 7 else -1 for item in range(NUM_ITEMS)])


def opened(seed=0, k=6):
    log = read_log(to_batches(random_users(seed)))
    rankings = rank_baselines(("popularity", "personal frequency"), log, eligibility(), popularity(log, NUM_ITEMS, BaselineConfig()),
                              BaselineConfig(), k, progress=False)
    return log, rankings


def slow_metrics(log, ranking):
    """Name -> list of (numerator, denominator) with one entry per target or request."""
    found = {}

    def add(name, numerator, denominator=1.0):
        found.setdefault(name, []).append((numerator, denominator))

    for request, row in enumerate(ranking.item_RK):
        items = [int(item) for item in row if item >= 0]
        mine = np.flatnonzero(log.target_request_N == request)
        for prefix, keys, of in (("", items, lambda item: item),
                                 ("leaf_", list(dict.fromkeys(int(LEAF[i]) for i in items if LEAF[i] >= 0)), lambda item: int(LEAF[item]))):
            wanted = [of(int(item)) for item in log.target_item_N[mine]]
            ranks = [keys.index(key) + 1 if key in keys and key >= 0 else np.inf for key in wanted]
            distinct = dict(zip(wanted, ranks, strict=True))
            for k in KS:
                for rank in ranks:
                    add(f"{prefix}hitr@{k}", rank <= k)
                    add(f"{prefix}ndcg@{k}", (rank <= k) / np.log2(rank + 1))
                hits = [rank for rank in distinct.values() if rank <= k]
                add(f"{prefix}request_hitr@{k}", bool(hits))
                add(f"{prefix}request_recall@{k}", len(hits) / len(distinct))
                ideal = sum(1 / np.log2(place + 2) for place in range(min(k, len(distinct))))
                add(f"{prefix}request_ndcg@{k}", sum(1 / np.log2(rank + 1) for rank in hits) / ideal)
            for rank in ranks:
                add(f"{prefix}mrr", 1 / rank)
            add(f"{prefix}request_mrr", 1 / min(ranks))
            if not prefix:
                for target, rank in zip(mine, ranks, strict=True):
                    value = float(log.target_value_N[target])
                    for k in KS:
                        if value > 0:
                            add(f"value@{k}", value * (rank <= k), value)
    return {name: sum(n for n, _ in entries) / sum(d for _, d in entries) for name, entries in found.items()}


@pytest.mark.parametrize("seed", range(3))
def test_every_metric_equals_a_loop(seed):
    log, rankings = opened(seed)
    for ranking in rankings.values():
        means = measure_ranking(log, ranking, LEAF, KS, user_groups(log)).means()
        assert means == pytest.approx(slow_metrics(log, ranking)) and 0 < means["hitr@5"] < 1


def test_users_joined_at_random_change_no_mean(monkeypatch):
    log, rankings = opened()
    alone = measure_ranking(log, rankings["popularity"], LEAF, KS, user_groups(log))
    monkeypatch.setattr(measures, "MAX_GROUPS", 3)
    joined = measure_ranking(log, rankings["popularity"], LEAF, KS, user_groups(log))
    assert joined.numerator_MU.shape[1] == 3 < alone.numerator_MU.shape[1] and joined.means() == pytest.approx(alone.means())


def test_leaf_ranks_by_hand():
    log = SimpleNamespace(target_request_N=np.array([0, 0, 0, 1]), target_item_N=np.array([1, 5, 7, 2], dtype=np.int32))
    ranking = Ranking(np.array([[3, 4, 0, 5], [6, -1, -1, -1]], dtype=np.int32), np.zeros((2, 4), dtype=np.float32))
    leaf_I = np.array([9, 9, 8, 8, 8, 7, 6, -1])  # list of request 0: leaves 8 8 9 7
    assert leaf_ranks(log, ranking, leaf_I).tolist() == [2, 3, measures.ABSENT, measures.ABSENT]


def test_segments_are_parts_of_the_whole_and_know_what_came_before():
    log, rankings = opened(2)
    kinds = find_segments(log, {"colour": log.target_item_N % 3})
    for segments in kinds.values():
        assert np.sum(list(segments.values()), axis=0).tolist() == [1] * len(log.target_item_N)
    for target, (request, item) in enumerate(zip(log.target_request_N, log.target_item_N, strict=True)):
        earlier = (log.user_X == log.request_user_R[request]) & (log.time_X < log.request_time_R[request])
        assert kinds["repeat"]["met before"][target] == (item in log.item_X[earlier])
        assert not kinds["history"].get("new user: no event before", np.zeros(99, bool))[target] or earlier.sum() == 0
        trained = ((log.item_X == item) & (log.split_X == 0)).sum()
        assert not kinds["item"].get("new item: never trained", np.zeros(99, bool))[target] or trained == 0
    flat = {f"{kind}|{name}": inside for kind, segments in kinds.items() for name, inside in segments.items()}
    groups, everything = user_groups(log), {"all": np.ones(len(log.target_item_N), bool)}
    parts, whole = (measure_segments(log, rankings["popularity"], which, 5, groups) for which in (flat, everything))
    for kind in kinds:
        of_kind = [row for row, name in enumerate(parts.names) if name.startswith(f"hitr@5|{kind}|")]
        assert parts.numerator_MU[of_kind].sum() == pytest.approx(whole.numerator_MU[0].sum())
    assert whole.means()["hitr@5|all"] == pytest.approx(measure_ranking(log, rankings["popularity"], LEAF, (5,), groups).means()["hitr@5"])


def test_categories_are_called_what_the_log_calls_them(tmp_path):
    log, _ = opened(2)
    assert read_value_names(tmp_path) == {}
    (tmp_path / "value_names.json").write_text('{"colour": {"1": "red", "2": "others", "0": "never"}, "other": {"1": "x"}}')
    kinds = find_segments(log, {"colour": log.target_item_N % 3, "shape": log.target_item_N % 2}, read_value_names(tmp_path))
    assert kinds["colour"].keys() == {"unknown", "red", "others #2"} and kinds["shape"].keys() == {"unknown", "#1"}
    assert kinds["colour"]["red"].tolist() == (log.target_item_N % 3 == 1).tolist()
    (tmp_path / "value_names.json").write_text("[1]")
    with pytest.raises(DataError, match=r"value_names.json cannot be read"):
        read_value_names(tmp_path)


def test_bootstrap_of_users_is_as_wide_as_the_textbook_says(monkeypatch):
    """Users with one to five alike entries each: the standard error of a ratio over clusters."""
    random = np.random.default_rng(0)
    count_U = random.integers(1, 6, 400).astype(float)
    rate_U = random.random(400)
    sums = UserSums(np.arange(400), 400)
    sums.add("m", np.arange(400), rate_U * count_U, count_U)
    one = sums.result()
    config = BootstrapConfig(replicates=2000)
    drawn = replicate({"a": one}, config)["a"]
    mean = one.means()["m"]
    expected = np.sqrt((np.square((rate_U - mean) * count_U)).sum()) / count_U.sum()
    assert drawn.shape == (2000, 1) and drawn.std() == pytest.approx(expected, rel=0.1) and drawn.mean() == pytest.approx(mean, rel=0.01)
    low, high = interval(drawn, 0.95)[:, 0]
    assert high - low == pytest.approx(2 * 1.96 * expected, rel=0.12) and low < mean < high
    monkeypatch.setattr(intervals, "REPLICATES_PER_CHUNK", 2000)
    np.testing.assert_allclose(replicate({"a": one}, config)["a"], drawn)


def test_differences_are_paired():
    """A ranker that is better by the same amount for every user is surely better, however much users differ."""
    random = np.random.default_rng(1)
    rate_U = random.random(200)
    parts = {name: Sums(["m"], (rate_U + shift)[None], np.ones((1, 200))) for name, shift in (("a", 0.0), ("b", 0.01))}
    drawn = replicate(parts, BootstrapConfig(replicates=100))
    np.testing.assert_allclose(drawn["b"] - drawn["a"], 0.01)
    assert drawn["a"].std() > 0.01
    empty = interval(np.array([[np.nan, 1.0, np.nan], [0.5, 2.0, np.nan]]), 0.9)
    assert empty[:, 0].tolist() == [0.5, 0.5] and np.isnan(empty[:, 2]).all()


def test_order_by_value_against_all_orders_of_ties(monkeypatch):
    random = np.random.default_rng(3)
    request = np.sort(random.integers(0, 12, 45))
    value, score = random.integers(0, 4, 45).astype(float), random.integers(0, 3, 45).astype(float)
    score[7] = -np.inf
    found = order_by_value(score, value, request)
    expected = {}
    for number in np.unique(request):
        v, s = value[request == number], score[request == number]
        if len(set(v)) < 2:
            continue
        pairs = [(a, b) for a in range(len(v)) for b in range(len(v)) if v[a] > v[b]]
        agreeing = sum(1.0 if s[a] > s[b] else 0.5 if s[a] == s[b] else 0.0 for a, b in pairs)
        discounts = 1 / np.log2(np.arange(2, len(v) + 2))
        orders = [order for order in itertools.permutations(range(len(v))) if all(s[a] >= s[b] for a, b in itertools.pairwise(order))]
        dcg = np.mean([(v[list(order)] * discounts).sum() for order in orders])
        expected[number] = (dcg / (np.sort(v)[::-1] * discounts).sum(), agreeing, len(pairs))
    assert found.request_Q.tolist() == sorted(expected)
    for row, number in enumerate(found.request_Q):
        assert (found.ndcg_Q[row], found.agreeing_Q[row], found.pairs_Q[row]) == pytest.approx(expected[number])
    perfect = order_by_value(value, value, request)
    np.testing.assert_allclose(perfect.ndcg_Q, 1)
    np.testing.assert_allclose(perfect.agreeing_Q, perfect.pairs_Q)
    monkeypatch.setattr(value_order, "PAIRS_PER_CHUNK", 5)
    np.testing.assert_allclose(order_by_value(score, value, request).agreeing_Q, found.agreeing_Q)
    assert len(order_by_value(score[:0], value[:0], request[:0]).request_Q) == 0


def test_exposure_by_hand():
    candidates = np.array([True] * 4 + [False])
    even = count_exposure(np.array([5, 5, 5, 5, 0]), candidates, np.array([True, False, False, False, False]), np.array([0, 0, 1, -1, 2]))
    assert (even.items, even.coverage, even.gini, even.new_share) == (4, 1.0, pytest.approx(0), 0.25)
    assert (even.advertisers, even.top_advertiser_share) == (2, 0.5)
    assert even.lorenz == pytest.approx(np.linspace(0, 1, 101).tolist())
    one = count_exposure(np.array([0, 0, 0, 8, 0]), candidates, np.zeros(5, bool), None)
    assert (one.items, one.coverage, one.gini, one.top_share, one.advertisers) == (1, 0.25, pytest.approx(0.75), 1.0, None)
    log, rankings = opened()
    found = measure_exposure(rankings["popularity"], 3, find_candidates(log, eligibility(), NUM_ITEMS), np.zeros(NUM_ITEMS, bool))
    shown = rankings["popularity"].item_RK[:, :3]
    assert found.items == len(set(shown[shown >= 0].tolist())) and 0 < found.gini < 1
