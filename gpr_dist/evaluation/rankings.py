"""Any number of rankers over the requests of a split: what a ranker is, and how its answers are collected beside the log they belong to."""

import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from torch import Tensor
from tqdm import tqdm

from gpr_dist.data.eligibility import Eligibility
from gpr_dist.evaluation.baselines import Ranking
from gpr_dist.evaluation.journey_log import JourneyLog, Lists
from gpr_dist.schema import Batch

# R requests  K ranked items


class Ranker(Protocol):
    """A model that ranks the requests of a batch."""

    def __call__(self, batch: Batch, seen: Lists | None = None) -> tuple[Tensor, Tensor]:
        """(item_RK int64, score_RK float32 log-probabilities, best first) of the batch's requests; -1 and -inf where a list ends.

        Args: seen: of each request, items that are no candidates; none = every eligible ad is one.
        """


@dataclass
class Requests:
    """The requests of one split and what every ranker may know of them."""

    log: JourneyLog
    popularity_I: np.ndarray
    seen: Lists | None = None
    """items that are no candidates (leave-one-out protocols); none = every eligible ad is one"""
    rankings: dict[str, Ranking] = field(default_factory=dict)
    """of each ranker, in the order of the report"""
    requests_per_s: dict[str, float] = field(default_factory=dict)


def collect(ranker: Ranker, batches: Iterable[Batch], requests: Requests, k: int, name: str, progress: bool = True) -> None:
    """Rank every request of the log with a model and add the ranking to `requests`.

    Args: batches: one pass over the split the log was read from (`iter_once` of one rank), with the same max_rows.
    """
    log, first, seconds = requests.log, 0, 0.0
    items, scores = [np.empty((0, k), dtype=np.int32)], [np.empty((0, k), dtype=np.float32)]
    for batch in tqdm(batches, desc=name, unit="batch", mininterval=0.5, disable=not progress):
        end = first + len(batch.request_eligibility_R)
        same = np.array_equal(batch.request_time_R.cpu().numpy(), log.request_time_R[first:end])
        assert same, f"other requests than the log's {first}:{end}"
        started = time.perf_counter()
        item_RK, score_RK = ranker(batch) if requests.seen is None else ranker(batch, requests.seen.of(first, end))
        seconds += time.perf_counter() - started
        items.append(item_RK[:, :k].cpu().numpy().astype(np.int32))
        scores.append(score_RK[:, :k].float().cpu().numpy())
        first = end
    assert first == log.num_requests, f"{first} requests ranked, the log has {log.num_requests}"
    requests.rankings[name] = Ranking(np.concatenate(items), np.concatenate(scores))
    requests.requests_per_s[name] = log.num_requests / max(seconds, 1e-9)


def count_illegal(log: JourneyLog, ranking: Ranking, eligibility: Eligibility, seen: Lists | None = None) -> int:
    """Ranked items that are not eligible at their request, or that were to be left out; 0, or a ranker is broken."""
    request, column = np.nonzero(ranking.item_RK >= 0)
    item = ranking.item_RK[request, column].astype(np.int64)
    illegal = int((~eligibility.contains(log.request_group_R[request], item)).sum())
    if seen is not None and len(seen.item_M):
        width = int(max(item.max(initial=0), seen.item_M.max())) + 1
        owner = np.repeat(np.arange(log.num_requests), np.diff(seen.offset_R1))
        illegal += int(np.isin(request * width + item, owner * width + seen.item_M).sum())
    return illegal


def eligible_target_frac(log: JourneyLog, eligibility: Eligibility, seen: Lists | None = None) -> float:
    """Share of the targets that could be ranked: eligible, and not left out as seen."""
    is_eligible_N = eligibility.contains(log.request_group_R[log.target_request_N], log.target_item_N)
    if seen is not None:
        is_eligible_N &= ~log.is_repeat()
    return float(is_eligible_N.mean())
