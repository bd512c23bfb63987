"""Stable 64-bit hashes of string columns, vectorised over the Arrow buffers, and the categories made from strings and times.

Owns the one hash by which users are put into buckets, items are looked up and categories become integers. The value of a string
is part of the data format: it is the same on every machine and in every version (golden values in the tests). polars and pyarrow
have hashes too, but promise nothing between versions; xxhash is stable, but is one Python call per string.
"""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from gpr_dist.errors import ConfigError, DataError

_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)
_LENGTH = np.uint64(0xD6E8FEB86659FD93)
_INCREMENT = np.uint64(0x2545F4914F6CDD1D)
_LOW_BYTES = np.array([(1 << 8 * n) - 1 for n in range(9)], dtype=np.uint64)  # mask that keeps the first n bytes of a word

StringColumn = pa.Array | pa.ChunkedArray


def mix64(x: np.ndarray) -> np.ndarray:
    """A bijection of uint64 in which every input bit moves every output bit (the finaliser of SplitMix64, Steele et al. 2014)."""
    x = x ^ (x >> np.uint64(30))
    x = x * np.uint64(0xBF58476D1CE4E5B9)
    x ^= x >> np.uint64(27)
    x *= np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(31)
    return x


def mix_tensor(x: torch.Tensor) -> torch.Tensor:
    """`mix64` of int64 tensors. Products wrap around; `>>` keeps the sign, so it is masked away."""
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * -4_658_895_280_553_007_687
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * -7_723_592_293_110_705_685
    return x ^ ((x >> 31) & 0x1FFFFFFFF)


def row_keys(row_T: torch.Tensor, position_T: torch.Tensor, seed: int) -> torch.Tensor:
    """int64 [T], one key for every position of every row, different for every seed (any int64)."""
    wrapped = (seed * 0x2545F4914F6CDD1 + 2**63) % 2**64 - 2**63
    return mix_tensor(mix_tensor(row_T + wrapped) + position_T)


def combine64(*columns: np.ndarray) -> np.ndarray:
    """One uint64 per row from several columns of integers or floats (floats by their bits); the order of the columns matters."""
    hashes = np.zeros(len(columns[0]), np.uint64)
    for column in columns:
        if column.dtype.kind == "f":
            column = np.ascontiguousarray(column, np.float32).view(np.uint32)
        hashes = mix64((hashes ^ mix64(column.astype(np.int64, copy=False).view(np.uint64) if column.dtype != np.uint64 else column))
                       + _MULTIPLIER)
    return hashes


def hash_strings(column: StringColumn, salt: str = "") -> np.ndarray:
    """uint64 hash per value of a string column (string, large_string, or a dictionary of them); 0 stands for null and only for null.

    Strings of up to 8 bytes and equal length never collide; others collide as 64 random bits do.
    """
    if isinstance(column, pa.ChunkedArray):
        return np.concatenate([hash_strings(chunk, salt) for chunk in column.chunks]) if column.num_chunks else np.zeros(0, np.uint64)
    if pa.types.is_dictionary(column.type):
        values = np.append(hash_strings(column.dictionary, salt), np.uint64(0))
        return values[pc.fill_null(column.indices, len(values) - 1).to_numpy(zero_copy_only=False)]
    column = column.cast(pa.large_string())
    seed = hash_strings(pa.array([salt], pa.large_string()))[0] if salt else _INCREMENT
    hashes = _hash_bytes(*_offsets_and_bytes(column), seed)
    if column.null_count:
        hashes[pc.is_null(column).to_numpy(zero_copy_only=False)] = 0
    return hashes


def feature_id(column: StringColumn, name: str) -> np.ndarray:
    """Category of a feature as int32 in [1, 2^31); 0 = null. `name` salts the hash: "1" as an hour is not "1" as a weekday."""
    hashes = hash_strings(column, salt=name)
    ids = (hashes >> np.uint64(33)).astype(np.int32)
    return np.where((ids == 0) & (hashes != 0), np.int32(1), ids)


TIME_FEATURES = ("hour", "day_of_week", "week_of_year")


def time_feature(name: str, timestamp: pa.ChunkedArray | pa.Array) -> pa.DictionaryArray | pa.ChunkedArray:
    """A categorical feature of a time (int64 seconds, UTC): "hour" 0..23, "day_of_week" 0..6 from Monday, "week_of_year" 1..53 (ISO)."""
    if name not in TIME_FEATURES:
        raise ConfigError(f"unknown time feature {name!r}; known: {', '.join(TIME_FEATURES)}")
    function = {"hour": pc.hour, "day_of_week": pc.day_of_week, "week_of_year": pc.iso_week}[name]
    return function(timestamp.cast(pa.timestamp("s"))).dictionary_encode().cast(pa.dictionary(pa.int32(), pa.string()))


def bucket_of(hashes: np.ndarray, num_buckets: int) -> np.ndarray:
    """Bucket in [0, num_buckets) as int64: equal ranges of the hash, so that buckets one after another are sorted by hash."""
    assert 0 < num_buckets < 1 << 31, num_buckets
    return ((hashes >> np.uint64(32)) * np.uint64(num_buckets) >> np.uint64(32)).astype(np.int64)


def check_collisions(column: StringColumn, hashes: np.ndarray, what: str) -> None:
    """Raises: DataError when two different ids of `column` have the same hash, so that they would silently become one.

    The odds are 3e-4 for 1e8 ids. `what` names the ids in the message, e.g. "item".
    """
    distinct, first, which = np.unique(hashes, return_index=True, return_inverse=True)
    if len(pc.unique(column)) == len(distinct):
        return
    row = int(np.flatnonzero(pc.not_equal(column.cast(pa.string()), column.cast(pa.string()).take(pa.array(first[which])))
                             .to_numpy(zero_copy_only=False))[0])
    one, other = column[int(first[which[row]])].as_py(), column[row].as_py()
    raise DataError(f"{what} ids {one!r} and {other!r} have the same 64-bit hash; rename one of them in the logs")


def _offsets_and_bytes(column: pa.LargeStringArray) -> tuple[np.ndarray, np.ndarray]:
    """Offsets [n+1] into the bytes, and the bytes followed by 8 zeros so that a word can be read at any offset."""
    if not len(column):  # pyarrow may then have no buffers at all
        return np.zeros(1, np.int64), np.zeros(8, np.uint8)
    _, offsets_buffer, data = column.buffers()
    offsets = np.frombuffer(offsets_buffer, np.int64, len(column) + 1, offset=8 * column.offset)
    first, last = int(offsets[0]), int(offsets[-1])
    padded = np.zeros(last - first + 8, np.uint8)
    if last > first:
        padded[:-8] = np.frombuffer(data, np.uint8)[first:last]
    return offsets - first, padded


def _hash_bytes(offsets: np.ndarray, padded: np.ndarray, seed: np.uint64) -> np.ndarray:
    """Round k folds in the k-th word (8 bytes, little-endian) of every string that has one."""
    lengths = np.diff(offsets)
    words = np.ndarray(len(padded) - 7, dtype="<u8", buffer=padded, strides=(1,))  # an overlapping word at every byte
    hashes = mix64(lengths.astype(np.uint64) * _LENGTH + seed)
    alive, position = np.arange(len(lengths)), offsets[:-1]
    while True:
        keep = np.flatnonzero(lengths[alive] > 0)
        if len(keep) < len(alive):
            alive, position = alive[keep], position[keep]
        if not len(alive):
            break
        word = words[position] & _LOW_BYTES[np.minimum(lengths[alive], 8)]
        hashes[alive] = (hashes[alive] ^ mix64(word + _INCREMENT)) * _MULTIPLIER + _INCREMENT
        lengths[alive] -= 8
        position = position + 8
    hashes = mix64(hashes)
    hashes[hashes == 0] = 1
    return hashes
