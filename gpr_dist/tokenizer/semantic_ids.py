"""Semantic IDs of a catalogue: the tokenizer bundle in memory and on disk.

Owns the codes of every item, the quantizer that makes them, their fingerprints and the bundle folder; fitting is fit.py's.
Three fingerprints answer three questions: `codebook_fingerprint` (what does a code mean? stored in every checkpoint, because
appended items leave it as it is), `catalogues` (whose items are rows 0..N-1? compared with a shard manifest) and `fingerprint`
(is this exactly the same bundle?).

Folder: `tokenizer.json` names every other file with its checksum and is replaced last; file names carry a fingerprint, so that
a bundle that is rewritten or appended to stays whole at every moment. Nothing in it is pickled.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import xxhash
from safetensors.numpy import save

from gpr_dist.config import build_config
from gpr_dist.errors import GPRError, TokenizerError
from gpr_dist.safety import inside, load_tensors
from gpr_dist.schema import file_checksum, write_atomic
from gpr_dist.tokenizer.config import TokenizerConfig
from gpr_dist.tokenizer.metrics import Groups, TokenizerReport, group_items, pack
from gpr_dist.tokenizer.quantizer import Quantizer

# N items  L levels  V codes per level  D embedding dim

BUNDLE_VERSION = 2
BUNDLE_FILE = "tokenizer.json"


@dataclass(frozen=True, eq=False)
class SemanticIds:
    """Codes of every item of a catalogue. Row i belongs to catalogue index i."""

    codes_NL: np.ndarray  # int32, each in [0, V); a read-only memory map after `load`
    quantizer: Quantizer
    catalogues: tuple[str, ...]  # fingerprints of the catalogues whose items these rows are: as fitted, then after each append
    report: TokenizerReport | None = None  # as fitted; an append does not measure again
    attachments: Mapping[str, str] = field(default_factory=dict)  # role -> file name in the folder, e.g. the text encoder
    folder: Path | None = None  # where it was loaded from or saved to, for messages and attachments

    def __post_init__(self) -> None:
        if self.codes_NL.ndim != 2 or self.codes_NL.shape[1] != self.config.num_levels:
            raise TokenizerError(f"{self._name}: codes {self.codes_NL.shape} do not have shape [N, {self.config.num_levels}]")
        if len(self.codes_NL) and not 0 <= self.codes_NL.min() <= self.codes_NL.max() < self.codebook_size:
            item = int(np.argmax(((self.codes_NL < 0) | (self.codes_NL >= self.codebook_size)).any(1)))
            raise TokenizerError(f"{self._name}: item {item} has codes {self.codes_NL[item].tolist()} outside [0, {self.codebook_size})")

    @property
    def config(self) -> TokenizerConfig:
        return self.quantizer.config

    @property
    def num_items(self) -> int:
        return len(self.codes_NL)

    @property
    def num_levels(self) -> int:
        return self.codes_NL.shape[1]

    @property
    def codebook_size(self) -> int:
        return self.config.codebook_size

    @property
    def catalogue_fingerprint(self) -> str:
        """Of the newest catalogue covered."""
        return self.catalogues[-1]

    @cached_property
    def codebook_fingerprint(self) -> str:
        """Of the quantizer: what the codes mean. Checkpoints store this one."""
        return self.quantizer.fingerprint

    @cached_property
    def fingerprint(self) -> str:
        """16 hex digits of sha256 over quantizer, codes and settings; changes if any code of any item does."""
        settings = self.config.model_dump_json(exclude={"device"})
        return _sha256(self.codebook_fingerprint.encode(), self.codes_NL, settings.encode())

    @cached_property
    def groups(self) -> Groups:
        """The reverse map: items by semantic ID, as CSR over ascending packed keys. Built on first use, one sort of N keys."""
        return group_items(self.codes_NL, self.codebook_size)

    def items_of(self, codes: np.ndarray) -> np.ndarray:
        """Items on one semantic ID, ascending.

        Args: codes: L codes, or fewer: then every item below that prefix, in the order of the IDs.
        Returns: int64 [n], empty when no item has it.
        """
        codes = np.asarray(codes, np.int64)
        if codes.ndim != 1 or len(codes) > self.num_levels or (len(codes) and not 0 <= codes.min() <= codes.max() < self.codebook_size):
            raise TokenizerError(f"{codes.tolist()} is no semantic ID: at most {self.num_levels} codes in [0, {self.codebook_size})")
        span = self.codebook_size ** (self.num_levels - len(codes))
        first = int(pack(codes[None], self.codebook_size)[0]) * span
        lo, hi = np.searchsorted(self.groups.keys_G, [first, first + span])
        return self.groups.items_N[self.groups.offsets_G1[lo]:self.groups.offsets_G1[hi]]

    def append(self, embeddings_ND: np.ndarray, catalogue_fingerprint: str) -> "SemanticIds":
        """A bundle that also covers new items, encoded with the codebooks as they are; codes of old items stay.

        Models of the old bundle accept the new one (same `codebook_fingerprint`), and so do shards of every earlier catalogue.
        Args:
            embeddings_ND: of the new items only, in catalogue order.
            catalogue_fingerprint: of the grown catalogue, whose first `num_items` rows must be the old ones (the caller's promise).
        """
        codes_NL = np.concatenate([self.codes_NL, self.quantizer.encode(embeddings_ND)])
        return replace(self, codes_NL=codes_NL, catalogues=(*self.catalogues, catalogue_fingerprint))

    def check_catalogue(self, catalogue_fingerprint: str, where: str) -> None:
        """Refuse data of another catalogue. Args: where: what brings the fingerprint, e.g. the manifest's path. Raises: TokenizerError."""
        if catalogue_fingerprint not in self.catalogues:
            raise TokenizerError(f"{where} is of catalogue {catalogue_fingerprint}, {self._name} encodes catalogue "
                                 f"{' and, before it grew, '.join(self.catalogues[::-1])}; use the tokenizer of this data or fit one "
                                 "with launch/fit_tokenizer.py")

    def check_codebooks(self, codebook_fingerprint: str, where: str) -> None:
        """Refuse a model trained with other codebooks. Args: where: what brings it, e.g. the checkpoint's path. Raises: TokenizerError."""
        if codebook_fingerprint != self.codebook_fingerprint:
            raise TokenizerError(f"{where} was trained with codebooks {codebook_fingerprint}, {self._name} has codebooks "
                                 f"{self.codebook_fingerprint}; use the model's own tokenizer bundle, take the checkpoint over to this one "
                                 "with launch/migrate.py, or train a new model")

    def save(self, folder: str | Path) -> "SemanticIds":
        """Write the bundle; a bundle already there is replaced at the moment `tokenizer.json` is, and its files removed after.

        Attachments must already lie in the folder. Returns: the same bundle, knowing its folder.
        Raises: TokenizerError when the folder cannot be written, e.g. on a full disk; a bundle already there stays usable.
        """
        try:
            return self._save(Path(folder))
        except OSError as error:
            raise TokenizerError(f"cannot save the tokenizer in {folder}: {error.strerror} ({error.filename})") from error

    def _save(self, folder: Path) -> "SemanticIds":
        folder.mkdir(parents=True, exist_ok=True)
        old = _listed_files(folder)
        quantizer = f"quantizer-{self.codebook_fingerprint}.safetensors"
        codes = f"codes-{self.fingerprint}.arrow"
        write_atomic(folder / quantizer, save(self.quantizer.tensors()))
        _write_codes(folder / codes, self.codes_NL)
        content = {
            "bundle_version": BUNDLE_VERSION,
            "fingerprint": self.fingerprint,
            "codebook_fingerprint": self.codebook_fingerprint,
            "catalogues": self.catalogues,
            "num_items": self.num_items,
            "config": self.config.model_dump(mode="json"),
            "report": self.report.model_dump(mode="json") if self.report else None,
            "quantizer": quantizer,
            "codes": codes,
            "attachments": dict(self.attachments),
            "checksums": {name: file_checksum(folder / name) for name in (quantizer, codes, *self.attachments.values())},
        }
        content["checksum"] = _json_checksum(content)
        write_atomic(folder / BUNDLE_FILE, json.dumps(content, indent=1).encode())
        for name in old - set(content["checksums"]):
            (folder / name).unlink(missing_ok=True)
        return replace(self, folder=folder)

    @classmethod
    def load(cls, folder: str | Path) -> "SemanticIds":
        """Open a bundle; the codes are memory-mapped. Raises: TokenizerError naming a file that is missing or damaged."""
        folder = Path(folder)
        content = _read_json(folder)
        for name, expected in content["checksums"].items():
            if not (folder / name).is_file():
                raise TokenizerError(f"{folder / name} is missing; restore the bundle or fit it again with launch/fit_tokenizer.py")
            if (found := file_checksum(folder / name)) != expected:
                raise TokenizerError(f"{folder / name} is damaged (checksum {found}, expected {expected}); "
                                     "restore the bundle or fit it again with launch/fit_tokenizer.py")
        report, quantizer = content["report"], folder / content["quantizer"]
        return cls(
            codes_NL=_read_codes(folder / content["codes"]),
            quantizer=Quantizer.from_tensors(build_config(TokenizerConfig, content["config"], str(folder / BUNDLE_FILE)),
                                             load_tensors(quantizer, TokenizerError, "np"), str(quantizer)),
            catalogues=tuple(content["catalogues"]),
            report=build_config(TokenizerReport, report, str(folder / BUNDLE_FILE)) if report else None,
            attachments=content["attachments"],
            folder=folder,
        )

    @property
    def _name(self) -> str:
        return f"tokenizer {self.folder}" if self.folder else "the tokenizer"


def _read_json(folder: Path) -> dict:
    path = folder / BUNDLE_FILE
    try:
        content = json.loads(path.read_bytes())
        version, checksum = content["bundle_version"], content.pop("checksum")
    except FileNotFoundError:
        raise TokenizerError(f"{path} does not exist, so {folder} is no complete tokenizer bundle; run launch/fit_tokenizer.py") from None
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise TokenizerError(f"{path} is damaged ({error}); restore the bundle or fit it again with launch/fit_tokenizer.py") from None
    if version != BUNDLE_VERSION:
        raise TokenizerError(f"{path}: bundle version {version}, this code reads {BUNDLE_VERSION}; fit it again")
    if checksum != _json_checksum(content):
        raise TokenizerError(f"{path} was altered (its checksum does not match); restore the bundle or fit it again")
    for name in (*content["checksums"], content["codes"], content["quantizer"], *content["attachments"].values()):
        inside(folder, name, path, TokenizerError)
    return content


def _listed_files(folder: Path) -> set[str]:
    """Files of the bundle in the folder; none when there is no readable bundle."""
    try:
        return set(_read_json(folder)["checksums"])
    except GPRError:
        return set()


def _write_codes(path: Path, codes_NL: np.ndarray) -> None:
    """One record batch, so that reading it back as one array copies nothing."""
    values = pa.array(np.ascontiguousarray(codes_NL, np.int32).reshape(-1))
    column = pa.FixedSizeListArray.from_arrays(values, codes_NL.shape[1])
    batch = pa.record_batch([column], names=["codes"])
    temporary = path.with_name(path.name + ".tmp")
    with pa.OSFile(str(temporary), "wb") as sink, pa.ipc.new_file(sink, batch.schema) as writer:
        writer.write_batch(batch)
    with open(temporary, "rb") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _read_codes(path: Path) -> np.ndarray:
    column = pa.ipc.open_file(pa.memory_map(str(path))).get_batch(0).column("codes")
    return column.flatten().to_numpy(zero_copy_only=True).reshape(len(column), column.type.list_size)


def _json_checksum(content: dict) -> str:
    return xxhash.xxh3_64(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _sha256(*parts: np.ndarray | bytes) -> str:
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, np.ndarray):
            digest.update(f"{part.dtype.str}{part.shape}".encode())
            digest.update(np.ascontiguousarray(part).data)
        else:
            digest.update(part)
    return digest.hexdigest()[:16]
