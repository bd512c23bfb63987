"""Ranking metrics as ratios of sums over users: per target ad and per request, by item and by semantic ID, plain and value-weighted.

Keeping the two sums of every metric per user makes the mean, a segment's mean and bootstrap intervals (intervals.py) one matter. The
cheap metrics of the training loop are metrics.py's.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from gpr_dist.evaluation.baselines import Ranking
from gpr_dist.evaluation.journey_log import JourneyLog
from gpr_dist.evaluation.metrics import ABSENT, target_ranks

# R requests  N target events  K ranked items  I catalogue items  U groups of users  M metrics  D distinct (request, item) pairs

MAX_GROUPS = 1 << 14  # more users are joined at random: intervals of sums over users need no more


@dataclass(frozen=True)
class Sums:
    """Metric m = numerator_MU[m].sum() / denominator_MU[m].sum(); the denominators are the same for all rankers."""

    names: list[str]
    numerator_MU: np.ndarray  # float64
    denominator_MU: np.ndarray  # float64

    def means(self) -> dict[str, float]:
        """NaN where a metric has nothing to count."""
        total = self.denominator_MU.sum(axis=1)
        with np.errstate(invalid="ignore", divide="ignore"):
            return dict(zip(self.names, (self.numerator_MU.sum(axis=1) / total).tolist(), strict=True))

    @classmethod
    def join(cls, parts: Sequence["Sums"]) -> "Sums":
        """All metrics of the parts."""
        return cls([name for part in parts for name in part.names], np.concatenate([part.numerator_MU for part in parts]),
                   np.concatenate([part.denominator_MU for part in parts]))


class UserSums:
    """Collects metrics whose entries (targets, requests) belong to users."""

    def __init__(self, group_R: np.ndarray, num_groups: int) -> None:
        self.group_R, self.num_groups = group_R, num_groups
        self._names: list[str] = []
        self._sums: list[tuple[np.ndarray, np.ndarray]] = []

    def add(self, name: str, request_N: np.ndarray, numerator_N: np.ndarray, denominator_N: np.ndarray | None = None) -> None:
        """A metric whose entries belong to requests. Args: denominator_N: >= 0, default 1."""
        group_N = self.group_R[request_N]
        count = np.bincount(group_N, denominator_N, minlength=self.num_groups)
        self._names.append(name)
        self._sums.append((np.bincount(group_N, numerator_N, minlength=self.num_groups), count))

    def result(self) -> Sums:
        numerator, denominator = zip(*self._sums, strict=True)
        return Sums(self._names, np.array(numerator, dtype=np.float64), np.array(denominator, dtype=np.float64))


def user_groups(log: JourneyLog, seed: int = 0) -> tuple[np.ndarray, int]:
    """The group each request's user belongs to [R], and the number of groups: one user each, or random users together if there are many."""
    users, user_R = np.unique(log.request_user_R, return_inverse=True)
    if len(users) <= MAX_GROUPS:
        return user_R, len(users)
    return np.random.default_rng(seed).integers(0, MAX_GROUPS, len(users))[user_R], MAX_GROUPS


def measure_ranking(log: JourneyLog, ranking: Ranking, leaf_I: np.ndarray, ks: Sequence[int], groups: tuple[np.ndarray, int]) -> Sums:
    """Every metric of one ranker.

    Names: hitr@k, ndcg@k, mrr per target event (one relevant item each); request_hitr@k (any), request_recall@k, request_ndcg@k (over
    the ideal order), request_mrr (of the first hit) per request, whose relevant items are the distinct ones; value@k, the share of the
    logged value of all targets that the first k items capture. leaf_… is the same of semantic IDs: the list with only the first item of
    each, k distinct ones, so that a ranker loses nothing by how it orders the items of one. MRR is 0 beyond the list.

    Args:
        leaf_I: number of each catalogue item's semantic ID, < 0 = none.
    """
    sums = UserSums(*groups)
    rank_N = item_ranks(log, ranking)
    value_N = log.target_value_N.astype(np.float64)
    for prefix, ranks_N, key_N in (("", rank_N, log.target_item_N), ("leaf_", leaf_ranks(log, ranking, leaf_I), leaf_I[log.target_item_N])):
        _add_per_target(sums, prefix, log.target_request_N, ranks_N, ks)
        _add_per_request(sums, prefix + "request_", log, ranks_N, key_N, ks)
    valued = np.flatnonzero(np.isfinite(value_N) & (value_N > 0))
    for k in ks:
        sums.add(f"value@{k}", log.target_request_N[valued], value_N[valued] * (rank_N[valued] <= k), value_N[valued])
    return sums.result()


def measure_segments(log: JourneyLog, ranking: Ranking, segment_SN: Mapping[str, np.ndarray], k: int,
                     groups: tuple[np.ndarray, int]) -> Sums:
    """hitr@k and ndcg@k of the targets of each segment; names are "metric|segment". Args: segment_SN: name -> bool [N]."""
    sums = UserSums(*groups)
    rank_N = item_ranks(log, ranking)
    gain_N = np.where(rank_N <= k, 1 / np.log2(rank_N + 1.0), 0.0)
    for name, inside_N in segment_SN.items():
        request = log.target_request_N[inside_N]
        sums.add(f"hitr@{k}|{name}", request, (rank_N[inside_N] <= k).astype(np.float64))
        sums.add(f"ndcg@{k}|{name}", request, gain_N[inside_N])
    return sums.result()


def item_ranks(log: JourneyLog, ranking: Ranking) -> np.ndarray:
    """1-based rank of each target, int64 [N], `ABSENT` if it is not in the list."""
    return target_ranks(torch.from_numpy(ranking.item_RK), torch.from_numpy(log.target_request_N),
                        torch.from_numpy(log.target_item_N)).numpy()


def leaf_ranks(log: JourneyLog, ranking: Ranking, leaf_I: np.ndarray) -> np.ndarray:
    """1-based rank of each target's semantic ID among the distinct ones of its request's list, int64 [N]."""
    leaf_RK = np.where(ranking.item_RK >= 0, leaf_I[ranking.item_RK], -1)
    order_RK = np.argsort(leaf_RK, axis=1, kind="stable")
    sorted_RK = np.take_along_axis(leaf_RK, order_RK, axis=1)
    starts_RK = np.ones_like(sorted_RK, dtype=bool)
    starts_RK[:, 1:] = sorted_RK[:, 1:] != sorted_RK[:, :-1]
    is_first_RK = np.empty_like(starts_RK)
    np.put_along_axis(is_first_RK, order_RK, starts_RK & (sorted_RK >= 0), axis=1)
    place_N = target_ranks(torch.from_numpy(leaf_RK), torch.from_numpy(log.target_request_N),
                           torch.from_numpy(np.where(leaf_I[log.target_item_N] >= 0, leaf_I[log.target_item_N], -2))).numpy()
    found = place_N < ABSENT
    rank_N = np.full(len(place_N), ABSENT)
    rank_N[found] = np.cumsum(is_first_RK, axis=1)[log.target_request_N[found], place_N[found] - 1]
    return rank_N


def _add_per_target(sums: UserSums, prefix: str, request_N: np.ndarray, rank_N: np.ndarray, ks: Sequence[int]) -> None:
    gain_N = 1 / np.log2(rank_N + 1.0)
    for k in ks:
        sums.add(f"{prefix}hitr@{k}", request_N, (rank_N <= k).astype(np.float64))
        sums.add(f"{prefix}ndcg@{k}", request_N, np.where(rank_N <= k, gain_N, 0.0))
    sums.add(f"{prefix}mrr", request_N, np.where(rank_N < ABSENT, 1.0 / rank_N, 0.0))


def _add_per_request(sums: UserSums, prefix: str, log: JourneyLog, rank_N: np.ndarray, key_N: np.ndarray, ks: Sequence[int]) -> None:
    """Args: key_N: what counts once per request."""
    pair_N = log.target_request_N * (int(key_N.max(initial=0)) + 2) + key_N
    _, first = np.unique(pair_N, return_index=True)
    request_D, rank_D = log.target_request_N[first], rank_N[first]
    num_requests = log.num_requests
    relevant_R = np.bincount(request_D, minlength=num_requests)
    asked = np.flatnonzero(relevant_R)
    ideal_k = np.cumsum(1 / np.log2(np.arange(2, max(ks) + 2)))
    for k in ks:
        hits_R = np.bincount(request_D, rank_D <= k, minlength=num_requests)[asked]
        gain_R = np.bincount(request_D, np.where(rank_D <= k, 1 / np.log2(rank_D + 1.0), 0.0), minlength=num_requests)[asked]
        sums.add(f"{prefix}hitr@{k}", asked, (hits_R > 0).astype(np.float64))
        sums.add(f"{prefix}recall@{k}", asked, hits_R / relevant_R[asked])
        sums.add(f"{prefix}ndcg@{k}", asked, gain_R / ideal_k[np.minimum(relevant_R[asked], k) - 1])
    best_R = np.full(num_requests, ABSENT)
    np.minimum.at(best_R, request_D, rank_D)
    sums.add(f"{prefix}mrr", asked, np.where(best_R[asked] < ABSENT, 1.0 / best_R[asked], 0.0))
