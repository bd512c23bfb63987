"""The hand-off bundle as a folder: which files belong to it, their checksums, and how it comes into being in one moment.

`bundle.json` is written last, into a temporary folder that is then renamed: a bundle is there whole or not at all. What is in the files
is serving's business (gpr_dist/serving/); training reads weights from here too, by ranges, to start another job.
"""

import json
import math
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import xxhash

from gpr_dist.config import Config, build_config
from gpr_dist.errors import CheckpointError, ConfigError
from gpr_dist.safety import inside, open_tensors
from gpr_dist.schema import file_checksum, write_atomic

BUNDLE_VERSION = 1
MANIFEST = "bundle.json"
WEIGHTS = "model.safetensors"


class BundleFile(Config):
    """One file of a bundle."""

    num_bytes: int
    xxh3_128: str


class BundleManifest(Config):
    """`bundle.json`."""

    bundle_version: int = BUNDLE_VERSION
    fingerprints: dict[str, str]
    """of tokenizer (codebooks), data, catalogue and, if the model reads any, external knowledge"""
    source: dict[str, Any]
    """where the weights come from: run, step"""
    model: dict[str, Any]
    """GPRConfig"""
    settings: dict[str, Any]
    """gpr_dist/serving/settings.py"""
    files: dict[str, BundleFile]
    """every other file, by its path relative to the folder, with forward slashes"""


def is_bundle(folder: Path) -> bool:
    return (folder / MANIFEST).is_file()


@contextmanager
def new_bundle(out: Path) -> Iterator[Path]:
    """A temporary folder beside `out` that becomes `out` when the block ends well (after `seal`), and is removed when it does not.

    Raises: CheckpointError when `out` exists: nothing is overwritten.
    """
    if out.exists():
        raise CheckpointError(f"{out} already exists; a bundle is never overwritten: choose another folder or remove it first")
    staging = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    try:
        yield staging
        assert is_bundle(staging), "seal was not called"
        if out.exists():
            raise CheckpointError(f"{out} appeared meanwhile; a bundle is never overwritten: choose another folder")
        staging.rename(out)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise


def seal(folder: Path, **content: Any) -> BundleManifest:
    """Flush all files, take their checksums and write the manifest. Args: content: the other fields of BundleManifest."""
    files = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        with open(path, "rb") as file:
            os.fsync(file.fileno())
        files[path.relative_to(folder).as_posix()] = BundleFile(num_bytes=path.stat().st_size, xxh3_128=_checksum(path))
    manifest = BundleManifest(files=files, **content)
    values = manifest.model_dump(mode="json")
    write_atomic(folder / MANIFEST, json.dumps({**values, "xxh3_128": _values_checksum(values)}, indent=1).encode())
    return manifest


def read_manifest(folder: Path) -> BundleManifest:
    """Raises: CheckpointError when there is none, it was altered, is of another version, or names a file outside the folder."""
    path = folder / MANIFEST
    try:
        values = json.loads(path.read_bytes())
        checksum, version = values.pop("xxh3_128"), values["bundle_version"]
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist, so {folder} is no complete bundle; make one with launch/export.py") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is damaged ({error!r}); export the bundle again with launch/export.py") from None
    if version != BUNDLE_VERSION:
        raise CheckpointError(f"{path}: bundle version {version}, this code reads {BUNDLE_VERSION}; export it again with launch/export.py")
    if checksum != _values_checksum(values):
        raise CheckpointError(f"{path} was altered (it does not have its own checksum); export the bundle again with launch/export.py")
    try:
        manifest = build_config(BundleManifest, values, str(path))
    except ConfigError as error:
        raise CheckpointError(f"{error}; export the bundle again with launch/export.py") from None
    for name in manifest.files:
        inside(folder, name, path, CheckpointError)
    return manifest


def verify(folder: Path, manifest: BundleManifest, names: list[str] | None = None) -> str | None:
    """Compare files (none given = all) with the manifest. Returns: what is wrong, or None."""
    for name in manifest.files if names is None else names:
        path, entry = folder / name, manifest.files.get(name)
        if entry is None:
            return f"{name} is not in {MANIFEST}"
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != entry.num_bytes:
            return f"{name} has {path.stat().st_size} bytes, expected {entry.num_bytes}"
        if _checksum(path) != entry.xxh3_128:
            return f"{name} was altered: its checksum is not the one in {MANIFEST}"
    return None


def weight_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Shape of every weight."""
    with open_tensors(folder / WEIGHTS, CheckpointError) as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118


def read_weight_range(target: torch.Tensor, lo: int, hi: int, folder: Path, name: str) -> None:
    """Fill `target`, 1-D, with the flat elements [lo, hi) of one weight; only the rows that hold them are read.

    Raises: CheckpointError when there is no such weight or it is too small.
    """
    with open_tensors(folder / WEIGHTS, CheckpointError) as file:
        if name not in file.keys():  # noqa: SIM118
            raise CheckpointError(f"{folder / WEIGHTS} has no weight {name}; is the configured model another one?")
        view = file.get_slice(name)
        shape = view.get_shape()
        if hi > math.prod(shape):
            raise CheckpointError(f"{folder / WEIGHTS} has {name} of shape {shape}, elements [{lo}, {hi}) were asked for")
        if not shape:
            target.copy_(file.get_tensor(name).view(1)[lo:hi])
            return
        width = math.prod(shape[1:])
        first, last = lo // max(width, 1), -(-hi // max(width, 1))
        target.copy_(view[first:last].reshape(-1)[lo - first * width : hi - first * width])


def _checksum(path: Path) -> str:
    return file_checksum(path, xxhash.xxh3_128)


def _values_checksum(values: dict[str, Any]) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(values, sort_keys=True).encode())
