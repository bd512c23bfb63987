"""The hash is part of the data format: golden values, independence of the Arrow layout, and spread."""

import numpy as np
import pyarrow as pa
import pytest

from gpr_dist.hashing import bucket_of, combine64, feature_id, hash_strings

VALUES = ["", "a", "b", "12345678", "123456789", "ü", "a much longer identifier than one word", None, "a"]


def _slow_hash(text: str) -> int:
    """The definition, one string at a time in Python integers."""
    mask = (1 << 64) - 1

    def mix(x):
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & mask
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB & mask
        return x ^ (x >> 31)

    data = text.encode()
    increment = 0x2545F4914F6CDD1D
    h = mix((len(data) * 0xD6E8FEB86659FD93 + increment) & mask)
    for start in range(0, len(data), 8):
        word = int.from_bytes(data[start:start + 8], "little")
        h = ((h ^ mix((word + increment) & mask)) * 0x9E3779B97F4A7C15 + increment) & mask
    return mix(h) or 1


def test_equals_the_definition_and_null_is_zero():
    assert hash_strings(pa.array(VALUES)).tolist() == [0 if v is None else _slow_hash(v) for v in VALUES]


def test_golden_values():
    """A change here makes every existing catalogue and shard unreadable."""
    assert hash_strings(pa.array(["", "a", "item-000001"])).tolist() == GOLDEN
    assert feature_id(pa.array(["18-24", None]), "age").tolist() == GOLDEN_FEATURE


GOLDEN = [14398946087335736702, 18342052688689918560, 14992678070550351099]
GOLDEN_FEATURE = [1514273629, 0]


@pytest.mark.parametrize("layout", ["sliced", "large", "dictionary", "chunked"])
def test_layout_does_not_matter(layout):
    plain = pa.array(VALUES)
    column = {"sliced": pa.array(["x", *VALUES, "y"]).slice(1, len(VALUES)), "large": plain.cast(pa.large_string()),
              "dictionary": plain.dictionary_encode(), "chunked": pa.chunked_array([plain[:3], plain[3:]])}[layout]
    assert (hash_strings(column) == hash_strings(plain)).all()
    assert (feature_id(column, "f") == feature_id(plain, "f")).all()


def test_spread_and_ranges():
    ids = pa.array(np.arange(200_000)).cast(pa.string())
    hashes = hash_strings(ids)
    assert len(np.unique(hashes)) == len(hashes)
    counts = np.bincount(bucket_of(hashes, 16), minlength=16)
    assert abs(counts - counts.mean()).max() < 5 * counts.mean() ** 0.5
    order = np.argsort(hashes)
    assert (np.diff(bucket_of(hashes[order], 7)) >= 0).all()
    features = feature_id(ids, "f")
    assert features.min() >= 1 and features.dtype == np.int32
    assert (features != feature_id(ids, "g")).mean() > 0.999


def test_combine_depends_on_every_column_and_their_order():
    a, b = np.array([1, 2], np.int64), np.array([2, 1], np.int64)
    value = np.array([0.5, np.nan], np.float32)
    assert len({*combine64(a, b).tolist(), *combine64(b, a).tolist()}) == 2  # (1,2) and (2,1) differ, swapping columns swaps them
    assert (combine64(a, value) != combine64(a, value + 1))[0]


def test_empty_column():
    assert hash_strings(pa.array([], pa.string())).shape == (0,)
    assert hash_strings(pa.chunked_array([], pa.string())).shape == (0,)
