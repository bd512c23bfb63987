"""A pointer to the user's own past items, mixed into the search over whole paths: p(path) = (1 - g) p_gen(path) + g p_copy(path).

The masses stay sparse: below each node lies the sum over the few past items there. What the model says about them is the model's
business (`schema.CopyMass`); what may be shown is decided here once more, so that a path that is not legal gets no mass.
"""

import torch
from torch import Tensor

from gpr_dist.decoding.legality import Eligible
from gpr_dist.decoding.segments import NodePairs, log_sum_exp
from gpr_dist.schema import CopyMass

# B requests  M entries of a flat list  X (request, past item) pairs


class Pointer:
    """Copy masses by node of the trie."""

    def __init__(self, eligible: Eligible, copy: CopyMass) -> None:
        """Items that a request may not be shown are left out and the others share their mass; without any, the gate is closed."""
        trie = eligible.trie
        slot_X = trie.slots(copy.item_M)
        request_X, log_mass_X = copy.request_M[slot_X >= 0], copy.log_mass_M[slot_X >= 0].double()
        slot_X = slot_X[slot_X >= 0]
        kept = eligible.keep(trie.num_levels, request_X, slot_X)
        if kept is not None:
            request_X, slot_X, log_mass_X = request_X[kept], slot_X[kept], log_mass_X[kept]
        log_mass_X = log_mass_X - log_sum_exp(log_mass_X, request_X, eligible.num_requests)[request_X]

        has_items_B = torch.zeros(eligible.num_requests, dtype=torch.bool, device=slot_X.device)
        has_items_B[request_X[log_mass_X > -torch.inf]] = True
        log_gate_B = copy.log_gate_B.double().masked_fill(~has_items_B, -torch.inf)
        self.log_gate_B, self.log_rest_B = log_gate_B.float(), (-log_gate_B.expm1()).log().float()
        self.pairs, self.log_mass = [], []
        for level, node_X in enumerate(trie.ancestors(slot_X)):
            key, place_X = torch.unique(request_X * trie.num_nodes(level) + node_X, return_inverse=True)
            self.pairs.append(NodePairs.of(key, trie.num_nodes(level)))
            mass = torch.zeros(len(key), dtype=torch.double, device=key.device).index_add_(0, place_X, log_mass_X.exp())
            self.log_mass.append(mass.log().float())

    def mix(self, level: int, request_M: Tensor, node_M: Tensor, log_p_gen_M: Tensor) -> Tensor:
        """log((1 - g) p_gen + g p_copy) of prefixes ending in these nodes, or of items (level L, their slots) [M]."""
        mixed_M = log_p_gen_M + self.log_rest_B.index_select(0, request_M)
        place, pair = self.pairs[level].find(request_M, node_M)
        copied = self.log_gate_B.index_select(0, request_M.index_select(0, place)) + self.log_mass[level].index_select(0, pair)
        mixed_M[place] = torch.logaddexp(mixed_M[place], copied.to(mixed_M.dtype))
        return mixed_M
