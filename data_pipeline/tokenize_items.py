"""Catalogue to tokenizer bundle: embed the items, fit and encode, save; or encode the items a grown catalogue adds.

Joins the parts and checks that they belong together; the work is done in embeddings.py and gpr_dist/tokenizer.
"""

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa

from data_pipeline.catalogue import Catalogue
from data_pipeline.cooccurrence import CooccurrenceConfig, cooccurrence_svd, join
from data_pipeline.embeddings import EmbeddingConfig, TextSVD, embed_items, fit_text_svd, read_catalogue
from gpr_dist.config import Config
from gpr_dist.errors import DataError, TokenizerError
from gpr_dist.schema import write_atomic
from gpr_dist.tokenizer.collective import rank, together
from gpr_dist.tokenizer.config import TokenizerConfig
from gpr_dist.tokenizer.fit import fit_tokenizer
from gpr_dist.tokenizer.points import open_embeddings
from gpr_dist.tokenizer.semantic_ids import SemanticIds

TEXT_SVD = "text_svd"  # attachment: the fitted text encoder
PROVENANCE = "provenance"  # attachment: checksum of the ids of the rows covered and the embedding settings, which an append must keep


class FitTokenizerConfig(Config):
    """Settings of launch/fit_tokenizer.py."""

    data: Path
    """data folder with catalogue/; embeddings.npy is written there"""
    out: Path
    """folder of the tokenizer bundle"""
    embedding: EmbeddingConfig = EmbeddingConfig()
    """where the item embeddings come from"""
    cooccurrence: CooccurrenceConfig = CooccurrenceConfig()
    """what the training journeys add to them"""
    tokenizer: TokenizerConfig = TokenizerConfig()
    """how the codebooks are fitted"""


def build_tokenizer(config: FitTokenizerConfig) -> SemanticIds | None:
    """Embed the catalogue's items, fit the tokenizer, save the bundle in `config.out`.

    With torch.distributed every process calls this; rank 0 embeds and saves, all fit and encode, and must see the same data folder.
    Returns: the bundle on rank 0, None elsewhere.
    Raises: DataError for an unusable catalogue or embeddings, TokenizerError when they cannot be tokenised.
    """
    catalogue, path, text_svd = open_catalogue(config.data), config.data / "embeddings.npy", None
    with together():
        if rank() == 0:
            text_svd = _embed_catalogue(catalogue, config, path)
    fitted = fit_tokenizer(open_embeddings(path), config.tokenizer, catalogue.fingerprint)
    with together():
        if fitted is None:
            return None
        attachments = {PROVENANCE: _save_provenance(catalogue, config)}
        if text_svd is not None:
            attachments[TEXT_SVD] = text_svd.save(config.out)
        return replace(fitted, attachments=attachments).save(config.out)


def _embed_catalogue(catalogue: Catalogue, config: FitTokenizerConfig, path: Path) -> TextSVD | None:
    """Write the vectors the tokenizer is fitted on. Returns: the fitted text encoder, if there is one."""
    text_svd = fit_text_svd(catalogue_table(catalogue), config.embedding) if config.embedding.source == "text_svd" else None
    behaviour = None
    if config.cooccurrence.dim:
        behaviour = cooccurrence_svd(config.data / "shards" / "train", catalogue.num_items, config.cooccurrence)
    _embed(catalogue, config, text_svd, path, behaviour)
    return text_svd


def append_items(config: FitTokenizerConfig) -> SemanticIds:
    """Encode the items the catalogue has gained since the bundle in `config.out` was saved; old codes and codebooks stay.

    New items are encoded by their content; with co-occurrence they are as the items that no journey showed at the fit.
    Raises: TokenizerError when the catalogue's first rows are no longer the bundle's items.
    """
    bundle = SemanticIds.load(config.out)
    catalogue = open_catalogue(config.data)
    saved = json.loads((config.out / bundle.attachments[PROVENANCE]).read_text())
    old, new = bundle.num_items, catalogue.num_items
    found = _provenance(catalogue, old, config)
    if new < old or found["item_ids"] != saved["item_ids"]:
        raise TokenizerError(f"catalogue {catalogue.fingerprint} ({new} items) does not continue {bundle.catalogue_fingerprint}, whose "
                             f"{old} items {config.out} encodes: rows were changed or removed; fit the tokenizer again without --append")
    changed = ", ".join(f"{part}.{key}={value} (fitted with {saved[part].get(key)})" for part in ("embedding", "cooccurrence")
                        for key, value in found[part].items() if value != saved[part].get(key))
    if changed:
        raise TokenizerError(f"new items of {config.out} need embeddings made like the old ones; this run has {changed}")
    if new == old:
        return bundle
    text_svd = TextSVD.load(config.out / bundle.attachments[TEXT_SVD]) if TEXT_SVD in bundle.attachments else None
    embeddings_ND = _embed(catalogue, config, text_svd, config.data / "appended_embeddings.npy", behaviour=None)
    attachments = {**bundle.attachments, PROVENANCE: _save_provenance(catalogue, config)}
    return replace(bundle.append(embeddings_ND[old:], catalogue.fingerprint), attachments=attachments).save(config.out)


def common_items(old: SemanticIds, new: SemanticIds, data: Path) -> int:
    """How many items two bundles share: rows 0 .. n-1 of both are the same items.

    Args: data: data folder whose catalogue `new` encodes; read only when the bundles name different catalogues.
    Raises: TokenizerError when that cannot be shown: one catalogue must continue the other.
    """
    num_common = min(old.num_items, new.num_items)
    if old.catalogue_fingerprint in new.catalogues or new.catalogue_fingerprint in old.catalogues:
        return num_common
    saved = [_saved_item_ids(bundle) for bundle in (old, new)]
    if old.num_items == new.num_items and saved[0] == saved[1] is not None:
        return num_common
    catalogue = open_catalogue(data)
    if new.catalogue_fingerprint == catalogue.fingerprint and old.num_items <= catalogue.num_items and \
            saved[0] == _item_ids_checksum(catalogue_table(catalogue), old.num_items):
        return num_common
    raise TokenizerError(f"tokenizers {old.folder} ({old.num_items} items of catalogue {old.catalogue_fingerprint}) and {new.folder} "
                         f"({new.num_items} of {new.catalogue_fingerprint}) do not encode the same items: {data}/catalogue does not "
                         "continue the old one; codes can only be matched through items that both have")


def _saved_item_ids(bundle: SemanticIds) -> str | None:
    """Checksum of the item ids that the bundle covers, as noted when they were encoded."""
    if bundle.folder is None or PROVENANCE not in bundle.attachments:
        return None
    return json.loads((bundle.folder / bundle.attachments[PROVENANCE]).read_text())["item_ids"]


def _embed(catalogue: Catalogue, config: FitTokenizerConfig, text_svd: TextSVD | None, out: Path,
           behaviour: tuple[np.ndarray, np.ndarray] | None) -> np.ndarray:
    """The vectors the codes are made of, in `out`; without `behaviour` every item is as one that no journey shows."""
    dim = config.cooccurrence.dim
    if not dim:
        return embed_items(catalogue_table(catalogue), config.embedding, out, text_svd)
    content = out.with_name(f"content_{out.name}")
    content_ND = embed_items(catalogue_table(catalogue), config.embedding, content, text_svd)
    items_M, vectors_MD = behaviour or (np.zeros(0, np.int64), np.zeros((0, dim), np.float32))
    joined_ND = join(content_ND, items_M, vectors_MD, config.cooccurrence.content_weight, out)
    content.unlink()
    return joined_ND


def open_catalogue(data: Path) -> Catalogue:
    """The finished catalogue of a data folder, whose table has the rows its description says. Raises: DataError."""
    catalogue = Catalogue(data / "catalogue")
    if (found := len(read_catalogue(catalogue_table(catalogue)))) != catalogue.num_items:
        raise DataError(f"{catalogue_table(catalogue)} has {found} items, catalogue.json says {catalogue.num_items}; "
                        "rebuild the catalogue with launch/build_data.py")
    return catalogue


def catalogue_table(catalogue: Catalogue) -> Path:
    return catalogue.folder / "catalogue.arrow"


def _provenance(catalogue: Catalogue, num_items: int, config: FitTokenizerConfig) -> dict:
    """What the codes were made from; the path of given vectors may change, since a grown catalogue comes with a new file."""
    return {"item_ids": _item_ids_checksum(catalogue_table(catalogue), num_items),
            "embedding": config.embedding.model_dump(mode="json", exclude={"path", "max_missing_frac"}),
            "cooccurrence": config.cooccurrence.model_dump(mode="json")}


def _save_provenance(catalogue: Catalogue, config: FitTokenizerConfig) -> str:
    content = json.dumps(_provenance(catalogue, catalogue.num_items, config), indent=1).encode()
    name = f"provenance-{hashlib.sha256(content).hexdigest()[:16]}.json"
    config.out.mkdir(parents=True, exist_ok=True)
    write_atomic(config.out / name, content)
    return name


def _item_ids_checksum(catalogue: Path, num_items: int) -> str:
    """Of the first `num_items` ids, in order: 16 hex digits, whatever the record batches."""
    lengths, content = hashlib.sha256(), hashlib.sha256()
    for chunk in read_catalogue(catalogue)["item_id"].slice(0, num_items).chunks:
        ids = chunk.cast(pa.large_binary())
        offsets = memoryview(ids.buffers()[1]).cast("B").cast("q")[ids.offset:ids.offset + len(ids) + 1]
        content.update(memoryview(ids.buffers()[2])[offsets[0]:offsets[-1]])
        lengths.update(pa.compute.binary_length(ids).to_numpy().tobytes())
    return hashlib.sha256(lengths.digest() + content.digest()).hexdigest()[:16]
