"""What a request may repeat, against a slow walk over its row; and the users' older events, against the journeys themselves."""

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from journeys_fixture import NUM_ITEMS, random_journeys, write_split
from random_batches import concat_batches, empty_batch, random_batch

from data_pipeline.history import build_history, is_history_of
from gpr_dist.data.eligibility import Eligibility
from gpr_dist.data.history import UserHistory
from gpr_dist.data.loader import LoaderConfig, iter_once
from gpr_dist.data.past import PastItems
from gpr_dist.data.sampler import World
from gpr_dist.errors import ConfigError, DataError
from gpr_dist.schema import TokenType

ITEMS, V, L = 12, 4, 3
CODES = np.random.default_rng(0).integers(0, V, (ITEMS, L))


def repeating_batch(seed, num_rows=4):
    """A random batch of few items, with codes that belong to the items, and eligibility groups."""
    batch, rng = random_batch(seed, num_rows=num_rows, codebook_size=V), np.random.default_rng(seed)
    item, target = batch.item_T % ITEMS, batch.target_item_N % ITEMS
    item[batch.item_T < 0] = -1
    codes = torch.from_numpy(CODES)
    return dataclasses.replace(batch, item_T=item, codes_TL=torch.where(item[:, None] < 0, -1, codes[item]), target_item_N=target,
                               target_codes_NL=codes[target],
                               request_eligibility_R=torch.from_numpy(rng.integers(-1, 4, len(batch.request_row_R))))


def random_eligibility(seed):
    rng = np.random.default_rng(seed)
    groups = [np.sort(rng.choice(ITEMS, size, replace=False)).astype(np.int32) for size in (0, 3, 7, 12)]
    return Eligibility(groups, np.arange(0, ITEMS, 2, dtype=np.int32), ITEMS)


class Events:
    """Stands in for UserHistory: two older events of row 0, none of row 1, three of the others."""

    def gather(self, rows):
        lengths = [(2, 0, 3)[min(row, 2)] for row in rows.tolist()]
        items = [(7 * row + k) % ITEMS for row, length in zip(rows.tolist(), lengths, strict=True) for k in range(length)]
        item = np.array(items, np.int64)
        return np.cumsum([0, *lengths]), {"item": item, "time": item + 5, "action": item % 2 + 1}


@pytest.mark.parametrize("history", [None, Events()])
@pytest.mark.parametrize("seed", range(4))
def test_pairs_and_ranges_equal_a_walk(seed, history):
    eligibility = random_eligibility(seed)
    found = PastItems(CODES, V, eligibility).add_to(repeating_batch(seed), history)
    older = found.past_offsets_B1.tolist() if history else []
    for request, row in enumerate(found.request_row_R.tolist()):
        shown = set(eligibility.items(int(found.request_eligibility_R[request])).tolist())
        tokens = range(int(found.offsets_B1[row]), int(found.request_token_R[request]) + 1)
        expected = {t for t in tokens if int(found.item_T[t]) in shown}
        if history:
            expected |= {found.num_tokens + x for x in range(older[row], older[row + 1]) if int(found.past_item_X[x]) in shown}
        mine = found.copy_request_M == request
        assert sorted(found.copy_source_M[mine].tolist()) == sorted(expected)
    assert (found.copy_request_M.diff() >= 0).all() and len(found.copy_request_M) > 20
    item_S = torch.cat((found.item_T, found.past_item_X)) if history else found.item_T
    for n, (request, codes) in enumerate(zip(found.target_request_N.tolist(), found.target_codes_NL.tolist(), strict=True)):
        for level in range(L):
            begin, end = found.target_copy_NL2[n, level].tolist()
            expected = [m for m in range(len(item_S[found.copy_source_M])) if found.copy_request_M[m] == request
                        and CODES[item_S[found.copy_source_M[m]], : level + 1].tolist() == codes[: level + 1]]
            assert list(range(begin, end)) == expected or (begin == end and not expected)


def test_pairs_do_not_depend_on_packing_or_on_the_answer():
    past, parts = PastItems(CODES, V, random_eligibility(0)), [repeating_batch(seed, 1) for seed in range(5)]
    whole = past.add_to(concat_batches(parts))
    tokens = requests = 0
    request, source = [], []
    for part in map(past.add_to, parts):
        request.append(part.copy_request_M + requests)
        source.append(part.copy_source_M + tokens)
        tokens, requests = tokens + part.num_tokens, requests + len(part.request_row_R)
    assert torch.equal(torch.cat(request), whole.copy_request_M) and torch.equal(torch.cat(source), whole.copy_source_M)
    batch = concat_batches(parts)
    other = dataclasses.replace(batch, target_item_N=(batch.target_item_N + 1) % ITEMS)
    assert torch.equal(past.add_to(other).copy_source_M, whole.copy_source_M)
    half = whole.keep_targets(torch.arange(len(whole.target_head_N)) % 2 == 0)
    assert torch.equal(half.target_copy_NL2, whole.target_copy_NL2[::2])


def test_no_rows_and_too_many_codes():
    found = PastItems(CODES, V, random_eligibility(0)).add_to(empty_batch(), None)
    assert len(found.copy_request_M) == 0 and found.target_copy_NL2.shape == (0, L, 2)
    with pytest.raises(ConfigError, match="pointer"):
        PastItems(np.zeros((3, 6), np.int64), 8192, random_eligibility(0))


def write_shards(folder: Path, num_rows=60):
    """Three splits of the same users, each two rows a split; `random_journeys` puts no order between the rows, the history sorts."""
    rows = random_journeys(num_rows, seed=3).to_pylist()
    for number, row in enumerate(rows):
        row["user_id"] = f"user-{number % 10}"
    manifests = {}
    for k, split in enumerate(("train", "validation", "test")):
        journeys = type(random_journeys(1)).from_pylist(rows[k::3], random_journeys(1).schema)
        manifests[split] = write_split(folder / "shards" / split, journeys)
    return rows, manifests


def test_history_holds_what_the_user_did_before_the_row_began(tmp_path):
    rows, _ = write_shards(tmp_path)
    build_history(tmp_path, tmp_path / "history")
    for k, split in enumerate(("train", "validation", "test")):
        batch = next(iter(iter_once(tmp_path / "shards" / split, LoaderConfig(micro_batch_tokens=1 << 20), World(0, 1),
                                    np.zeros((NUM_ITEMS, 2), np.int64), 1,
                                    past=PastItems(np.zeros((NUM_ITEMS, 2), np.int64), 4, EVERYTHING, tmp_path / "history", 8))))
        lengths = 0
        for number, row in enumerate(rows[k::3]):
            events = []
            for other in rows:
                if other["user_id"] == row["user_id"]:
                    fresh = range(other["num_context"], len(other["item"]) - other["num_lookahead"])
                    events += [(other["timestamp"][t], other["item"][t], other["action"][t]) for t in fresh if other["item"][t] >= 0]
            before = sorted(event for event in events if event[0] < row["timestamp"][0])[-8:]
            mine = slice(int(batch.past_offsets_B1[number]), int(batch.past_offsets_B1[number + 1]))
            assert sorted(zip(batch.past_time_X[mine].tolist(), batch.past_item_X[mine].tolist(), batch.past_action_X[mine].tolist(),
                              strict=True)) == before
            lengths += len(before)
        assert lengths > 20 and len(batch.past_item_X) == lengths


EVERYTHING = Eligibility([np.arange(NUM_ITEMS, dtype=np.int32)] * 5, np.arange(NUM_ITEMS, dtype=np.int32), NUM_ITEMS)


def test_a_history_of_other_shards_or_an_altered_one_is_refused(tmp_path):
    _, manifests = write_shards(tmp_path)
    manifest = build_history(tmp_path, tmp_path / "history")
    assert is_history_of(tmp_path / "history", tmp_path)
    shutil.copytree(tmp_path / "shards" / "train", tmp_path / "fewer" / "shards" / "train")
    assert not is_history_of(tmp_path / "history", tmp_path / "fewer")
    with pytest.raises(DataError, match="made for the shards"):
        UserHistory(tmp_path / "history", manifests["train"].model_copy(update={"num_rows": 7}), 8)
    file = tmp_path / "history" / manifest.files["item"]
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(DataError, match="altered"):
        UserHistory(tmp_path / "history", manifests["train"], 8)
    file.unlink()
    with pytest.raises(DataError, match="cannot be read"):
        UserHistory(tmp_path / "history", manifests["train"], 8)
    with pytest.raises(DataError, match=r"history\.json"):
        UserHistory(tmp_path / "nothing", manifests["train"], 8)
    with pytest.raises(DataError, match="no journeys"):
        build_history(tmp_path / "nothing", tmp_path / "out")


def test_copies_are_items_only():
    found = PastItems(CODES, V, random_eligibility(1)).add_to(repeating_batch(9), None)
    kinds = set(found.token_type_T[found.copy_source_M].tolist())
    assert kinds == {TokenType.O, TokenType.I}
