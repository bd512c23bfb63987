"""One folder on a local disk or an object store, read so that a storage that misbehaves for a while does not end a run.

Owns the retries of every remote read: which errors are worth another attempt, the waits between attempts, their limits, the log lines
and the counts. What the bytes mean, and whether they are the right ones, is the reader's affair (reader.py).

pyarrow's own S3 retries are switched off: they cover the same errors (5xx, throttling, resets, cut transfers), but silently, for less
than two seconds in all, and would multiply with ours. Its timeouts are used, and are not enough: they see a connection on which
nothing arrives, not one on which little does; so an attempt is also given up by the clock.
"""

import functools
import logging
import os
import random
import re
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import TypeVar
from urllib.parse import unquote, urlsplit, urlunsplit

import pyarrow as pa
from pyarrow import fs
from pydantic import Field

from gpr_dist.config import Config
from gpr_dist.errors import DataError

T = TypeVar("T")
log = logging.getLogger(__name__)
_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.2, 20.0
_PIECE_BYTES = 1 << 24  # of a long file: one request each, so that a failure repeats little
_MISSING = re.compile(r"AWS Error (NO_SUCH_KEY|NO_SUCH_BUCKET|RESOURCE_NOT_FOUND)")
_DENIED = re.compile(r"AWS Error (ACCESS_DENIED|\w*SIGNATURE\w*|INVALID_ACCESS_KEY_ID|INVALID_CLIENT_TOKEN_ID|UNRECOGNIZED_CLIENT|"
                     r"MISSING_AUTHENTICATION_TOKEN|OPT_IN_REQUIRED|REQUEST_TIME_TOO_SKEWED)")
_jitter = random.Random()  # not the global generator: a retry must not move the random numbers of the run


class StorageConfig(Config):
    """Patience with remote shards (s3://, gs://, hdfs://); local ones are read once."""

    max_attempts: int = Field(default=16, ge=1)
    """attempts per read, the first one included; waits between them double from 0.2 to 20 seconds, with jitter: 16 outlast 2 minutes"""
    max_read_s: float = Field(default=300.0, gt=0)
    """seconds per read over all attempts and waits; then the run stops with an error"""
    attempt_s: float = Field(default=60.0, gt=0)
    """seconds after which one attempt is given up, however much has arrived"""
    stall_s: float = Field(default=10.0, ge=1)
    """whole seconds without a byte after which S3 closes a connection (request_timeout); in the middle of an answer about 6 more"""
    connect_s: float = Field(default=5.0, gt=0)
    """seconds to open a connection to S3"""


class StorageError(DataError):
    """The storage cannot be reached or refuses; nothing is known about the data, so it is never skipped as damaged."""


class Storage:
    """A folder given by path or URI. Methods may be called from several threads; a read that waits holds up no other.

    All raise FileNotFoundError at once for what does not exist, and StorageError when access is denied (at once) or attempts ran out;
    a local folder raises OSError.
    """

    def __init__(self, folder: str | Path, config: StorageConfig | None = None) -> None:
        """Raises: DataError when no file system knows such a URI."""
        self.config, self.name = config or StorageConfig(), shown(str(folder))
        self.num_retries, self.lost_s = 0, 0.0
        self._lock, self._opened = threading.Lock(), {}
        self.is_local = "://" not in str(folder)  # until we know better: opening asks S3 for the region of a bucket
        if self.is_local:
            self.files, self.root = fs.LocalFileSystem(), os.path.abspath(folder)
            return
        try:
            self.files, root = self.retried(self.name, lambda: _open_uri(str(folder), self.config))
        except (pa.ArrowInvalid, FileNotFoundError) as error:
            raise DataError(f"cannot open {self.name}: {error}") from None
        self.root, self.is_local = root.rstrip("/"), isinstance(self.files, fs.LocalFileSystem)

    def sizes(self) -> dict[str, int]:
        """Bytes of every file of the folder."""
        found = self.retried(self.name, lambda: self.files.get_file_info(fs.FileSelector(self.root)))
        return {info.base_name: info.size for info in found if info.is_file}

    def read_all(self, name: str) -> bytes:
        def read() -> bytes:
            with self.files.open_input_stream(f"{self.root}/{name}") as file:
                return file.read()
        return self.retried(f"{self.name}/{name}", read)

    def read_range(self, name: str, offset: int, num_bytes: int, what: str | None = None) -> pa.Buffer:
        """Fewer bytes at the end of the file. `what`: for messages, default the file."""
        def read() -> pa.Buffer:
            file = self._opened.get(name)
            if file is None:
                file = self._opened[name] = self.files.open_input_file(f"{self.root}/{name}")
            try:
                return pa.py_buffer(file.read_at(num_bytes, offset))
            except OSError:
                self._opened.pop(name, None)  # the next attempt opens it again: a broken connection may live in the handle
                raise
        return self.retried(what or f"{self.name}/{name}", read)

    def copy(self, name: str, target: Path) -> Path:
        """Copy a file to this machine once. Processes may race: each writes beside the final name and renames."""
        if target.exists():
            return target
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f"{target.name}.{os.getpid()}.tmp")
        with open(temporary, "wb") as file:
            while (piece := self.read_range(name, file.tell(), _PIECE_BYTES)).size:
                file.write(piece)
        os.replace(temporary, target)
        return target

    def retried(self, what: str, read: Callable[[], T]) -> T:
        """read(), again after errors that may pass."""
        if self.is_local:
            return read()
        config, started = self.config, time.monotonic()
        for attempt in range(1, config.max_attempts + 1):
            begun = time.monotonic() - started
            try:
                result = _within(min(config.attempt_s, config.max_read_s - begun), read)
            except OSError as error:
                problem = _first_line(error)
                if isinstance(error, FileNotFoundError) or _MISSING.search(problem):
                    raise FileNotFoundError(problem) from None
                if isinstance(error, PermissionError) or _DENIED.search(problem):
                    raise StorageError(f"{what} cannot be read: {problem}; check credentials, permissions and the clock "
                                       "(not tried again, that would not help)") from None
            else:
                if attempt > 1:
                    log.warning("%s: read at attempt %d, %.1f s late", what, attempt, begun)
                    with self._lock:
                        self.num_retries, self.lost_s = self.num_retries + attempt - 1, self.lost_s + begun
                return result
            elapsed = time.monotonic() - started
            wait = min(_LONGEST_WAIT_S, _FIRST_WAIT_S * 2 ** (attempt - 1)) * _jitter.uniform(0.5, 1)
            if attempt == config.max_attempts or elapsed + wait >= config.max_read_s:
                break
            log.warning("%s: attempt %d of %d failed (%s); again in %.1f s", what, attempt, config.max_attempts, problem, wait)
            time.sleep(wait)
        raise StorageError(f"{what} cannot be read: {attempt} attempts in {elapsed:.1f} s failed, the last one: {problem}; check storage "
                           "and network and start again, or raise data.loader.storage.max_attempts and max_read_s")


def shown(uri: str) -> str:
    """A path or URI for messages: without the credentials and options it may carry, and without a slash at the end."""
    return re.sub(r"//[^/@]*@", "//", uri.partition("?")[0] if "://" in uri else uri).rstrip("/")


def _open_uri(uri: str, config: StorageConfig) -> tuple[fs.FileSystem, str]:
    parts = urlsplit(uri)
    files, root = _open_store(urlunsplit(parts._replace(path="/")), config)
    return files, f"{root.rstrip('/')}{unquote(parts.path)}"


@functools.cache  # pyarrow makes an S3 client only when no request of the process is under way: one that crawls would hold up the next
def _open_store(uri: str, config: StorageConfig) -> tuple[fs.FileSystem, str]:
    files, root = fs.FileSystem.from_uri(uri)
    if isinstance(files, fs.S3FileSystem):  # from_uri takes no timeouts: make it again from what it would be pickled as
        _, (options,) = files.__reduce__()
        options |= {"request_timeout": config.stall_s, "connect_timeout": config.connect_s}
        files = fs.S3FileSystem(**options, retry_strategy=fs.AwsStandardS3RetryStrategy(max_attempts=1))
    return files, root


def _within(seconds: float, read: Callable[[], T]) -> T:
    """read(), given up after so many seconds. pyarrow cannot interrupt a request: its thread stays until the request ends by itself,
    and holds up the end of the process until then."""
    result = Future()

    def run() -> None:
        try:
            result.set_result(read())
        except BaseException as error:
            result.set_exception(error)

    threading.Thread(target=run, name="storage", daemon=True).start()
    try:
        return result.result(timeout=seconds)
    except TimeoutError as error:
        raise OSError(_first_line(error) or f"no complete answer within {seconds:.3g} s") from None


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0]
