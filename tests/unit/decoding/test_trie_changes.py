"""Inserts, deletes and files: whatever the history, the trie holds the same paths and items as one built anew."""

import numpy as np
import pytest
import torch

from gpr_dist.decoding.trie import TRIE_FILE, Trie
from gpr_dist.errors import TokenizerError

V, L, N = 4, 3, 80


def content(trie, legal=None):
    """leaf -> its items, reached from the root by `children`; nodes that are not legal are not entered."""
    legal = trie.legal_nodes([None]) if legal is None else legal
    found = {}
    nodes, paths = torch.zeros(1, dtype=torch.long), [()]
    for level in range(trie.num_levels + 1):
        owner, child = trie.children(level, nodes)
        assert (owner.diff() >= 0).all()
        owner, child = (part[legal[level][0, child]] for part in (owner, child))
        if level == trie.num_levels:
            for number, item in zip(owner.tolist(), trie.slot_item[child].tolist(), strict=True):
                found.setdefault(paths[number], []).append(item)
            return {path: sorted(items) for path, items in found.items()}
        assert torch.equal(trie.parents_of(level, child), nodes[owner])
        paths = [(*paths[number], code) for number, code in zip(owner.tolist(), trie.codes_of(level, child).tolist(), strict=True)]
        assert len(set(paths)) == len(paths)
        nodes = child


def expected(codes, items):
    found = {}
    for item in items:
        found.setdefault(tuple(codes[item].tolist()), []).append(item)
    return {path: sorted(group) for path, group in found.items()}


@pytest.mark.parametrize("seed", range(8))
def test_any_history_of_inserts_and_deletes_equals_a_rebuilt_trie(seed):
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, V, (N, L))
    codes[N // 2:, 0] += rng.integers(0, 3)  # some prefixes start only with the late items
    alive = set(rng.choice(N, 20, replace=False).tolist())
    start = np.array(sorted(alive))
    trie = Trie.from_codes(codes[start], V + 2, start)
    for _ in range(6):
        before, known = content(trie), set(alive)
        absent = np.array(sorted(set(range(N)) - alive))
        added = rng.choice(absent, min(len(absent), int(rng.integers(1, 15))), replace=False)
        changed = trie.insert(codes[added], added)
        alive |= set(added.tolist())
        gone = rng.choice(np.array(sorted(alive)), int(rng.integers(0, 10)), replace=False)
        changed = changed.delete(np.append(gone, [-1, N + 7]))
        alive -= set(gone.tolist())
        assert content(trie) == before == expected(codes, known)  # a search on the old trie is not disturbed
        trie = changed
        assert content(trie) == expected(codes, alive)
        assert trie.num_items == len(alive) and trie.contains(torch.arange(-1, N + 3)).tolist() == [i in alive for i in range(-1, N + 3)]
        slots = trie.slots(torch.tensor(sorted(alive)))
        assert trie.slot_item[slots].tolist() == sorted(alive)
        for level, nodes in enumerate(trie.ancestors(slots)[:-1]):
            assert trie.codes_of(level, nodes).tolist() == codes[sorted(alive), level].tolist()
        rebuilt = Trie.from_codes(codes[sorted(alive)], V + 2, np.array(sorted(alive)))
        assert_equal(trie.compact(), rebuilt)
        groups = [rng.choice(N, 30, replace=False), []]
        for group in groups:
            assert content(trie, trie.legal_nodes([group])) == expected(codes, alive & set(np.array(group).tolist()))
        if rng.random() < 0.3:
            trie = trie.compact()


def assert_equal(trie, other):
    for name in ("code", "parent", "child_offset", "first_slot"):
        assert all(map(torch.equal, getattr(trie, name), getattr(other, name)))
    assert torch.equal(trie.slot_item, other.slot_item) and torch.equal(trie.slot_of_item, other.slot_of_item)
    assert trie.codebook_size == other.codebook_size and trie.overlay is None and trie.alive is None


def test_a_deleted_item_can_come_back_with_other_codes():
    trie = Trie.from_codes(np.array([[0, 1], [2, 3]]), V).delete([0]).insert(np.array([[3, 3]]), [0])
    assert content(trie) == {(2, 3): [1], (3, 3): [0]}
    assert content(trie.delete([0]).insert(np.array([[2, 3]]), [0])) == {(2, 3): [0, 1]}


def test_without_items_left_a_trie_answers_but_cannot_be_rebuilt():
    trie = Trie.from_codes(np.array([[0, 1]]), V).delete([0])
    assert content(trie) == {} and trie.num_items == 0
    with pytest.raises(TokenizerError, match="N > 0"):
        trie.compact()


@pytest.mark.parametrize("codes, items, message", [
    ([[0, 1]], [1], "item 1 is in the trie already"), ([[0, 1], [1, 1]], [5, 5], "listed twice"),
    ([[0, 4]], [5], r"item 5 has codes \[0, 4\]"), ([[0]], [5], "1 codes, the trie has 2 levels")])
def test_bad_inserts_are_refused(codes, items, message):
    trie = Trie.from_codes(np.array([[0, 1], [2, 3]]), V)
    with pytest.raises(TokenizerError, match=message):
        trie.insert(np.array(codes), np.array(items))


def test_a_file_gives_the_same_trie_compacted(tmp_path):
    codes = np.random.default_rng(0).integers(0, V, (N, L))
    trie = Trie.from_codes(codes[:60], V).insert(codes[60:], np.arange(60, N)).delete(np.arange(10))
    path = trie.save(tmp_path)
    assert path == tmp_path / TRIE_FILE
    assert_equal(Trie.load(tmp_path), Trie.from_codes(codes[10:], V, np.arange(10, N)))


@pytest.mark.parametrize("damage, message", [
    (lambda arrays: arrays.pop("slot_item"), "no tensor 'slot_item'"),
    (lambda arrays: arrays["code_1"].fill_(V), r"codes outside 0\.\.3"),
    (lambda arrays: arrays["child_offset_2"].sub_(1), "children of level 2"),
    (lambda arrays: arrays.update(slot_item=arrays["slot_item"][:-1]), "children of level 3"),
    (lambda arrays: arrays["child_offset_1"][1:2].fill_(9999), "children of level 1"),
])
def test_damaged_arrays_are_refused(damage, message):
    arrays = Trie.from_codes(np.random.default_rng(0).integers(0, V, (N, L)), V).to_arrays()
    damage(arrays)
    with pytest.raises(TokenizerError, match=message):
        Trie.from_arrays(arrays)


def test_a_missing_or_broken_file_is_refused(tmp_path):
    with pytest.raises(TokenizerError, match="cannot read"):
        Trie.load(tmp_path)
    (tmp_path / TRIE_FILE).write_bytes(b"no tensors")
    with pytest.raises(TokenizerError, match="cannot read"):
        Trie.load(tmp_path)
