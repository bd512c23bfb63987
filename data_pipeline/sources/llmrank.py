"""LLMRank files (`<name>.test.inter`, `.valid.inter`, `.item`): tab-separated, a header line, histories cut to the last 50 items."""

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from data_pipeline.events import SourceBatch
from data_pipeline.sources.base import Source, Task, file_line, require_file
from data_pipeline.sources.sequences import read_lines, sequence_events, split_columns, split_words
from gpr_dist.config import Config
from gpr_dist.errors import DataError


class LLMRankConfig(Config):
    """LLMRank's RecBole files."""

    format: Literal["llmrank"]
    folder: Path
    """folder of the files"""
    name: str = "Games-6k"
    """first part of the file names"""


class LLMRankSource(Source):
    """A user's sequence is the test history and the test target; the validation file must agree with it."""

    def __init__(self, config: LLMRankConfig):
        hint = f"point source.folder at the folder of {config.name}.test.inter, .valid.inter and .item"
        self._files = {kind: require_file(config.folder / f"{config.name}.{kind}", hint) for kind in ("test.inter", "valid.inter", "item")}

    def inputs(self) -> list[str]:
        return [file_line(path) for path in self._files.values()]

    def tasks(self) -> list[Task]:
        path = self._files["test.inter"]
        return [Task(0, path.name, path.stat().st_size // 6)]

    def read_events(self, task: Task) -> Iterator[SourceBatch]:
        user, items = self._sequences("test.inter")
        valid_user, valid_items = self._sequences("valid.inter")
        if not user.equals(valid_user):
            raise DataError(f"{self._files['valid.inter']} and {self._files['test.inter']} list other users; they must come from one split")
        # The last validation item must be the last item of the test history: otherwise the test target is not the user's last event.
        second_last = items.flatten().take(pa.array(items.offsets.to_numpy()[1:] - 2))
        last_valid = valid_items.flatten().take(pa.array(valid_items.offsets.to_numpy()[1:] - 1))
        different = np.flatnonzero(pc.not_equal(second_last, last_valid).to_numpy(zero_copy_only=False))
        if len(different):
            row = int(different[0])
            raise DataError(f"{self._files['valid.inter']} line {row + 2}: target {last_valid[row]} is not the last item of the test "
                            f"history ({second_last[row]})")
        yield sequence_events(user, items, task.name)

    def read_items(self) -> Iterator[pa.Table]:
        path = str(self._files["item"])
        item, title = split_columns(read_lines(path)[1:], "\t", 2, path)
        yield pa.table({"item_id": item, "text": title, "price": pa.nulls(len(item), pa.float32())})

    def _sequences(self, kind: str) -> tuple[pa.Array, pa.ListArray]:
        path = str(self._files[kind])
        user, history, target = split_columns(read_lines(path)[1:], "\t", 3, path)
        return user, split_words(pc.binary_join_element_wise(history, target, " "))
