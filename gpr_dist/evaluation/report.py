"""Everything an evaluation says, as one plain dictionary (the JSON report), and as text for the terminal.

Owns what is compared with what: every ranker beside every other on the same requests, with intervals, differences to the baselines,
segments, exposure, and the order by value. The page is report_page.py's.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from gpr_dist.data.eligibility import Eligibility
from gpr_dist.evaluation.exposure import count_exposure, find_candidates, measure_exposure
from gpr_dist.evaluation.intervals import BootstrapConfig, interval, replicate
from gpr_dist.evaluation.journey_log import SPLITS
from gpr_dist.evaluation.measures import Sums, UserSums, item_ranks, measure_ranking, measure_segments, user_groups
from gpr_dist.evaluation.metrics import ABSENT
from gpr_dist.evaluation.rankings import Requests, count_illegal, eligible_target_frac
from gpr_dist.evaluation.segments import find_segments
from gpr_dist.evaluation.value_order import order_by_value

# R requests  N target events  K ranked items  I catalogue items


def build_report(requests: Requests, models: Sequence[str], eligibility: Eligibility, leaf_I: np.ndarray, ks: Sequence[int],
                 bootstrap: BootstrapConfig, features: Mapping[str, np.ndarray] | None = None, advertiser_I: np.ndarray | None = None,
                 value_scores: Mapping[str, np.ndarray] | None = None,
                 value_names: Mapping[str, Mapping[int, str]] | None = None) -> dict[str, Any]:
    """Measure every ranking of `requests`.

    Args:
        models: the rankers that are compared with all others; the others are baselines.
        leaf_I: number of each catalogue item's semantic ID, < 0 = none.
        features: category of every target by feature name, for segments.
        value_names: what the categories of features and scenes are called, `names.read_value_names`.
        value_scores: further orders of the shown ads by name, e.g. the value head's: a score of each target, [N], NaN = not scored.
    Returns:
        results: ranker -> metric -> number (names: `measure_ranking`), and its counts. intervals: ranker -> metric -> [low, high].
        differences: model -> baseline -> metric -> [model - baseline, low, high], paired over the same draws of users.
        segments: kind -> segment -> {"targets": n, ranker: {metric: [value, low, high]}}. curves: ranker -> HitR@1, HitR@2 ...
        exposure: ranker, and "ads shown" -> `Exposure`. value_order: scorer -> {"ndcg", "opr": [value, low, high], "requests"}.
    """
    log, rankings = requests.log, requests.rankings
    groups, k = user_groups(log), ks[0]
    kinds = find_segments(log, features, value_names)
    segment_SN = {f"{kind}|{name}": inside_N for kind, segments in kinds.items() for name, inside_N in segments.items()}
    ranked = {name: measure_ranking(log, ranking, leaf_I, ks, groups) for name, ranking in rankings.items()}
    sums = {name: Sums.join([ranked[name], measure_segments(log, ranking, segment_SN, k, groups)]) for name, ranking in rankings.items()}
    drawn = replicate(sums, bootstrap)
    ends = {name: interval(drawn[name], bootstrap.level) for name in sums}
    means = {name: each.means() for name, each in sums.items()}
    metrics = next(iter(ranked.values())).names
    frac = eligible_target_frac(log, eligibility, requests.seen)
    counts = {"num_requests": log.num_requests, "num_targets": len(log.target_item_N), "eligible_target_frac": frac}
    found = {name: {metric: (means[name][metric], *ends[name][:, column].tolist()) for column, metric in enumerate(sums[name].names)}
             for name in sums}
    baselines = [name for name in rankings if name not in models]
    return {
        "results": {name: {metric: means[name][metric] for metric in metrics} | counts
                    | {"illegal_items": count_illegal(log, rankings[name], eligibility, requests.seen)}
                    | ({"requests_per_s": requests.requests_per_s[name]} if name in requests.requests_per_s else {}) for name in rankings},
        "intervals": {name: {metric: list(found[name][metric][1:]) for metric in metrics} for name in rankings},
        "differences": {model: {other: _differences(drawn[model] - drawn[other], means[model], means[other], metrics, bootstrap.level)
                                for other in baselines} for model in models},
        "curves": {name: _hit_curve(item_ranks(log, ranking), ranking.item_RK.shape[1]) for name, ranking in rankings.items()},
        "segments": {kind: {name: {"targets": int(inside_N.sum())} | {
            ranker: {metric: list(found[ranker][f"{metric}|{kind}|{name}"]) for metric in (f"hitr@{k}", f"ndcg@{k}")}
            for ranker in rankings}
            for name, inside_N in segments.items()} for kind, segments in kinds.items()},
        "exposure": _exposures(requests, eligibility, k, advertiser_I),
        "value_order": _value_orders(requests, value_scores or {}, bootstrap, groups),
        "users": len(np.unique(log.request_user_R)),
    }


def _differences(drawn_SM: np.ndarray, one: Mapping[str, float], other: Mapping[str, float], metrics: Sequence[str],
                 level: float) -> dict[str, list[float]]:
    ends = interval(drawn_SM[:, : len(metrics)], level)
    return {metric: [one[metric] - other[metric], *ends[:, column].tolist()] for column, metric in enumerate(metrics)}


def _hit_curve(rank_N: np.ndarray, k: int) -> list[float]:
    """HitR@1 ... HitR@k."""
    counts = np.bincount(rank_N[rank_N < ABSENT], minlength=k + 1)[1 : k + 1]
    return (np.cumsum(counts) / max(len(rank_N), 1)).tolist()


def _exposures(requests: Requests, eligibility: Eligibility, k: int, advertiser_I: np.ndarray | None) -> dict[str, dict[str, Any]]:
    log, num_items = requests.log, len(requests.popularity_I)
    is_candidate_I = find_candidates(log, eligibility, num_items)
    is_new_I = np.bincount(log.item_X[log.split_X == SPLITS.index("train")], minlength=num_items) == 0
    found = {name: measure_exposure(ranking, k, is_candidate_I, is_new_I, advertiser_I) for name, ranking in requests.rankings.items()}
    shown = np.bincount(log.target_item_N, minlength=num_items)
    found["ads shown"] = count_exposure(shown, is_candidate_I, is_new_I, advertiser_I)
    return {name: each._asdict() for name, each in found.items()}


def _value_orders(requests: Requests, scores: Mapping[str, np.ndarray], bootstrap: BootstrapConfig,
                  groups: tuple[np.ndarray, int]) -> dict[str, dict[str, Any]]:
    """Only requests at which two ads with different logged values were shown count; a ranker's absent ads are tied at the end."""
    log = requests.log
    valued = np.flatnonzero(np.isfinite(log.target_value_N))
    value = log.target_value_N[valued].astype(np.float64)
    scores = dict(scores) | {name: -item_ranks(log, ranking).astype(np.float64) for name, ranking in requests.rankings.items()}
    found = {}
    for name, score_N in scores.items():
        order = order_by_value(score_N[valued], value, log.target_request_N[valued])
        if not len(order.request_Q):
            return {}
        sums = UserSums(*groups)
        sums.add("ndcg", order.request_Q, order.ndcg_Q)
        sums.add("opr", order.request_Q, order.agreeing_Q, order.pairs_Q)
        total = sums.result()
        ends = interval(replicate({name: total}, bootstrap)[name], bootstrap.level)
        found[name] = {metric: [mean, *ends[:, column].tolist()] for column, (metric, mean) in enumerate(total.means().items())}
        found[name]["requests"] = len(order.request_Q)
    return found


def format_text(report: Mapping[str, Any], models: Sequence[str], ks: Sequence[int]) -> str:
    """The table of all rankers with the half-widths of their intervals, and what the models gain or lose against every baseline."""
    metrics = [f"hitr@{k}" for k in ks] + [f"ndcg@{k}" for k in ks]
    if any(np.isfinite(result[f"value@{ks[0]}"]) for result in report["results"].values()):
        metrics.append(f"value@{ks[0]}")
    width = max(len(name) for name in [*report["results"], "ranker"]) + 2
    lines = ["  ".join(["ranker".ljust(width), *(f"{label(metric):>14}" for metric in metrics)])]
    lines.append("-" * len(lines[0]))
    for name, result in report["results"].items():
        cells = [f"{result[metric]:.4f} ±{half_width(report['intervals'][name][metric]):.4f}" for metric in metrics]
        lines.append("  ".join([name.ljust(width), *(f"{cell:>14}" for cell in cells)]))
    for model in models:
        if len(report["differences"][model]):
            lines += ["", f"{model} minus"]
        for other, found in report["differences"][model].items():
            cells = [f"{found[metric][0]:+.4f} ±{half_width(found[metric][1:]):.4f}" for metric in metrics]
            lines.append("  ".join([f"  {other}".ljust(width), *(f"{cell:>14}" for cell in cells)]))
    return "\n".join(lines)


def label(metric: str) -> str:
    """leaf_request_hitr@10 -> HitR@10; what is counted stands above the table."""
    name, at, k = metric.removeprefix("leaf_").removeprefix("request_").partition("@")
    return {"hitr": "HitR", "ndcg": "NDCG", "mrr": "MRR", "recall": "Recall", "value": "Value"}[name] + at + k


def half_width(ends: Sequence[float]) -> float:
    return (ends[1] - ends[0]) / 2
