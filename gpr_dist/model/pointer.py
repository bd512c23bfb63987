"""The pointer: a request's ad may be a repetition, copied from the user's own past instead of generated.

p(path) = (1 - g) p_generated(path) + g p_copied(path). p_copied is an attention over the user's earlier events whose items are eligible at
the request (`gpr_dist/data/past.py`), g a gate, closed where there is none. Both depend on the request alone, so that they cost one
product of requests and events per row, whatever the number of heads, targets or beams. Pointer networks (arXiv 1506.03134) and their
mixture with a generator (1603.06393, 1704.04368); the GPR paper has none.
"""

from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from gpr_dist.config import Config
from gpr_dist.schema import Action, Batch, CopyMass

# T packed tokens  X events older than their rows  D width  K pointer width  R requests  P MTP heads  M pairs (request, event)
# G age buckets  N targets  L levels

_TINY = torch.finfo(torch.float32).tiny


class PointerConfig(Config):
    """Copying from the user's past."""

    width: int = Field(0, ge=0)
    """width of queries and keys; 0 = no pointer"""
    age_buckets: int = Field(64, ge=2)
    """ages of an event with a bias of their own, each half a power of two of seconds"""


@dataclass
class Copying:
    """What the requests of a batch copy."""

    log_mass_M: Tensor  # log of the attention to each pair; over a request's pairs it sums to 1
    log_gate_RP: Tensor  # log g; -inf where there is nothing to copy
    log_rest_RP: Tensor  # log (1 - g)

    def mixed_nll(self, nll_NL: Tensor, batch: Batch) -> Tensor:
        """-log p of every true code under the mixture: differences of the logs of its prefix probabilities, so that they sum to that of
        the path. Args: nll_NL: the generator's. A request with nothing to copy keeps it bit by bit."""
        request_N, head_N = batch.target_request_N, batch.target_head_N
        log_gate_N1, log_rest_N1 = (x[request_N, head_N][:, None] for x in (self.log_gate_RP, self.log_rest_RP))
        copied_NL = _log_sums(self.log_mass_M, batch.target_copy_NL2)
        log_prefix_NL = torch.logaddexp(log_rest_N1 - nll_NL.cumsum(1), log_gate_N1 + copied_NL)
        mixed_NL = -torch.diff(log_prefix_NL, dim=1, prepend=torch.zeros_like(log_prefix_NL[:, :1]))
        return torch.where(log_gate_N1 == -torch.inf, nll_NL, mixed_NL)

    def of_items(self, batch: Batch, head: int) -> CopyMass:
        """For the decoder: the mass of each item a request may copy, all requests of the batch."""
        source_M, request_M = batch.copy_source_M, batch.copy_request_M
        item_S = batch.item_T if batch.past_item_X is None else torch.cat((batch.item_T, batch.past_item_X))
        stride = int(item_S.max()) + 1 if len(item_S) else 1
        pair_I, place_M = torch.unique(request_M * stride + item_S[source_M], return_inverse=True)
        mass_I = self.log_mass_M.new_zeros(len(pair_I)).index_add(0, place_M, self.log_mass_M.exp())
        return CopyMass(pair_I // stride, pair_I % stride, mass_I.clamp_min(_TINY).log().float(), self.log_gate_RP[:, head].float())


class Pointer(nn.Module):
    """Scores, softmax and gate."""

    def __init__(self, width: int, num_heads_mtp: int, config: PointerConfig) -> None:
        super().__init__()
        self.config = config
        self.query = nn.Linear(width, config.width)
        self.key = nn.Linear(width, config.width, bias=False)
        self.past_key = nn.Linear(width, config.width, bias=False)
        self.age_G = nn.Parameter(torch.zeros(config.age_buckets))
        self.kind_2A = nn.Parameter(torch.zeros(2, len(Action)))  # of tokens and of older events, by action
        self.gate = nn.Linear(width, num_heads_mtp)
        self.evidence_2P = nn.Parameter(torch.zeros(2, num_heads_mtp))  # what the number and the scores of its pairs say about the gate

    def forward(self, hidden_TD: Tensor, past_XD: Tensor | None, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Args: hidden_TD: HSD output. past_XD: embeddings of the events older than the rows, if the batch has them.

        Returns: the fields of `Copying`, as a tuple, in which ZeRO-3 finds the tensors whose gradients need the parameters again.
        """
        site_RD = hidden_TD.index_select(0, batch.request_token_R)
        past_XK = self.past_key(hidden_TD[:0] if past_XD is None else past_XD)
        score_M = self._scores(self.query(site_RD), self.key(hidden_TD), past_XK, batch)
        time_S, action_S = batch.timestamp_T, batch.action_T
        if past_XD is not None:
            time_S, action_S = torch.cat((time_S, batch.past_time_X)), torch.cat((action_S, batch.past_action_X))
        request_M, source_M = batch.copy_request_M, batch.copy_source_M
        age_M = (batch.request_time_R[request_M] - time_S[source_M]).clamp_min(0)
        bucket_M = (2 * (age_M + 1).double().log2()).long().clamp_max(len(self.age_G) - 1)
        kind_M = action_S[source_M] + len(Action) * (source_M >= batch.num_tokens)
        score_M = score_M + (self.age_G.index_select(0, bucket_M) + self.kind_2A.flatten().index_select(0, kind_M)).to(score_M.dtype)

        count_R, lse_R = _log_sum_exp(score_M, request_M, len(site_RD))
        evidence_R2 = torch.stack((count_R.to(lse_R.dtype).clamp_min(1).log(), lse_R), dim=1)
        gate_RP = self.gate(site_RD).to(lse_R.dtype) + evidence_R2 @ self.evidence_2P.to(lse_R.dtype)
        empty_R1 = (count_R == 0)[:, None]
        return (score_M - lse_R.index_select(0, request_M), F.logsigmoid(gate_RP).masked_fill(empty_R1, -torch.inf),
                F.logsigmoid(-gate_RP).masked_fill(empty_R1, 0.0))

    def _scores(self, query_RK: Tensor, key_TK: Tensor, past_XK: Tensor, batch: Batch) -> Tensor:
        """[M], float32 or wider: one product per row, of which the pairs are picked."""
        offsets = batch.offsets_B1.tolist()
        older = batch.past_offsets_B1.tolist() if batch.past_item_X is not None else [0] * len(offsets)
        first_request = torch.searchsorted(batch.request_row_R, torch.arange(len(offsets), device=query_RK.device)).tolist()
        products, base, start = [query_RK[:0] @ torch.cat((key_TK[:0], past_XK[:0])).T], [], 0  # the first: also without rows
        for (first, last), (begin, end), (low, high) in zip(pairwise(first_request), pairwise(offsets), pairwise(older), strict=True):
            keys = torch.cat((key_TK[begin:end], past_XK[low:high])) if high > low else key_TK[begin:end]
            products.append(query_RK[first:last] @ keys.T)
            base.append(start)
            start += (last - first) * len(keys)
        flat = torch.cat([product.flatten() for product in products])

        device = query_RK.device
        base_B, first_B, older_B = (torch.tensor(x, dtype=torch.int64, device=device) for x in (base, first_request[:-1], older[:-1]))
        length_B = batch.offsets_B1.diff()
        size_B = length_B + torch.tensor(older, device=device).diff()
        request_M, source_M = batch.copy_request_M, batch.copy_source_M
        row_M = batch.request_row_R[request_M]
        column_M = torch.where(source_M < batch.num_tokens, source_M - batch.offsets_B1[row_M],
                               source_M - batch.num_tokens - older_B[row_M] + length_B[row_M])
        picked_M = flat.index_select(0, base_B[row_M] + (request_M - first_B[row_M]) * size_B[row_M] + column_M)
        return (picked_M if picked_M.dtype == torch.float64 else picked_M.float()) * query_RK.shape[1] ** -0.5


def _log_sum_exp(score_M: Tensor, request_M: Tensor, num_requests: int) -> tuple[Tensor, Tensor]:
    """Number of entries and log of the sum of their exponentials, of each request [R]; 0 where there is none."""
    count_R = torch.bincount(request_M, minlength=num_requests)
    largest_R = score_M.new_full((num_requests,), -torch.inf).scatter_reduce(0, request_M, score_M.detach(), "amax")
    largest_R = largest_R.masked_fill(count_R == 0, 0.0)
    total_R = score_M.new_zeros(num_requests).index_add(0, request_M, (score_M - largest_R.index_select(0, request_M)).exp())
    return count_R, total_R.masked_fill(count_R == 0, 1.0).log() + largest_R


def _log_sums(log_mass_M: Tensor, range_NL2: Tensor) -> Tensor:
    """log of the mass in each range of pairs [N, L]; -inf in an empty one."""
    first, count = range_NL2[..., 0].flatten(), (range_NL2[..., 1] - range_NL2[..., 0]).flatten()
    owner = torch.repeat_interleave(count)
    place = torch.arange(len(owner), device=count.device) + (first - count.cumsum(0) + count).index_select(0, owner)
    mass = log_mass_M.new_zeros(len(count)).index_add(0, owner, log_mass_M.index_select(0, place).exp())
    return mass.clamp_min(_TINY).log().masked_fill(count == 0, -torch.inf).view(range_NL2.shape[:2])
