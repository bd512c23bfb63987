"""Flat lists cut into segments, and sparse sets of (request, node) pairs: the vector operations the search is written in."""

from dataclasses import dataclass

import torch
from torch import Tensor

# M entries, ordered by segment  S segments  n nodes of a level  X pairs of a sparse set


def starts(segment_M: Tensor, num_segments: int) -> Tensor:
    """First entry of each segment of ascending segment numbers, int64 [S + 1]."""
    return torch.searchsorted(segment_M, torch.arange(num_segments + 1, device=segment_M.device))


def top_k(score_M: Tensor, start: Tensor, k: "int | Tensor") -> Tensor:
    """Positions of the largest scores of each segment, best first, segment after segment; -inf is never among them.

    Args: start: int64 [S + 1], from `starts`. k: entries per segment, one number or int64 [S].
    """
    if not score_M.numel():
        return torch.empty(0, dtype=torch.long, device=score_M.device)
    num_segments = start.numel() - 1
    width = int((start[1:] - start[:-1]).max())
    largest = min(width, k if isinstance(k, int) else int(k.max()))
    if width * num_segments == score_M.numel():
        padded = score_M.view(num_segments, width)
    else:
        padded = score_M.new_full((num_segments, width), -torch.inf)
        shift_S = torch.arange(num_segments, device=score_M.device) * width - start[:-1]
        place_M = torch.repeat_interleave(shift_S, start.diff(), output_size=score_M.numel())
        place_M += torch.arange(score_M.numel(), device=score_M.device)
        padded.view(-1).index_copy_(0, place_M, score_M)  # several times faster than with brackets
    best_SK, position_SK = padded.topk(largest, dim=1)
    kept_SK = best_SK > -torch.inf
    if not isinstance(k, int):
        kept_SK &= torch.arange(largest, device=k.device) < k[:, None]
    return (position_SK + start[:-1, None])[kept_SK]


def log_sum_exp(value_M: Tensor, segment_M: Tensor, num_segments: int) -> Tensor:
    """log sum exp over the entries of each segment [S], in any order; 0 where all are -inf, so that subtracting it leaves them -inf."""
    largest_S = value_M.new_full((num_segments,), -torch.inf).scatter_reduce(0, segment_M, value_M, "amax")
    largest_S = largest_S.clamp(min=torch.finfo(value_M.dtype).min)
    total_S = value_M.new_zeros(num_segments).index_add(0, segment_M, (value_M - largest_S.index_select(0, segment_M)).exp())
    return torch.where(total_S > 0, total_S.log() + largest_S, 0.0)


def z_scores(value_M: Tensor, segment_M: Tensor, num_segments: int) -> Tensor:
    """(value - mean) / standard deviation within each segment [M]; 0 where a segment does not vary."""
    count_S = value_M.new_zeros(num_segments).index_add(0, segment_M, torch.ones_like(value_M)).clamp(min=1)
    mean_S = value_M.new_zeros(num_segments).index_add(0, segment_M, value_M) / count_S
    centred_M = value_M - mean_S.index_select(0, segment_M)
    std_S = (value_M.new_zeros(num_segments).index_add(0, segment_M, centred_M.square()) / count_S).sqrt()
    return torch.where(std_S > 1e-6, 1.0 / std_S, 0.0).index_select(0, segment_M) * centred_M


@dataclass(frozen=True)
class NodePairs:
    """A sparse set of (request, node) pairs of one level: memory is per pair, not requests times nodes."""

    key_X: Tensor  # int64 ascending, request * num_nodes + node
    node_n: Tensor  # bool: in a pair of some request; a quick first look, since few nodes are

    @classmethod
    def of(cls, key_X: Tensor, num_nodes: int) -> "NodePairs":
        """Args: key_X: distinct and ascending."""
        node_n = torch.zeros(num_nodes, dtype=torch.bool, device=key_X.device)
        node_n[key_X % num_nodes] = True
        return cls(key_X, node_n)

    def find(self, request_M: Tensor, node_M: Tensor) -> tuple[Tensor, Tensor]:
        """(positions in M of the pairs of this set, the X of each)."""
        if not self.key_X.numel():
            none = torch.empty(0, dtype=torch.long, device=node_M.device)
            return none, none
        maybe = self.node_n.index_select(0, node_M).nonzero().squeeze(1)
        key = request_M.index_select(0, maybe) * self.node_n.numel() + node_M.index_select(0, maybe)
        place = torch.searchsorted(self.key_X, key).clamp(max=self.key_X.numel() - 1)
        found = self.key_X.index_select(0, place) == key
        return maybe[found], place[found]
