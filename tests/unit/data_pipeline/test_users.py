"""Stored user ids: by default keyed hashes of a salt that lies nowhere but in its file; everything else is the same with any salt."""

import stat

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from user_logs import SPLITS, USERS, build_users, files_with, manifests_of, write_user_logs

from data_pipeline import build
from data_pipeline.knowledge import BuildKnowledgeConfig, GivenTextsConfig, build_knowledge
from data_pipeline.shards import iter_record_batches
from data_pipeline.users import SALT_FILE, SALT_VARIABLE, USERS_FILE, UserIds, UsersConfig, choose_users, open_users, record_users
from gpr_dist.errors import ConfigError, DataError


@pytest.fixture(scope="module")
def logs(tmp_path_factory):
    return write_user_logs(tmp_path_factory.mktemp("logs"))


@pytest.fixture(scope="module")
def built(logs, tmp_path_factory):
    """With the defaults: hashed, with a generated salt."""
    return build_users(logs, tmp_path_factory.mktemp("hashed") / "data")


def rows_of(data, split):
    return pa.Table.from_batches(iter_record_batches(data / "shards" / split))


def content(data, split):
    """The bytes of every column but the ids: NaN is equal to NaN."""
    return [batch.drop_columns(["user_id"]).serialize().to_pybytes() for batch in iter_record_batches(data / "shards" / split)]


def test_no_raw_id_is_stored_and_each_is_found_by_its_hash(built):
    assert files_with(built, "person-", "@example") == []
    found = {user for split in SPLITS for user in rows_of(built, split)["user_id"].to_pylist()}
    assert found == set(open_users(built).stored(pa.array(USERS)).to_pylist()) and len(found) == len(USERS)
    assert all(len(user) == 32 and int(user, 16) for user in found)


def test_the_salt_lies_in_its_file_only(built):
    salt = (built / SALT_FILE).read_text()
    assert stat.S_IMODE((built / SALT_FILE).stat().st_mode) == 0o600 and len(salt) == 64
    assert files_with(built, salt) == [SALT_FILE]


def test_another_salt_changes_the_ids_and_nothing_else(logs, built, tmp_path, monkeypatch):
    monkeypatch.setenv(SALT_VARIABLE, "a salt that a cluster's secrets hold")
    other = build_users(logs, tmp_path / "other")
    plain = build_users(logs, tmp_path / "plain", users={"ids": "plain"})
    for split in SPLITS:
        one, two, three = (rows_of(data, split) for data in (built, other, plain))
        assert content(built, split) == content(other, split) == content(plain, split)
        assert not set(one["user_id"].to_pylist()) & set(two["user_id"].to_pylist())
        assert open_users(other).stored(three["user_id"]).equals(two["user_id"].combine_chunks())
    same = [{split: manifest.fingerprint for split, manifest in manifests_of(data).items()} for data in (built, other, plain)]
    assert same[0] == same[1] == same[2]
    assert not (other / SALT_FILE).exists() and files_with(other, "a salt that") == []


def test_the_same_salt_gives_the_same_bytes(logs, built, tmp_path):
    again = build_users(logs, tmp_path / "again", users={"salt": built / SALT_FILE})
    for path in built.rglob("shards/*/*"):
        assert path.read_bytes() == (again / path.relative_to(built)).read_bytes(), path
    assert (again / USERS_FILE).read_bytes() == (built / USERS_FILE).read_bytes()


def test_a_rebuild_keeps_the_salt_and_refuses_another(logs, tmp_path, capsys, monkeypatch):
    data = build_users(logs, tmp_path / "data")
    ids = rows_of(data, "test")["user_id"].to_pylist()
    build_users(logs, data, min_buckets=2)
    assert rows_of(data, "test")["user_id"].to_pylist() == ids
    monkeypatch.setenv(SALT_VARIABLE, "not the salt of this data set")
    with pytest.raises(ConfigError, match=r"has user ids of the salt \w{16}, this one is \w{16}.*give the old salt"):
        build_users(logs, data)
    assert rows_of(data, "test")["user_id"].to_pylist() == ids
    monkeypatch.delenv(SALT_VARIABLE)
    (data / SALT_FILE).rename(tmp_path / "kept")
    capsys.readouterr()
    build_users(logs, data, min_buckets=2)  # nothing to do, so nothing is asked for
    assert "up to date" in capsys.readouterr().out
    with pytest.raises(ConfigError, match=r"hashed with the salt \w{16}, which is not here"):
        build_users(logs, data, min_buckets=3)
    assert rows_of(data, "test")["user_id"].to_pylist() == ids and not (data / SALT_FILE).exists()


def test_an_interrupted_build_holds_no_raw_id(logs, tmp_path, monkeypatch):
    def fail(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(build, "build_journeys", fail)
    with pytest.raises(KeyboardInterrupt):
        build_users(logs, tmp_path / "data")
    assert (tmp_path / "data" / ".build" / "users").exists() and files_with(tmp_path / "data", "person-", "@example") == []


def test_stored_ids_do_not_depend_on_the_arrays_form():
    ids, text = UserIds(b"k" * 64), pa.array(["a", None, "b", "a", "", "ü"])
    expected = ids.stored(text).to_pylist()
    assert expected[0] == expected[3] and expected[1] is None and len({*expected}) == 5
    forms = [text.cast(pa.large_string()), text.dictionary_encode(), pa.chunked_array([text[:2], text[2:]]),
             pa.chunked_array([text.dictionary_encode()[:2], text.dictionary_encode()[2:]])]
    assert all(ids.stored(form).to_pylist() == expected for form in forms)
    assert ids.stored(text[2:4]).to_pylist() == expected[2:4] and UserIds(None).stored(text.dictionary_encode()).equals(text)
    assert UserIds(b"l" * 64).stored(text).to_pylist()[0] != expected[0]


def test_where_the_salt_is_looked_for(tmp_path, monkeypatch):
    file = tmp_path / "salt"
    file.write_text("sixteen or more bytes\n")
    found = choose_users(UsersConfig(salt=file), tmp_path)
    record_users(tmp_path, found)
    monkeypatch.setenv(SALT_VARIABLE, "sixteen or more bytes")
    assert open_users(tmp_path) == open_users(tmp_path, file)  # a line's end is no part of it
    monkeypatch.setenv(SALT_VARIABLE, "short")
    with pytest.raises(ConfigError, match="has 5 bytes; at least 16"):
        open_users(tmp_path)
    monkeypatch.delenv(SALT_VARIABLE)
    with pytest.raises(ConfigError, match=r"user salt .*nowhere cannot be read: No such file"):
        open_users(tmp_path, tmp_path / "nowhere")
    (tmp_path / USERS_FILE).write_text("[]")
    with pytest.raises(DataError, match=r"users.json is damaged"):
        open_users(tmp_path)
    assert open_users(tmp_path / "data of an older version").key is None


def test_given_texts_find_their_users(logs, built, tmp_path):
    texts = tmp_path / "texts.parquet"
    pq.write_table(pa.table({"user_id": USERS[::-1], "vector": [[float(USERS.index(user)), 1.0] for user in USERS[::-1]]}), texts)
    given = GivenTextsConfig(path=texts, columns=("vector",), vectors_by="numbers")
    manifest = build_knowledge(BuildKnowledgeConfig(data=built, out=tmp_path / "knowledge", given=given, max_missing_frac=0))
    number = dict(zip(open_users(built).stored(pa.array(USERS)).to_pylist(), range(len(USERS)), strict=True))
    vectors = np.load(tmp_path / "knowledge" / manifest.vectors, allow_pickle=False)
    for entry in manifest.splits.values():
        rows = np.load(tmp_path / "knowledge" / entry.file, allow_pickle=False)
        assert vectors[rows, 0, 0].tolist() == [number[user] for user in rows_of(built, entry.split)["user_id"].to_pylist()]
