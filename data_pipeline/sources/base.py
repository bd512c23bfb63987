"""What every source of raw logs provides. One file per format beside this one; build.py knows nothing else about them.

A source is made anew in every worker process from its config, so it holds no state but caches.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa

from data_pipeline.events import SourceBatch
from gpr_dist.errors import DataError


class Task(NamedTuple):
    """A piece of the logs one worker reads in one go. `order` is its place in the log, `detail` is the source's own affair."""

    order: int
    name: str
    num_rows: int  # as far as known without reading, for the progress bar and the number of buckets
    detail: tuple = ()


class Source(ABC):
    """Raw logs as normalised events, with the items, users and eligibility lists that belong to them."""

    user_features: tuple[str, ...] = ()
    """names of features logged with events (columns `user.<name>`)"""
    profile_features: tuple[str, ...] = ()
    """names of static features in the users table; on a U token they stand before `user_features`"""
    env_features: tuple[str, ...] = ()
    """names of request features (columns `env.<name>`)"""
    item_features: pa.Schema = pa.schema([])
    """feature columns of the items table beyond text and price"""
    num_groups: int = 0
    """eligibility groups; 0 = every ad is always eligible"""

    @abstractmethod
    def tasks(self) -> list[Task]:
        """The pieces of the log, in a fixed order. Raises: DataError when files are missing, ConfigError when columns are."""

    @abstractmethod
    def read_events(self, task: Task) -> Iterator[SourceBatch]:
        """The events of one task, batch by batch; memory does not grow with the task."""

    @abstractmethod
    def inputs(self) -> list[str]:
        """One line per input file with what changes when it changes (name, size, time), so that a rebuild notices."""

    def read_items(self) -> Iterator[pa.Table]:
        """Items tables: ITEM_SCHEMA and `item_features`."""
        return iter(())

    def read_users(self) -> Iterator[pa.Table]:
        """Users tables: `user_id` and a string column per profile feature."""
        return iter(())

    def read_eligibility(self) -> Iterator[pa.Table]:
        """Tables of `group` (int32 in [0, num_groups)) and `item_id` (string or dictionary)."""
        return iter(())

    def describe(self) -> list[str]:
        """What would be read, for --dry-run."""
        tasks = self.tasks()
        lines = [f"{len(tasks)} pieces of log, about {sum(task.num_rows for task in tasks):,} rows", *self.inputs()]
        return [*lines, f"U features: {', '.join(self.profile_features + self.user_features) or 'none'}",
                f"E features: {', '.join(self.env_features) or 'none'}", f"eligibility groups: {self.num_groups or 'every ad is eligible'}"]


def require_file(path: str | Path, hint: str) -> Path:
    """Raises: DataError when `path` is not a file with something in it; `hint` says how to get it."""
    path = Path(path).expanduser()
    if not path.is_file():
        raise DataError(f"{path} does not exist; {hint}")
    if path.stat().st_size == 0:
        raise DataError(f"{path} is empty; {hint}")
    return path


def file_line(path: Path) -> str:
    """An `inputs` line of a local file."""
    stat = path.stat()
    return f"{path} ({stat.st_size:,} bytes, modified {stat.st_mtime_ns})"
