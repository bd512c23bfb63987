"""HitR@K and NDCG@K of ranked item lists, kept as sums and counts so that batches and ranks can be added up.

Every target event counts once: an ad shown twice in one request is two events. A target that could not be ranked (not eligible,
not encoded) stays in the denominator. What launch/evaluate.py reports beyond that, with intervals, is measures.py's.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

# R requests  N target events  K ranked items

EVENTS_PER_CHUNK = 1 << 16
ABSENT = torch.iinfo(torch.int64).max // 2


def ranking_sums(ranked_RK: Tensor, target_request_N: Tensor, target_item_N: Tensor, ks: Sequence[int]) -> dict[str, Tensor]:
    """Sums over the target events, to be added over batches and ranks and then given to `ranking_metrics`.

    Args:
        ranked_RK: distinct item indices, best first, -1 where the list ends; K >= max(ks).
        target_request_N: row of `ranked_RK` of each event. target_item_N: its item, >= 0.
    Returns: float64 scalars: num_targets, num_requests, and hitr@k, ndcg@k (sum over events) for every k.
    """
    assert ranked_RK.shape[1] >= max(ks), f"{ranked_RK.shape[1]} ranked items, metrics up to {max(ks)}"
    rank_N = target_ranks(ranked_RK, target_request_N, target_item_N)
    gain_N = 1 / torch.log2(rank_N.double() + 1)
    sums = {"num_targets": rank_N.new_tensor(rank_N.numel()), "num_requests": rank_N.new_tensor(ranked_RK.shape[0])}
    for k in ks:
        sums[f"hitr@{k}"] = (rank_N <= k).sum()
        sums[f"ndcg@{k}"] = gain_N[rank_N <= k].sum()
    return {name: value.double() for name, value in sums.items()}


def ranking_metrics(sums: Mapping[str, Tensor | float]) -> dict[str, float]:
    """Means per target event of the sums of `ranking_sums` (added up); the counts as they are. NaN without any event.

    HitR@K is the share of events whose item is among the first K of its request. NDCG@K has one relevant item per event:
    1 / log2(1 + rank), rank from 1, 0 beyond K.
    """
    num_targets = float(sums["num_targets"])
    means = {name: float(value) / num_targets if num_targets else float("nan") for name, value in sums.items() if "@" in name}
    return means | {name: float(value) for name, value in sums.items() if "@" not in name}


def add_sums(sums: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The sum of several batches, name by name."""
    return {name: torch.stack([part[name] for part in sums]).sum() for name in sums[0]}


def target_ranks(ranked_RK: Tensor, target_request_N: Tensor, target_item_N: Tensor) -> Tensor:
    """1-based rank of each event's item in its request's list, int64 [N]; `ABSENT`, beyond any list, where it is not in it."""
    parts = [_rank(ranked_RK, requests, items) for requests, items in
             zip(target_request_N.split(EVENTS_PER_CHUNK), target_item_N.split(EVENTS_PER_CHUNK), strict=True)]
    return torch.cat(parts)


def _rank(ranked_RK: Tensor, target_request_N: Tensor, target_item_N: Tensor) -> Tensor:
    is_target_NK = ranked_RK[target_request_N] == target_item_N.unsqueeze(1)
    return torch.where(is_target_NK.any(dim=1), is_target_NK.int().argmax(dim=1) + 1, ABSENT)
