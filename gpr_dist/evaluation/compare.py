"""Puts rankers beside each other on the requests of a split: the model's, the baselines, and their mix.

Owns the order of the work and which split decides what: a mix's weights and SASRec's epoch are chosen on the validation split, in a
pass of its own over its first journeys, also when the test split is what is reported.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field

from gpr_dist.config import Config
from gpr_dist.data.reader import ShardReader
from gpr_dist.errors import ConfigError
from gpr_dist.evaluation.baselines import BASELINES, popularity, rank_baselines, rank_requests
from gpr_dist.evaluation.journey_log import SPLITS
from gpr_dist.evaluation.mix import MixConfig, choose_weights, mix
from gpr_dist.evaluation.names import check_metric, check_names
from gpr_dist.evaluation.rankings import Ranker, Requests, collect
from gpr_dist.evaluation.sasrec import SASRecConfig, load_or_train, sasrec_scorer
from gpr_dist.evaluation.validate import Catalogue, ValidationConfig, open_journeys
from gpr_dist.schema import Batch

# I catalogue items

GENERATIVE, ITEM_HEAD, MIX, SASREC = "generative", "item head", "mix", "SASRec"
DEFAULT_BASELINES = tuple(BASELINES)
ALL_BASELINES = (*BASELINES, SASREC)

Batches = Callable[[str, int | None], Iterable[Batch]]
"""(split, max_rows) -> one pass over it."""


class CompareConfig(Config):
    """Which rankers stand beside the model, and how they are made."""

    baselines: tuple[str, ...] = DEFAULT_BASELINES
    """popularity, personal frequency, Markov chain, SASRec (trained once, minutes on 2 cores, and kept in the run folder); [] = none"""
    mix: tuple[str, ...] | None = None
    """rankers whose probabilities are mixed: generative, item head, or baselines; none = generative, item head and Markov chain where the
    model has an item head; [] = no mix"""
    exclude_seen: bool = False
    """take the items a user met before from the candidates of all rankers: the protocol of the published leave-one-out tables"""
    validation_rows: int = Field(2048, ge=1)
    """journeys of the validation split by which weights of the mix and SASRec's epoch are chosen, the first ones"""
    weights: MixConfig = MixConfig()
    """search of the mix's weights"""
    sasrec: SASRecConfig = SASRecConfig()
    """the trained baseline"""


def check_choices(config: CompareConfig, settings: ValidationConfig, split: str, rankers: Sequence[str]) -> tuple[str, ...]:
    """The parts of the mix, perhaps none. Raises: ConfigError for names that are not known, or a mix whose weights would be chosen on
    the split that is reported."""
    check_names("baselines", config.baselines, ALL_BASELINES)
    default = (GENERATIVE, ITEM_HEAD, "Markov chain") if ITEM_HEAD in rankers and split == "test" else ()
    parts = default if config.mix is None else config.mix
    check_names("mix", parts, (*rankers, *ALL_BASELINES))
    if parts:
        check_metric("weights.metric", config.weights.metric, ("hitr", "ndcg"), max(settings.ks))
        if split != "test":
            raise ConfigError(f"mix={list(parts)} with split={split}: its weights are chosen on the validation split; use split=test")
    return parts


def open_requests(shards: Mapping[str, str | Path], split: str, num_items: int, settings: ValidationConfig, exclude_seen: bool,
                  max_rows: int | None) -> Requests:
    """The requests of the first `max_rows` journeys of a split, with everything that came before them."""
    log = open_journeys({name: shards[name] for name in SPLITS[: SPLITS.index(split) + 1]}, split, max_rows)
    return Requests(log, popularity(log, num_items, settings.baselines), log.seen() if exclude_seen else None)


def rank_all(requests: Requests, split: str, rankers: Mapping[str, Ranker], parts: Sequence[str], shards: Mapping[str, str | Path],
             batches: Batches, catalogue: Catalogue, settings: ValidationConfig, config: CompareConfig, folder: Path) -> dict[str, Any]:
    """Fill `requests.rankings`: the model's rankers, their mix, then the baselines.

    Args: rankers: of the model, by name. parts: of the mix. folder: where SASRec is kept.
    Returns: what was chosen for the mix (weights, metric, what it reached); empty without one.
    """
    baselines = (*config.baselines, *(name for name in parts if name in ALL_BASELINES and name not in config.baselines))
    tuning = None
    if parts or SASREC in baselines:
        tuning = open_requests(shards, "validation", len(requests.popularity_I), settings, config.exclude_seen, config.validation_rows)
    sasrec = None
    if SASREC in baselines:
        data = f"{[ShardReader(shards[name]).manifest.fingerprint for name in SPLITS[:2]]} {config.exclude_seen} {config.validation_rows}"
        sasrec = load_or_train(folder, data, tuning, catalogue.eligibility, len(requests.popularity_I), config.sasrec)

    def rank(target: Requests, of_split: str, max_rows: int | None, names: Sequence[str]) -> None:
        k = max(settings.ks)
        for name in (name for name in rankers if name in names):
            collect(rankers[name], batches(of_split, max_rows), target, k, name)
        counted = tuple(name for name in names if name in BASELINES)
        target.rankings |= rank_baselines(counted, target.log, catalogue.eligibility, target.popularity_I, settings.baselines, k,
                                          target.seen)
        if SASREC in names:
            score = sasrec_scorer(sasrec, target.log)
            target.rankings[SASREC] = rank_requests(target.log, catalogue.eligibility, target.popularity_I, score, k, target.seen, SASREC)

    chosen: dict[str, Any] = {}
    if parts:
        rank(tuning, "validation", config.validation_rows, parts)
        weights, reached = choose_weights(tuning.log, [tuning.rankings[name] for name in parts], config.weights)
        chosen = {"weights": dict(zip(parts, weights, strict=True)), "metric": config.weights.metric, "reached": reached,
                  "num_requests": min(tuning.log.num_requests, config.weights.max_requests)}
    rank(requests, split, settings.max_rows, (*rankers, *baselines))
    if parts:
        mixed = mix([requests.rankings[name] for name in parts], list(chosen["weights"].values()), max(settings.ks))
        of_model = {name: requests.rankings[name] for name in rankers} | {MIX: mixed}
        requests.rankings = of_model | {name: requests.rankings[name] for name in config.baselines}
    return chosen


def leaves(catalogue: Catalogue) -> np.ndarray:
    """Number of each catalogue item's semantic ID, -1 = not in the trie, int64 [I]."""
    trie, leaf_I = catalogue.trie, np.full(catalogue.semantic_ids.num_items, -1)
    leaf_I[trie.slot_item.cpu().numpy()] = trie.parent[-1].cpu().numpy()
    return leaf_I
