"""Given texts and vectors: who gets which, what is counted, what is refused, and vectors of one encoder stay comparable."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.feather
import pyarrow.parquet as pq
import pytest
from journeys_fixture import random_journeys, write_split

from data_pipeline import knowledge
from data_pipeline.knowledge import BuildKnowledgeConfig, GivenTextsConfig, build_knowledge, describe_knowledge
from data_pipeline.user_texts import first_ad_times
from gpr_dist.config import build_config
from gpr_dist.data.knowledge import KnowledgeVectors
from gpr_dist.errors import ConfigError, DataError
from gpr_dist.schema import KnowledgeManifest

WORDS = ["tea", "shoe", "lamp", "book", "car", "bike", "hat", "pen", "red", "blue", "wild", "tiny"]


@pytest.fixture
def data(tmp_path):
    """Rows of user-0 to user-39 in each split; half of the users have a text."""
    for seed, split in enumerate(("train", "validation")):
        write_split(tmp_path / "data" / "shards" / split, random_journeys(40, seed), num_parts=2)
    return tmp_path / "data"


def sentences(num, seed=0):
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, 5)) for _ in range(num)]


def build(data, table, path=None, embedding=None, max_missing_frac=1.0, out="knowledge", dtype="float32", **given):
    path = path or data.parent / "users.parquet"
    {".parquet": pq.write_table, ".csv": pa.csv.write_csv, ".feather": lambda t, p: pa.feather.write_feather(t, str(p))}[path.suffix](
        table, path)
    values = {"data": data, "out": data.parent / out, "given": {"path": path, **given}, "dtype": dtype,
              "max_missing_frac": max_missing_frac, "embedding": {"dim": 4, "min_df": 1, **(embedding or {})}}
    return build_knowledge(build_config(BuildKnowledgeConfig, values, "test"))


def rows_of(data, manifest, split="train", out="knowledge"):
    entry = list(manifest.splits.values())[("train", "validation").index(split)]  # the fixture calls every split "train"
    return np.load(data.parent / out / entry.file)


@pytest.mark.parametrize("suffix", [".parquet", ".csv", ".feather"])
def test_each_user_gets_its_own_text_and_the_others_are_counted(data, suffix, monkeypatch):
    monkeypatch.setattr(knowledge, "_CHUNK_ROWS", 7)
    users = [f"user-{n}" for n in range(38, -2, -2)] + ["somebody else"]
    users[3], empty = "user-1", sentences(len(users))
    empty[5] = " "
    table = pa.table({"user_id": users, "likes": sentences(len(users)), "hates": empty})
    manifest = build(data, table, data.parent / f"users{suffix}", columns=("likes", "hates"))
    assert (manifest.num_texts, manifest.num_vectors, manifest.width) == (len(users), 2, 4)
    for split in ("train", "validation"):
        found = rows_of(data, manifest, split)
        assert found.tolist() == [users.index(f"user-{n}") if f"user-{n}" in users else -1 for n in range(40)]
    assert [(entry.num_rows, entry.num_missing) for entry in manifest.splits.values()] == [(40, 20), (40, 20)]
    vectors = np.load(data.parent / "knowledge" / manifest.vectors)
    norms = np.linalg.norm(vectors, axis=-1)
    assert norms[5, 1] == 0 and np.allclose(np.delete(norms.ravel(), 11), 1, atol=1e-5)
    assert len(np.unique(vectors.round(4).reshape(-1, 4), axis=0)) > 20


def test_a_text_with_a_time_is_given_to_later_journeys_only(data):
    journeys = random_journeys(40, 0)
    times = first_ad_times(journeys)
    users, as_of = [], []
    for number, time in enumerate(times.tolist()):
        for shift in ((-100, -1, 0, 1, 100), (-100, 1), (1, 2), ())[number % 4]:
            users.append(f"user-{number}")
            as_of.append(time + shift)
    order = np.random.default_rng(0).permutation(len(users))
    users, as_of = [users[i] for i in order], [as_of[i] for i in order]
    for kind in (pa.int64(), pa.timestamp("ms")):
        column = pa.array(as_of) if kind == pa.int64() else pa.array([time * 1000 for time in as_of]).cast(kind)
        manifest = build(data, pa.table({"user_id": users, "text": sentences(len(users)), "at": column}), as_of_column="at")
        for number, (text, time) in enumerate(zip(rows_of(data, manifest), times.tolist(), strict=True)):
            shift = (0, -100, None, None)[number % 4]
            assert text == -1 if shift is None else (users[text], as_of[text]) == (f"user-{number}", time + shift)


def test_given_vectors_are_kept_as_they_are(data):
    vectors = np.random.default_rng(0).normal(size=(40, 2, 6)).astype(np.float32)
    missing = [row == 3 for row in range(40)]
    columns = {name: pa.array([None if gone else list(map(float, row)) for row, gone in zip(vectors[:, place], missing, strict=True)],
                              pa.list_(pa.float32())) for place, name in enumerate(("a", "b"))}
    table = pa.table({"user_id": [f"user-{n}" for n in range(40)], **columns})
    manifest = build(data, table, columns=("a", "b"), vectors_by="our-encoder-3")
    vectors[3] = 0
    np.testing.assert_array_equal(np.load(data.parent / "knowledge" / manifest.vectors), vectors)
    assert manifest.encoder == {"source": "given", "by": "our-encoder-3"}
    half = build(data, table, columns=("a", "b"), vectors_by="our-encoder-3", dtype="float16")
    np.testing.assert_array_equal(np.load(data.parent / "knowledge" / half.vectors), vectors.astype(np.float16))
    assert half.fingerprint == manifest.fingerprint != build(data, table, columns=("a", "b"), vectors_by="other").fingerprint


def test_the_same_encoder_reads_new_texts_and_another_one_is_another_space(data):
    users = [f"user-{n}" for n in range(40)]
    first = build(data, pa.table({"user_id": users, "text": sentences(40)}))
    same = {"source": "same", "path": data.parent / "knowledge"}
    refreshed = build(data, pa.table({"user_id": users[::-1], "text": sentences(40)[::-1]}), embedding=same, out="refreshed")
    assert refreshed.fingerprint == first.fingerprint and refreshed.vectors != first.vectors
    old, new = (np.load(data.parent / folder / manifest.vectors) for folder, manifest in (("knowledge", first), ("refreshed", refreshed)))
    np.testing.assert_array_equal(new, old[::-1])
    assert build(data, pa.table({"user_id": users, "text": sentences(40, seed=1)}), out="other").fingerprint != first.fingerprint


def test_a_rebuilt_folder_holds_nothing_of_the_one_before(data):
    for seed in range(2):
        manifest = build(data, pa.table({"user_id": [f"user-{n}" for n in range(40)], "text": sentences(40, seed)}))
        files = {path.name for path in (data.parent / "knowledge").iterdir()}
        assert files == {"knowledge.json", manifest.vectors, manifest.blocks, manifest.encoder["file"],
                         *(entry.file for entry in manifest.splits.values())}
        assert KnowledgeManifest.load(data.parent / "knowledge") == manifest
    entries = json.loads((data.parent / "knowledge" / "knowledge.json").read_text())
    assert entries["num_texts"] == 40


def test_a_failed_build_leaves_the_old_folder_usable(data, monkeypatch):
    table = pa.table({"user_id": [f"user-{n}" for n in range(40)], "text": sentences(40)})
    build(data, table)
    monkeypatch.setattr(knowledge, "write_atomic", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError):
        build(data, table)
    manifest = write_split(data.parent / "again", random_journeys(40, 0), num_parts=2)
    assert KnowledgeVectors(data.parent / "knowledge", manifest).gather(np.arange(40)).any(-1).all()
    assert not list((data.parent / "knowledge").glob("*.tmp"))


USERS = [f"user-{n}" for n in range(40)]
VECTOR = [[1.0, 2.0]] * 39


@pytest.mark.parametrize(("table", "settings", "message"), [
    ({"user_id": USERS[:10], "text": sentences(10)}, {"max_missing_frac": 0.5}, r"30 of 40 journeys of .*train have no text .*give more"),
    ({"user_id": [*USERS, "user-7"], "text": sentences(41)}, {}, r"1 rows repeat a user, first row 40; .*several columns"),
    ({"user_id": [*USERS[1:], None], "text": sentences(40)}, {}, r"row 39 has no user_id"),
    ({"user_id": USERS, "text": [" "] * 40}, {}, r"users.parquet has no text to embed"),
    ({"user_id": USERS, "text": list(range(40))}, {}, r"columns text are int64; all should be strings"),
    ({"user_id": USERS, "words": sentences(40)}, {}, r"texts .*users.parquet cannot be read: .*no column text"),
    ({"user_id": USERS, "text": [*VECTOR, [1.0]]}, {}, r"a vector of text has 1 values, others have 2"),
    ({"user_id": USERS, "text": [*VECTOR, [1.0, float("inf")]]}, {}, r"vector of row 39 is not finite in float32"),
    ({"user_id": USERS, "text": [*VECTOR, [1.0, 1e6]]}, {"dtype": "float16"}, r"row 39 is not finite in float16; .*dtype=float32"),
    ({"user_id": USERS, "text": [None] * 40}, {}, r"columns text are null"),
    ({"user_id": USERS, "text": sentences(40), "at": [None] + [1] * 39}, {"as_of_column": "at"}, r"1 rows have no at; .*may foretell"),
    ({"user_id": USERS, "text": sentences(40), "at": ["x"] * 40}, {"as_of_column": "at"}, r"at should be timestamps or whole seconds"),
    ({"user_id": pa.array([], pa.string()), "text": pa.array([], pa.string())}, {}, r"has no row: nothing is known"),
])
def test_unusable_texts_are_one_line(data, table, settings, message):
    with pytest.raises(DataError, match=message):
        build(data, pa.table(table), **settings)
    assert not (data.parent / "knowledge" / "knowledge.json").exists()


def test_a_dry_run_opens_everything_and_writes_nothing(data):
    pq.write_table(pa.table({"user_id": USERS, "text": sentences(40)}), data.parent / "users.parquet")
    values = {"data": data, "out": data.parent / "knowledge", "given": {"path": data.parent / "users.parquet"}}
    lines = describe_knowledge(build_config(BuildKnowledgeConfig, values, "test"))
    assert lines[:2] == ["train: 40 journeys"] * 2 and lines[2].endswith("users.parquet: user_id string, text string")
    template = describe_knowledge(build_config(BuildKnowledgeConfig, {"data": data, "out": "o", "template": {}}, "test"))
    assert template[2].startswith("texts habits, interests, promotions at the end of each of ")
    assert not (data.parent / "knowledge").exists()
    with pytest.raises(DataError, match=r"no shards in .*nowhere/shards/train; build them"):
        describe_knowledge(build_config(BuildKnowledgeConfig, values | {"data": data.parent / "nowhere"}, "test"))


def test_settings_that_contradict_each_other():
    with pytest.raises(ConfigError, match="give one of template and given"):
        build_config(BuildKnowledgeConfig, {"data": "d", "out": "o"}, "test")
    with pytest.raises(ConfigError, match="path is needed by source=same"):
        build_config(BuildKnowledgeConfig, {"data": "d", "out": "o", "template": {}, "embedding": {"source": "same"}}, "test")
    with pytest.raises(DataError, match="unknown format"):
        next(knowledge.iter_texts(GivenTextsConfig(path="users.xlsx"), ["text"]))
