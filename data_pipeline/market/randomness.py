"""Random numbers of the market: streams by name for whole tables, and hashes for what must not depend on the order of computation."""

import zlib

import numpy as np

from gpr_dist.hashing import mix64

_GOLDEN = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1


def generator(seed: int, *names: str | int) -> np.random.Generator:
    """An independent stream for every name."""
    return np.random.Generator(np.random.PCG64([seed, *(zlib.crc32(name.encode()) if isinstance(name, str) else name for name in names)]))


def keys(seed: int, stream: str, *columns: np.ndarray) -> np.ndarray:
    """uint64 per row: equal for equal integers, whoever asks and when; independent between streams."""
    salt = (zlib.crc32(stream.encode()) * _GOLDEN + seed * 0xD6E8FEB86659FD93) & _MASK
    key = np.full(len(columns[0]), salt, np.uint64)
    for column in columns:
        key = mix64(key ^ column.astype(np.uint64)) + np.uint64(_GOLDEN)
    return mix64(key)


def spread(key_R: np.ndarray, count: int) -> np.ndarray:
    """uint64 [R, count]: further hashes of each key."""
    return mix64(key_R[:, None] + (np.arange(1, count + 1, dtype=np.uint64) * np.uint64(_GOLDEN))[None, :])


def pairs(key_R: np.ndarray, number_RK: np.ndarray) -> np.ndarray:
    """uint64 [R, K]: a hash of each key with each of its numbers."""
    return mix64(key_R[:, None] + number_RK.astype(np.uint64) * np.uint64(_GOLDEN))


def uniform(key: np.ndarray) -> np.ndarray:
    """float64 in [0, 1) from the upper 53 bits."""
    return (key >> np.uint64(11)) * 2.0**-53


def normal_of_bits(key: np.ndarray) -> np.ndarray:
    """float32, nearly standard normal: the sum of four uniform numbers of the lower 40 bits (its tails end at 3.46)."""
    low = key & np.uint64(0x3FF)
    total = low.astype(np.float32)
    for shift in (10, 20, 30):
        total += ((key >> np.uint64(shift)) & np.uint64(0x3FF)).astype(np.float32)
    return (total - np.float32(2046)) * np.float32(1 / 591.2)  # variance of one part: (1024² - 1)/12
