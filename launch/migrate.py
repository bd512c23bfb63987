"""Take a checkpoint over to a refitted tokenizer: match old and new codes by their items, move the rows of the code tables, keep the rest.

    python launch/fit_tokenizer.py --config FIT.yaml out=DATA/tokenizer-2                 # the refit, in a folder of its own
    python launch/migrate.py checkpoint=runs/daily tokenizer=DATA/tokenizer-2 out=runs/daily-2 [data=GROWN_DATA]
    deepspeed launch/pretrain.py ... data.tokenizer=DATA/tokenizer-2 run.name=daily-2     # goes on at the same step

--dry-run prints the matching and writes nothing.
"""

import time
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field

from data_pipeline.tokenize_items import common_items
from gpr_dist.config import Config, build_config, parse_cli, public
from gpr_dist.data.loader import build_loader
from gpr_dist.data.sampler import World
from gpr_dist.errors import DataError, TokenizerError, run_cli
from gpr_dist.job import DataConfig, PretrainConfig, resolve, tokenizer_folder, train_shards
from gpr_dist.model.gpr import GPRConfig
from gpr_dist.tokenizer.matching import Matching, format_matching, match_codes
from gpr_dist.tokenizer.semantic_ids import SemanticIds
from gpr_dist.training import checkpoint
from gpr_dist.training.migrate import Changed, migrate

UNSEEN_WEIGHT = 0.01  # of an item that the training data do not show, over the mean item's


class MigrateConfig(Config):
    """What becomes what."""

    checkpoint: Path
    """run folder (its newest intact checkpoint) or one step folder; only read"""
    tokenizer: Path
    """the new tokenizer bundle"""
    out: Path
    """run folder for the migrated checkpoint; must not hold checkpoints"""
    before: Path | None = None
    """the tokenizer bundle of the checkpoint; none = the one in its config"""
    data: Path | None = None
    """data set to go on with, from its first row, when the catalogue grew; none = that of the checkpoint, at the place it had reached"""
    min_jaccard: float = Field(0.5, gt=0, le=1)
    """a new code continues an old one when the items on both are at least this share of the items on either"""
    popularity: Path | None = None
    """.npy with each item's weight in the matching, float [items]; none = the run's popularity.npy, where it has one, else all alike"""
    changed: Changed = "origin"
    """weights of codes that continue none: origin = mean of the old rows of the code's items; fresh = as in a new model"""
    seed: int = 0
    """of fresh rows"""


def main() -> None:
    config, args = parse_cli(MigrateConfig, __doc__)
    started = time.perf_counter()
    source = checkpoint.find_checkpoint(config.checkpoint)
    state = checkpoint.read_state(source)
    trained = build_config(DataConfig, state["config"]["data"], f"{source}/state.json")
    old, new = open_bundles(config, source, state["fingerprints"]["tokenizer"], trained)
    changes = changed_state(config, source, state, trained)
    matching = match(config, source, old, new, changes["config"]["data"]["folder"])
    print(format_matching(matching))
    if args.dry_run:
        print(f"would migrate {source} from {old.folder} to {new.folder}, into {config.out}")
        return
    folder = migrate(source, config.out, matching, changes, config.changed, config.seed)
    print(f"{folder}: {source} for tokenizer {new.folder} (codebooks {new.codebook_fingerprint}), {time.perf_counter() - started:.1f} s\n"
          f"go on with data.tokenizer={new.folder} run.folder={config.out.parent} run.name={config.out.name}")


def open_bundles(config: MigrateConfig, source: Path, trained_with: str, trained: DataConfig) -> tuple[SemanticIds, SemanticIds]:
    """The checkpoint's tokenizer and the new one. Raises: TokenizerError."""
    old, new = SemanticIds.load(config.before or tokenizer_folder(trained)), SemanticIds.load(config.tokenizer)
    if new.codebook_fingerprint == trained_with:
        raise TokenizerError(f"{source} was trained with the codebooks of {new.folder} ({trained_with}); there is nothing to migrate")
    if old.codebook_fingerprint != trained_with:
        raise TokenizerError(f"{source} was trained with codebooks {trained_with}, {old.folder} has {old.codebook_fingerprint}; give the "
                             "checkpoint's own tokenizer as before=…, and refit into another folder than its own (out=…)")
    return old, new


def changed_state(config: MigrateConfig, source: Path, state: dict[str, Any], trained: DataConfig) -> dict[str, Any]:
    """Entries of state.json that the new tokenizer, and other data if there are any, decide."""
    data = trained.model_copy(update={"tokenizer": config.tokenizer})
    if config.data:
        data = data.model_copy(update={"folder": config.data, "shards": None})
    model = build_config(GPRConfig, state["config"]["model"], f"{source}/state.json")
    job, new, fingerprints = resolve(PretrainConfig(data=data, model=model))
    if not config.data and fingerprints["data"] != state["fingerprints"]["data"]:
        raise DataError(f"{train_shards(data)} is not what {source} was trained on (data {fingerprints['data']}, trained on "
                        f"{state['fingerprints']['data']}); to go on with it from its first row, say data={data.folder}")
    settings = {**state["config"], "data": public(job.data), "model": job.model.model_dump(mode="json")}
    changes = {"config": settings, "fingerprints": {**state["fingerprints"], **fingerprints},
               "migrated_from": {"checkpoint": str(source), "fingerprints": state["fingerprints"]}}
    if config.data:
        loader = build_loader(train_shards(data), data.loader, World(), new.codes_NL, model.num_mtp_heads)
        changes["loader"] = loader.state_dict()
    return changes


def match(config: MigrateConfig, source: Path, old: SemanticIds, new: SemanticIds, data: str) -> Matching:
    num_common = common_items(old, new, Path(data))
    path = config.popularity or source.parent / "popularity.npy"
    weight_N = item_weights(path, num_common) if config.popularity or path.exists() else None
    print(f"{num_common:,} common items, " + (f"all alike: there is no {path}" if weight_N is None else f"weighted by {path}"))
    return match_codes(old.codes_NL[:num_common], new.codes_NL[:num_common], old.codebook_size, new.codebook_size, config.min_jaccard,
                       weight_N)


def item_weights(path: Path, num_items: int) -> np.ndarray:
    """Float64 > 0 [num_items]: what the model saw of an item; one it never saw counts a little. Raises: DataError."""
    try:
        counts_N = np.load(path, allow_pickle=False)[:num_items]
    except (OSError, ValueError, IndexError) as error:
        raise DataError(f"popularity {path} cannot be read as .npy ({error})") from None
    if counts_N.shape != (num_items,) or not (np.isfinite(counts_N).all() and counts_N.min() >= 0 and counts_N.any()):
        raise DataError(f"popularity {path} should hold a finite count >= 0 for each of {num_items} items, not all 0; give another file")
    return counts_N + UNSEEN_WEIGHT * counts_N.mean()


if __name__ == "__main__":
    run_cli(main)
