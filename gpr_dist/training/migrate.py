"""A checkpoint for a refitted tokenizer: code tables follow the matching of old and new codes, everything else is copied bit for bit.

Works on the files of a checkpoint (training/checkpoint.py), without engine, process group or GPU, whatever the number of ranks that wrote
them: the new folder has one file per old one, with the same ranges of every parameter that has no row per code. Files are copied in
pieces; the largest thing in memory is one state of one code table, old and new.
"""

import json
import os
import shutil
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from tqdm import tqdm

from gpr_dist.config import build_config
from gpr_dist.errors import CheckpointError
from gpr_dist.model.code_tables import CodeTable, code_tables
from gpr_dist.model.gpr import GPR, GPRConfig
from gpr_dist.schema import write_atomic
from gpr_dist.tokenizer.matching import Matching
from gpr_dist.training import checkpoint
from gpr_dist.training.engine import STATES

# L levels  V codes per level (new)  W numbers per code

Changed = Literal["origin", "fresh"]
_PIECE_BYTES = 1 << 24
_LENGTH = struct.Struct("<Q")  # a safetensors file: length of the header, header, tensors end to end


@dataclass(frozen=True)
class _Entry:
    """One tensor of a safetensors file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int  # bytes from the start of the file
    end: int


def migrate(source: Path, run: Path, matching: Matching, changes: dict[str, Any], changed: Changed = "origin", seed: int = 0) -> Path:
    """Write the checkpoint `source` again under `run`, for the new tokenizer; `source` is only read.

    A kept code takes its row with it: weights and both Adam moments. A code that continues none gets zero moments and weights by `changed`;
    so do codes that no item carries, always `fresh`.

    Args:
        source: a complete step folder.
        run: run folder without checkpoints; the new step folder has the step of `source`.
        matching: of the tokenizer that `source` was trained with and the new one.
        changes: entries of state.json that are replaced, at least "config" (whose "model" is the new GPRConfig) and "fingerprints".
        changed: origin = mean of the old rows of the code's items, by weight; fresh = drawn like a new model's.
        seed: of the rows drawn.
    Returns: the committed folder.
    Raises: CheckpointError when `source` is damaged, when the models differ in more than codes per level, or when `run` has checkpoints;
        OSError when the folder cannot be written. What was written is removed then.
    """
    problem = checkpoint.verify(source)
    if problem:
        raise CheckpointError(f"{source}: {problem}")
    if taken := [folder for folder in checkpoint.list_steps(run) if (folder / "manifest.json").exists()]:
        raise CheckpointError(f"{run} already has {taken[-1].name}; a migrated checkpoint needs a run folder of its own, choose another")
    state = checkpoint.read_state(source)
    tables, shapes = _new_tables(state, changes, matching, source)
    folder = checkpoint.step_folder(run, state["step"])
    shutil.rmtree(folder, ignore_errors=True)  # the remains of a migration that was killed
    folder.mkdir(parents=True)
    try:
        _write(source, folder, state, tables, shapes, matching, changes, changed, seed)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return folder


def _write(source: Path, folder: Path, state: dict[str, Any], tables: dict[str, CodeTable], shapes: dict[str, tuple[int, ...]],
           matching: Matching, changes: dict[str, Any], changed: Changed, seed: int) -> None:
    manifest = checkpoint.read_manifest(source)
    names = [checkpoint.rank_file(rank) for rank in range(state["world_size"])]
    old_size = {name: int(np.prod(state["shapes"][name])) for name in tables}
    new_size = {name: int(np.prod(table.shape)) for name, table in tables.items()}
    places: dict[str, dict[str, _Entry]] = {}
    with tqdm(total=sum(manifest["files"][name]["num_bytes"] for name in names), desc="migrate", unit="B", unit_scale=True,
              mininterval=0.5) as bar:
        for name in names:
            places[name] = _copy_rank_file(source / name, folder / name, old_size, new_size, bar)
    generator = torch.Generator().manual_seed(seed)
    for name, table in tables.items():
        for key in STATES:
            old = torch.empty(old_size[name])
            checkpoint.read_range(old, 0, old.numel(), manifest["ranges"].get(name, []), {}, source, name, key)
            old_LWW = old.view(table.num_levels, -1, table.width).numpy()
            _write_table(migrate_table(old_LWW, table, matching, key, changed, generator), name, key, folder, places)
    for name in names:
        with open(folder / name, "rb+") as file:
            os.fsync(file.fileno())
        ranges = [_parse_key(key) for key in places[name]]
        checkpoint.write_note(folder / name, [(parameter, lo, hi) for parameter, key, lo, hi in ranges if key == STATES[0]])
    document = {**state, **changes, "shapes": shapes}
    if "progress" in document:  # losses under the old codes are not comparable with those to come
        document["progress"] = {**document["progress"], "best_step": None, "best_loss": None, "metrics": {}}
    write_atomic(folder / "state.json", json.dumps(document, indent=1).encode())
    checkpoint.commit(folder, state["world_size"])


def migrate_table(old_LWW: np.ndarray, table: CodeTable, matching: Matching, state: str, changed: Changed,
                  generator: torch.Generator) -> np.ndarray:
    """Float32 [L, V, numbers per code]: one state of a code table, under the new codes.

    Args:
        old_LWW: float32 [L, old codes, numbers per code].
        table: the table under the new codes.
        state: one of engine.STATES.
    """
    new_LVW = np.zeros(table.flat_shape, np.float32)
    if state == "param" and table.std:
        new_LVW = (torch.randn(table.flat_shape, generator=generator) * table.std).numpy()
    for level, match in enumerate(matching.levels):
        if state == "param" and changed == "origin":
            new_LVW[level][match.used_V] = (match.origin_VW @ old_LWW[level])[match.used_V]
        new_LVW[level][match.kept_V] = old_LWW[level][match.source_V[match.kept_V]]
    return new_LVW


def _new_tables(state: dict[str, Any], changes: dict[str, Any], matching: Matching,
                source: Path) -> tuple[dict[str, CodeTable], dict[str, tuple[int, ...]]]:
    """Code tables of the new model and the shapes of all its parameters. Raises: CheckpointError when another parameter changes too."""
    old = build_config(GPRConfig, state["config"]["model"], f"{source}/state.json")
    new = build_config(GPRConfig, changes["config"]["model"], "the new model")
    with torch.device("meta"):
        shapes = {name: tuple(parameter.shape) for name, parameter in GPR(new).named_parameters()}
    tables, found = code_tables(new), {name: tuple(shape) for name, shape in state["shapes"].items()}
    expected = shapes | {name: table.shape for name, table in code_tables(old).items()}
    for name in sorted(expected.keys() | found.keys()):
        if found.get(name) != expected.get(name):
            raise CheckpointError(f"{source} has {name} of shape {found.get(name)}, a model that differs by its codes alone has "
                                  f"{expected.get(name)}; only codes per level may change: keep the other settings and the data's fields")
    for match in matching.levels:
        assert match.origin_VW.shape == (new.codebook_size, old.codebook_size), (match.origin_VW.shape, new, old)
    return tables, shapes


def _copy_rank_file(source: Path, target: Path, old_size: dict[str, int], new_size: dict[str, int], bar: tqdm) -> dict[str, _Entry]:
    """Copy all but the code tables, which get their place and size. Returns: the state entries of the new file by key."""
    entries, header, at = _read_header(source), {}, 0
    planned: list[tuple[_Entry, str, int]] = []  # old entry, new key, new position
    for entry in entries:
        key, shape, num_bytes = entry.name, list(entry.shape), entry.end - entry.begin
        if "|" in key and (name := _parse_key(key)[0]) in new_size:
            # The same share of the parameter: bounds scale alike on every rank, so that the ranges tile it as before.
            lo, hi = (bound * new_size[name] // old_size[name] for bound in _parse_key(key)[2:])
            if lo == hi:
                continue
            key, shape, num_bytes = checkpoint.tensor_name(name, _parse_key(key)[1], lo, hi), [hi - lo], (hi - lo) * 4
        header[key] = {"dtype": entry.dtype, "shape": shape, "data_offsets": [at, at + num_bytes]}
        planned.append((entry, key, at))
        at += num_bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    start = _LENGTH.size + len(text)
    with open(source, "rb") as old, open(target, "wb") as new:
        new.write(_LENGTH.pack(len(text)) + text)
        new.truncate(start + at)
        bar.update(entries[0].begin)
        for entry, key, position in planned:
            if key == entry.name:
                old.seek(entry.begin)
                new.seek(start + position)
                for done in range(0, entry.end - entry.begin, _PIECE_BYTES):
                    new.write(old.read(min(_PIECE_BYTES, entry.end - entry.begin - done)))
            bar.update(entry.end - entry.begin)
    return {key: _Entry(key, entry.dtype, tuple(header[key]["shape"]), start + position, start + header[key]["data_offsets"][1])
            for entry, key, position in planned if "|" in key}


def _write_table(new_LVW: np.ndarray, name: str, state: str, folder: Path, places: dict[str, dict[str, _Entry]]) -> None:
    """Each file's range of one state of one parameter."""
    flat = new_LVW.reshape(-1)
    for file_name, entries in places.items():
        for key, entry in entries.items():
            parameter, found, lo, hi = _parse_key(key)
            if (parameter, found) == (name, state):
                with open(folder / file_name, "rb+") as file:
                    file.seek(entry.begin)
                    file.write(np.ascontiguousarray(flat[lo:hi], "<f4").data)


def _read_header(path: Path) -> list[_Entry]:
    """Tensors of a safetensors file, in the order of their bytes."""
    with open(path, "rb") as file:
        (length,) = _LENGTH.unpack(file.read(_LENGTH.size))
        header = json.loads(file.read(length))
    start = _LENGTH.size + length
    entries = [_Entry(name, entry["dtype"], tuple(entry["shape"]), *(start + offset for offset in entry["data_offsets"]))
               for name, entry in header.items() if name != "__metadata__"]
    return sorted(entries, key=lambda entry: (entry.begin, entry.end))


def _parse_key(key: str) -> tuple[str, str, int, int]:
    name, state, lo, hi = key.split("|")
    return name, state, int(lo), int(hi)
