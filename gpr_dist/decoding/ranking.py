"""From the leaves of a search to ranked items: the items that share a semantic ID, by probability or by value (GPR §4, the auction)."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from gpr_dist.decoding.legality import Eligible
from gpr_dist.decoding.search import BeamResult, Softmax
from gpr_dist.decoding.segments import starts

# B requests  K ranked items  N leaves found, of all requests  M their eligible items

Order = Literal["probability", "value", "leaf_value"]


@dataclass(frozen=True)
class RankedItems:
    """The best items of each request. Where there are fewer than K: item -1, score -inf, value NaN."""

    item_BK: Tensor  # int64 catalogue indices
    score_BK: Tensor  # float32, log-probability of the item in nats
    value_BK: Tensor | None  # float32, its value


@torch.no_grad()
def rank_items(result: BeamResult, eligible: Eligible, item_weight_M: Tensor, k: int, softmax: Softmax = "all",
               value_M: Tensor | None = None, order: Order = "probability") -> RankedItems:
    """The k best eligible items on the leaves found (ties: more probable, then smaller index).

    Items that collide on one semantic ID are one to the model; ordering whole leaves would put every item of a crowded leaf before
    the best item of the next one.

    Args:
        item_weight_M: [slots] > 0, from `Trie.slot_weights`; the items of a leaf share its probability in proportion.
        softmax: as in the search: "all" shares a leaf among all its items, "legal" and "prior" among those eligible.
        value_M: [slots], e.g. eCPM or final_value; None = V_L of the item's leaf, where the search has worked it out.
        order: probability = log p(leaf) + log p(item | leaf); value = the auction, by value alone; leaf_value = leaves as the search
            ordered them, the items of each by value.
    """
    trie, level = eligible.trie, eligible.trie.num_levels
    request_N, beam_N = _distinct(result.leaf_BK, trie.num_leaves)
    owner_M, slot_M = trie.children(level, result.leaf_BK[request_N, beam_N])
    if trie.alive is not None:
        alive_M = trie.alive.index_select(0, slot_M)
        owner_M, slot_M = owner_M[alive_M], slot_M[alive_M]
    weight_M = item_weight_M.index_select(0, slot_M)
    total_N = weight_M.new_zeros(len(request_N))
    if softmax == "all":
        total_N.index_add_(0, owner_M, weight_M)
    kept = eligible.keep(level, request_N.index_select(0, owner_M), slot_M)
    if kept is not None:
        owner_M, slot_M, weight_M = owner_M[kept], slot_M[kept], weight_M[kept]
    if softmax != "all":
        total_N.index_add_(0, owner_M, weight_M)
    item_M, request_M = trie.slot_item.index_select(0, slot_M).long(), request_N.index_select(0, owner_M)
    leaf_score_BK = result.score_BK if result.log_p_gen_BK is None else result.log_p_gen_BK
    score_M = leaf_score_BK[request_N, beam_N][owner_M] + (weight_M / total_N[owner_M]).log().float()
    if result.pointer is not None:  # a past item has its own copy mass
        score_M = result.pointer.mix(level, request_M, slot_M, score_M)

    item_value_M = None
    if value_M is not None:
        item_value_M = value_M.to(trie.device).float().index_select(0, slot_M)
    elif result.value_BK is not None:
        item_value_M = result.value_BK[request_N, beam_N][owner_M]
    # Sorted by the last key first: the stable sorts after it leave its order among equals.
    keys = [item_M, -score_M, request_M]
    if order != "probability":
        assert item_value_M is not None, f"order={order} needs value_M or a search with strategy value"
        keys[2:2] = [-item_value_M] if order == "value" else [-item_value_M, beam_N[owner_M]]
    place = torch.arange(len(item_M), device=trie.device)
    for key in keys:
        place = place[key[place].argsort(stable=True)]
    request = request_M[place]
    rank = torch.arange(len(place), device=trie.device) - starts(request, eligible.num_requests)[request]
    place, request, rank = place[rank < k], request[rank < k], rank[rank < k]

    def spread(values_M: Tensor, fill: float) -> Tensor:
        return values_M.new_full((eligible.num_requests, k), fill).index_put_((request, rank), values_M[place])

    return RankedItems(spread(item_M, -1), spread(score_M, -torch.inf), None if item_value_M is None else spread(item_value_M, torch.nan))


def _distinct(leaf_BK: Tensor, num_leaves: int) -> tuple[Tensor, Tensor]:
    """(request, column) of the leaves found, each where it comes first: independent samples repeat."""
    request_N, beam_N = (leaf_BK >= 0).nonzero(as_tuple=True)
    distinct, place_N = torch.unique(request_N * num_leaves + leaf_BK[request_N, beam_N], return_inverse=True)
    if len(distinct) == len(place_N):
        return request_N, beam_N
    number_N = torch.arange(len(place_N), device=place_N.device)
    first = torch.full_like(distinct, len(place_N)).scatter_reduce(0, place_N, number_N, "amin").sort().values
    return request_N[first], beam_N[first]
