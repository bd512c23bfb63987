"""Which children of the alive prefixes go on: by value (GPR §4), or by draws that belong to the request and not to the batch."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gpr_dist.decoding.segments import log_sum_exp, starts, top_k, z_scores

if TYPE_CHECKING:
    from gpr_dist.decoding.search import ValueGuide

# B requests  Q searches  N alive prefixes, by search  M their legal children, in the same order  S samples

_MULTIPLIER = 6_364_136_223_846_793_005  # Knuth's MMIX; keys wrap around in 64 bits


def propose(score_M: Tensor, owner_M: Tensor, search_N: Tensor, value_N: Tensor, num_searches: int, width_Q: "int | Tensor",
            guide: "ValueGuide") -> Tensor:
    """The k_b best children of each prefix b: positions in M, by prefix.

    k_b = clip(round(C w_b), 1, k_max) with w = softmax((V - mean) / (std tau)) over the search's prefixes and C proposals in all;
    what rounding and clipping leave over or take too much is moved so that sum k_b = C wherever enough children are there.
    """
    if not owner_M.numel():
        return owner_M
    room_N = torch.bincount(owner_M, minlength=len(search_N)).clamp(max=guide.max_children)
    start_N = starts(owner_M, len(search_N))
    if guide.temperature is None:
        return top_k(score_M, start_N, room_N)
    total_Q = torch.as_tensor(width_Q, device=owner_M.device).mul(guide.proposals).long().expand(num_searches)
    total_Q = torch.minimum(total_Q, torch.zeros_like(search_N.new_empty(num_searches)).index_add_(0, search_N, room_N))
    logit_N = z_scores(value_N, search_N, num_searches) / guide.temperature
    share_N = (logit_N - log_sum_exp(logit_N, search_N, num_searches)[search_N]).exp()
    wanted_N = torch.minimum((total_Q[search_N] * share_N).round().long().clamp(min=1), room_N)
    missing_Q = total_Q - torch.zeros_like(total_Q).index_add_(0, search_N, wanted_N)
    start_Q = starts(search_N, num_searches)
    best_first = top_k(share_N, start_Q, len(search_N))
    wanted_N = wanted_N + _pour(missing_Q.clamp(min=0), (room_N - wanted_N), best_first, search_N)
    worst_first = top_k(-share_N, start_Q, len(search_N))
    wanted_N = wanted_N - _pour((-missing_Q).clamp(min=0), (wanted_N - 1).clamp(min=0), worst_first, search_N)
    return top_k(score_M, start_N, wanted_N)


def _pour(amount_Q: Tensor, room_N: Tensor, order_N: Tensor, search_N: Tensor) -> Tensor:
    """Give each search's amount to its prefixes in the order given, to each as much as it has room for, [N]."""
    search, room = search_N[order_N], room_N[order_N]
    before = room.cumsum(0) - room
    before = before - before[starts(search, len(amount_Q))[:-1].clamp(max=len(room) - 1)][search]
    given = torch.minimum((amount_Q[search] - before).clamp(min=0), room)
    return torch.zeros_like(room_N).index_copy_(0, order_N, given)


def keep_guided(score_P: Tensor, value_P: Tensor, search_P: Tensor, num_searches: int, width_Q: "int | Tensor", eta: float) -> Tensor:
    """Positions of the proposals with the largest S = log p + eta zscore(V) of each search, best first."""
    if eta:
        score_P = score_P + eta * z_scores(value_P, search_P, num_searches)
    return top_k(score_P, starts(search_P, num_searches), width_Q)


def perturb(score_M: Tensor, gumbel_M: Tensor, owner_M: Tensor, perturbed_N: Tensor) -> Tensor:
    """Gumbels with locations `score_M`, conditioned on their largest being that of the prefix (Kool et al., 1903.06059, Appendix B.3).

    Taking the largest of every level samples leaves without replacement. float64 [M]; -inf where the child has no probability.
    """
    free_M = score_M.double() + gumbel_M
    largest_N = perturbed_N.new_full(perturbed_N.shape, -torch.inf).scatter_reduce(0, owner_M, free_M, "amax")
    target_M = perturbed_N.index_select(0, owner_M)
    gap_M = (free_M - largest_N.index_select(0, owner_M)).clamp(max=0)
    v_M = target_M - free_M + torch.log(-torch.expm1(gap_M))
    shifted_M = target_M - v_M.clamp(min=0) - torch.log1p(torch.exp(-v_M.abs()))
    return torch.where(free_M > -torch.inf, shifted_M, -torch.inf)


class Draws:
    """Random numbers of a batch of requests, each a function of (seed, request id, what it is for)."""

    def __init__(self, seed: int, request_id_B: Tensor, num_samples: int) -> None:
        self._salt = _hash(torch.tensor(seed, device=request_id_B.device))
        self.root_key_B = request_id_B.long() * _MULTIPLIER
        device, num_requests = request_id_B.device, request_id_B.numel()
        self._request_S = torch.arange(num_requests, device=device).repeat_interleave(num_samples)
        self._column_S = torch.arange(num_samples, device=device).repeat(num_requests)
        self._row_S = self._request_S

    def child_key(self, key_M: Tensor, code_M: Tensor) -> Tensor:
        """Names the prefix one code longer."""
        return (key_M + code_M + 1) * _MULTIPLIER

    def uniform(self, key_M: Tensor) -> Tensor:
        """float64 in (0, 1), 52 bits."""
        return (_hash(key_M + self._salt) >> 12 & (1 << 52) - 1).double().add_(0.5).mul_(2.0**-52)

    def gumbel(self, key_M: Tensor) -> Tensor:
        """Standard Gumbel, float64."""
        return -(-self.uniform(key_M).log()).log()

    def sample(self, level: int, score_M: Tensor, owner_M: Tensor, num_prefixes: int) -> Tensor:
        """Draw a child for every sample that is still alive, in proportion to exp(score): the distinct ones, positions in M."""
        mass_M = (score_M.double() - log_sum_exp(score_M.double(), owner_M, num_prefixes)[owner_M]).exp()
        total_M = mass_M.cumsum(0)
        ends = torch.cat((total_M.new_zeros(1), total_M))[starts(owner_M, num_prefixes)]
        first_S, end_S = ends[:-1][self._row_S], ends[1:][self._row_S]
        alive_S = end_S > first_S
        self._request_S, self._column_S = self._request_S[alive_S], self._column_S[alive_S]
        first_S, end_S = first_S[alive_S], end_S[alive_S]
        key_S = self.child_key(self.child_key(self.root_key_B[self._request_S], self._column_S), torch.full_like(self._column_S, level))
        target_S = first_S + self.uniform(key_S) * (end_S - first_S)
        target_S = torch.minimum(target_S, torch.nextafter(end_S, first_S))
        chosen, self._row_S = torch.unique(torch.searchsorted(total_M, target_S, right=True), return_inverse=True)
        return chosen

    def paths(self) -> tuple[Tensor, Tensor, Tensor]:
        """(request, number of the sample, row among the prefixes chosen last) of every sample that came through."""
        return self._request_S, self._column_S, self._row_S


def _hash(key_M: Tensor) -> Tensor:
    """The finaliser of SplitMix64. Products wrap around; `>>` keeps the sign, so it is masked away."""
    x = key_M.clone()
    for shift, mask, factor in ((30, 0x3FFFFFFFF, -4_658_895_280_553_007_687), (27, 0x1FFFFFFFFF, -7_723_592_293_110_705_685)):
        x.bitwise_xor_((x >> shift).bitwise_and_(mask)).mul_(factor)
    return x.bitwise_xor_((x >> 31).bitwise_and_(0x1FFFFFFFF))
