"""Damaged, missing and foreign shards: one line that names file and batch; and the ways to open a folder."""

import json
import shutil

import pyarrow as pa
import pytest
from journeys_fixture import random_journeys, write_split

from data_pipeline.shards import ShardConfig, ShardWriter
from gpr_dist.data import storage
from gpr_dist.data.reader import ShardReader, iter_batches
from gpr_dist.errors import DataError

JOURNEYS = random_journeys(100)


def build(folder, container="arrow", compression="none"):
    config = ShardConfig(container=container, compression=compression, rows_per_batch=8, rows_per_shard=40)
    write_split(folder, JOURNEYS, config, num_parts=2)
    return folder


def read_all(reader):
    return pa.Table.from_batches([reader.read_batch(number) for number in range(reader.num_batches)])


def same(table, journeys):
    # compared through IPC: NaN differs from itself, and slices differ in their buffers
    everything = pa.array(range(journeys.num_rows))
    return table.take(everything).combine_chunks().to_batches()[0].serialize().equals(journeys.take(everything).serialize())


@pytest.mark.parametrize("container", ["arrow", "webdataset"])
@pytest.mark.parametrize("compression", ["none", "lz4", "zstd"])
def test_reads_back_what_was_written(tmp_path, container, compression):
    reader = ShardReader(build(tmp_path, container, compression))
    assert same(read_all(reader), JOURNEYS)
    assert reader.num_batches_read == reader.num_batches == 14
    assert reader.locate(99).endswith(("part-00001-0001.arrow batch 1 row 1", "part-00001-0001.tar batch 1 row 1"))


def test_opens_a_uri_and_a_remote_filesystem(tmp_path, monkeypatch):
    folder = build(tmp_path / "split")
    assert same(read_all(ShardReader(folder.as_uri())), JOURNEYS)
    wrapped = pa.fs.SubTreeFileSystem(str(tmp_path), pa.fs.LocalFileSystem())  # not local by type: takes the road of object stores
    monkeypatch.setattr(storage, "_open_uri", lambda uri, config: (wrapped, "split"))
    remote = ShardReader("s3://bucket/split", cache_dir=tmp_path / "cache")
    assert same(read_all(remote), JOURNEYS)
    assert len(list((tmp_path / "cache").iterdir())) == 2


@pytest.mark.parametrize("container,suffix", [("arrow", ".arrow"), ("webdataset", ".tar")])
def test_an_altered_byte_is_named_or_skipped(tmp_path, container, suffix):
    folder = build(tmp_path, container)
    clean = ShardReader(folder)
    shard, offset = int(clean._index["shard"][6]), int(clean._index["offset"][6])
    path = folder / clean.manifest.shards[shard].name
    content = bytearray(path.read_bytes())
    content[offset + 700] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match=rf"part-00000-0001{suffix} batch 1 is damaged: checksum [0-9a-f]{{16}}, expected [0-9a-f]{{16}}"):
        ShardReader(folder).read_batch(6)
    skipping = ShardReader(folder, on_corrupt="skip")
    batches = [skipping.read_batch_or_skip(number) for number in range(skipping.num_batches)]
    assert [batch is None for batch in batches] == [number == 6 for number in range(14)]
    assert (skipping.num_skipped_batches, skipping.num_skipped_rows) == (1, 2)
    ShardReader(folder, verify="never").read_batch(5)


def test_missing_truncated_and_empty_shards(tmp_path):
    for name, damage, message in [
        ("missing", lambda path: path.unlink(), r"part-00000-0001.arrow is missing"),
        ("truncated", lambda path: path.write_bytes(path.read_bytes()[:-3000]),
         r"part-00000-0001.arrow has \d+ bytes, the manifest says \d+"),
        ("empty", lambda path: path.write_bytes(b""), r"part-00000-0001.arrow has 0 bytes"),
    ]:
        folder = build(tmp_path / name)
        damage(folder / "part-00000-0001.arrow")
        with pytest.raises(DataError, match=message):
            ShardReader(folder)
        skipping = ShardReader(folder, on_corrupt="skip")
        there = [skipping.read_batch_or_skip(number) is not None for number in range(14)]
        assert all(there[:5]) and all(there[7:]) and not there[6]


def test_a_shard_overwritten_after_its_checksum_was_compared(tmp_path):
    """Cut and filled with zeros in place: Arrow's own checks are all that is left, and their errors are ours too."""
    folder = build(tmp_path)
    reader = ShardReader(folder)
    reader.read_batch(0)
    with open(folder / reader.manifest.shards[0].name, "r+b") as file:
        file.write(bytes(reader.manifest.shards[0].num_bytes))
    with pytest.raises(DataError, match=r"part-00000-0000.arrow batch 0 is not a record batch"):
        reader.read_batch(0)
    with pytest.raises(DataError, match=r"part-00000-0000.arrow batch 1 is damaged"):
        reader.read_batch(1)


def test_interrupted_build_has_no_manifest(tmp_path):
    with ShardWriter(tmp_path, 0, ShardConfig()) as writer:
        writer.write(JOURNEYS)
    with pytest.raises(DataError, match=r"manifest.json does not exist: .* interrupted"):
        ShardReader(tmp_path)


@pytest.mark.parametrize("change,message", [
    (lambda text: text[:len(text) // 2], "manifest.json is damaged"),
    (lambda text: json.dumps(json.loads(text) | {"schema_version": 99}), "schema version 99, this code reads"),
    (lambda text: json.dumps(json.loads(text) | {"num_row": 3}), "did you mean num_rows"),
])
def test_damaged_manifest(tmp_path, change, message):
    path = build(tmp_path) / "manifest.json"
    path.write_text(change(path.read_text()))
    with pytest.raises(DataError, match=message):
        ShardReader(tmp_path)


@pytest.mark.parametrize("name", ["index.arrow", "rows.npy"])
def test_altered_index(tmp_path, name):
    path = build(tmp_path) / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 255
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"index.arrow or rows.npy was altered"):
        ShardReader(tmp_path)
    path.unlink()
    with pytest.raises(DataError, match=r"index.arrow and rows.npy cannot be read .*No such file"):
        ShardReader(tmp_path)


def test_streams_a_tar_through_a_command(tmp_path):
    folder = build(tmp_path, "webdataset")
    tars = sorted(folder.glob("*.tar"))
    assert same(pa.Table.from_batches([batch for tar in tars for batch in iter_batches(f"pipe:cat {tar}")]), JOURNEYS)
    assert sum(batch.num_rows for batch in iter_batches(str(tars[0]))) == 40
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "1.txt").write_text("hello")
    shutil.make_archive(str(tmp_path / "foreign"), "tar", foreign)
    with pytest.raises(DataError, match=r"has no .arrow file"):
        list(iter_batches(str(tmp_path / "foreign.tar")))
    for broken in (f"pipe:head -c 20000 {tars[0]}", f"pipe:cat {tars[0]}; exit 1", "pipe:true"):
        with pytest.raises(DataError, match=r"broke off before its end .*; read it again") as error:
            list(iter_batches(broken))
        assert "\n" not in str(error.value)
