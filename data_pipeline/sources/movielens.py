"""MovieLens-1M as time-ordered sequences: sequences.tsv (user<TAB>movie ids), movies.dat (titles and genres), users.dat (U features)."""

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import pyarrow as pa
import pyarrow.compute as pc

from data_pipeline.events import SourceBatch
from data_pipeline.sources.base import Source, Task, file_line, require_file
from data_pipeline.sources.sequences import read_lines, sequence_events, split_columns, split_words
from gpr_dist.config import Config


class MovieLensConfig(Config):
    """MovieLens-1M."""

    format: Literal["movielens"]
    folder: Path
    """folder of sequences.tsv, movies.dat and users.dat"""


class MovieLensSource(Source):
    """Every rating is an ad; position is the time (see sequences.py)."""

    profile_features = ("gender", "age", "occupation", "zip")

    def __init__(self, config: MovieLensConfig):
        hint = "point source.folder at MovieLens-1M (sequences.tsv, movies.dat, users.dat)"
        self._files = {name: require_file(config.folder / name, hint) for name in ("sequences.tsv", "movies.dat", "users.dat")}

    def inputs(self) -> list[str]:
        return [file_line(path) for path in self._files.values()]

    def tasks(self) -> list[Task]:
        path = self._files["sequences.tsv"]
        return [Task(0, path.name, path.stat().st_size // 5)]

    def read_events(self, task: Task) -> Iterator[SourceBatch]:
        path = str(self._files["sequences.tsv"])
        user, items = split_columns(read_lines(path), "\t", 2, path)
        yield sequence_events(user, split_words(items), task.name)

    def read_items(self) -> Iterator[pa.Table]:
        path = str(self._files["movies.dat"])
        item, title, genres = split_columns(read_lines(path, "latin-1"), "::", 3, path)
        text = pc.binary_join_element_wise(title, pc.replace_substring(genres, "|", " "), " ")
        yield pa.table({"item_id": item, "text": text, "price": pa.nulls(len(item), pa.float32())})

    def read_users(self) -> Iterator[pa.Table]:
        path = str(self._files["users.dat"])
        yield pa.table(split_columns(read_lines(path, "latin-1"), "::", 5, path), names=["user_id", *self.profile_features])
