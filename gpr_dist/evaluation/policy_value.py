"""What a policy's candidates are worth: nDCG, OPR, average and maximum final_value of the G candidates of a request (GPR Table 3).

The paper does not define them; our reading is value_order.py's. Whoever values candidates, a simulator or a market's truth, hands in
numbers; nothing here knows either. All metrics are ratios of sums over users, so that intervals are bootstrapped over users.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from gpr_dist.evaluation.baselines import Ranking
from gpr_dist.evaluation.intervals import BootstrapConfig, interval, replicate
from gpr_dist.evaluation.measures import Sums, UserSums
from gpr_dist.evaluation.value_order import order_by_value

# R requests  K ranked items  N candidates, by request, best first


class Ranked(NamedTuple):
    """The candidates of a ranking, end to end."""

    request_N: np.ndarray  # int64, ascending
    item_N: np.ndarray  # int64
    score_N: np.ndarray  # float64, larger = earlier

    @classmethod
    def of(cls, ranking: Ranking) -> "Ranked":
        request_N, column_N = np.nonzero(ranking.item_RK >= 0)
        return cls(request_N, ranking.item_RK[request_N, column_N].astype(np.int64), ranking.score_RK[request_N, column_N].astype(float))


def add_candidate_values(sums: UserSums, prefix: str, ranked: Ranked, value_N: np.ndarray) -> None:
    """Add {prefix}ndcg, {prefix}opr, {prefix}average, {prefix}maximum and {prefix}first: the value of the candidates of a request in the
    policy's order, of all of them, of the best, and of the one the policy puts first."""
    order = order_by_value(ranked.score_N, value_N, ranked.request_N)
    sums.add(f"{prefix}ndcg", order.request_Q, order.ndcg_Q)
    sums.add(f"{prefix}opr", order.request_Q, order.agreeing_Q, order.pairs_Q)
    first = np.flatnonzero(np.diff(ranked.request_N, prepend=-1))
    asked, count = ranked.request_N[first], np.diff(first, append=len(ranked.request_N))
    if len(first):
        sums.add(f"{prefix}average", asked, np.add.reduceat(value_N, first) / count)
        sums.add(f"{prefix}maximum", asked, np.maximum.reduceat(value_N, first))
        sums.add(f"{prefix}first", asked, value_N[first])


def reorder(ranked: Ranked, score_N: np.ndarray) -> Ranked:
    """The same candidates by another score; equal scores keep their order."""
    order = np.lexsort((-score_N, ranked.request_N))
    return Ranked(ranked.request_N[order], ranked.item_N[order], score_N[order])


def as_lists(ranked: Ranked, num_requests: int) -> np.ndarray:
    """int64 [R, K], -1 where a list ends."""
    start_R = np.searchsorted(ranked.request_N, np.arange(num_requests))
    column_N = np.arange(len(ranked.request_N)) - start_R[ranked.request_N]
    lists_RK = np.full((num_requests, int(column_N.max(initial=0)) + 1), -1, np.int64)
    lists_RK[ranked.request_N, column_N] = ranked.item_N
    return lists_RK


def with_intervals(sums: Sums, bootstrap: BootstrapConfig) -> dict[str, list[float]]:
    """Metric -> [value, low, high]."""
    ends = interval(replicate({"": sums}, bootstrap)[""], bootstrap.level)
    return {name: [mean, *ends[:, column].tolist()] for column, (name, mean) in enumerate(sums.means().items())}


def format_policies(results: Mapping[str, Mapping[str, list[float]]], columns: Sequence[str], level: float) -> str:
    """A text table: one row per policy, half the interval beside each value."""
    width = max(len(name) for name in (*results, "policy")) + 2
    cells = [max(18, len(column) + 2) for column in columns]
    lines = ["policy".ljust(width) + "".join(column.rjust(size) for column, size in zip(columns, cells, strict=True))]
    lines.append("-" * len(lines[0]))
    for name, found in results.items():
        shown = [f"{found[c][0]:.4f} ±{(found[c][2] - found[c][1]) / 2:.4f}" if c in found else "-" for c in columns]
        lines.append(name.ljust(width) + "".join(cell.rjust(size) for cell, size in zip(shown, cells, strict=True)))
    return "\n".join([*lines, f"± half the {level:.0%} interval, over users"])
