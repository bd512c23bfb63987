"""Co-occurrence counts against a double loop, its vectors, both containers, and the tokenizer built with it."""

from collections import defaultdict
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from data_pipeline import cooccurrence
from data_pipeline.cooccurrence import CooccurrenceConfig, cooccurrence_svd, join
from data_pipeline.shards import ShardConfig, ShardWriter, write_manifest
from gpr_dist.errors import DataError
from gpr_dist.schema import JOURNEY_SCHEMA, NO_ITEM

NUM_ITEMS = 30


def journey(items: list[int], num_context: int = 0, num_lookahead: int = 0) -> dict:
    size = len(items)
    row = {field.name: [0] * size for field in JOURNEY_SCHEMA if pa.types.is_list(field.type)}
    kinds = [2 if item == NO_ITEM else 1 for item in items]
    return row | {"user_id": "u", "num_context": num_context, "num_lookahead": num_lookahead, "token_type": kinds, "item": items,
                  "user_features": [], "env_features": [], "eligibility": [-1]}


def random_journeys(num_rows: int = 40, seed: int = 0) -> list[dict]:
    random = np.random.default_rng(seed)
    rows = []
    for _ in range(num_rows):
        items = random.integers(NUM_ITEMS // 2, size=random.integers(2, 20)) + (NUM_ITEMS // 2 - 2) * random.integers(2)
        items[random.random(len(items)) < 0.2] = NO_ITEM
        context = int(random.integers(len(items)))
        rows.append(journey(items.tolist(), context, int(random.integers(len(items) - context + 1))))
    return rows


def write_shards(folder: Path, rows: list[dict], container: str = "arrow") -> Path:
    with ShardWriter(folder, 0, ShardConfig(container=container, rows_per_batch=7)) as writer:
        writer.write(pa.RecordBatch.from_pylist(rows, JOURNEY_SCHEMA))
    write_manifest(folder, "train", (), (), "c0ffee", NUM_ITEMS)
    return folder


def count_by_hand(rows: list[dict], window: int) -> np.ndarray:
    counts = defaultdict(float)
    for row in rows:
        end = len(row["item"]) - row["num_lookahead"]
        tokens = [(item, place >= row["num_context"]) for place, item in enumerate(row["item"][:end]) if item != NO_ITEM]
        for i, (left, _) in enumerate(tokens):
            for distance, (right, fresh) in enumerate(tokens[i + 1:i + 1 + window], 1):
                if fresh and left != right:
                    counts[left, right] += 1 / distance
                    counts[right, left] += 1 / distance
    dense = np.zeros((NUM_ITEMS, NUM_ITEMS))
    for (left, right), weight in counts.items():
        dense[left, right] = weight
    return dense


@pytest.mark.parametrize("container", ["arrow", "webdataset"])
@pytest.mark.parametrize("chunk_tokens", [20, 1 << 20])
def test_counts_equal_a_double_loop(tmp_path, container, chunk_tokens, monkeypatch):
    monkeypatch.setattr(cooccurrence, "_CHUNK_TOKENS", chunk_tokens)
    rows = random_journeys()
    counts = cooccurrence._count(write_shards(tmp_path, rows, container), NUM_ITEMS, CooccurrenceConfig(window=3))
    np.testing.assert_allclose(counts.toarray(), count_by_hand(rows, 3), rtol=1e-5)


def test_vectors_are_the_factors_of_the_ppmi(tmp_path):
    rows = random_journeys(400)
    items, vectors = cooccurrence_svd(write_shards(tmp_path, rows), NUM_ITEMS, CooccurrenceConfig(dim=8))
    counts = count_by_hand(rows, 5)
    seen = np.flatnonzero(counts.sum(1))
    np.testing.assert_array_equal(items, seen)
    counts, mass = counts[seen][:, seen], counts.sum(1)[seen]
    with np.errstate(divide="ignore"):
        ppmi = np.maximum(np.log(counts * mass.sum() / np.outer(mass, mass)), 0)
    left, scale, _ = np.linalg.svd(ppmi)
    expected = left[:, :8] * np.sqrt(scale[:8])
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    np.testing.assert_allclose(vectors @ vectors.T, expected @ expected.T, atol=0.05)  # up to signs; the SVD is randomised
    again = cooccurrence_svd(tmp_path, NUM_ITEMS, CooccurrenceConfig(dim=8))
    np.testing.assert_array_equal(vectors, again[1])


def test_limits_keep_the_most_frequent_items_and_stop_reading(tmp_path):
    rows = random_journeys(400)
    folder = write_shards(tmp_path, rows)
    mass = count_by_hand(rows, 5).sum(1)
    items, _ = cooccurrence_svd(folder, NUM_ITEMS, CooccurrenceConfig(dim=3, max_items=10))
    assert mass[items].min() >= np.sort(mass)[-10]
    some = cooccurrence._count(folder, NUM_ITEMS, CooccurrenceConfig(max_tokens=500)).sum()
    assert 0 < some < 0.5 * mass.sum()


def test_join_weights_the_content_and_leaves_unseen_items_without_behaviour(tmp_path):
    content = np.arange(12, dtype=np.float32).reshape(4, 3)
    joined = join(content, np.array([1, 3]), np.array([[1, 0], [0, 1]], np.float32), 0.5, tmp_path / "e.npy")
    np.testing.assert_array_equal(joined[:, :2], [[0, 0], [1, 0], [0, 0], [0, 1]])
    np.testing.assert_array_equal(joined[:, 2:], content / 2)


def test_missing_damaged_or_too_small_shards_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"shards .*nowhere cannot be read .*cooccurrence.dim=0"):
        cooccurrence_svd(tmp_path / "nowhere", NUM_ITEMS, CooccurrenceConfig(dim=4))
    folder = write_shards(tmp_path / "train", [journey([0, 1, 2])])
    with pytest.raises(DataError, match=r"only 3 items co-occur, too few for cooccurrence.dim=4"):
        cooccurrence_svd(folder, NUM_ITEMS, CooccurrenceConfig(dim=4))
    with pytest.raises(DataError, match=r"item 2 of a catalogue of 2"):
        cooccurrence_svd(folder, 2, CooccurrenceConfig(dim=1))
    shard = next(folder.glob("part-*.arrow"))
    whole = shard.read_bytes()
    middle = whole.rindex(np.array([0, 1, 2], np.int32).tobytes())
    for damaged in (whole[:100], whole[:middle] + b"\x07" + whole[middle + 1:]):
        shard.write_bytes(damaged)
        with pytest.raises(DataError, match=rf"{shard.name}: record batch at byte \d+ is damaged"):
            cooccurrence_svd(folder, NUM_ITEMS, CooccurrenceConfig(dim=1))
