"""Catalogue to tokenizer bundle: embed the items, fit and encode, save; or encode the items a grown catalogue adds.

Joins the parts and checks that they belong together; the work is done in embeddings.py and gpr_dist/tokenizer.
"""

import hashlib
import json
from dataclasses import dataclass, replace
from pathlib import Path

import pyarrow as pa

from data_pipeline.embeddings import EmbeddingConfig, TextSVD, embed_items, fit_text_svd, read_catalogue
from gpr_dist.config import Config
from gpr_dist.errors import DataError, TokenizerError
from gpr_dist.tokenizer.fit import fit_tokenizer
from gpr_dist.tokenizer.rq_kmeans import RQKMeansConfig
from gpr_dist.tokenizer.semantic_ids import SemanticIds

TEXT_SVD = "text_svd"  # attachment: the fitted text encoder
ITEM_IDS = "item_ids"  # attachment: checksum of the ids of the rows covered, so that an append can prove they are still the same


class FitTokenizerConfig(Config):
    """Settings of launch/fit_tokenizer.py."""

    data: Path
    """data folder with catalogue/; embeddings.npy is written there"""
    out: Path
    """folder of the tokenizer bundle"""
    embedding: EmbeddingConfig = EmbeddingConfig()
    """where the item embeddings come from"""
    tokenizer: RQKMeansConfig = RQKMeansConfig()
    """how the codebooks are fitted"""


@dataclass(frozen=True)
class CatalogueInfo:
    """What catalogue.json says."""

    arrow: Path
    num_items: int
    fingerprint: str


def build_tokenizer(config: FitTokenizerConfig) -> SemanticIds:
    """Embed the catalogue's items, fit the tokenizer, save the bundle in `config.out`.

    Raises: DataError for an unusable catalogue or embeddings, TokenizerError when they cannot be tokenised.
    """
    catalogue = check_catalogue(config.data)
    text_svd = fit_text_svd(catalogue.arrow, config.embedding) if config.embedding.source == "text_svd" else None
    embeddings_ND = embed_items(catalogue.arrow, config.embedding, config.data / "embeddings.npy", text_svd)
    fitted = fit_tokenizer(embeddings_ND, config.tokenizer, catalogue.fingerprint)
    attachments = {ITEM_IDS: _save_item_ids(catalogue.arrow, catalogue.num_items, config.out)}
    if text_svd is not None:
        attachments[TEXT_SVD] = text_svd.save(config.out)
    return replace(fitted, attachments=attachments).save(config.out)


def append_items(config: FitTokenizerConfig) -> SemanticIds:
    """Encode the items the catalogue has gained since the bundle in `config.out` was saved; old codes and codebooks stay.

    Raises: TokenizerError when the catalogue's first rows are no longer the bundle's items.
    """
    bundle = SemanticIds.load(config.out)
    catalogue = check_catalogue(config.data)
    old, new = bundle.num_items, catalogue.num_items
    if new < old or _item_ids_checksum(catalogue.arrow, old) != (config.out / bundle.attachments[ITEM_IDS]).read_text():
        raise TokenizerError(f"catalogue {catalogue.fingerprint} ({new} items) does not continue {bundle.catalogue_fingerprint}, whose "
                             f"{old} items {config.out} encodes: rows were changed or removed; fit the tokenizer again without --append")
    if new == old:
        return bundle
    text_svd = TextSVD.load(config.out / bundle.attachments[TEXT_SVD]) if TEXT_SVD in bundle.attachments else None
    if (config.embedding.source == "text_svd") != (text_svd is not None):
        raise TokenizerError(f"embedding.source={config.embedding.source} is not what tokenizer {config.out} was fitted on; "
                             "append with embeddings of the same source")
    embeddings_ND = embed_items(catalogue.arrow, config.embedding, config.data / "embeddings.npy", text_svd)
    attachments = {**bundle.attachments, ITEM_IDS: _save_item_ids(catalogue.arrow, new, config.out)}
    return replace(bundle.append(embeddings_ND[old:], catalogue.fingerprint), attachments=attachments).save(config.out)


def check_catalogue(data: Path) -> CatalogueInfo:
    """Read `catalogue/catalogue.json` and compare it with the table beside it. Raises: DataError."""
    path = data / "catalogue" / "catalogue.json"
    try:
        content = json.loads(path.read_text())
        info = CatalogueInfo(path.with_name("catalogue.arrow"), int(content["num_items"]), str(content["fingerprint"]))
    except FileNotFoundError:
        raise DataError(f"{path} does not exist; build the catalogue with launch/build_data.py") from None
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is damaged ({error}); rebuild the catalogue with launch/build_data.py") from None
    if (found := len(read_catalogue(info.arrow))) != info.num_items:
        raise DataError(f"{info.arrow} has {found} items, {path} says {info.num_items}; rebuild the catalogue with launch/build_data.py")
    return info


def _save_item_ids(catalogue: Path, num_items: int, folder: Path) -> str:
    checksum = _item_ids_checksum(catalogue, num_items)
    name = f"item-ids-{checksum}.txt"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(checksum)
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
