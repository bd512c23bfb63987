"""Numbers of a data set that are memory-mapped: opened once, with shape, type and checksum compared."""

from pathlib import Path

import numpy as np

from gpr_dist.errors import DataError
from gpr_dist.schema import file_checksum


def open_array(path: Path, shape: tuple[int, ...], kinds: tuple[str, ...], remedy: str, checksum: str | None = None) -> np.ndarray:
    """A .npy file as a read-only memory map (an empty one is read).

    Args: kinds: what it may hold: kinds of numpy (`i`, `u`, `f`) or types (`i8`). checksum: of `schema.file_checksum`; none = not
        compared. remedy: what to do about a bad file, the end of every message.
    Raises: DataError when it is missing, cut, altered, or another array.
    """
    try:
        if checksum is not None and file_checksum(path) != checksum:
            raise DataError(f"{path} was altered; {remedy}")
        array = np.load(path, mmap_mode="r" if np.prod(shape) else None, allow_pickle=False)
    except DataError:
        raise
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{path} cannot be read ({error}); {remedy}") from None
    if array.shape != shape or not {array.dtype.kind, array.dtype.str[1:]} & set(kinds):
        raise DataError(f"{path} is {array.dtype} {array.shape}, expected shape {shape} of type {' or '.join(kinds)}; {remedy}")
    return array
