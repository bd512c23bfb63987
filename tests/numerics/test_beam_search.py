"""Beam search against every path of a tiny trie, and against a beam search written with Python lists."""

import math

import numpy as np
import pytest
import torch

from gpr_dist.decoding.beam_search import beam_search, expand_items
from gpr_dist.decoding.trie import Trie

V, L, B, N = 5, 3, 7, 70


class Market:
    """A random model, catalogue and eligibility; group 3 has fewer leaves than any beam, group 4 none."""

    def __init__(self, seed):
        rng = np.random.default_rng(seed)
        self.codes = rng.integers(0, V, (N, L))
        self.groups = [rng.choice(N, size, replace=False) for size in (40, 25, 60, 2, 0)]
        self.request_group = torch.tensor([0, 1, 2, 3, 4, 0, 2])
        logits = torch.from_numpy(rng.normal(size=(B, L, V**L, V)) * 2)
        self.log_probs = logits.log_softmax(-1).float()
        self.trie = Trie.from_codes(self.codes, V)
        self.legal = self.trie.legal_nodes(self.groups)

    def step(self, request_N, prefix_codes_Nl):
        return self.log_probs[request_N, prefix_codes_Nl.shape[1], self.prefix_number(prefix_codes_Nl)]

    @staticmethod
    def prefix_number(prefix_codes_Nl):
        return (prefix_codes_Nl * V ** torch.arange(prefix_codes_Nl.shape[1])).sum(1)

    def legal_leaves(self, request):
        return sorted({tuple(self.codes[item].tolist()) for item in self.groups[self.request_group[request]]})

    def step_score(self, request, prefix, code, normalise):
        row = self.log_probs[request, len(prefix), self.prefix_number(torch.tensor([prefix], dtype=torch.long))[0]].double()
        siblings = {leaf[len(prefix)] for leaf in self.legal_leaves(request) if leaf[: len(prefix)] == prefix}
        mass = sum(math.exp(row[sibling]) for sibling in siblings) if normalise == "legal" else 1.0
        return float(row[code]) - math.log(mass)

    def slow_beam(self, request, widths, normalise):
        beams = [((), 0.0)]
        for level, width in enumerate(widths):
            legal = {leaf[: level + 1] for leaf in self.legal_leaves(request)}
            longer = [((*prefix, code), score + self.step_score(request, prefix, code, normalise))
                      for prefix, score in beams for code in range(V) if (*prefix, code) in legal]
            beams = sorted(longer, key=lambda beam: -beam[1])[:width]
        return beams


def as_list(result, request):
    alive = result.leaf_BK[request] >= 0
    return [tuple(codes) for codes in result.codes_BKL[request][alive].tolist()], result.score_BK[request][alive]


@pytest.mark.parametrize("normalise", ["all", "legal"])
@pytest.mark.parametrize("seed", range(3))
def test_full_budget_equals_brute_force(seed, normalise):
    market = Market(seed)
    result = beam_search(market.step, market.trie, market.legal, market.request_group, N, normalise)
    for request in range(B):
        scores = {leaf: sum(market.step_score(request, leaf[:level], leaf[level], normalise) for level in range(L))
                  for leaf in market.legal_leaves(request)}
        best = sorted(scores, key=lambda leaf: -scores[leaf])
        leaves, found = as_list(result, request)
        assert leaves == best
        torch.testing.assert_close(found.double(), torch.tensor([scores[leaf] for leaf in best], dtype=torch.double), atol=1e-5, rtol=0)


@pytest.mark.parametrize("normalise", ["all", "legal"])
@pytest.mark.parametrize("widths", [1, 4, (2, 6, 3), (5, 9, 30)])
def test_any_budget_equals_a_beam_of_lists(widths, normalise):
    market = Market(11)
    result = beam_search(market.step, market.trie, market.legal, market.request_group, widths, normalise)
    widths = (widths,) * L if isinstance(widths, int) else widths
    assert result.leaf_BK.shape == (B, widths[-1]) and result.codes_BKL.shape == (B, widths[-1], L)
    for request in range(B):
        expected = market.slow_beam(request, widths, normalise)
        leaves, found = as_list(result, request)
        assert leaves == [leaf for leaf, _ in expected]
        torch.testing.assert_close(found.double(), torch.tensor([score for _, score in expected], dtype=torch.double), atol=1e-5, rtol=0)


def test_scores_over_all_codes_rank_by_probability_and_legal_ones_sum_to_one():
    market = Market(5)
    legal = beam_search(market.step, market.trie, market.legal, market.request_group, N, "legal").score_BK.exp().sum(1)
    torch.testing.assert_close(legal, torch.tensor([1.0, 1, 1, 1, 0, 1, 1]))
    everything = market.trie.legal_nodes([None])
    no_group = torch.zeros(B, dtype=torch.long)
    unrestricted = beam_search(market.step, market.trie, everything, no_group, N)
    restricted = beam_search(market.step, market.trie, market.legal, market.request_group, N)
    for request in range(B):
        leaves, scores = as_list(restricted, request)
        probability = dict(zip(*as_list(unrestricted, request), strict=True))
        assert [probability[leaf] for leaf in leaves] == list(scores)


@pytest.mark.parametrize("seed", range(3))
def test_only_legal_leaves_come_out_and_a_prefix_without_leaves_never_appears(seed):
    market = Market(seed)
    off = market.codes[0, :2]  # switch off every leaf below this prefix
    market.groups = [group[(market.codes[group, :2] != off).any(axis=1)] for group in market.groups]
    seen = []

    def step(request_N, prefix_codes_Nl):
        seen.extend(tuple(prefix) for prefix in prefix_codes_Nl.tolist())
        return market.step(request_N, prefix_codes_Nl)

    result = beam_search(step, market.trie, market.trie.legal_nodes(market.groups), market.request_group, 8)
    assert tuple(off.tolist()) not in seen
    for request in range(B):
        leaves, _ = as_list(result, request)
        assert set(leaves) <= set(market.legal_leaves(request)) and len(set(leaves)) == len(leaves)
        assert len(leaves) == min(8, len(market.legal_leaves(request))) or len(market.legal_leaves(request)) > 8


@pytest.mark.parametrize("normalise", ["legal", "all"])
@pytest.mark.parametrize("k", [1, 5, 100])
def test_items_come_by_probability_of_leaf_and_share_and_only_eligible_ones(k, normalise):
    market = Market(2)
    weight = torch.from_numpy(np.random.default_rng(0).integers(0, 3, N))  # with ties
    result = beam_search(market.step, market.trie, market.legal, market.request_group, 6)
    item_BK, score_BK = expand_items(result, market.trie, market.legal[-1], market.request_group, market.trie.slot_weights(weight), k,
                                     normalise)
    leaf_of = [tuple(codes) for codes in market.codes.tolist()]
    for request in range(B):
        eligible, expected = market.groups[market.request_group[request]], []
        score_of_leaf = dict(zip(*as_list(result, request), strict=True))
        for item in eligible:
            if leaf_of[item] in score_of_leaf:
                sharing = eligible if normalise == "legal" else range(N)
                total = sum(float(weight[other]) + 0.1 for other in sharing if leaf_of[other] == leaf_of[item])
                expected.append((float(score_of_leaf[leaf_of[item]]) + math.log((float(weight[item]) + 0.1) / total), int(item)))
        expected = sorted(expected, reverse=True)[:k]
        assert item_BK[request, len(expected):].eq(-1).all() and score_BK[request, len(expected):].eq(-torch.inf).all()
        torch.testing.assert_close(score_BK[request, : len(expected)], torch.tensor([score for score, _ in expected]))
        assert sorted(item_BK[request, : len(expected)].tolist()) == sorted(item for _, item in expected) or k < N
        score_of_item = {item: score for score, item in expected}
        ranked = item_BK[request, : len(expected)].tolist()
        assert all(score_of_item.get(item, expected[-1][0]) == pytest.approx(score, abs=1e-5) for item, (score, _) in
                   zip(ranked, expected, strict=True))


def test_with_the_prior_a_model_that_knows_nothing_ranks_by_popularity():
    market = Market(3)
    weight = torch.from_numpy(np.random.default_rng(1).permutation(N)).double()  # no ties
    slot_weights = market.trie.slot_weights(weight)

    def uniform(request_N, prefix_codes_Nl):
        return torch.zeros(request_N.numel(), market.trie.codebook_size).log_softmax(-1)

    result = beam_search(uniform, market.trie, market.legal, market.request_group, N, "prior", slot_weights)
    item_BK, score_BK = expand_items(result, market.trie, market.legal[-1], market.request_group, slot_weights, N, "prior")
    for request in range(B):
        eligible = market.groups[market.request_group[request]]
        by_weight = sorted((int(item) for item in eligible), key=lambda item: -float(weight[item]))
        assert item_BK[request, : len(eligible)].tolist() == by_weight
        share = torch.tensor([float(weight[item]) + 0.1 for item in by_weight], dtype=torch.double)
        torch.testing.assert_close(score_BK[request, : len(eligible)].exp().double(), share / share.sum(), rtol=1e-5, atol=1e-7)
