"""A random model, catalogue and eligibility on a small trie, and what a search over it must find, worked out path by path."""

import math
from collections import defaultdict

import numpy as np
import torch

from gpr_dist.decoding.legality import Eligible, Legal, pack_slots
from gpr_dist.decoding.trie import Trie
from gpr_dist.schema import CopyMass

V, L, B, N, P = 5, 3, 7, 70, 3
SEARCHABLE = ("all", "legal", "prior")


class SearchMarket:
    """Requests of five audiences, of which one has two ads and one none; every request excludes some ads of its own."""

    def __init__(self, seed, changed=False, lazy=False, exclude=True):
        rng = self.rng = np.random.default_rng(seed)
        self.codes = rng.integers(0, V, (N, L))
        self.weight = torch.from_numpy(rng.integers(0, 5, N))
        alive = np.arange(N)
        if changed:  # the same catalogue after inserts and deletes
            late = rng.choice(N, 25, replace=False)
            gone = rng.choice(N, 10, replace=False)
            early = np.setdiff1d(alive, late)
            trie = Trie.from_codes(self.codes[early], V, early).insert(self.codes[late[:12]], late[:12]).delete(gone[:6])
            trie = trie.insert(self.codes[late[12:]], late[12:]).delete(gone)
            alive = np.setdiff1d(alive, gone)
        else:
            trie = Trie.from_codes(self.codes, V)
        self.trie, self.alive = trie, alive
        groups = [rng.choice(N, size, replace=False) for size in (40, 25, 60, 2, 0)]
        self.group = torch.tensor([0, 1, 2, 3, 4, 0, 2])
        if lazy:
            bits = torch.stack([torch.isin(trie.slot_item.long(), torch.from_numpy(group)) for group in groups])
            legal = Legal.from_slots(trie, pack_slots(bits), dense_nodes=V)
        else:
            legal = trie.legal_nodes(groups)
        excluded = [rng.choice(N, rng.integers(0, 30), replace=False) if exclude else np.empty(0, int) for _ in range(B)]
        pairs = [(request, item) for request, items in enumerate(excluded) for item in items.tolist()]
        request, item = torch.tensor(pairs, dtype=torch.long).reshape(-1, 2)[torch.randperm(len(pairs))].unbind(1)
        self.eligible = Eligible.of(trie, legal, self.group, (request, item))
        self.items = [sorted(set(groups[group].tolist()) & set(alive.tolist()) - set(out.tolist()))
                      for group, out in zip(self.group.tolist(), excluded, strict=True)]
        logits = torch.from_numpy(rng.normal(size=(B, P, L, V**L, V)) * 2)
        self.log_probs_BPLXV = logits.log_softmax(-1).float()
        self.value_BPLXV = torch.from_numpy(rng.normal(size=(B, P, L, V**L, V))).float()
        self.item_weight = trie.slot_weights(self.weight)
        self.calls, self.copy = [], None

    # the model

    def log_probs(self, request_N, head_N, prefix_Nl):
        self.calls.append(("log_probs", prefix_Nl.shape[1]))
        assert (request_N.diff() >= 0).all()
        level, number = prefix_Nl.shape[1], prefix_number(prefix_Nl)
        return self.log_probs_BPLXV[request_N, head_N, level, number], (request_N, head_N, number)

    def values(self, state, row_M, code_M, level):
        self.calls.append(("values", level))
        request, head, number = (part[row_M] for part in state)
        return self.value_BPLXV[request, head, level, number, code_M]

    def copies(self, num_requests, heads):
        return self.copy

    # the truth

    def leaves(self, request):
        """leaf -> its eligible items."""
        found = defaultdict(list)
        for item in self.items[request]:
            found[tuple(self.codes[item].tolist())].append(item)
        return dict(found)

    def weight_below(self, request, prefix):
        return sum(float(self.weight[item]) + 0.1 for item in self.items[request] if tuple(self.codes[item][: len(prefix)]) == prefix)

    def steps(self, request, prefix, softmax, head=0, temperature=1.0):
        """next legal code -> log p."""
        row = self.log_probs_BPLXV[request, head, len(prefix), prefix_number(torch.tensor([prefix], dtype=torch.long).view(1, -1))[0]]
        codes = sorted({leaf[len(prefix)] for leaf in self.leaves(request) if leaf[: len(prefix)] == prefix})
        scores = {code: float(row[code]) for code in codes}
        if softmax == "prior":
            scores = {code: score + math.log(self.weight_below(request, (*prefix, code))) for code, score in scores.items()}
        scores = {code: score / temperature for code, score in scores.items()}
        total = 0.0 if softmax == "all" else math.log(sum(math.exp(score) for score in scores.values())) if scores else 0.0
        return {code: score - total for code, score in scores.items()}

    def paths(self, request, softmax, head=0, temperature=1.0):
        """Every legal leaf -> log p."""
        scores = {(): 0.0}
        for _ in range(L):
            scores = {(*prefix, code): score + step for prefix, score in scores.items()
                      for code, step in self.steps(request, prefix, softmax, head, temperature).items()}
        return scores

    def copy_mass(self, heads=1):
        """Past items of every request but the last, whether it may show them or not; some gates are closed, one is wide open."""
        pairs = sorted((request, item) for request in range(B - 1) for item in self.rng.choice(N, 12, replace=False).tolist())
        mass = self.rng.random(len(pairs))
        log_gate = torch.tensor([[0.3, 0.9, 0.5, 0.5, 0.5, 1.0, 0.4], [0.8, 0.0, 0.5, 0.1, 0.5, 1.0, 0.3]]).T[:, :heads].log()
        request, item = torch.tensor(pairs).unbind(1)
        return CopyMass(request, item, torch.from_numpy(np.log(mass)).float(), log_gate)

    def copied(self, copy, request):
        """(gates of the heads, eligible item -> its share of the copy mass); the gates are closed without such items."""
        mine = copy.request_M == request
        mass = {item: math.exp(log) for item, log in zip(copy.item_M[mine].tolist(), copy.log_mass_M[mine].tolist(), strict=True)
                if item in self.items[request]}
        total = sum(mass.values())
        gates = [float(gate) if mass else 0.0 for gate in copy.log_gate_B[request].exp()]
        return gates, {item: part / total for item, part in mass.items()}


def prefix_number(prefix_Nl):
    return (prefix_Nl * V ** torch.arange(prefix_Nl.shape[1])).sum(1)


def as_dict(result, request, field="score_BK"):
    """leaf -> score, in the order of the result."""
    alive = result.leaf_BK[request] >= 0
    leaves = [tuple(codes) for codes in result.codes_BKL[request][alive].tolist()]
    return dict(zip(leaves, getattr(result, field)[request][alive].tolist(), strict=True))


def log(value):
    return math.log(value) if value > 0 else -math.inf
