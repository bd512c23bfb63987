"""Model quality on one split: loss, and HitR and NDCG of what the beam search generates; during training and in launch/evaluate.py."""

import io
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from gpr_dist.config import Config
from gpr_dist.data.candidates import ItemCandidates
from gpr_dist.data.counts import count_events
from gpr_dist.data.eligibility import Eligibility
from gpr_dist.data.legal import LegalCodes
from gpr_dist.data.loader import LoaderConfig, iter_once
from gpr_dist.data.past import PastItems
from gpr_dist.data.reader import ShardReader
from gpr_dist.data.sampler import World
from gpr_dist.decoding.beam_search import Softmax
from gpr_dist.decoding.model_decoder import ModelDecoder
from gpr_dist.decoding.trie import Trie
from gpr_dist.evaluation.baselines import DAY_S, BaselineConfig
from gpr_dist.evaluation.evaluate import GenerativeRanker
from gpr_dist.evaluation.item_ranker import ItemRanker
from gpr_dist.evaluation.journey_log import SPLITS, JourneyLog, Lists, read_log
from gpr_dist.evaluation.metrics import add_sums, ranking_metrics, ranking_sums
from gpr_dist.evaluation.rankings import Ranker
from gpr_dist.schema import EVERY_AD, Batch, ShardManifest, write_atomic
from gpr_dist.tokenizer.semantic_ids import SemanticIds
from gpr_dist.training.engine import Engine
from gpr_dist.training.loop import Objective


class ValidationConfig(Config):
    """How quality is measured."""

    max_rows: int | None = None
    """journeys used, from the front of the split; none = all"""
    beam_width: int = 128
    """prefixes kept per level"""
    ks: tuple[int, ...] = (10, 100)
    """cut-offs K of HitR@K and NDCG@K"""
    exclude_seen: bool = False
    """during training: take the items of a request's row before it from its candidates (launch/evaluate.py: compare.exclude_seen)"""
    baselines: BaselineConfig = BaselineConfig()
    """popularity, which also orders the items of one semantic ID"""


@dataclass
class Catalogue:
    """What generation is constrained by: the trie of legal semantic IDs, who may be shown, and how a leaf's items share it."""

    semantic_ids: SemanticIds
    trie: Trie
    eligibility: Eligibility
    item_weight: Tensor  # float32 [catalogue items]


def has_targets(split: Path) -> bool:
    """Whether a local split folder exists and holds something to predict. Raises: DataError for a damaged manifest."""
    manifest = split / "manifest.json"
    return manifest.exists() and ShardManifest.parse(manifest.read_bytes(), str(manifest)).num_targets > 0


def open_journeys(shards: Mapping[str, str | Path], evaluated: str, max_rows: int | None = None) -> JourneyLog:
    """Every event of the splits, once; requests and targets of the first `max_rows` rows of `evaluated`.

    Args: shards: split -> folder or URI, of `evaluated` and every split before it.
    """

    def batches(reader: ShardReader) -> Iterator[pa.RecordBatch]:
        return (reader.read_batch(number) for number in range(reader.num_batches))

    readers = {split: ShardReader(folder) for split, folder in shards.items()}
    manifest = readers[evaluated].manifest
    return read_log({split: batches(reader) for split, reader in readers.items()}, evaluated, max_rows,
                    (len(manifest.user_features), len(manifest.env_features)))


def count_before(shards: Mapping[str, str | Path], evaluated: str, num_items: int, config: BaselineConfig, world: World) -> np.ndarray:
    """What popularity is made of (`baselines.weigh_counts`), of the splits before `evaluated`: this rank's share, [3, num_items]."""
    readers = [ShardReader(shards[split]) for split in SPLITS[: SPLITS.index(evaluated)]]
    recent_from = max(reader.manifest.last_timestamp for reader in readers) - config.recent_days * DAY_S
    return sum((count_events(reader, world, num_items, recent_from) for reader in readers), np.zeros((3, num_items)))


def save_popularity(path: Path, popularity_I: np.ndarray) -> None:
    """Write it as .npy, whole or not at all."""
    content = io.BytesIO()
    np.save(content, popularity_I, allow_pickle=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, content.getvalue())


def open_catalogue(semantic_ids: SemanticIds, eligibility: Eligibility, popularity_I: np.ndarray, device: torch.device | str) -> Catalogue:
    """Build the trie over the ads of the catalogue."""
    ads = eligibility.items(EVERY_AD)
    trie = Trie.from_codes(semantic_ids.codes_NL[ads], semantic_ids.codebook_size, ads).to(device)
    return Catalogue(semantic_ids, trie, eligibility, torch.from_numpy(np.ascontiguousarray(popularity_I, dtype=np.float32)))


def build_validation(engine: Engine, shards: str | Path, catalogue: Catalogue, objective: Objective, config: ValidationConfig,
                     loader: LoaderConfig, num_heads: int, legal: LegalCodes | None, softmax: Softmax,
                     knowledge: Path | None = None, candidates: ItemCandidates | None = None,
                     past: PastItems | None = None) -> Callable[[], dict[str, float]]:
    """The function `fit` calls: validation/loss and ranking metrics over `config.max_rows` journeys of a split (collective)."""
    world = World(engine.rank, engine.world_size)
    codes_ML = catalogue.semantic_ids.codes_NL
    batches = iter_once(shards, loader, world, codes_ML, num_heads, config.max_rows, legal, knowledge, candidates, past)

    rankers: dict[str, Ranker] = {"": GenerativeRanker(ModelDecoder(engine, engine.device), catalogue.trie, catalogue.eligibility,
                                                       catalogue.item_weight, max(config.ks), config.beam_width, softmax,
                                                       all_reduce=engine.all_reduce)}
    if candidates is not None:
        rankers["item_"] = ItemRanker(engine, engine.device, codes_ML, catalogue.eligibility, max(config.ks))

    @torch.no_grad()
    def validate() -> dict[str, float]:
        sums = torch.zeros(2, dtype=torch.float64)
        for batch in batches:
            # The share of one target of this batch alone, so that summing over batches gives the mean over all targets.
            sums += torch.tensor([float(objective(engine, batch.to(engine.device), 1).loss), float(batch.num_targets)], dtype=torch.float64)
        total, count = engine.all_reduce(sums).tolist()
        found = {"loss": total / max(count, 1)}
        for prefix, ranker in rankers.items():
            sums = add_sums([_ranking_sums(ranker, batch, config) for batch in batches])
            reduced = engine.all_reduce(torch.stack(list(sums.values()))).tolist()
            metrics = ranking_metrics(dict(zip(sums, reduced, strict=True)))
            found |= {f"{prefix}{metric}@{k}": metrics[f"{metric}@{k}"] for metric in ("hitr", "ndcg") for k in config.ks}
        return {f"validation/{name}": value for name, value in found.items()}

    return validate


def _ranking_sums(ranker: Ranker, batch: Batch, config: ValidationConfig) -> dict[str, Tensor]:
    """Metric sums of one batch; targets are those of head 0."""
    item_RK, _ = ranker(batch, seen_in_row(batch) if config.exclude_seen else None)
    shown_N = batch.target_head_N == 0
    return ranking_sums(item_RK, batch.target_request_N[shown_N], batch.target_item_N[shown_N], config.ks)


def seen_in_row(batch: Batch) -> Lists:
    """Items of each request's row up to its prediction site, ascending and distinct."""
    start_R = batch.offsets_B1[batch.request_row_R]
    count_R = batch.request_token_R + 1 - start_R
    request_M = torch.repeat_interleave(count_R)
    token_M = torch.arange(len(request_M)) - (count_R.cumsum(0) - count_R - start_R).index_select(0, request_M)
    item_M = batch.item_T[token_M]
    width = int(item_M.max().clamp_min(0)) + 1 if len(item_M) else 1
    pairs = torch.unique((request_M * width + item_M)[item_M >= 0])
    offset_R1 = torch.zeros(len(start_R) + 1, dtype=torch.int64)
    offset_R1[1:] = torch.bincount(pairs // width, minlength=len(start_R)).cumsum(0)
    return Lists(offset_R1.numpy(), (pairs % width).int().numpy())
