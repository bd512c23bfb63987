"""Saving in the background, with ranks that are threads of this process: what is copied, who commits when, what an error does.

And reading back on any other number of ranks: the same numbers, from a share of the bytes.
"""

import json
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from checkpoint_files import write_checkpoint
from thread_ranks import Group, ThreadEngine

from gpr_dist.errors import CheckpointError
from gpr_dist.training import checkpoint, saver
from gpr_dist.training.checkpoint import CheckpointConfig
from gpr_dist.training.saver import Saver

SHAPES = {"a": (64, 32), "b": (1000,), "c": (3,)}


class Gate:
    """Stands in for the library's `save_file`: rank `number` waits until it is opened, or fails."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, number: int, error: OSError | None = None) -> None:
        self.opened, self.reached, original = threading.Event(), threading.Event(), saver.save_file

        def save_file(tensors: dict, path: Path) -> None:
            if path.name == checkpoint.rank_file(number):
                self.reached.set()
                assert self.opened.wait(20)
                if error:
                    raise error
            original(tensors, path)

        monkeypatch.setattr(saver, "save_file", save_file)


def state(**values: Any) -> dict[str, Any]:
    return {"fingerprints": {"data": "d"}, "config": {}, "progress": values}


def complete(run: Path) -> list[str]:
    return [folder.name for folder in checkpoint.list_steps(run) if checkpoint.verify(folder) is None]


@pytest.mark.parametrize("world_size", [1, 3])
def test_what_is_saved_is_the_instant_of_the_call(tmp_path, monkeypatch, world_size):
    """The writer is held up, training changes everything meanwhile, and nothing of it is in the checkpoint."""
    group, gate, progress = Group(world_size, SHAPES), Gate(monkeypatch, world_size - 1), {"step": 5}
    savers = [Saver(engine, tmp_path, CheckpointConfig()) for engine in group.engines]
    before = [engine.numbers() for engine in group.engines]

    def train(engine: ThreadEngine) -> bool:
        savers[engine.rank].save(5, state(**progress))
        for shard in engine.shards:
            for values in shard.tensors.values():
                values.mul_(-1)
        return savers[engine.rank].poll()

    random = torch.get_rng_state()
    assert group.run(train) == [True] * world_size, "the call did not return before the file was written"
    progress["step"] = 6
    torch.rand(3)
    assert complete(tmp_path) == [] and [engine.numbers() for engine in group.engines] != before
    gate.opened.set()
    group.run(lambda engine: savers[engine.rank].wait())
    assert complete(tmp_path) == ["step-000005"] and savers[0].write_seconds > 0
    other = Group(world_size, SHAPES)
    restored = other.run(lambda engine: checkpoint.load(engine, tmp_path / "step-000005", {"data": "d"}))
    assert [engine.numbers() for engine in other.engines] == before
    assert restored[0].state["progress"] == {"step": 5} and torch.equal(torch.get_rng_state(), random)


def test_one_write_at_a_time_and_the_former_stays_until_the_commit(tmp_path, monkeypatch):
    """Rank 0 commits when the slowest rank's file is there; a save meets a write under way: it waits; retention acts after the commit."""
    group, config = Group(2, SHAPES), CheckpointConfig(keep_last=1)
    savers = [Saver(engine, tmp_path, config) for engine in group.engines]
    group.run(lambda engine: (savers[engine.rank].save(1, state()), savers[engine.rank].wait()))
    assert complete(tmp_path) == ["step-000001"]
    gate = Gate(monkeypatch, 1)
    group.run(lambda engine: savers[engine.rank].save(2, state()))
    assert gate.reached.wait(20) and complete(tmp_path) == ["step-000001"]
    third = threading.Thread(target=lambda: group.run(lambda engine: savers[engine.rank].save(3, state())))
    third.start()
    third.join(0.2)
    assert third.is_alive() and not (tmp_path / "step-000003").exists() and complete(tmp_path) == ["step-000001"]
    gate.opened.set()
    third.join(20)
    group.run(lambda engine: savers[engine.rank].wait())
    assert complete(tmp_path) == ["step-000003"] == [folder.name for folder in checkpoint.list_steps(tmp_path)]


@pytest.mark.parametrize("rank", [0, 2])
def test_an_error_of_one_rank_reaches_all(tmp_path, monkeypatch, rank):
    group = Group(3, SHAPES)
    savers = [Saver(engine, tmp_path, CheckpointConfig()) for engine in group.engines]
    group.run(lambda engine: (savers[engine.rank].save(1, state()), savers[engine.rank].wait()))
    gate = Gate(monkeypatch, rank, OSError(28, "No space left on device"))
    assert group.run(lambda engine: (savers[engine.rank].save(2, state()), savers[engine.rank].poll())[1]) == [True] * 3
    gate.opened.set()
    problems = group.run(lambda engine: savers[engine.rank].wait())
    assert all(isinstance(problem, CheckpointError) and "step-000002 failed" in str(problem) for problem in problems)
    assert ["No space left" in str(problem) for problem in problems] == [number == rank for number in range(3)]
    assert [folder.name for folder in checkpoint.list_steps(tmp_path)] == ["step-000001"] == complete(tmp_path)


def test_a_write_that_never_ends_is_an_error(tmp_path, monkeypatch):
    group, gate = Group(2, SHAPES), Gate(monkeypatch, 1)
    monkeypatch.setattr(saver, "_PATIENCE_S", 0.1)
    for engine in group.engines:
        engine.config.timeout_seconds = 0.3
    savers = [Saver(engine, tmp_path, CheckpointConfig()) for engine in group.engines]
    problems = group.run(lambda engine: (savers[engine.rank].save(1, state()), savers[engine.rank].wait()))
    assert all(isinstance(problem, CheckpointError) for problem in problems) and not checkpoint.list_steps(tmp_path)
    assert "not on disk after 0.3 s" in str(problems[1])
    gate.opened.set()


def test_what_fails_after_the_commit_leaves_the_checkpoint(tmp_path, monkeypatch):
    def prune(*_: Any) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(checkpoint, "prune", prune)
    with pytest.raises(CheckpointError, match="Input/output error"):
        saver.save(Group(1, SHAPES).engines[0], tmp_path, 1, state())
    assert complete(tmp_path) == ["step-000001"]


def test_room_is_looked_for_first(tmp_path, monkeypatch):
    """Neither this checkpoint nor what else is on the disk suffers."""
    group = Group(2, SHAPES)
    savers = [Saver(engine, tmp_path, CheckpointConfig()) for engine in group.engines]
    monkeypatch.setattr(saver.shutil, "disk_usage", lambda _: SimpleNamespace(total=10**9, free=1000))
    problems = group.run(lambda engine: savers[engine.rank].save(1, state()))
    assert "No space left on device: 3.66e-05 GB needed, 1e-06 GB free" in str(problems[0]) and isinstance(problems[1], CheckpointError)
    assert not checkpoint.list_steps(tmp_path)


class CountingFile:
    """An opened safetensors file, counting the bytes of the slices taken."""

    def __init__(self, file: Any, read: list[int]) -> None:
        self.file, self.read = file, read

    def get_slice(self, name: str) -> Any:
        return Slice(self.file.get_slice(name), self.read)

    def get_tensor(self, name: str) -> torch.Tensor:
        return self.file.get_tensor(name)  # the random state, 5 kB

    def __enter__(self) -> "CountingFile":
        return self

    def __exit__(self, *_: Any) -> None:
        return None


class Slice:
    def __init__(self, whole: Any, read: list[int]) -> None:
        self.whole, self.read = whole, read

    def __getitem__(self, part: slice) -> torch.Tensor:
        values = self.whole[part]
        self.read.append(values.nbytes)
        return values


@pytest.mark.parametrize(("before", "after"), [(1, 1), (1, 2), (2, 1), (2, 4), (4, 2), (3, 8), (8, 3)])
def test_a_rank_reads_its_share_of_the_bytes(tmp_path, monkeypatch, before, after):
    """Loading takes exactly the elements owned, checking an equal share of the blocks, whatever number of ranks wrote them."""
    monkeypatch.setattr(checkpoint, "BLOCK_BYTES", 512)
    weights = {name: torch.randn(shape) for name, shape in SHAPES.items()}
    folder = write_checkpoint(tmp_path / "step-000001", weights, before, fingerprints={"data": "d"})
    loaded, checked, original, open_tensors = [], [], checkpoint.block_checksum, checkpoint.open_tensors
    monkeypatch.setattr(checkpoint, "open_tensors", lambda *args: CountingFile(open_tensors(*args), loaded))

    def count(path: Path, start: int, num_bytes: int) -> str:
        checked.append(min(num_bytes, path.stat().st_size - start))
        return original(path, start, num_bytes)

    monkeypatch.setattr(checkpoint, "block_checksum", count)
    total = sum(path.stat().st_size for path in folder.iterdir() if path.name != "manifest.json")
    checked_by_all = 0
    for engine in Group(after, SHAPES).engines:
        loaded.clear(), checked.clear()
        assert checkpoint.verify(folder, engine.rank, after) is None
        checkpoint.load(engine, folder, {"data": "d"})
        owned = 12 * sum(shard.hi - shard.lo for shard in engine.shards)
        assert sum(loaded) == owned and abs(owned - 12 * 3051 / after) <= 12 * len(SHAPES)
        assert sum(checked) <= total / after + 512
        checked_by_all += sum(checked)
        for shard in engine.shards:
            assert torch.equal(shard.tensors["param"], weights[shard.name].flatten()[shard.lo : shard.hi])
    assert checked_by_all == total


def test_checkpoints_with_one_checksum_per_file_are_still_read(tmp_path):
    folder = write_checkpoint(tmp_path / "step-000001", {"a": torch.randn(100)}, 1)
    manifest = checkpoint.read_manifest(folder)
    for name in manifest["files"]:
        size = (folder / name).stat().st_size
        manifest["files"][name] = {"num_bytes": size, "xxh3_128": checkpoint.block_checksum(folder / name, 0, size)}
    (folder / "manifest.json").write_text(json.dumps({**manifest, "xxh3_128": checkpoint._manifest_checksum(manifest)}))
    assert checkpoint.verify(folder) is None
    path = folder / checkpoint.rank_file(0)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert "was altered" in checkpoint.verify(folder)
