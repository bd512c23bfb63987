"""A mapped array is the one that was written, or refused with what is wrong and what to do."""

import numpy as np
import pytest

from gpr_dist.data.arrays import open_array
from gpr_dist.errors import DataError
from gpr_dist.schema import file_checksum


def test_what_was_written_is_mapped(tmp_path):
    path = tmp_path / "a.npy"
    np.save(path, np.arange(6).reshape(3, 2))
    found = open_array(path, (3, 2), ("i", "u"), "build again", file_checksum(path))
    assert isinstance(found, np.memmap) and found.tolist() == [[0, 1], [2, 3], [4, 5]]
    assert open_array(path, (3, 2), ("i8",), "build again").dtype == np.int64
    np.save(tmp_path / "empty.npy", np.zeros((0, 2)))
    assert open_array(tmp_path / "empty.npy", (0, 2), ("f",), "build again").shape == (0, 2)


@pytest.mark.parametrize(("shape", "kinds", "text"), [
    ((2, 3), ("i", "u"), r"int64 \(3, 2\), expected shape \(2, 3\) of type i or u"), ((3, 2), ("f",), "of type f"),
    ((3, 2), ("i4",), "of type i4")])
def test_another_array_is_refused(tmp_path, shape, kinds, text):
    np.save(tmp_path / "a.npy", np.arange(6).reshape(3, 2))
    with pytest.raises(DataError, match=f"{text}.*; build again"):
        open_array(tmp_path / "a.npy", shape, kinds, "build again")


def test_damage_is_refused(tmp_path):
    path = tmp_path / "a.npy"
    np.save(path, np.arange(6))
    checksum, content = file_checksum(path), bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"a.npy was altered; build again"):
        open_array(path, (6,), ("i8",), "build again", checksum)
    path.write_bytes(content[:-3])
    with pytest.raises(DataError, match=r"a.npy cannot be read .*; build again"):
        open_array(path, (6,), ("i8",), "build again")
    path.unlink()
    with pytest.raises(DataError, match=r"a.npy cannot be read .*; build again"):
        open_array(path, (6,), ("i8",), "build again", checksum)
