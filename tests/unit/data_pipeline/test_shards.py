"""Layout, determinism and crash safety of shards."""

import io
import json
import tarfile

import numpy as np
import pyarrow as pa
import pytest
import webdataset
import xxhash
from journeys_fixture import NUM_ITEMS, random_journeys, stored_rows, write_split

from data_pipeline.shards import ShardConfig, ShardWriter, finished_parts, row_stats, write_manifest
from gpr_dist.data.collate import collate
from gpr_dist.errors import DataError
from gpr_dist.schema import JOURNEY_SCHEMA, ShardManifest

JOURNEYS = random_journeys(203)


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("container", ["arrow", "webdataset"])
@pytest.mark.parametrize("compression", ["none", "lz4", "zstd"])
def test_index_points_at_the_bytes_of_each_batch(tmp_path, container, compression):
    config = ShardConfig(container=container, compression=compression, rows_per_batch=8, rows_per_shard=40)
    manifest = write_split(tmp_path, JOURNEYS, config, num_parts=3)
    index = pa.ipc.open_file(tmp_path / "index.arrow").read_all().to_pylist()
    assert [row["first_row"] for row in index] == np.cumsum([0] + [row["num_rows"] for row in index])[:-1].tolist()
    for row in index:
        data = (tmp_path / manifest.shards[row["shard"]].name).read_bytes()[row["offset"]:row["offset"] + row["num_bytes"]]
        assert xxhash.xxh3_64_intdigest(data) == row["checksum"]
        in_arrow = container == "arrow"
        read = pa.ipc.read_record_batch(pa.py_buffer(data), JOURNEY_SCHEMA) if in_arrow else pa.ipc.open_stream(data).read_next_batch()
        assert read.column("user_id").to_pylist() == [f"user-{row['first_row'] + i}" for i in range(row["num_rows"])]
    assert sum(shard.num_rows for shard in manifest.shards) == manifest.num_rows == 203 == sum(row["num_rows"] for row in index)
    assert all((tmp_path / shard.name).stat().st_size == shard.num_bytes for shard in manifest.shards)
    assert not [name for name in content(tmp_path) if name.endswith((".json", ".npy", ".tmp")) and name.startswith("part")]


def test_files_are_ordinary_arrow_and_tar(tmp_path):
    write_split(tmp_path / "a", JOURNEYS)
    write_split(tmp_path / "w", JOURNEYS, ShardConfig(container="webdataset", rows_per_batch=8, rows_per_shard=40))
    first = pa.ipc.open_file(tmp_path / "a" / "part-00000-0000.arrow").read_all()
    assert first.column("user_id").to_pylist() == [f"user-{i}" for i in range(40)]
    tar = tmp_path / "w" / "part-00000-0000.tar"
    with tarfile.open(tar) as file:
        assert file.getnames() == [f"{i:06d}.arrow" for i in range(5)]
        assert {member.mtime for member in file.getmembers()} == {0}
    samples = list(webdataset.WebDataset(str(tar), shardshuffle=False))
    tables = [pa.ipc.open_stream(io.BytesIO(sample["arrow"])).read_all() for sample in samples]
    assert pa.concat_tables(tables).column("user_id").equals(first.column("user_id"))


@pytest.mark.parametrize("container", ["arrow", "webdataset"])
def test_bytes_do_not_depend_on_how_rows_were_handed_in(tmp_path, container):
    config = ShardConfig(container=container, rows_per_batch=8, rows_per_shard=40)
    for name, sizes in (("whole", [203]), ("pieces", [1, 0, 7, 13, 100, 82]), ("rows", [1] * 203)):
        with ShardWriter(tmp_path / name, 0, config) as writer:
            start = 0
            for size in sizes:
                writer.write(JOURNEYS.slice(start, size) if name != "pieces" else pa.Table.from_batches([JOURNEYS.slice(start, size)]))
                start += size
        write_manifest(tmp_path / name, "train", (), (), "", 1)
    assert content(tmp_path / "whole") == content(tmp_path / "pieces") == content(tmp_path / "rows")


def test_fingerprint_is_that_of_the_content(tmp_path):
    prints = {}
    for container in ("arrow", "webdataset"):
        for compression in ("none", "zstd"):
            config = ShardConfig(container=container, compression=compression, rows_per_batch=8, rows_per_shard=40)
            prints[container, compression] = write_split(tmp_path / container / compression, JOURNEYS, config).fingerprint
    assert len(set(prints.values())) == 1
    rows = JOURNEYS.to_pylist()
    rows[7]["scene"][0] += 1
    assert write_split(tmp_path / "edited", pa.RecordBatch.from_pylist(rows, JOURNEY_SCHEMA),
                       ShardConfig(rows_per_batch=8, rows_per_shard=40)).fingerprint not in prints.values()


def test_interrupted_part_is_written_again_and_finished_ones_are_kept(tmp_path):
    config = ShardConfig(rows_per_batch=8, rows_per_shard=40)
    reference = tmp_path / "reference"
    write_split(reference, JOURNEYS, config, num_parts=2)
    folder = tmp_path / "interrupted"
    with ShardWriter(folder, 0, config) as writer:
        writer.write(JOURNEYS.slice(0, 101))
    broken = ShardWriter(folder, 1, config)
    broken.write(JOURNEYS.slice(101, 90))  # the process ends here: two files and a temporary one, no sidecar
    del broken
    assert finished_parts(folder) == {0} and not (folder / "manifest.json").exists()
    with ShardWriter(folder, 1, config) as writer:
        writer.write(JOURNEYS.slice(101))
    assert finished_parts(folder) == {0, 1}
    write_manifest(folder, "train", ("age", "town"), ("store", "slot", "hour"), "c0ffee", NUM_ITEMS)
    assert content(folder) == content(reference)
    with pytest.raises(RuntimeError), ShardWriter(folder, 2, config) as writer:
        writer.write(JOURNEYS)
        raise RuntimeError("worker died")
    assert finished_parts(folder) == set()


def test_manifest_again_is_the_same_and_no_rows_are_legal(tmp_path):
    first = write_split(tmp_path / "a", JOURNEYS)
    assert write_manifest(tmp_path / "a", "train", ("age", "town"), ("store", "slot", "hour"), "c0ffee", NUM_ITEMS) == first
    empty = write_manifest(tmp_path / "b", "test", (), (), "c0ffee", NUM_ITEMS)
    assert (empty.num_rows, empty.shards, empty.num_batches) == (0, (), 0)
    assert ShardManifest.parse((tmp_path / "b" / "manifest.json").read_bytes(), "b") == empty
    assert np.load(tmp_path / "b" / "rows.npy").shape == (0, 2)


def test_parts_with_other_settings_are_refused(tmp_path):
    for part, container in enumerate(("arrow", "webdataset")):
        with ShardWriter(tmp_path, part, ShardConfig(container=container)) as writer:
            writer.write(JOURNEYS)
    with pytest.raises(DataError, match="different settings"):
        write_manifest(tmp_path, "train", (), (), "", 1)
    assert not (tmp_path / "manifest.json").exists()


def test_row_statistics_are_what_collate_makes_of_the_rows():
    codes = np.zeros((NUM_ITEMS, 3), np.int64)
    stats = row_stats(JOURNEYS)
    for row in range(JOURNEYS.num_rows):
        batch = collate(stored_rows(JOURNEYS).take(np.array([row])), np.array([row]), codes, 4, 2, 3)
        assert stats[row].tolist() == [batch.num_tokens, batch.num_targets], row
    assert np.array_equal(row_stats(JOURNEYS.slice(50, 60)), stats[50:110])
    assert stats[:, 1].sum() > 100


def test_large_offsets_are_cast_and_bad_rows_refused(tmp_path):
    large = pa.Table.from_batches([JOURNEYS])
    wide = [pa.large_list(f.type.value_type) if pa.types.is_list(f.type) else f.type for f in JOURNEY_SCHEMA]
    wide[0] = pa.large_string()
    large = large.cast(pa.schema(list(zip(JOURNEY_SCHEMA.names, wide, strict=True))))
    write_split(tmp_path / "a", JOURNEYS)
    with ShardWriter(tmp_path / "b", 0, ShardConfig(rows_per_batch=8, rows_per_shard=40)) as writer:
        writer.write(large)
    assert (tmp_path / "a" / "part-00000-0000.arrow").read_bytes() == (tmp_path / "b" / "part-00000-0000.arrow").read_bytes()
    rows = random_journeys(3).to_pylist()
    rows[1]["scene"].append(1)
    for bad, message in [(pa.RecordBatch.from_pylist(rows, JOURNEY_SCHEMA), "row 1: scene and token_type differ in length"),
                         (JOURNEYS.drop_columns(["pctr"]), "no column pctr"),
                         (JOURNEYS.set_column(1, "num_context", pa.array([None] * 203, pa.int32())), "num_context has nulls")]:
        writer = ShardWriter(tmp_path / "c", 0, ShardConfig())
        with pytest.raises(DataError, match=message):
            writer.write(bad)


def test_sidecar_holds_the_time_span(tmp_path):
    manifest = write_split(tmp_path, JOURNEYS, num_parts=4)
    times = [time for row in JOURNEYS.to_pylist() for time in row["timestamp"]]
    assert (manifest.first_timestamp, manifest.last_timestamp) == (min(times), max(times))
    assert json.loads((tmp_path / "manifest.json").read_text())["num_targets"] == manifest.num_targets
    assert manifest.num_targets == np.load(tmp_path / "rows.npy")[:, 1].sum()
