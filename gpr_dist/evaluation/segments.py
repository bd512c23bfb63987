"""Kinds of targets a report is broken down by: how long the history is, whether the item is new, whether it is bought again, where, whom.

A segment is a mask over the target events; they may overlap, and those of one kind do not.
"""

import itertools
from collections.abc import Mapping, Sequence

import numpy as np

from gpr_dist.evaluation.journey_log import SPLITS, JourneyLog

# N target events  F categorical fields

HISTORY = (1, 5, 20, 100, 500)
TRAINED = (1, 10, 100, 1000)
MOST_VALUES = 8


def find_segments(log: JourneyLog, features: Mapping[str, np.ndarray] | None = None,
                  names: Mapping[str, Mapping[int, str]] | None = None) -> dict[str, dict[str, np.ndarray]]:
    """Kind -> segment -> its targets, bool [N]; empty segments are left out.

    "history": events of the user strictly before the request; none = a new user. "item": events of the item in the training split; none
    = a new item. "repeat": whether the user met the item before. "scene": where the ad was shown, the most frequent ones. Then one kind
    per feature.

    Args: features: name -> category of each target, int [N]. names: feature (or "scene") -> category -> what the log calls it.
    """
    first_R, end_R = log.histories
    trained = log.item_X[log.split_X == SPLITS.index("train")]
    num_items = int(max(trained.max(initial=-1), log.target_item_N.max(initial=-1))) + 1
    is_repeat_N = log.is_repeat()
    times_N = np.bincount(trained, minlength=num_items)[log.target_item_N]
    names = names or {}
    kinds = {"history": _ranges((end_R - first_R)[log.target_request_N], HISTORY, "events", "new user: no event before"),
             "item": _ranges(times_N, TRAINED, "training events", "new item: never trained"),
             "repeat": {"met before": is_repeat_N, "discovery": ~is_repeat_N},
             "scene": _categories(log.target_scene_N, names.get("scene", {})),
             **{name: _categories(values_N, names.get(name, {})) for name, values_N in (features or {}).items()}}
    kinds = {kind: {name: inside_N for name, inside_N in segments.items() if inside_N.any()} for kind, segments in kinds.items()}
    return {kind: segments for kind, segments in kinds.items() if len(segments) > 1 or kind in ("history", "item", "repeat")}


def target_features(log: JourneyLog, user_names: Sequence[str], env_names: Sequence[str], wanted: Sequence[str]) -> dict[str, np.ndarray]:
    """Category of each target's user or request, by feature name."""
    columns = dict(zip(user_names, log.user_features_RF.T, strict=True)) | dict(zip(env_names, log.env_features_RF.T, strict=True))
    return {name: columns[name][log.target_request_N] for name in wanted}


def _ranges(count_N: np.ndarray, starts: Sequence[int], unit: str, none: str) -> dict[str, np.ndarray]:
    bucket_N = np.searchsorted(starts, count_N, side="right")
    between = (f"{first:,}–{end - 1:,} {unit}" for first, end in itertools.pairwise(starts))
    names = [none, *between, f"{starts[-1]:,}+ {unit}"]
    return {name: bucket_N == number for number, name in enumerate(names)}


def _categories(value_N: np.ndarray, names: Mapping[int, str]) -> dict[str, np.ndarray]:
    """The most frequent values, then the rest together; by number where the build has not kept a name."""
    values, count = np.unique(value_N, return_counts=True)
    most = values[np.argsort(-count, kind="stable")][:MOST_VALUES]
    found: dict[str, np.ndarray] = {}
    for value in most.tolist():
        name = "unknown" if value in (-1, 0) else names.get(value, f"#{value}")
        found[name if name not in (*found, "others") else f"{name} #{value}"] = value_N == value
    return found | ({"others": ~np.isin(value_N, most)} if len(values) > len(most) else {})
