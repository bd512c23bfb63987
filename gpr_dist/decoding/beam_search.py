"""Beam search over the trie of legal semantic IDs (GPR Fig. 2d, without its value guidance), batched over requests.

Owns the search and the step from leaves to items. The model is a function handed in; it is called exactly once per level whatever
the batch holds, also when it holds nothing, because under ZeRO-3 every rank must run the same forwards.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from gpr_dist.decoding.trie import Trie
from gpr_dist.errors import TrainingError

# B requests  K beams  L levels  V codes per level  Gr eligibility groups  n_l trie nodes at level l
# N alive prefixes of all requests, ordered by request  M their legal children, in the same order

Softmax = Literal["all", "legal", "prior"]
StepLogProbs = Callable[[Tensor, Tensor], Tensor]
"""(request_N int64 ascending, prefix_codes_Nl int64) -> log p of the next code, float [N, V]; N may be 0, l = 0 at the first level."""


@dataclass(frozen=True)
class BeamResult:
    """The best leaves of each request, best first. Where fewer are reachable: leaf -1, score -inf, codes -1."""

    leaf_BK: Tensor  # int64, node of the trie's last level
    score_BK: Tensor  # float32, sum of log-probabilities in nats
    codes_BKL: Tensor  # int64


@torch.no_grad()
def beam_search(step_log_probs: StepLogProbs, trie: Trie, legal: Sequence[Tensor], request_group_B: Tensor,
                beam_width: int | Sequence[int] = 128, normalise: Softmax = "all", item_weight_M: Tensor | None = None) -> BeamResult:
    """The K legal leaves with the largest probability that survive the beam.

    Args:
        step_log_probs: the model; log-softmax over all V codes of the level whose number is the prefix length.
        legal: per level, bool [Gr, n_l] from `Trie.legal_nodes` or `LegalCache` (a further entry for the items is ignored here).
        request_group_B: row of `legal` for each request.
        beam_width: prefixes kept per request, one number or one per level; K = the last.
        normalise: "all" scores a path by the full-softmax probabilities, so leaves are ranked by p(leaf) of a model trained on the
            full softmax, exactly: restricting to eligible leaves divides all of them by the same p(eligible). "legal" renormalises
            every step over the prefix's legal children: the distribution of a policy that samples legal codes (GPR Eq. 3, 9), right
            for models trained that way; otherwise it favours leaves whose siblings are switched off.
    Returns: BeamResult with exactly K columns. With K >= the number of legal prefixes at every level it equals brute force.
    Raises: TrainingError when the model returns NaN.
    """
    num_requests, num_levels = request_group_B.numel(), trie.num_levels
    widths = [beam_width] * num_levels if isinstance(beam_width, int) else list(beam_width)
    assert len(widths) == num_levels and min(widths) > 0, f"beam widths {widths} for {num_levels} levels"
    assert normalise in ("all", "legal", "prior") and (normalise != "prior" or item_weight_M is not None), normalise
    log_prior = trie.log_weights(legal[-1], item_weight_M) if normalise == "prior" else None

    node_BK = torch.zeros(num_requests, 1, dtype=torch.long, device=trie.device)  # the root
    score_BK = torch.zeros(num_requests, 1, device=trie.device)
    codes_BKl = torch.empty(num_requests, 1, 0, dtype=torch.long, device=trie.device)
    for level in range(num_levels):
        request_N, beam_N = (node_BK >= 0).nonzero(as_tuple=True)
        log_probs_NV = step_log_probs(request_N, codes_BKl[request_N, beam_N])
        assert log_probs_NV.shape[0] == request_N.numel(), f"{tuple(log_probs_NV.shape)} for {request_N.numel()} prefixes"

        owner_M, child_M = _legal_children(trie.child_offset[level], node_BK[request_N, beam_N], legal[level], request_group_B[request_N])
        code_M = trie.code[level].index_select(0, child_M)
        log_prob_M = log_probs_NV.reshape(-1).index_select(0, owner_M * log_probs_NV.shape[1] + code_M).float()
        if log_prior is not None:
            log_prob_M = log_prob_M + log_prior[level][request_group_B[request_N].index_select(0, owner_M), child_M]
        if normalise != "all":
            log_prob_M = log_prob_M - _log_sum_exp(log_prob_M, owner_M, request_N.numel()).index_select(0, owner_M)
        score_M = log_prob_M + score_BK[request_N, beam_N].index_select(0, owner_M)
        if score_M.isnan().any():
            raise TrainingError(f"the model returned NaN log-probabilities at level {level} of the beam search")

        score_BK, chosen_BK = _top_k(score_M, request_N.index_select(0, owner_M), num_requests, widths[level])
        reached_BK = score_BK > -torch.inf
        chosen_M = chosen_BK[reached_BK]
        parent_codes_BKl = codes_BKl.new_full((num_requests, widths[level], level), -1)
        parent_codes_BKl[reached_BK] = codes_BKl[request_N, beam_N][owner_M[chosen_M]]
        node_BK = torch.full_like(chosen_BK, -1)
        node_BK[reached_BK] = child_M[chosen_M]
        code_BK = torch.full_like(chosen_BK, -1)
        code_BK[reached_BK] = code_M[chosen_M].long()
        codes_BKl = torch.cat([parent_codes_BKl, code_BK.unsqueeze(2)], dim=2)
    return BeamResult(node_BK, score_BK, codes_BKl)


@torch.no_grad()
def expand_items(result: BeamResult, trie: Trie, legal_slots: Tensor, request_group_B: Tensor, item_weight_M: Tensor, k: int,
                 normalise: Softmax = "all") -> tuple[Tensor, Tensor]:
    """The k best eligible items of each request by log p(leaf) + log p(item | leaf) (ties: smaller index).

    Items that collide on one semantic ID are one to the model; ordering whole leaves would put every item of a crowded leaf before
    the best item of the next one.

    Args:
        legal_slots: bool [Gr, N], the last entry of `Trie.legal_nodes`.
        item_weight_M: [slots] > 0, from `Trie.slot_weights`; the items of a leaf share it in proportion.
        normalise: as in the search: "all" shares a leaf among all its items, "legal" and "prior" among the eligible ones.
    Returns: (item_BK int64 catalogue indices, -1 where there are fewer than k; score_BK float32, -inf there).
    """
    num_requests = result.leaf_BK.shape[0]
    request_N, beam_N = (result.leaf_BK >= 0).nonzero(as_tuple=True)
    owner_M, slot_M = _legal_children(trie.child_offset[-1], result.leaf_BK[request_N, beam_N], legal_slots, request_group_B[request_N])
    item_M, request_M = trie.slot_item[slot_M].long(), request_N[owner_M]
    weight_M = item_weight_M[slot_M]
    if normalise != "all":
        total_M = weight_M.new_zeros(len(request_N)).index_add_(0, owner_M, weight_M)[owner_M]
    else:
        leaf_M = trie.parent[-1].long()
        total_M = weight_M.new_zeros(trie.num_leaves).index_add_(0, leaf_M, item_weight_M)[leaf_M[slot_M]]
    score_M = result.score_BK[request_N, beam_N][owner_M] + (weight_M / total_M).log().float()
    # Sorted by item first, the stable sorts after it leave the smaller index in front of equal scores.
    order = item_M.argsort()
    order = order[score_M[order].argsort(descending=True, stable=True)]
    order = order[request_M[order].argsort(stable=True)]
    item_M, request_M, score_M = item_M[order], request_M[order], score_M[order]

    rank_M = torch.arange(request_M.numel(), device=trie.device) - _starts(request_M, num_requests)[request_M]
    top = (rank_M < k).nonzero().squeeze(1)
    item_BK = torch.full((num_requests, k), -1, dtype=torch.long, device=trie.device)
    score_BK = torch.full((num_requests, k), -torch.inf, device=trie.device)
    item_BK[request_M[top], rank_M[top]] = item_M[top]
    score_BK[request_M[top], rank_M[top]] = score_M[top]
    return item_BK, score_BK


def _legal_children(offset: Tensor, node_N: Tensor, legal: Tensor, group_N: Tensor) -> tuple[Tensor, Tensor]:
    """The legal children of every node end to end: (which of the N each child belongs to, child id), int64 [M].

    `index_select` on flat tensors here and above: on CPU it is several times faster than indexing with brackets.
    """
    first_N = offset[node_N].long()
    count_N = offset[node_N + 1].long() - first_N
    owner_M = torch.repeat_interleave(count_N)
    child_M = torch.arange(owner_M.numel(), device=offset.device)
    child_M += (first_N - count_N.cumsum(0) + count_N).index_select(0, owner_M)
    if legal.all():  # no eligibility: saves a third of the time
        return owner_M, child_M
    flat_M = (group_N * legal.shape[1]).index_select(0, owner_M).add_(child_M)
    kept = legal.reshape(-1).index_select(0, flat_M).nonzero().squeeze(1)
    return owner_M.index_select(0, kept), child_M.index_select(0, kept)


def _starts(segment_M: Tensor, num_segments: int) -> Tensor:
    """First entry of each segment of ascending segment numbers, int64 [S + 1]."""
    return torch.searchsorted(segment_M, torch.arange(num_segments + 1, device=segment_M.device))


def _top_k(score_M: Tensor, request_M: Tensor, num_requests: int, k: int) -> tuple[Tensor, Tensor]:
    """Largest k scores of each request and their positions in M, [B, k]; -inf and 0 where there are fewer."""
    start = _starts(request_M, num_requests)
    width = max(k, int((start[1:] - start[:-1]).max()) if num_requests else 0)
    padded = score_M.new_full((num_requests, width), -torch.inf)
    place_M = torch.arange(score_M.numel(), device=score_M.device)
    place_M += (torch.arange(num_requests, device=score_M.device) * width - start[:-1]).index_select(0, request_M)
    padded.view(-1)[place_M] = score_M
    score_BK, position_BK = padded.topk(k, dim=1)
    return score_BK, torch.where(score_BK > -torch.inf, position_BK + start[:-1, None], 0)


def _log_sum_exp(value_M: Tensor, owner_M: Tensor, num_owners: int) -> Tensor:
    """log sum exp over the entries of each owner [N]; 0 where all are -inf, which leaves them -inf."""
    largest_N = value_M.new_full((num_owners,), -torch.inf).scatter_reduce(0, owner_M, value_M, "amax")
    largest_N = largest_N.clamp(min=torch.finfo(value_M.dtype).min)
    total_N = value_M.new_zeros(num_owners).index_add(0, owner_M, (value_M - largest_N.index_select(0, owner_M)).exp())
    return torch.where(total_N > 0, total_N.log() + largest_N, 0.0)
