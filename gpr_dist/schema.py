"""Types shared by the data side and the model side: token types, the journey row, the manifest, the batch.

The two sides meet only here and in the files on disk. Nothing here reads or writes a file except `ShardManifest.load/save`.
"""

import hashlib
import json
import os
from dataclasses import dataclass, fields, replace
from enum import IntEnum
from pathlib import Path

import pyarrow as pa
import torch
import xxhash
from torch import Tensor

from gpr_dist.config import Config, build_config
from gpr_dist.errors import ConfigError, DataError
from gpr_dist.safety import check_name, inside

# B rows (journey segments)  T packed journey tokens  R requests  N targets (a request, a head and an ad)  L levels
# P MTP heads  Fu / Fe categorical fields of a U / E token  Nu / Ne U / E tokens  X older events  M pairs (request, past event)

SCHEMA_VERSION = 1
NO_ITEM = -1
EVERY_AD = -1  # eligibility group of a request at which every ad of the catalogue may be shown


class TokenType(IntEnum):
    """The four token types of the unified schema (GPR Fig. 2a)."""

    U = 0  # user attributes and long-term preferences
    O = 1  # noqa: E741  organic content consumed (the paper's letter)
    E = 2  # environment of one ad request
    I = 3  # noqa: E741  an ad shown, with its action and value


class Action(IntEnum):
    """What the user did with an item; organic consumption is CONSUME."""

    NONE = 0  # U and E tokens
    CONSUME = 1
    IMPRESSION = 2
    CLICK = 3
    CONVERSION = 4


JOURNEY_SCHEMA = pa.schema([
    ("user_id", pa.string()),
    ("num_context", pa.int32()),  # leading tokens that only give history: their ads are targets of an earlier segment
    ("num_lookahead", pa.int32()),  # trailing I tokens that are labels of the MTP heads only and never model input
    ("token_type", pa.list_(pa.uint8())),
    ("block", pa.list_(pa.int32())),  # request block within the row, non-decreasing from 0
    ("item", pa.list_(pa.int32())),  # catalogue index; NO_ITEM at U and E
    ("action", pa.list_(pa.uint8())),
    ("scene", pa.list_(pa.int32())),  # hashed category of where the item was shown or consumed; 0 = unknown
    ("timestamp", pa.list_(pa.int64())),  # seconds since 1970, non-decreasing
    ("value", pa.list_(pa.float32())),  # value logged at exposure (eCPM, sales); NaN = not logged
    ("pctr", pa.list_(pa.float32())),  # logged predictions, needed by VAFT; NaN = not logged
    ("pcvr", pa.list_(pa.float32())),
    ("user_features", pa.list_(pa.int32())),  # Fu hashed categories per U token, 31 bits
    ("env_features", pa.list_(pa.int32())),  # Fe per E token
    ("eligibility", pa.list_(pa.int32())),  # one per block: row of eligibility.arrow, or EVERY_AD
])
"""One row per journey segment. Lists of one row have one entry per token unless said otherwise.

Request t is the block t; its prediction site is the token just before the block's first I token (its E where it has one); all its
I tokens share that site, so none of them sees another one of its request.
"""

INDEX_SCHEMA = pa.schema([
    ("shard", pa.int32()),  # position in manifest.shards
    ("offset", pa.int64()),  # of the record batch's bytes in the shard file
    ("num_bytes", pa.int64()),
    ("checksum", pa.uint64()),  # xxh3_64 of those bytes
    ("first_row", pa.int64()),  # global row number in the split
    ("num_rows", pa.int32()),
])
"""`index.arrow`: one row per record batch of a split, in file order."""

ROW_STATS = ("num_tokens", "num_targets")
"""Columns of `rows.npy` (int32, one line per row): tokens fed to the model (without lookahead), and ads that are targets."""


class ShardInfo(Config):
    """One shard file."""

    name: str
    num_bytes: int
    num_rows: int


class ShardManifest(Config):
    """`manifest.json` of one split, written last: without it the folder is not a data set."""

    schema_version: int = SCHEMA_VERSION
    container: str
    """arrow | webdataset"""
    compression: str
    """none | lz4 | zstd, of the buffers inside each record batch"""
    split: str
    shards: tuple[ShardInfo, ...]
    num_rows: int
    num_tokens: int
    num_targets: int
    num_batches: int
    first_timestamp: int
    last_timestamp: int
    user_features: tuple[str, ...]
    """names of the Fu categorical fields of a U token; empty = journeys without U tokens"""
    env_features: tuple[str, ...]
    catalogue_fingerprint: str
    num_items: int
    content_checksum: str
    """xxh3_128 of the uncompressed record batches without user_id: counts alone would not notice edited journeys on resume"""
    index_checksum: str
    """sha256 of the index followed by the row statistics"""
    index_file: str = "index.arrow"
    """INDEX_SCHEMA"""
    rows_file: str = "rows.npy"
    """ROW_STATS"""

    @property
    def fingerprint(self) -> str:
        """Identifies the data and its order: equal for the two containers of the same batches (16 hex digits)."""
        files = {"shards", "container", "compression", "index_checksum", "index_file", "rows_file"}
        content = self.model_dump(mode="json", exclude=files)
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]

    def save(self, folder: str | Path) -> None:
        """Write `manifest.json` atomically."""
        write_atomic(Path(folder) / "manifest.json", self.model_dump_json(indent=1).encode())

    @classmethod
    def parse(cls, text: str | bytes, where: str) -> "ShardManifest":
        """Read manifest text found at `where`. Raises: DataError when it is damaged or of another version."""
        try:
            values = json.loads(text)
            if values.get("schema_version") != SCHEMA_VERSION:
                found = values.get("schema_version")
                raise DataError(f"{where}: schema version {found}, this code reads {SCHEMA_VERSION}; rebuild the shards")
            manifest = build_config(cls, values, where)
        except (json.JSONDecodeError, AttributeError, ConfigError) as error:
            raise DataError(f"{where} is damaged ({error}); rebuild the shards with launch/build_data.py") from None
        for name in (*(shard.name for shard in manifest.shards), manifest.index_file, manifest.rows_file):
            check_name(name, where, DataError)
        return manifest


class KnowledgeRows(Config):
    """Which text each row of one split has; found by the split's fingerprint."""

    split: str
    file: str
    """.npy int64 [rows of the split]: row of the vectors, -1 = no text"""
    checksum: str
    """xxh3_64 of that file"""
    num_rows: int
    num_missing: int
    """rows without a text"""


class KnowledgeManifest(Config):
    """`knowledge.json` of a folder of external knowledge, written last (data_pipeline/knowledge.py; read by gpr_dist/data/knowledge.py)."""

    schema_version: int = SCHEMA_VERSION
    num_texts: int
    """rows of the vectors: users, or users and moments"""
    num_vectors: int
    """vectors m of one row"""
    width: int
    """their width E"""
    columns: tuple[str, ...]
    """what each of the m vectors is made from"""
    encoder: dict[str, str]
    """what makes a vector of a text; with `columns`, what a vector means"""
    vectors: str
    """.npy float16 or float32 [num_texts, m, E]"""
    blocks: str
    """.npy uint64: xxh3_64 of every `block_rows` rows of the vectors"""
    block_rows: int
    blocks_checksum: str
    """xxh3_64 of that file, and with it of all vectors"""
    splits: dict[str, KnowledgeRows]
    """by the fingerprint of the split's manifest"""

    @property
    def fingerprint(self) -> str:
        """Identifies what a vector means, not whose it is: a model goes on with refreshed texts of the same encoder (16 hex digits)."""
        content = self.model_dump(mode="json", include={"num_vectors", "width", "columns", "encoder"})
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]

    @classmethod
    def load(cls, folder: str | Path) -> "KnowledgeManifest":
        """Raises: DataError when there is none, or it is damaged or of another version."""
        path = Path(folder) / "knowledge.json"
        try:
            values = json.loads(path.read_bytes())
            if values.get("schema_version") != SCHEMA_VERSION:
                raise DataError(f"{path}: schema version {values.get('schema_version')}, this code reads {SCHEMA_VERSION}; make it again "
                                "with launch/build_knowledge.py")
            manifest = build_config(cls, values, str(path))
        except (OSError, json.JSONDecodeError, AttributeError, ConfigError) as error:
            raise DataError(f"{path} cannot be read ({error}); make it with launch/build_knowledge.py") from None
        encoder = [manifest.encoder["file"]] if "file" in manifest.encoder else []
        for name in (manifest.vectors, manifest.blocks, *(rows.file for rows in manifest.splits.values()), *encoder):
            inside(folder, name, path, DataError)
        return manifest


class HistoryRows(Config):
    """Which events the users of one split's rows had before; found by the split's fingerprint."""

    split: str
    file: str
    """.npy int64 [rows of the split, 2]: first and end among the events"""
    num_rows: int


class HistoryManifest(Config):
    """`history.json` of a folder of users' events, written last (data_pipeline/history.py; read by gpr_dist/data/history.py)."""

    schema_version: int = SCHEMA_VERSION
    num_events: int
    files: dict[str, str]
    """item, time (s), action: .npy [events], by user and time; every file name ends with the xxh3_64 of its content"""
    splits: dict[str, HistoryRows]
    """by the fingerprint of the split's manifest"""

    @classmethod
    def load(cls, folder: str | Path) -> "HistoryManifest":
        """Raises: DataError when there is none, or it is damaged or of another version."""
        path = Path(folder) / "history.json"
        try:
            values = json.loads(path.read_bytes())
            if values.get("schema_version") != SCHEMA_VERSION:
                raise DataError(f"{path}: schema version {values.get('schema_version')}, this code reads {SCHEMA_VERSION}; make it again")
            manifest = build_config(cls, values, str(path))
        except (OSError, json.JSONDecodeError, AttributeError, ConfigError) as error:
            raise DataError(f"{path} cannot be read ({error}); launch/pretrain.py makes it when it is missing") from None
        for name in (*manifest.files.values(), *(rows.file for rows in manifest.splits.values())):
            inside(folder, name, path, DataError)
        return manifest


@dataclass(frozen=True)
class Candidates:
    """What the item head's softmax runs over in one batch (gpr_dist/data/candidates.py)."""

    item_C: Tensor  # int64 catalogue indices, ascending
    codes_CL: Tensor  # int64
    offset_C: Tensor | None = None  # float32, added to the scores: log q correction; -inf = only as the target of its own request
    legal_GC: Tensor | None = None  # bool, which candidates each eligibility group of the batch allows
    group_R: Tensor | None = None  # int64 into G, of each request

    def to(self, device: torch.device | str, non_blocking: bool = True) -> "Candidates":
        """A copy on `device`."""
        return Candidates(*(None if x is None else x.to(device, non_blocking=non_blocking) for x in vars(self).values()))


@dataclass
class Batch:
    """One micro-batch: B journey segments packed end to end, without padding. All tensors; codes are -1 where there is no item."""

    offsets_B1: Tensor  # int64 [B+1], row b holds tokens offsets[b]:offsets[b+1]
    row_ids_B: Tensor  # int64, global row numbers in the split, for tracing
    token_type_T: Tensor  # int64
    block_T: Tensor  # int64, block within the row
    item_T: Tensor  # int64
    codes_TL: Tensor  # int64
    action_T: Tensor  # int64
    scene_T: Tensor  # int64
    timestamp_T: Tensor  # int64, seconds
    value_T: Tensor  # float32, NaN = not logged
    user_features_UF: Tensor  # int64 [Nu, Fu], in token order
    env_features_EF: Tensor  # int64 [Ne, Fe]
    request_token_R: Tensor  # int64, packed position of the prediction site of each request that has targets
    request_row_R: Tensor  # int64, its row b
    request_eligibility_R: Tensor  # int64
    request_time_R: Tensor  # int64, seconds
    target_request_N: Tensor  # int64 into R
    target_head_N: Tensor  # int64, 0-based MTP head
    target_item_N: Tensor  # int64
    target_codes_NL: Tensor  # int64
    target_action_N: Tensor  # int64
    target_value_N: Tensor  # float32
    target_pctr_N: Tensor  # float32
    target_pcvr_N: Tensor  # float32
    target_offset_NLV: Tensor | None = None  # float32, added to the logits; -inf = not legal (gpr_dist/data/legal.py); None = all codes
    target_column_N: Tensor | None = None  # int64 into candidates
    candidates: Candidates | None = None  # of the item head; None = the model has none
    noise_T: Tensor | None = None  # int64 key of each token and step for dropout; None = nothing is dropped
    knowledge_BmE: Tensor | None = None  # float32 [B, m, E], external knowledge of each row's user, 0 = none; None = the shards have none
    past_offsets_B1: Tensor | None = None  # int64, row b's user has the events offsets[b]:offsets[b+1] older than the row; None = unknown
    past_item_X: Tensor | None = None  # int64
    past_codes_XL: Tensor | None = None  # int64
    past_time_X: Tensor | None = None  # int64, seconds
    past_action_X: Tensor | None = None  # int64
    copy_request_M: Tensor | None = None  # int64 ascending: pairs (request, event) that may be repeated (data/past.py); None = no pointer
    copy_source_M: Tensor | None = None  # int64, a token, or T + an older event
    target_copy_NL2: Tensor | None = None  # int64, the pairs begin:end that repeat the target's first l codes
    target_time_N: Tensor | None = None  # int64, seconds, of the target ad itself: for head j >= 1 later than its request
    target_weight_N: Tensor | None = None  # float32, how much a target counts in the loss of codes and items (VAFT); None = 1

    @property
    def num_rows(self) -> int:
        return self.offsets_B1.numel() - 1

    @property
    def num_tokens(self) -> int:
        return self.token_type_T.numel()

    @property
    def num_targets(self) -> int:
        """Targets of head 0, by which the loss is divided: every ad of every request once."""
        return int((self.target_head_N == 0).sum())

    def keep_targets(self, keep_N: Tensor) -> "Batch":
        """Without the other targets; requests stay. Args: keep_N: bool."""
        return replace(self, **{f.name: getattr(self, f.name)[keep_N] for f in fields(self)
                                if f.name.startswith("target_") and getattr(self, f.name) is not None})

    def to(self, device: torch.device | str) -> "Batch":
        """A copy on `device`."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return Batch(**{name: None if value is None else value.to(device, non_blocking=True) for name, value in values.items()})


@dataclass(frozen=True)
class CopyMass:
    """What a pointer to the user's own past items says about B requests: p(path) = (1 - g) p_gen(path) + g p_copy(path).

    p_copy is spread over the M past items that a request may show; the decoder mixes whole paths, not steps. A request without such
    an item has no entry here and is decoded as if its gate were closed.
    """

    request_M: Tensor  # int64, ascending
    item_M: Tensor  # int64 catalogue indices, each at most once per request
    log_mass_M: Tensor  # float32; over the eligible items of each request the masses sum to 1
    log_gate_B: Tensor  # float32 [B], log g <= 0; -inf = closed; or [B, H] where H MTP heads are searched


def file_checksum(path: Path, digest: type = xxhash.xxh3_64) -> str:
    """Of a file's bytes, in hex: for damage, at the speed of the disk; what identifies content is sha256. Args: digest: an xxhash class."""
    running = digest()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 24):
            running.update(chunk)
    return running.hexdigest()


def write_atomic(path: Path, data: bytes) -> None:
    """Write a file so that a crash leaves the old one or the new one, never a part (temporary file, fsync, rename, folder fsync)."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        error.filename = str(path)  # a full disk shows in write() or fsync(), which do not know it
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


