"""Writes the parts of a hand-off bundle: weights as one safetensors file, in pieces, and the tables that serving looks things up in.

Knows no checkpoint and no training: what is read comes from functions handed in (launch/export.py). Nothing here holds more than one
piece of a weight or one record batch of a table.
"""

import json
import math
import shutil
import struct
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor
from tqdm import tqdm

from gpr_dist.bundle import WEIGHTS
from gpr_dist.data.eligibility import Eligibility
from gpr_dist.decoding.trie import Trie
from gpr_dist.errors import DataError, TokenizerError
from gpr_dist.hashing import TIME_FEATURES, feature_id, time_feature
from gpr_dist.safety import inside
from gpr_dist.schema import EVERY_AD, NO_ITEM, TokenType
from gpr_dist.serving.settings import BundleSettings
from gpr_dist.tokenizer.semantic_ids import BUNDLE_FILE, SemanticIds

# Ne E tokens  Fe their categorical fields

PIECE_ELEMENTS = 1 << 22
ITEM_COLUMNS = ("item_id", "kind")
CALIBRATION, ITEM_WEIGHT, EXAMPLE = "calibration.json", "item_weight.npy", "example.jsonl"
_LENGTH = struct.Struct("<Q")  # a safetensors file: length of the header, header, tensors end to end
_DTYPES = {"float32": ("F32", torch.float32, torch.int32), "bfloat16": ("BF16", torch.bfloat16, torch.int16)}

ReadWeight = Callable[[str, int, int], Tensor]
"""(name, lo, hi) -> float32 [hi - lo], elements of the flat weight; good until the next call."""
WeightType = Literal["float32", "bfloat16"]


def write_weights(folder: Path, shapes: Mapping[str, Sequence[int]], read: ReadWeight, dtype: WeightType,
                  piece_elements: int = PIECE_ELEMENTS) -> int:
    """Write every weight to `folder`/model.safetensors, one piece of at most `piece_elements` numbers in memory.

    Returns: numbers written.
    """
    label, torch_type, raw = _DTYPES[dtype]
    header, at = {"__metadata__": {"format": "pt"}}, 0
    for name, shape in shapes.items():
        num_bytes = math.prod(shape) * torch_type.itemsize
        header[name] = {"dtype": label, "shape": list(shape), "data_offsets": [at, at + num_bytes]}
        at += num_bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    total = sum(math.prod(shape) for shape in shapes.values())
    with open(folder / WEIGHTS, "wb") as file, tqdm(total=total, desc="weights", unit="", unit_scale=True, mininterval=0.5) as bar:
        file.write(_LENGTH.pack(len(text)) + text)
        for name, shape in shapes.items():
            size = math.prod(shape)
            for lo in range(0, size, piece_elements):
                piece = read(name, lo, min(lo + piece_elements, size))
                file.write(piece.to(torch_type).contiguous().view(raw).numpy().data)
                bar.update(len(piece))
    return total


def copy_tokenizer(semantic_ids: SemanticIds, folder: Path) -> None:
    """Copy the files of a tokenizer bundle, reports excepted; what `SemanticIds.load` reads."""
    source = semantic_ids.folder
    assert source is not None, "a bundle that was loaded"
    folder.mkdir()
    listed = json.loads((source / BUNDLE_FILE).read_bytes())["checksums"]
    for name in (*listed, BUNDLE_FILE):
        path = inside(source, name, source / BUNDLE_FILE, TokenizerError)
        if "/" in name:
            raise TokenizerError(f"{source / BUNDLE_FILE} names {name}, expected files of the folder itself; save the tokenizer again")
        shutil.copyfile(path, folder / name)


def copy_catalogue(data: Path, folder: Path) -> None:
    """What a request needs of the catalogue: ids and kinds by index, and the lookup from an id's hash to its index."""
    source, target = data / "catalogue", folder / "catalogue"
    target.mkdir()
    for name in ("catalogue.json", "hashes.npy", "indices.npy"):
        if not (source / name).is_file():
            raise DataError(f"{source / name} is missing; rebuild the data with launch/build_data.py")
        shutil.copyfile(source / name, target / name)
    with pa.memory_map(str(source / "catalogue.arrow")) as file:
        reader = pa.ipc.open_file(file)
        schema = pa.schema([reader.schema.field(name) for name in ITEM_COLUMNS])
        with pa.ipc.new_file(str(target / "catalogue.arrow"), schema) as writer:
            for number in range(reader.num_record_batches):
                writer.write_batch(reader.get_batch(number).select(list(ITEM_COLUMNS)))
    if (data / "eligibility.arrow").is_file():
        shutil.copyfile(data / "eligibility.arrow", folder / "eligibility.arrow")


def catalogue_lookup(folder: Path) -> Callable[[np.ndarray], np.ndarray]:
    """Hashes of item ids, uint64 → catalogue indices int32, NO_ITEM where the catalogue of this bundle does not have them."""
    paths = [folder / "catalogue" / f"{name}.npy" for name in ("hashes", "indices")]
    known, indices = (np.load(path, mmap_mode="r" if path.stat().st_size > 1024 else None, allow_pickle=False) for path in paths)

    def index_of(hashes: np.ndarray) -> np.ndarray:
        if not len(known):
            return np.full(len(hashes), NO_ITEM, np.int32)
        at = np.minimum(np.searchsorted(known, hashes), len(known) - 1)
        return np.where(known[at] == hashes, indices[at], np.int32(NO_ITEM)).astype(np.int32)

    return index_of


def save_trie(semantic_ids: SemanticIds, folder: Path) -> Trie:
    """Of the ads of the exported catalogue."""
    ads = Eligibility.load(folder).items(EVERY_AD)
    trie = Trie.from_codes(semantic_ids.codes_NL[ads], semantic_ids.codebook_size, ads)
    trie.save(folder)
    return trie


def write_example(folder: Path, settings: BundleSettings, weight_I: np.ndarray, time: int) -> None:
    """Requests to try the bundle with: a new user, a made-up history of popular ads, a list of eligible ads, and a line that is wrong.

    Args: time: of the requests, e.g. the end of the data. Nothing in it is of a real user.
    """
    ads = Eligibility.load(folder).items(EVERY_AD)
    best = ads[np.argsort(-weight_I[ads], kind="stable")[:6]]
    with pa.memory_map(str(folder / "catalogue" / "catalogue.arrow")) as file:
        names = pa.ipc.open_file(file).read_all()["item_id"].take(pa.array(best)).to_pylist()
    seen = [{"item_id": name, "type": "ad", "action": "click", "time": time - 86_400 * days} for days, name in enumerate(names[:3], 1)]
    requests = [{"id": "new user", "time": time}, {"id": "with a history", "user": "somebody", "time": time, "history": seen, "k": 5},
                {"id": "three ads", "time": time, "eligible": names[-3:]}, {"id": "without a time"}]
    (folder / EXAMPLE).write_text("".join(json.dumps(request) + "\n" for request in requests))


def save_item_weight(weight_I: np.ndarray, num_items: int, folder: Path) -> None:
    """Raises: DataError when it is not one finite number >= 0 for each item."""
    if weight_I.shape != (num_items,) or not np.isfinite(weight_I).all() or (num_items and weight_I.min() < 0):
        raise DataError(f"item weights {weight_I.dtype} {weight_I.shape} should be {num_items} finite numbers >= 0, one for each item")
    np.save(folder / ITEM_WEIGHT, weight_I.astype(np.float32), allow_pickle=False)


def save_calibration(curves: Sequence[tuple[np.ndarray, np.ndarray]], folder: Path) -> None:
    """Args: curves: (prediction, value) points of every level V_0 … V_L; none = no value was logged."""
    content = [{"predicted": np.asarray(x).tolist(), "value": np.asarray(y).tolist()} for x, y in curves]
    (folder / CALIBRATION).write_text(json.dumps(content))


def find_time_features(names: Sequence[str], batch: pa.RecordBatch) -> tuple[str, ...]:
    """Env features that hold nothing but the UTC time of their request: every E token of these journeys agrees.

    Args: batch: of JOURNEY_SCHEMA, with at least one E token, or none is found.
    """
    is_e = batch.column("token_type").flatten().to_numpy() == TokenType.E
    time = pa.array(batch.column("timestamp").flatten().to_numpy()[is_e])
    stored = batch.column("env_features").flatten().to_numpy().reshape(-1, len(names)) if names else np.zeros((0, 0), np.int32)
    if not len(time):
        return ()
    return tuple(name for column, name in enumerate(names)
                 if name in TIME_FEATURES and np.array_equal(feature_id(time_feature(name, time), name), stored[:, column]))
