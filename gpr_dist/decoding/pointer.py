"""A pointer to the user's own past items, mixed into the search over whole paths: p(path) = (1 - g) p_gen(path) + g p_copy(path).

The masses stay sparse: below each node lies the sum over the few past items there. What the model says about them is the model's
business (`schema.CopyMass`); what may be shown is decided here once more, so that a path that is not legal gets no mass.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gpr_dist.decoding.legality import Eligible
from gpr_dist.decoding.segments import NodePairs, log_sum_exp
from gpr_dist.schema import CopyMass

# B requests  H MTP heads searched  Q = B * H searches (request, head), by request  M entries of a flat list  X (request, past item) pairs


@dataclass(frozen=True)
class Pointer:
    """Copy masses by node of the trie, and the gate of every search."""

    log_gate_Q: Tensor  # float32
    log_rest_Q: Tensor  # float32, log (1 - g)
    heads: int
    masses: list[tuple[NodePairs, Tensor]]  # per level 0..L (L = slots), the log of the mass below each node that has any

    @classmethod
    def of(cls, eligible: Eligible, copy: CopyMass, heads: int) -> "Pointer":
        """Items that a request may not be shown are left out and the others share their mass; without any, the gate is closed."""
        trie = eligible.trie
        slot_X = trie.slots(copy.item_M)
        request_X, log_mass_X, slot_X = (part[slot_X >= 0] for part in (copy.request_M, copy.log_mass_M.double(), slot_X))
        kept = eligible.keep(trie.num_levels, request_X, slot_X)
        if kept is not None:
            request_X, slot_X, log_mass_X = request_X[kept], slot_X[kept], log_mass_X[kept]
        log_mass_X = log_mass_X - log_sum_exp(log_mass_X, request_X, eligible.num_requests)[request_X]

        has_items_B = torch.zeros(eligible.num_requests, dtype=torch.bool, device=slot_X.device)
        has_items_B[request_X[log_mass_X > -torch.inf]] = True
        log_gate_BH = (copy.log_gate_B if copy.log_gate_B.dim() == 2 else copy.log_gate_B[:, None]).double()
        log_gate_BH = log_gate_BH.masked_fill(~has_items_B[:, None], -torch.inf)
        log_gate_Q = log_gate_BH.expand(-1, heads).reshape(-1)
        masses = []
        for level, node_X in enumerate(trie.ancestors(slot_X)):
            key, place_X = torch.unique(request_X * trie.num_nodes(level) + node_X, return_inverse=True)
            mass = torch.zeros(len(key), dtype=torch.double, device=key.device).index_add_(0, place_X, log_mass_X.exp())
            masses.append((NodePairs.of(key, trie.num_nodes(level)), mass.log().float()))
        return cls(log_gate_Q.float(), (-log_gate_Q.expm1()).log().float(), heads, masses)

    def mix(self, level: int, search_M: Tensor, node_M: Tensor, log_p_gen_M: Tensor) -> Tensor:
        """log((1 - g) p_gen + g p_copy) of prefixes ending in these nodes, or of items (level L, their slots) [M]."""
        pairs, log_mass_X = self.masses[level]
        mixed_M = log_p_gen_M + self.log_rest_Q.index_select(0, search_M)
        place, pair = pairs.find(search_M // self.heads if self.heads > 1 else search_M, node_M)
        copied = self.log_gate_Q.index_select(0, search_M.index_select(0, place)) + log_mass_X.index_select(0, pair)
        mixed_M[place] = torch.logaddexp(mixed_M[place], copied.to(mixed_M.dtype))
        return mixed_M

    def united(self, weights: Sequence[float]) -> "Pointer":
        """That of the heads' mixture: one gate per request, the mean of the heads' by weight."""
        if self.heads == 1:
            return self
        log_weight_H = torch.tensor(weights, device=self.log_gate_Q.device).log()
        gate, rest = ((logs.view(-1, self.heads) + log_weight_H).logsumexp(1) for logs in (self.log_gate_Q, self.log_rest_Q))
        return Pointer(gate, rest, 1, self.masses)
