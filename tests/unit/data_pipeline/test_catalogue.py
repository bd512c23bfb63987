"""The catalogue does not depend on the order of sightings or on the number of partitions, and finds every collision."""

import numpy as np
import pyarrow as pa
import pytest

import data_pipeline.catalogue as module
from data_pipeline.catalogue import Catalogue, ItemCollector, ItemTableCollector, build_catalogue
from data_pipeline.events import AD, ORGANIC
from gpr_dist.errors import DataError
from gpr_dist.hashing import hash_strings


def make(folder, ids, kinds, times, num_partitions=1, limit=1 << 30, base=None, batch=100, hashes=None):
    collector = ItemCollector(folder / "sightings", "s", num_partitions, limit)
    hashes = hash_strings(pa.array(ids)) if hashes is None else hashes
    for start in range(0, len(ids), batch):
        part = slice(start, start + batch)
        collector.add(pa.array(ids[part]), hashes[part], np.array(kinds[part]), np.array(times[part]))
    collector.close()
    table = ItemTableCollector(folder / "items", num_partitions, limit)
    table.add(pa.table({"item_id": ["i3"], "text": ["three"], "price": pa.array([3.0], pa.float32()), "brand": ["x"]}))
    table.close()
    brand = pa.schema([("brand", pa.string())])
    return build_catalogue(folder / "catalogue", folder / "sightings", folder / "items", num_partitions, brand, base)


def random_sightings(seed, n=3000):
    rng = np.random.default_rng(seed)
    return [f"i{k}" for k in rng.integers(0, 700, n)], rng.integers(0, 2, n).tolist(), rng.integers(0, 1000, n).tolist()


def test_partitions_spills_and_order_do_not_matter(tmp_path):
    ids, kinds, times = random_sightings(0)
    one = make(tmp_path / "one", ids, kinds, times)
    order = np.random.default_rng(1).permutation(len(ids))
    other = make(tmp_path / "other", [ids[i] for i in order], [kinds[i] for i in order], [times[i] for i in order], 7, 1 << 10, batch=37)
    for name in ("catalogue.arrow", "hashes.npy", "indices.npy", "catalogue.json"):
        assert (one.folder / name).read_bytes() == (other.folder / name).read_bytes()
    rows = {row["item_id"]: row for row in one.table().to_pylist()}
    assert set(rows) == set(ids) and rows["i3"]["text"] == "three" and rows["i3"]["brand"] == "x" and rows["i4"]["brand"] is None
    for item in ("i3", "i4", "i5"):
        mine = [k for k, i in enumerate(ids) if i == item]
        assert rows[item]["first_seen"] == min(times[k] for k in mine)
        assert rows[item]["kind"] == (AD if any(kinds[k] == AD for k in mine) else ORGANIC)


@pytest.mark.parametrize("num_partitions", [1, 5])
def test_appending_twice_keeps_every_index(tmp_path, num_partitions):
    first = make(tmp_path / "a", *random_sightings(0), num_partitions)
    ids, kinds, times = random_sightings(1)
    second = make(tmp_path / "b", ["new-" + i if k % 3 else i for k, i in enumerate(ids)], kinds, times, num_partitions, base=first)
    third = make(tmp_path / "c", ["newer-" + i for i in ids], kinds, times, 3, base=second)
    names = third.table()["item_id"].to_pylist()
    assert names[:first.num_items] == first.table()["item_id"].to_pylist()
    assert names[:second.num_items] == second.table()["item_id"].to_pylist()
    assert len(set(names)) == len(names) == third.num_items
    assert (third.index_of_ids(pa.array(names)) == np.arange(len(names))).all()
    assert len({first.fingerprint, second.fingerprint, third.fingerprint}) == 3


@pytest.mark.parametrize("batch", [1, 2])
def test_two_ids_with_one_hash(tmp_path, batch):
    with pytest.raises(DataError, match="'a' and 'b' have the same 64-bit hash"):
        make(tmp_path, ["a", "b"], [1, 1], [0, 0], hashes=np.array([5, 5], np.uint64), batch=batch)


def test_a_hash_of_the_base_with_another_id(tmp_path, monkeypatch):
    base = make(tmp_path / "base", ["a"], [1], [0])
    with pytest.raises(DataError, match="'a' and 'b' have the same 64-bit hash"):
        make(tmp_path / "new", ["b"], [1], [0], hashes=hash_strings(pa.array(["a"])), base=base)


def test_missing_damaged_and_other_columns(tmp_path):
    with pytest.raises(DataError, match="no finished catalogue"):
        Catalogue(tmp_path)
    base = make(tmp_path / "base", ["a"], [1], [0])
    with pytest.raises(DataError, match=r"base catalogue .* has columns .*brand"):
        build_catalogue(tmp_path / "out", tmp_path / "base" / "sightings", tmp_path / "base" / "items", 1, pa.schema([]), base)
    np.save(base.folder / "hashes.npy", np.zeros(7, np.uint64))
    with pytest.raises(DataError, match=r"hashes.npy has 7 entries, catalogue.json says 1"):
        Catalogue(base.folder)
    (base.folder / "catalogue.json").write_text('{"schema_version": 99}')
    with pytest.raises(DataError, match="schema version 99"):
        Catalogue(base.folder)
    with pytest.raises(DataError, match="1 rows have no item_id"):
        ItemTableCollector(tmp_path / "x", 1, 100).add(pa.table({"item_id": pa.array([None], pa.string())}))


def test_record_batches_do_not_depend_on_partitions(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_BATCH_ROWS", 64)
    one, other = make(tmp_path / "one", *random_sightings(2)), make(tmp_path / "other", *random_sightings(2), 9)
    assert [b.num_rows for b in one.batches()] == [b.num_rows for b in other.batches()] and next(one.batches()).num_rows == 64
