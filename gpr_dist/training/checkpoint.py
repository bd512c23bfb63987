"""Checkpoints that any world size can read: one safetensors file per rank, an index of flat ranges, a commit marker written last.

Layout of `runs/<name>/step-000100/`:
    rank-00000.safetensors   "parameter|state|lo|hi" -> float32 [hi - lo], state in engine.STATES; and this rank's RNG state
    state.json               step counters, loader state, fingerprints, metrics, resolved config
    manifest.json            every file's size and checksums, and which file holds which range; written last, by rank 0, from the notes
                             (rank-00000.json, then removed) that each rank leaves beside its own file when that is on disk

A rank reads just the ranges it owns. No conversion step, no full copy anywhere, nothing pickled. A folder without a manifest, or
whose files differ from it, is ignored and named. This file reads, checks and removes checkpoints; training/saver.py writes them.
"""

import json
import math
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash

from gpr_dist.config import Config
from gpr_dist.errors import CheckpointError
from gpr_dist.safety import inside, open_tensors
from gpr_dist.schema import write_atomic
from gpr_dist.training.engine import Engine

FORMAT_VERSION = 1
STEP_FOLDER = re.compile(r"step-(\d{6,})")
RNG_KEY, CUDA_RNG_KEY = "rng", "rng_cuda"
BLOCK_BYTES = 1 << 22  # with a checksum each, so that any number of ranks can share the checking


class CheckpointConfig(Config):
    """When to save and what to keep."""

    every_steps: int = 500
    """optimizer steps between checkpoints"""
    keep_last: int = 3
    """newest checkpoints kept"""
    keep_every_steps: int = 0
    """checkpoints at multiples of this many steps are kept for ever; 0 = none"""
    keep_best: bool = True
    """also keep the checkpoint with the lowest validation loss"""
    background: bool = True
    """copy the state (12 bytes per parameter / ranks of host memory) and write while training goes on; false = training waits"""


@dataclass
class Restored:
    """What a checkpoint gives back beside the weights."""

    folder: Path
    state: dict[str, Any]


def step_folder(run: Path, step: int) -> Path:
    """`run`/step-000100."""
    return run / f"step-{step:06d}"


def load_latest(engine: Engine, run: Path, expected: dict[str, str]) -> Restored | None:
    """Resume from the newest complete checkpoint of a run, on any number of ranks (collective).

    Args: expected: fingerprints the checkpoint must carry, e.g. {"tokenizer": "4f2c…"}.
    Returns: None if the run has no complete checkpoint. Damaged or unfinished ones are reported on stderr and passed over.
    Raises: CheckpointError when the newest intact checkpoint belongs to another model, tokenizer or data set.
    """
    for folder in reversed(list_steps(run)):
        problem = verify(folder, engine.rank, engine.world_size)
        if engine.all_reduce(torch.tensor([float(problem is not None)]), "max").item():
            if problem:
                print(f"checkpoint {folder} is not usable ({problem}); trying the one before it", file=sys.stderr, flush=True)
            continue
        return load(engine, folder, expected)
    return None


def load(engine: Engine, folder: Path, expected: dict[str, str]) -> Restored:
    """Fill the engine from one complete checkpoint (collective). Raises: CheckpointError on any mismatch, before anything changes."""
    state = read_state(folder)
    _check(state, engine, expected, folder)
    ranges, files = read_manifest(folder)["ranges"], {}
    for shard in engine.loadable_shards():
        for key, target in shard.tensors.items():
            read_range(target, shard.lo, shard.hi, ranges.get(shard.name, []), files, folder, shard.name, key)
    engine.finish_loading(state["optimizer_step"])
    rng_file = folder / rank_file(engine.rank)
    if rng_file.exists():  # on more ranks than before the new ones keep their seed: dropout differs, rows and weights do not
        with open_tensors(rng_file, CheckpointError) as file:
            torch.set_rng_state(file.get_tensor(RNG_KEY))
            if torch.cuda.is_available() and CUDA_RNG_KEY in file.keys():  # noqa: SIM118
                torch.cuda.set_rng_state(file.get_tensor(CUDA_RNG_KEY))
    return Restored(folder, state)


def list_steps(run: Path) -> list[Path]:
    """Step folders of a run, complete or not, oldest first."""
    folders = [p for p in run.glob("step-*") if STEP_FOLDER.fullmatch(p.name)]
    return sorted(folders, key=lambda p: int(p.name.removeprefix("step-")))


def verify(folder: Path, part: int = 0, parts: int = 1) -> str | None:
    """Check a checkpoint's files against its manifest; each of `parts` ranks reads its share. Returns: what is wrong, or None."""
    try:
        manifest = read_manifest(folder)
    except FileNotFoundError:
        return "it has no manifest.json: the save was interrupted"
    except (OSError, ValueError) as error:
        return f"manifest.json is damaged: {error}"
    blocks = []
    for name, entry in sorted(manifest["files"].items()):
        path = folder / name
        if not path.exists():
            return f"{name} is missing"
        if path.stat().st_size != entry["num_bytes"]:
            return f"{name} has {path.stat().st_size} bytes, expected {entry['num_bytes']}"
        # checkpoints from before the blocks have one checksum of the whole file
        size, checksums = entry.get("block_bytes", entry["num_bytes"]), entry.get("blocks") or [entry["xxh3_128"]]
        blocks += [(path, number * size, size, wanted) for number, wanted in enumerate(checksums)]
    for path, start, size, wanted in blocks[len(blocks) * part // parts : len(blocks) * (part + 1) // parts]:
        if block_checksum(path, start, size) != wanted:
            return f"{path.name} was altered: its checksum is not the one in the manifest"
    return None


def read_state(folder: Path) -> dict[str, Any]:
    """`state.json` of a checkpoint. Raises: CheckpointError."""
    try:
        state = json.loads((folder / "state.json").read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder}/state.json cannot be read ({error}); is {folder} a checkpoint folder?") from None
    if state.get("format_version") != FORMAT_VERSION:
        raise CheckpointError(f"{folder} has checkpoint format {state.get('format_version')}, this code reads {FORMAT_VERSION}")
    return state


def prune(run: Path, config: CheckpointConfig, best_step: int | None) -> None:
    """Remove checkpoints that the retention rules do not keep, and unfinished ones older than the newest complete one."""
    complete = [p for p in list_steps(run) if (p / "manifest.json").exists()]
    if not complete:
        return
    keep = set(complete[-max(1, config.keep_last) :])
    for folder in complete:
        step = int(folder.name.removeprefix("step-"))
        if (config.keep_every_steps and step % config.keep_every_steps == 0) or (config.keep_best and step == best_step):
            keep.add(folder)
    for folder in list_steps(run):
        if folder not in keep and int(folder.name.removeprefix("step-")) < int(complete[-1].name.removeprefix("step-")):
            (folder / "manifest.json").unlink(missing_ok=True)  # first, so that a kill here leaves no half-removed "complete" folder
            shutil.rmtree(folder)


def rank_file(rank: int) -> str:
    return f"rank-{rank:05d}.safetensors"


def iter_weights(folder: Path) -> Any:
    """Yield (name, float32 tensor in its shape) one parameter at a time, from a checkpoint of any world size; for export and evaluation."""
    state = read_state(folder)
    ranges, files = read_manifest(folder)["ranges"], {}
    for name, shape in state["shapes"].items():
        whole = torch.empty(math.prod(shape))
        read_range(whole, 0, whole.numel(), ranges.get(name, []), files, folder, name, "param")
        yield name, whole.view(shape)


def open_weights(folder: Path, mapped_bytes: int = 1 << 27) -> tuple[dict[str, list[int]], Callable[[str, int, int], torch.Tensor]]:
    """To stream the weights out of a checkpoint of any world size, e.g. into a bundle.

    Args: mapped_bytes: the ranks' files are closed whenever this much was read, so that their pages do not add up in memory.
    Returns: (shape of every parameter, function (name, lo, hi) -> float32 [hi - lo] of the flat parameter, good until the next call).
    """
    ranges, shapes = read_manifest(folder)["ranges"], read_state(folder)["shapes"]
    files: dict[str, Any] = {}
    num_read, buffer = 0, torch.empty(0)  # one buffer for all pieces: the allocator would keep many

    def read(name: str, lo: int, hi: int) -> torch.Tensor:
        nonlocal num_read, buffer
        num_read += 4 * (hi - lo)
        if num_read > mapped_bytes:
            files.clear()
            num_read = 0
        if len(buffer) < hi - lo:
            buffer = torch.empty(hi - lo)
        piece = buffer[:hi - lo]
        read_range(piece, lo, hi, ranges.get(name, []), files, folder, name, "param")
        return piece

    return shapes, read


def find_checkpoint(path: Path, best: bool = False) -> Path:
    """A step folder as given, or the newest intact one of a run folder, or the one that had validated best when that was saved.

    Raises: CheckpointError when there is none, or it is damaged.
    """
    if STEP_FOLDER.fullmatch(path.name):
        if problem := verify(path):
            raise CheckpointError(f"{path}: {problem}")
        return path
    for folder in reversed(list_steps(path)):
        if verify(folder) is None:
            step = read_state(folder)["progress"]["best_step"] if best else None
            return folder if step is None else find_checkpoint(step_folder(path, step))
    raise CheckpointError(f"{path} has no complete checkpoint; train first, or give a step folder")


def file_entry(path: Path) -> dict[str, Any]:
    """What the manifest says of a file: its size and the checksum of every block."""
    num_bytes = path.stat().st_size
    starts = range(0, max(1, num_bytes), BLOCK_BYTES)
    return {"num_bytes": num_bytes, "block_bytes": BLOCK_BYTES, "blocks": [block_checksum(path, at, BLOCK_BYTES) for at in starts]}


def write_note(path: Path, ranges: list[tuple[str, int, int]]) -> None:
    """Beside a rank's file that is on disk: that it is, and what it holds, (parameter, lo, hi) each; `commit` waits for all of them."""
    write_atomic(path.with_suffix(".json"), json.dumps({**file_entry(path), "ranges": ranges}).encode())


def commit(folder: Path, world_size: int) -> None:
    """Write manifest.json from the notes beside the ranks' files; from then on the folder is a checkpoint."""
    files, ranges = {}, {}
    for rank in range(world_size):
        note_path = (folder / rank_file(rank)).with_suffix(".json")
        note = json.loads(note_path.read_text())
        for name, lo, hi in note.pop("ranges"):
            ranges.setdefault(name, []).append((lo, hi, rank_file(rank)))
        files[rank_file(rank)] = note
        note_path.unlink()
    files["state.json"] = file_entry(folder / "state.json")
    manifest = {"files": files, "ranges": ranges}
    write_atomic(folder / "manifest.json", json.dumps({**manifest, "xxh3_128": _manifest_checksum(manifest)}).encode())


def _manifest_checksum(manifest: dict[str, Any]) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(manifest).encode())


def read_manifest(folder: Path) -> dict[str, Any]:
    """Files and ranges. Raises: OSError; ValueError when anything in it was altered, or a name leads out of the folder."""
    manifest = json.loads((folder / "manifest.json").read_text())
    if manifest.pop("xxh3_128", None) != _manifest_checksum(manifest):
        raise ValueError("it does not have its own checksum")
    for name in {*manifest["files"], *(file for ranges in manifest["ranges"].values() for _, _, file in ranges)}:
        inside(folder, name, "it", ValueError)
    return manifest


def tensor_name(name: str, state: str, lo: int, hi: int) -> str:
    """Of one range of one state of a parameter, in a rank's file."""
    return f"{name}|{state}|{lo}|{hi}"


def block_checksum(path: Path, start: int, num_bytes: int) -> str:
    """xxh3_128 of a part of a file, in hex."""
    running = xxhash.xxh3_128()
    with open(path, "rb") as file:
        file.seek(start)
        while num_bytes > 0 and (chunk := file.read(min(num_bytes, BLOCK_BYTES))):
            running.update(chunk)
            num_bytes -= len(chunk)
    return running.hexdigest()


def read_range(target: torch.Tensor, lo: int, hi: int, ranges: list[tuple[int, int, str]], files: dict[str, Any], folder: Path, name: str,
               state: str) -> None:
    """Fill `target`, 1-D, with elements [lo, hi) of one state of a parameter.

    Args: ranges: the parameter's entry in the manifest; files: keeps opened files from one call to the next.
    Raises: CheckpointError when the files do not hold all of them.
    """
    filled = 0
    for first, last, file_name in ranges:
        a, b = max(lo, first), min(hi, last)
        if a < b:
            if file_name not in files:
                files[file_name] = open_tensors(folder / file_name, CheckpointError)
            target[a - lo : b - lo].copy_(files[file_name].get_slice(tensor_name(name, state, first, last))[a - first : b - first])
            filled += b - a
    if filled != hi - lo:
        raise CheckpointError(f"{folder} holds {filled} of the {hi - lo} elements [{lo}, {hi}) of {name}; the checkpoint is incomplete")


def _check(state: dict[str, Any], engine: Engine, expected: dict[str, str], folder: Path) -> None:
    for kind, wanted in expected.items():
        found = state.get("fingerprints", {}).get(kind)
        if found != wanted:
            way_out = {"tokenizer": ", take the checkpoint over to the new one with launch/migrate.py,",
                       "data": f", go on from these weights on this data with init_from={folder} and another run name,"}.get(kind, "")
            raise CheckpointError(f"{folder} was trained with {kind} {found}, this run uses {kind} {wanted}; "
                                  f"use the same {kind}{way_out} or another run name (run.name=…) to start afresh")
    shapes = {name: tuple(shape) for name, shape in state["shapes"].items()}
    for name in sorted(shapes.keys() | engine.shapes.keys()):
        if shapes.get(name) != engine.shapes.get(name):
            raise CheckpointError(f"{folder} has {name} of shape {shapes.get(name)}, the configured model has {engine.shapes.get(name)}; "
                                  f"use the model settings of {folder}/state.json or another run name")
