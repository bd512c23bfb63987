"""The loader brings each row its user's vectors, on any rank and after any resume; damaged or foreign folders are refused in one line."""

import itertools
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from journeys_fixture import NUM_ITEMS, random_journeys, write_split

from data_pipeline import knowledge as build_module
from data_pipeline.knowledge import BuildKnowledgeConfig, build_knowledge
from gpr_dist.config import build_config
from gpr_dist.data.knowledge import KnowledgeVectors
from gpr_dist.data.loader import LoaderConfig, build_loader, iter_once
from gpr_dist.data.sampler import World
from gpr_dist.errors import DataError
from gpr_dist.schema import KnowledgeManifest, ShardManifest

NUM_ROWS = 203
CODES = np.random.default_rng(0).integers(0, 32, (NUM_ITEMS, 3))
CONFIG = LoaderConfig(seed=5, global_batch_size=24, num_streams=8, shuffle_rows=12, micro_batch_tokens=300)


def expected(rows):
    """Vectors of user-n, float32 [B, 2, 3]; every third user has none, every fifth only the second one."""
    vectors = np.array([[[n, 1, -n], [n, 2, n / 4]] for n in rows], np.float32).reshape(-1, 2, 3)
    vectors[np.asarray(rows) % 5 == 0, 0] = 0
    vectors[np.asarray(rows) % 3 == 0] = 0
    return torch.from_numpy(vectors)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(build_module, "_BLOCK_ROWS", 16)
    write_split(tmp_path / "shards" / "train", random_journeys(NUM_ROWS, seed=1), num_parts=3)
    users = [n for n in reversed(range(NUM_ROWS)) if n % 3]
    vectors = expected(users).numpy()
    columns = {name: pa.array([v[place].tolist() if v[place].any() else None for v in vectors]) for place, name in enumerate("ab")}
    pq.write_table(pa.table({"user_id": [f"user-{n}" for n in users], **columns}), tmp_path / "users.parquet")
    build_knowledge(build_config(BuildKnowledgeConfig, {
        "data": tmp_path, "out": tmp_path / "knowledge", "dtype": "float32",
        "given": {"path": tmp_path / "users.parquet", "columns": ["a", "b"]}}, "test"))
    return tmp_path


def load(folder, rank, world_size, **changes):
    config = CONFIG.model_copy(update=changes)
    return build_loader(folder / "shards/train", config, World(rank, world_size), CODES, 4, knowledge=folder / "knowledge")


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_vectors_follow_the_rows_on_every_rank_and_after_a_resume(folder, world_size):
    for rank in range(world_size):
        loader, seen = load(folder, rank, world_size), 0
        for step in itertools.islice(loader, 6):
            for batch in step.micro_batches:
                assert batch.knowledge_BmE.dtype == torch.float32 and torch.equal(batch.knowledge_BmE, expected(batch.row_ids_B.tolist()))
                seen += batch.num_rows
        assert seen > 100 // world_size
        resumed = load(folder, rank, world_size)
        resumed.load_state_dict({**resumed.state_dict(), "step": 6})
        for a, b in zip(next(iter(loader)).micro_batches, next(iter(resumed)).micro_batches, strict=True):
            assert torch.equal(a.knowledge_BmE, b.knowledge_BmE) and torch.equal(a.row_ids_B, b.row_ids_B)


def test_one_pass_brings_them_too_and_an_empty_batch_has_their_shape(folder):
    passes = [iter_once(folder / "shards/train", CONFIG, World(rank, 3), CODES, 4, knowledge=folder / "knowledge", max_rows=31)
              for rank in range(3)]
    batches = [batch for one in passes for batch in one]
    assert all(torch.equal(batch.knowledge_BmE, expected(batch.row_ids_B.tolist())) for batch in batches)
    assert sum(batch.num_rows for batch in batches) == 31
    vectors = KnowledgeVectors(folder / "knowledge", passes[0].reader.manifest)
    assert vectors.gather(np.zeros(0, np.int64)).shape == (0, 2, 3)


def test_without_a_folder_a_batch_has_none(folder):
    assert next(iter(iter_once(folder / "shards/train", CONFIG, World(), CODES, 4))).knowledge_BmE is None


def test_refreshed_knowledge_needs_no_new_shards_and_no_new_order(folder):
    first, state = load(folder, 0, 1), {}
    row_ids = [batch.row_ids_B.tolist() for step in itertools.islice(first, 4) for batch in step.micro_batches]
    state = first.state_dict()
    table = pq.read_table(folder / "users.parquet")
    pq.write_table(table.set_column(1, "a", table["b"]), folder / "users.parquet")
    build_knowledge(build_config(BuildKnowledgeConfig, {
        "data": folder, "out": folder / "knowledge", "given": {"path": folder / "users.parquet", "columns": ["a", "b"]}}, "test"))
    again = load(folder, 0, 1)
    assert [batch.row_ids_B.tolist() for step in itertools.islice(again, 4) for batch in step.micro_batches] == row_ids
    assert again.state_dict() == state
    batch = next(iter(again)).micro_batches[0]
    assert torch.equal(batch.knowledge_BmE[:, 0], batch.knowledge_BmE[:, 1]) and batch.knowledge_BmE.any()


def manifest_of(folder):
    path = folder / "shards/train/manifest.json"
    return ShardManifest.parse(path.read_bytes(), str(path))


def test_damaged_vectors_are_found_where_they_are_read(folder):
    manifest = KnowledgeManifest.load(folder / "knowledge")
    path = folder / "knowledge" / manifest.vectors
    content = bytearray(path.read_bytes())
    content[-1] ^= 1  # of the last text, user-1's
    path.write_bytes(content)
    vectors = KnowledgeVectors(folder / "knowledge", manifest_of(folder))
    fine = np.arange(100, 203)
    assert torch.equal(vectors.gather(fine), expected(fine))
    with pytest.raises(DataError, match=rf"{path}: texts 128 to {manifest.num_texts - 1} are damaged; make it again"):
        vectors.gather(np.arange(3))
    assert KnowledgeVectors(folder / "knowledge", manifest_of(folder), verify="never").gather(np.arange(3)).any()


def damage(folder, kind):
    manifest = KnowledgeManifest.load(folder / "knowledge")
    rows = next(iter(manifest.splits.values())).file
    where = folder / "knowledge"
    match kind:
        case "rows altered":
            np.save(where / rows, np.load(where / rows)[::-1])
        case "rows missing":
            (where / rows).unlink()
        case "vectors cut":
            content = (where / manifest.vectors).read_bytes()
            (where / manifest.vectors).write_bytes(content[:-8])
        case "vectors of another shape":
            np.save(where / manifest.vectors, np.zeros((manifest.num_texts, 1, 3), np.float32))
        case "checksums altered":
            np.save(where / manifest.blocks, np.load(where / manifest.blocks) + np.uint64(1))
        case "description damaged":
            (where / "knowledge.json").write_text("{")
        case "of another version":
            values = json.loads((where / "knowledge.json").read_text())
            (where / "knowledge.json").write_text(json.dumps({**values, "schema_version": 99}))
        case "of other shards":
            write_split(folder / "other", random_journeys(50, seed=2))
            (folder / "other").rename(folder / "moved")
            (folder / "shards/train").rename(folder / "gone")
            (folder / "moved").rename(folder / "shards/train")


@pytest.mark.parametrize(("kind", "message"), [
    ("rows altered", r"rows-.*npy was altered"), ("rows missing", r"rows-.*npy cannot be read"),
    ("vectors cut", r"vectors-.*npy cannot be read"),
    ("vectors of another shape", r"vectors-.*npy is float32 \(135, 1, 3\), expected shape \(135, 2, 3\)"),
    ("checksums altered", r"blocks-.*npy was altered"), ("description damaged", r"knowledge.json cannot be read"),
    ("of another version", r"schema version 99, this code reads 1"),
    ("of other shards", r"was made for the shards train \w{16}, not for train \w{16}"),
])
def test_a_damaged_or_foreign_folder_is_refused_in_one_line(folder, kind, message):
    damage(folder, kind)
    with pytest.raises(DataError, match=message) as error:
        load(folder, 0, 1)
    assert "build_knowledge.py" in str(error.value) and "\n" not in str(error.value)
