"""The mix against dictionaries; weights that are the best of the grid, found without a look at anything else."""

import itertools

import numpy as np
import pytest
from journey_logs import NUM_ITEMS, eligibility, random_users, to_batches

from gpr_dist.errors import ConfigError
from gpr_dist.evaluation import mix as mixing
from gpr_dist.evaluation.baselines import BASELINES, BaselineConfig, Ranking, popularity, rank_baselines
from gpr_dist.evaluation.journey_log import read_log
from gpr_dist.evaluation.measures import measure_ranking, user_groups
from gpr_dist.evaluation.mix import MixConfig, choose_weights, mix
from gpr_dist.evaluation.names import check_metric, check_names

LEAF = np.arange(NUM_ITEMS)


def opened(seed=0):
    log = read_log(to_batches(random_users(seed)))
    ranked = rank_baselines(tuple(BASELINES), log, eligibility(), popularity(log, NUM_ITEMS, BaselineConfig()), BaselineConfig(), 6,
                            progress=False)
    return log, list(ranked.values())


def reached(log, ranking, metric, k):
    return measure_ranking(log, ranking, LEAF, (k,), user_groups(log)).means()[f"{metric}@{k}"]


def test_mixed_lists_equal_dictionaries():
    log, rankings = opened()
    weights = (0.5, 0.3, 0.2)
    mixed = mix(rankings, weights, 8)
    for request in range(log.num_requests):
        total = {}
        for weight, ranking in zip(weights, rankings, strict=True):
            for item, score in zip(ranking.item_RK[request].tolist(), ranking.score_RK[request].tolist(), strict=True):
                if item >= 0:
                    total[item] = total.get(item, 0.0) + weight * np.exp(score)
        expected = sorted(total, key=lambda item: (-total[item], item))[:8]
        row = mixed.item_RK[request]
        assert row[row >= 0].tolist() == expected
        np.testing.assert_allclose(np.exp(mixed.score_RK[request][row >= 0]), [total[item] for item in expected], rtol=1e-5)
    for number, ranking in enumerate(rankings):
        alone = mix(rankings, np.eye(3)[number], 6)
        assert reached(log, alone, "hitr", 6) == pytest.approx(reached(log, ranking, "hitr", 6))


@pytest.mark.parametrize("metric", ["ndcg@3", "hitr@5"])
@pytest.mark.parametrize("pairs_per_chunk", [7, 1 << 22])
def test_chosen_weights_are_at_least_as_good_as_the_grid_and_reach_what_they_say(metric, pairs_per_chunk, monkeypatch):
    monkeypatch.setattr(mixing, "PAIRS_PER_CHUNK", pairs_per_chunk)
    log, rankings = opened(3)
    config = MixConfig(metric=metric, grid=0.25)
    weights, best = choose_weights(log, rankings, config, progress=False)
    name, k = metric.split("@")
    assert sum(weights) == pytest.approx(1) and min(weights) >= 0
    assert reached(log, mix(rankings, weights, 18), name, int(k)) == pytest.approx(best)
    grid = [np.array(point) / 4 for point in itertools.product(range(5), repeat=3) if sum(point) == 4]
    assert len(list(mixing._simplex(3, 4))) == len(grid)
    assert best >= max(reached(log, mix(rankings, point, 18), name, int(k)) for point in grid) - 1e-12
    assert choose_weights(log, rankings, config, progress=False) == (weights, best)


def test_only_the_first_requests_count():
    log, rankings = opened(1)
    config = MixConfig(metric="ndcg@3", max_requests=5)
    weights, best = choose_weights(log, rankings, config, progress=False)
    first = [Ranking(ranking.item_RK[:5], ranking.score_RK[:5]) for ranking in rankings]
    assert (weights, best) == choose_weights(log.head(5), first, config, progress=False)


def test_unknown_names_get_the_nearest_one():
    with pytest.raises(ConfigError, match="'sasrec' is not known; did you mean SASRec"):
        check_names("baselines", ("sasrec",), ("popularity", "SASRec"))
    with pytest.raises(ConfigError, match="did you mean ndcg"):
        check_metric("metric", "nddcg@10", ("hitr", "ndcg"), 100)
    for metric in ("ndcg", "ndcg@0", "ndcg@101", "ndcg@x"):
        with pytest.raises(ConfigError, match="needs a cut-off from 1 to 100"):
            check_metric("metric", metric, ("hitr", "ndcg"), 100)
