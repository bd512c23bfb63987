"""Amazon review sequences in the text format of S3-Rec: `user item item ...` per line, and item attributes as JSON lists."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import pyarrow as pa

from data_pipeline.events import SourceBatch
from data_pipeline.sources.base import Source, Task, file_line, require_file
from data_pipeline.sources.sequences import read_lines, sequence_events, split_columns, split_words
from gpr_dist.config import Config
from gpr_dist.errors import DataError


class AmazonConfig(Config):
    """Amazon reviews, S3-Rec text format."""

    format: Literal["amazon"]
    sequences: Path
    """e.g. Beauty.txt: user and items, oldest first, separated by spaces"""
    attributes: Path | None = None
    """e.g. Beauty_item2attributes.json: item -> list of attribute numbers, which become the words of its text"""


class AmazonSource(Source):
    """Every review is an ad; position is the time (see sequences.py)."""

    def __init__(self, config: AmazonConfig):
        self._sequences = require_file(config.sequences, "point source.sequences at a file of lines `user item item ...`")
        self._attributes = config.attributes and require_file(config.attributes, "point source.attributes at the JSON of item attributes")

    def inputs(self) -> list[str]:
        return [file_line(path) for path in (self._sequences, self._attributes) if path]

    def tasks(self) -> list[Task]:
        return [Task(0, self._sequences.name, self._sequences.stat().st_size // 6)]

    def read_events(self, task: Task) -> Iterator[SourceBatch]:
        path = str(self._sequences)
        user, items = split_columns(read_lines(path), " ", 2, path, max_splits=1)
        yield sequence_events(user, split_words(items), task.name)

    def read_items(self) -> Iterator[pa.Table]:
        if not self._attributes:
            return
        try:
            attributes = json.loads(self._attributes.read_text())
            texts = [" ".join(f"attribute_{number}" for number in numbers) for numbers in attributes.values()]
        except (json.JSONDecodeError, AttributeError, TypeError) as error:
            raise DataError(f"{self._attributes} is not a JSON object of item -> list of attributes ({error})") from None
        yield pa.table({"item_id": pa.array(list(attributes), pa.string()), "text": pa.array(texts, pa.string()),
                        "price": pa.nulls(len(texts), pa.float32())})
