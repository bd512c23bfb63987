"""The shared types: the manifest on disk, the batch, and files that are replaced whole or not at all."""

import dataclasses
import errno
import os

import pytest
import torch
from random_batches import concat_batches, empty_batch, random_batch

from gpr_dist import schema
from gpr_dist.errors import DataError
from gpr_dist.schema import JOURNEY_SCHEMA, SCHEMA_VERSION, Action, Batch, ShardInfo, ShardManifest, TokenType, write_atomic

MANIFEST = ShardManifest(container="arrow", compression="none", split="train", shards=(ShardInfo(name="a", num_bytes=5, num_rows=2),),
                         num_rows=2, num_tokens=9, num_targets=3, num_batches=1, first_timestamp=0, last_timestamp=10,
                         user_features=("age",), env_features=(), catalogue_fingerprint="c", num_items=4, content_checksum="d",
                         index_checksum="e")


def test_numbers_on_disk_never_change_their_meaning():
    assert {t.name: int(t) for t in TokenType} == {"U": 0, "O": 1, "E": 2, "I": 3}
    assert {a.name: int(a) for a in Action} == {"NONE": 0, "CONSUME": 1, "IMPRESSION": 2, "CLICK": 3, "CONVERSION": 4}
    assert SCHEMA_VERSION == 1 and len(JOURNEY_SCHEMA) == 15  # a change of the columns is a new version


def test_the_manifest_reads_back_equal(tmp_path):
    MANIFEST.save(tmp_path)
    path = tmp_path / "manifest.json"
    assert ShardManifest.parse(path.read_bytes(), str(path)) == MANIFEST and os.listdir(tmp_path) == ["manifest.json"]


@pytest.mark.parametrize("name", sorted(ShardManifest.model_fields.keys() - {
    "shards", "container", "compression", "index_checksum", "index_file", "rows_file"}))
def test_the_fingerprint_follows_the_content(name):
    value = getattr(MANIFEST, name)
    other = value + 1 if isinstance(value, int) else (*value, "new") if isinstance(value, tuple) else value + "x"
    assert MANIFEST.model_copy(update={name: other}).fingerprint != MANIFEST.fingerprint


def test_the_fingerprint_ignores_the_container():
    tar = MANIFEST.model_copy(update={"container": "webdataset", "compression": "zstd", "shards": (), "index_checksum": "z"})
    assert tar.fingerprint == MANIFEST.fingerprint and len(tar.fingerprint) == 16


@pytest.mark.parametrize(("text", "message"), [("{", "damaged"), ("[]", "damaged"), ('{"schema_version": 99}', "schema version 99"),
                                               ('{"schema_version": 1, "container": "arrow"}', "num_rows")])
def test_a_damaged_manifest_is_named(text, message):
    with pytest.raises(DataError, match=rf"(?s)some/where.*{message}.*rebuild the shards"):
        ShardManifest.parse(text, "some/where")


def test_a_batch_counts_itself_and_copies_whole():
    batch = random_batch(1, num_rows=4)
    assert (batch.num_rows, batch.num_tokens) == (4, len(batch.item_T)) and batch.num_targets == int((batch.target_head_N == 0).sum())
    assert (empty_batch().num_rows, empty_batch().num_tokens, empty_batch().num_targets) == (0, 0, 0)
    legal = dataclasses.replace(batch, target_offset_NLV=torch.zeros(len(batch.target_head_N), 3, 16))
    for source in (batch, legal):
        for f in dataclasses.fields(Batch):
            a, b = getattr(source, f.name), getattr(source.to("cpu"), f.name)
            assert a is b is None or torch.equal(a.nan_to_num(), b.nan_to_num())


def test_the_test_batches_are_lawful():
    batch = concat_batches([random_batch(1), empty_batch(), random_batch(2, num_rows=2)])
    assert batch.num_rows == 5 and (batch.request_row_R.diff() >= 0).all() and (batch.target_request_N < len(batch.request_row_R)).all()
    row = torch.repeat_interleave(torch.arange(5), batch.offsets_B1.diff())
    assert torch.equal(row[batch.request_token_R], batch.request_row_R)
    assert (batch.token_type_T[batch.request_token_R] == TokenType.E).all()
    assert (batch.token_type_T[batch.request_token_R + 1] == TokenType.I).all()


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "state"
    write_atomic(path, b"old")
    with monkeypatch.context() as broken:
        broken.setattr(schema.os, "fsync", lambda _: (_ for _ in ()).throw(OSError(errno.ENOSPC, "disk full")))
        with pytest.raises(OSError, match="disk full"):
            write_atomic(path, b"new, but cut")
    assert path.read_bytes() == b"old"
    write_atomic(path, b"new")
    assert path.read_bytes() == b"new" and os.listdir(tmp_path) == ["state"]
