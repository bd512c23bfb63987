"""Legal nodes answered from packed slots, and exclusions kept sparse, against sets of items."""

import numpy as np
import pytest
import torch
from search_market import B, L, SearchMarket

from gpr_dist.decoding.legality import Eligible, Legal, pack_slots, unpack_slots


@pytest.mark.parametrize("dense_nodes", [0, 6, 1 << 17])
@pytest.mark.parametrize("seed, changed", [(0, False), (1, True), (2, True)])
def test_nodes_answered_from_slots_equal_bitmaps(seed, changed, dense_nodes):
    market, rng = SearchMarket(seed, changed), np.random.default_rng(seed)
    trie = market.trie
    groups = [rng.choice(70, size, replace=False) for size in (0, 3, 30, 70)]
    expected = trie.legal_nodes(groups)
    legal = Legal.from_slots(trie, pack_slots(torch.stack([torch.isin(trie.slot_item, torch.from_numpy(group)) for group in groups])),
                             dense_nodes)
    weights = torch.ones(trie.slot_item.numel(), dtype=torch.double)
    for level in range(L + 1):
        assert torch.equal(legal[level], expected[level])
        group_M = torch.from_numpy(rng.integers(0, 4, 200))
        node_M = torch.from_numpy(rng.integers(0, trie.num_nodes(level), 200))
        assert torch.equal(legal.mask(level, group_M, node_M), expected[level][group_M, node_M])
        if level < L:
            counts = trie.weights(expected[-1], weights)[level]
            for source in (legal, Legal(trie, expected)):
                assert torch.equal(source.count(level, group_M, node_M).double(), counts[group_M, node_M])


@pytest.mark.parametrize("num_slots", [1, 8, 37])
def test_packing_and_unpacking(num_slots):
    bits = torch.rand(3, num_slots) < 0.5
    packed = pack_slots(bits)
    assert packed.shape == (3, -(-num_slots // 8)) and packed.dtype == torch.uint8
    assert torch.equal(unpack_slots(packed, num_slots), bits)
    assert np.array_equal(packed.numpy(), np.packbits(bits.numpy(), axis=1, bitorder="little"))


@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize("seed", range(6))
def test_a_node_is_gone_when_all_its_items_are_excluded_for_that_request(seed, lazy):
    market = SearchMarket(seed, changed=seed % 2 == 1, lazy=lazy)
    trie, eligible = market.trie, market.eligible
    for request in range(B):
        slots = trie.slots(torch.tensor(market.items[request], dtype=torch.long))
        for level, nodes in enumerate(trie.ancestors(slots)):
            everything = torch.arange(trie.num_nodes(level))
            kept = eligible.keep(level, torch.full_like(everything, request), everything)
            kept = everything if kept is None else kept
            assert kept.tolist() == sorted(set(nodes.tolist()))


def test_exclusions_cost_memory_by_their_number_not_by_requests_times_nodes():
    market = SearchMarket(0)
    excluded = market.eligible.excluded
    assert all(pairs.key_X.numel() <= excluded.slot_X.numel() for pairs in excluded.pairs)
    assert all(pairs.node_n.numel() == market.trie.num_nodes(level) for level, pairs in enumerate(excluded.pairs))


def test_excluding_nothing_that_is_eligible_changes_nothing():
    market = SearchMarket(3, exclude=False)
    none = torch.empty(0, dtype=torch.long)
    for exclude in (None, (none, none), (torch.tensor([4, 0]), torch.tensor([5, 10_000]))):
        eligible = Eligible.of(market.trie, market.eligible.legal, market.group, exclude)
        owner, child = eligible.children(0, torch.arange(B), torch.zeros(B, dtype=torch.long))
        before = market.eligible.children(0, torch.arange(B), torch.zeros(B, dtype=torch.long))
        assert torch.equal(owner, before[0]) and torch.equal(child, before[1])
