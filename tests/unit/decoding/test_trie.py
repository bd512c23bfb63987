from itertools import pairwise

import numpy as np
import pytest
import torch

from gpr_dist.decoding.legality import LegalCache
from gpr_dist.decoding.trie import Trie
from gpr_dist.errors import TokenizerError


def random_codes(seed, num_items=60, codebook_size=4, num_levels=3):
    return np.random.default_rng(seed).integers(0, codebook_size, (num_items, num_levels))


def paths(trie):
    """Every node's whole prefix, per level, by walking up to the root."""
    prefixes = [[()]]
    for level in range(trie.num_levels):
        parents, codes = trie.parent[level].tolist(), trie.code[level].tolist()
        prefixes.append([prefixes[-1][parent] + (code,) for parent, code in zip(parents, codes, strict=True)])
    return prefixes[1:]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("num_levels", [1, 3])
def test_nodes_are_the_sorted_prefixes_and_leaves_hold_their_items(seed, num_levels):
    codes = random_codes(seed, num_levels=num_levels)
    items = np.random.default_rng(seed).permutation(100)[:60]
    trie = Trie.from_codes(codes, 4, items)
    for level, prefixes in enumerate(paths(trie)):
        assert prefixes == sorted({tuple(row[: level + 1]) for row in codes.tolist()})
        offsets = trie.child_offset[level].tolist()
        for parent, (first, end) in enumerate(pairwise(offsets)):
            assert trie.parent[level][first:end].eq(parent).all() and end > first
    leaves, offsets = paths(trie)[-1], trie.child_offset[-1].tolist()
    for leaf, (first, end) in enumerate(pairwise(offsets)):
        expected = sorted(item for item, row in zip(items.tolist(), codes.tolist(), strict=True) if tuple(row) == leaves[leaf])
        assert trie.slot_item[first:end].tolist() == expected
    assert trie.contains(torch.arange(-1, 120)).tolist() == [item in items for item in range(-1, 120)]


def test_the_order_of_the_items_does_not_matter():
    codes, order = random_codes(0), np.random.default_rng(1).permutation(60)
    one, other = Trie.from_codes(codes, 4), Trie.from_codes(codes[order], 4, order)
    assert torch.equal(one.slot_item, other.slot_item) and all(map(torch.equal, one.parent, other.parent))


def test_codes_beyond_16_bits():
    trie = Trie.from_codes(np.array([[70_000, 1], [3, 65_537], [3, 1]]), 1 << 20)
    assert paths(trie)[-1] == [(3, 1), (3, 65_537), (70_000, 1)] and trie.slot_item.tolist() == [2, 1, 0]


def test_legal_nodes_are_the_prefixes_of_eligible_items():
    codes = random_codes(3)
    trie = Trie.from_codes(codes[:50], 4)
    groups = [np.array([0, 7, 55, 999, -1]), np.array([], dtype=np.int32), None, np.arange(20, 50)]
    legal = trie.legal_nodes(groups)
    for row, group in enumerate(groups):
        items = [item for item in (range(50) if group is None else group.tolist()) if 0 <= item < 50]
        for level, prefixes in enumerate(paths(trie)):
            expected = {tuple(codes[item, : level + 1].tolist()) for item in items}
            assert {prefix for prefix, is_legal in zip(prefixes, legal[level][row].tolist(), strict=True) if is_legal} == expected
        assert set(trie.slot_item[legal[-1][row]].tolist()) == set(items)


@pytest.mark.parametrize("capacity", [1, 2, 10])
def test_cached_bitmaps_equal_fresh_ones(capacity):
    trie, rng = Trie.from_codes(random_codes(4), 4), np.random.default_rng(0)
    groups = [np.sort(rng.choice(60, 12, replace=False)) for _ in range(5)]
    asked = []
    cache = LegalCache(trie, lambda group: asked.append(group) or groups[group], capacity)
    for wanted in ([3, 0, 3], [], [0, 1, 2, 4], [4, 4]):
        legal, request_group = cache(torch.tensor(wanted, dtype=torch.long))
        for level, fresh in enumerate(trie.legal_nodes([groups[group] for group in wanted])):
            assert torch.equal(legal[level][request_group], fresh)
    assert len(asked) == (5 if capacity == 10 else len(asked)) and asked.count(4) == 1


@pytest.mark.parametrize("codes, items, message", [
    ([[0, 1], [2, 4]], None, r"item 1 has codes \[2, 4\], expected 0\.\.3"),
    ([[0, -1], [2, 3]], [8, 9], r"item 8 has codes"),
    ([[0, 1], [2, 3]], [5, 5], "listed twice"),
    (np.empty((0, 3), int), None, "N > 0"),
])
def test_bad_codes_are_refused(codes, items, message):
    with pytest.raises(TokenizerError, match=message):
        Trie.from_codes(np.array(codes), 4, None if items is None else np.array(items))
