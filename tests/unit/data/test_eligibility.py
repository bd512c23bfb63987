import numpy as np
import pyarrow as pa
import pytest

from gpr_dist.data.eligibility import Eligibility
from gpr_dist.errors import DataError
from gpr_dist.schema import EVERY_AD

GROUPS = [[1, 3], [], [0, 1, 4], [4]]


def write_data(folder, groups, list_type=pa.list_, chunk=2):
    (folder / "catalogue").mkdir()
    kind = pa.table({"item_id": [str(i) for i in range(6)], "kind": pa.array([1, 1, 0, 1, 1, 0], pa.uint8())})
    with pa.ipc.new_file(folder / "catalogue" / "catalogue.arrow", kind.schema) as writer:
        writer.write_table(kind, max_chunksize=4)
    if groups is not None:
        table = pa.table({"items": pa.array(groups, list_type(pa.int32()))})
        with pa.ipc.new_file(folder / "eligibility.arrow", table.schema) as writer:
            writer.write_table(table, max_chunksize=chunk)


@pytest.mark.parametrize("list_type", [pa.list_, pa.large_list])
@pytest.mark.parametrize("chunk", [1, 3, 10])
def test_groups_are_read_whatever_the_chunks(tmp_path, list_type, chunk):
    write_data(tmp_path, GROUPS, list_type, chunk)
    eligibility = Eligibility.load(tmp_path)
    assert eligibility.num_groups == len(GROUPS)
    assert [eligibility.items(group).tolist() for group in range(4)] == GROUPS
    assert eligibility.items(EVERY_AD).tolist() == [0, 1, 3, 4] and eligibility.items(0).dtype == np.int32


def test_without_a_group_file_every_ad_is_eligible(tmp_path):
    write_data(tmp_path, None)
    eligibility = Eligibility.load(tmp_path)
    assert eligibility.num_groups == 0 and eligibility.items(EVERY_AD).tolist() == [0, 1, 3, 4]


def test_contains_equals_the_obvious_set(tmp_path):
    write_data(tmp_path, GROUPS)
    eligibility = Eligibility.load(tmp_path)
    rng = np.random.default_rng(0)
    groups, items = rng.integers(-1, 4, 200), rng.integers(0, 6, 200)
    sets = [set(group) for group in [*GROUPS, [0, 1, 3, 4]]]  # the last one is group -1
    assert eligibility.contains(groups, items).tolist() == [item in sets[group] for group, item in zip(groups, items, strict=True)]
    assert eligibility.contains(groups[:0], items[:0]).tolist() == []


def test_damage_is_named(tmp_path):
    write_data(tmp_path, [*GROUPS, [2, 9]])
    with pytest.raises(DataError, match=r"row 4: holds items 2\.\.9, the catalogue has 6"):
        Eligibility.load(tmp_path).items(4)
    with pytest.raises(DataError, match="group 7 does not exist"):
        Eligibility.load(tmp_path).items(7)
    (tmp_path / "eligibility.arrow").write_bytes(b"ARROW1 cut off")
    with pytest.raises(DataError, match=r"cannot read .*eligibility\.arrow"):
        Eligibility.load(tmp_path)


def test_another_column_type_is_refused(tmp_path):
    write_data(tmp_path, None)
    table = pa.table({"items": pa.array(GROUPS, pa.list_(pa.int64()))})
    with pa.ipc.new_file(tmp_path / "eligibility.arrow", table.schema) as writer:
        writer.write_table(table)
    with pytest.raises(DataError, match="expected list<int32>"):
        Eligibility.load(tmp_path)
