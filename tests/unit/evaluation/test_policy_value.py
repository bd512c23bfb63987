"""Candidates and what they are worth: by hand on a tiny ranking, extremes, and the table."""

import numpy as np
import pytest

from gpr_dist.evaluation.baselines import Ranking
from gpr_dist.evaluation.intervals import BootstrapConfig
from gpr_dist.evaluation.measures import UserSums
from gpr_dist.evaluation.policy_value import Ranked, add_candidate_values, as_lists, format_policies, reorder, with_intervals

RANKING = Ranking(np.array([[5, 2, -1], [7, 8, 9]], np.int32), np.array([[-1.0, -2.0, -np.inf], [-1.0, -1.5, -3.0]], np.float32))


def measured(ranked: Ranked, value_N: np.ndarray) -> dict[str, float]:
    sums = UserSums(np.array([0, 1]), 2)
    add_candidate_values(sums, "", ranked, value_N)
    return sums.result().means()


def test_by_hand() -> None:
    ranked = Ranked.of(RANKING)
    assert ranked.request_N.tolist() == [0, 0, 1, 1, 1] and ranked.item_N.tolist() == [5, 2, 7, 8, 9]
    found = measured(ranked, np.array([1.0, 3.0, 4.0, 2.0, 6.0]))
    assert found["average"] == pytest.approx((2 + 4) / 2) and found["maximum"] == pytest.approx((3 + 6) / 2)
    assert found["first"] == pytest.approx((1 + 4) / 2)
    assert found["opr"] == pytest.approx(1 / 4)  # of four pairs only (7, 8) stands as its values do
    gain = 1 / np.log2([2, 3, 4])
    ndcg = [(1 * gain[0] + 3 * gain[1]) / (3 * gain[0] + 1 * gain[1]),
            (4 * gain[0] + 2 * gain[1] + 6 * gain[2]) / (6 * gain[0] + 4 * gain[1] + 2 * gain[2])]
    assert found["ndcg"] == pytest.approx(np.mean(ndcg))


def test_ordered_by_value_everything_agrees() -> None:
    ranked, value_N = Ranked.of(RANKING), np.array([1.0, 3.0, 4.0, 2.0, 6.0])
    best = reorder(ranked, value_N)
    found = measured(best, best.score_N)
    assert found["ndcg"] == found["opr"] == 1 and found["first"] == found["maximum"]
    assert as_lists(best, 3).tolist() == [[2, 5, -1], [9, 7, 8], [-1, -1, -1]]
    assert as_lists(ranked, 2).tolist() == RANKING.item_RK.tolist()


def test_the_table() -> None:
    sums = UserSums(np.array([0, 1]), 2)
    add_candidate_values(sums, "", Ranked.of(RANKING), np.array([1.0, 3.0, 4.0, 2.0, 6.0]))
    found = with_intervals(sums.result(), BootstrapConfig(replicates=50))
    assert all(low <= value <= high for value, low, high in found.values())
    shown = format_policies({"policy": found, "production": {}}, ("ndcg", "opr"), 0.95)
    assert "0.2500" in shown and "-" in shown.splitlines()[3]
