"""Make a hand-off bundle from a checkpoint of any world size: `python launch/export.py checkpoint=runs/quickstart out=bundle`.

The bundle is one folder that answers requests with torch alone (launch/recommend.py), and that further jobs start from (init_from=).
Weights go from the ranks' files into it piece by piece. Only the calibration of the value head needs the whole model in memory; for a
model that does not fit there, calibration_rows=0 leaves it out.
"""

import json
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field

from data_pipeline.build import BuildConfig
from data_pipeline.journeys import JourneyConfig
from gpr_dist.bundle import new_bundle, seal
from gpr_dist.config import Config, build_config, load_config, parse_cli
from gpr_dist.data.counts import count_ads
from gpr_dist.data.eligibility import Eligibility
from gpr_dist.data.loader import LoaderConfig, iter_once
from gpr_dist.data.reader import ShardReader
from gpr_dist.data.sampler import World
from gpr_dist.decoding.ranking import Order
from gpr_dist.decoding.search import SearchConfig
from gpr_dist.decoding.trie import Trie
from gpr_dist.errors import ConfigError, DataError, run_cli
from gpr_dist.evaluation.baselines import BaselineConfig, weigh_counts
from gpr_dist.evaluation.validate import ValidationConfig, count_before, has_targets
from gpr_dist.evaluation.values import calibrate, predict_values
from gpr_dist.job import DataConfig, open_past, prepare_history, split_shards, tokenizer_folder
from gpr_dist.model.gpr import GPR, GPRConfig
from gpr_dist.schema import ShardManifest, TokenType
from gpr_dist.serving.card import write_card
from gpr_dist.serving.export import (
    EXAMPLE,
    WeightType,
    catalogue_lookup,
    copy_catalogue,
    copy_tokenizer,
    find_time_features,
    save_calibration,
    save_item_weight,
    save_trie,
    write_example,
    write_weights,
)
from gpr_dist.serving.rules import RulesConfig, compile_rules
from gpr_dist.serving.settings import RANKERS, BundleSettings, Ranker, RequestSettings, check_ranker
from gpr_dist.tokenizer.semantic_ids import SemanticIds
from gpr_dist.training import checkpoint

ROOT = Path(__file__).resolve().parents[1]


class ExportConfig(Config):
    """What goes into the bundle."""

    checkpoint: Path = Path("runs/quickstart")
    """run folder (its newest intact checkpoint) or one step folder"""
    best: bool = False
    """of a run folder: the checkpoint that validated best (train.best_metric), instead of the newest"""
    out: Path
    """folder of the bundle; must not exist"""
    dtype: WeightType = "float32"
    """of the stored weights; bfloat16 halves the file, and answers are no longer bit for bit the checkpoint's"""
    data: Path | None = None
    """data set whose catalogue, eligibility and popularity are handed off; none = the one the run was trained on"""
    tokenizer: Path | None = None
    """tokenizer bundle; none = the run's"""
    build: Path | None = None
    """config of launch/build_data.py the data were made with; none = what the data set says of itself, else the run's data.build"""
    popularity_before: Literal["validation", "test"] | None = None
    """item weights are the popularity of everything before this split, as launch/evaluate.py takes them, so that its report holds for the
    bundle; none = the last split there is, and counts of the training ads where there is no other"""
    item_weight: Path | None = None
    """.npy of item weights given instead, float [items]: any non-negative popularity"""
    baselines: BaselineConfig = BaselineConfig()
    """weights of recent and organic events in that popularity"""
    search: SearchConfig = SearchConfig(width=ValidationConfig().beam_width)
    """how the bundle searches; softmax is that of training whatever is said here"""
    order: Order = "probability"
    """how ads are ordered: probability, or with search.strategy=value by value or leaf_value"""
    ranker: Ranker = "generative"
    """who ranks, of a model with an item head: the search over semantic IDs, the item head, or both mixed"""
    mix_weights: dict[Literal["generative", "item head"], float] | None = None
    """shares in that mix; none = those that launch/evaluate.py chose for this checkpoint with compare.mix=[generative, item head]"""
    list_length: int = Field(max(ValidationConfig().ks), ge=1)
    """ads of each list that are mixed; as launch/evaluate.py takes them, so that its report holds for the bundle"""
    rules: Path | None = None
    """targeting, blocked placements, audit, budgets, pacing, caps: a rules file (gpr_dist/serving/rules.py)"""
    calibration_rows: int | None = Field(4096, ge=0)
    """journeys of the validation split that the value head is calibrated on; none = all; 0 = no calibration, and no values in answers"""
    placements: Path | None = None
    """JSON file {"name": row of eligibility.arrow}: names that requests may use instead of numbers"""
    license: str = "not stated; ask the team that trained this model"
    """line of the model card"""
    note: str = ""
    """further text of the model card"""


def main() -> int:
    config, args = parse_cli(ExportConfig, __doc__)
    folder = checkpoint.find_checkpoint(config.checkpoint, config.best)
    state = checkpoint.read_state(folder)
    trained = build_config(DataConfig, state["config"]["data"], f"{folder}/state.json")
    data = trained if config.data is None else trained.model_copy(update={"folder": config.data, "shards": None, "history": None})
    semantic_ids = SemanticIds.load(config.tokenizer or tokenizer_folder(trained))
    semantic_ids.check_codebooks(state["fingerprints"]["tokenizer"], str(folder))
    manifest = ShardReader(split_shards(data)["train"], cache_dir=data.loader.cache_dir, storage=data.loader.storage).manifest
    semantic_ids.check_catalogue(manifest.catalogue_fingerprint, split_shards(data)["train"])
    model = build_config(GPRConfig, state["config"]["model"], f"{folder}/state.json")
    check_ranker(config.ranker, model)
    found = reports(folder)
    settings = describe(config, data, manifest, model, trained, mix_weights(config, model, found))
    if args.dry_run:
        print(f"would export {folder} with the catalogue of {data.folder} ({manifest.num_items:,} items) to {config.out}\n"
              f"{settings.model_dump_json(indent=1)}")
        return 0

    with new_bundle(config.out) as staging:
        shapes, read = checkpoint.open_weights(folder)
        num_weights = write_weights(staging, shapes, read, config.dtype)
        copy_tokenizer(semantic_ids, staging / "tokenizer")
        copy_catalogue(data.folder, staging)
        trie = save_trie(semantic_ids, staging)
        if config.rules is not None:
            settings = add_rules(config.rules, staging, trie, settings)
        weight_I = item_weights(config, data, semantic_ids.num_items)
        save_item_weight(weight_I, semantic_ids.num_items, staging)
        write_example(staging, settings, weight_I, manifest.last_timestamp)
        curves = calibration(config, data, folder, model, semantic_ids)
        save_calibration(curves, staging)
        source = {"checkpoint": str(folder.name), "run": folder.resolve().parent.name, "step": state["step"],
                  "world_size": state["world_size"], "dtype": config.dtype}
        fingerprints = state["fingerprints"] | {"catalogue": manifest.catalogue_fingerprint}
        write_card(staging, settings, source, fingerprints, model, num_weights, data_facts(data), found, config.license,
                   config.note, is_calibrated=bool(curves))
        seal(staging, fingerprints=fingerprints, source=source, model=model.model_dump(mode="json"),
             settings=settings.model_dump(mode="json"))
    print(f"{config.out}: {num_weights:,} weights of {folder} in {config.dtype}, {semantic_ids.num_items:,} items\n"
          f"answers by {settings.ranker}"
          + ("" if settings.ranker != "generative" or not model.items.has_head else "; the model has an item head too: ranker=mix")
          + f"\ntry it: python launch/recommend.py bundle={config.out} requests={config.out}/{EXAMPLE}", flush=True)
    return 0


def describe(config: ExportConfig, data: DataConfig, manifest: ShardManifest, model: GPRConfig, trained: DataConfig,
             weights: dict[str, float]) -> BundleSettings:
    """How requests become tokens, and how they are searched. Raises: DataError when the shards say otherwise than the build's config."""
    journeys, num_profile = journey_settings(config, data)
    reader = ShardReader(split_shards(data)["train"], cache_dir=data.loader.cache_dir, storage=data.loader.storage)
    first = reader.read_batch(0)
    tokens = {kind: bool((first.column("token_type").flatten().to_numpy() == kind).any()) for kind in (TokenType.U, TokenType.E)}
    user_tokens = journeys.user_tokens if manifest.user_features else "none"
    env_tokens = journeys.env_tokens and bool(manifest.env_features)
    longest = int(reader.num_tokens.max(initial=0))
    if tokens[TokenType.U] != (user_tokens != "none") or tokens[TokenType.E] != env_tokens or longest > journeys.max_tokens:
        raise DataError(f"{reader.folder} was not built with these journeys settings: user_tokens={user_tokens}, env_tokens={env_tokens}, "
                        f"max_tokens={journeys.max_tokens}; found U {tokens[TokenType.U]}, E {tokens[TokenType.E]}, up to {longest} "
                        "tokens a row; give the config of launch/build_data.py as build=…")
    requests = RequestSettings(
        user_features=manifest.user_features, env_features=manifest.env_features,
        num_event_user_features=len(manifest.user_features) - num_profile if num_profile is not None else 0,
        time_features=find_time_features(manifest.env_features, first) if env_tokens else (),
        user_tokens=user_tokens, env_tokens=env_tokens, max_tokens=journeys.max_tokens, context_tokens=journeys.max_tokens,
        max_organic_per_block=journeys.max_organic_per_block, num_knowledge_vectors=model.knowledge.num_vectors,
        history_events=trained.history_events if model.pointer.width else 0,
        knowledge_width=model.knowledge.width)
    search = {**config.search.model_dump(), "softmax": trained.softmax}
    return build_config(BundleSettings, {
        "requests": requests, "search": build_config(SearchConfig, search, "search"), "order": config.order, "ranker": config.ranker,
        "mix_weights": weights, "list_length": config.list_length, "placements": read_placements(config, data),
        "num_items": manifest.num_items, "catalogue_fingerprint": manifest.catalogue_fingerprint}, "export")


def mix_weights(config: ExportConfig, model: GPRConfig, reports: list[dict[str, Any]]) -> dict[str, float]:
    """As given, or as evaluation chose them for this checkpoint; empty = not known.

    Raises: ConfigError when a mix is wanted whose weights are of rankers that a bundle does not have.
    """
    if config.mix_weights is not None or not model.items.has_head:
        return config.mix_weights or {}
    chosen = next((report["mix"]["weights"] for report in reports if report.get("mix")), {})
    foreign = [name for name, weight in chosen.items() if name not in RANKERS and weight > 0]
    if foreign and config.ranker == "mix":
        raise ConfigError(f"the mix that was evaluated has a share of {foreign[0]}, which a bundle does not have; evaluate again with "
                          "compare.mix=[generative, item head], or give mix_weights")
    return {} if foreign else {name: weight for name, weight in chosen.items() if name in RANKERS}


def add_rules(path: Path, staging: Path, trie: Trie, settings: BundleSettings) -> BundleSettings:
    """Put the rules beside the trie; requests may then say what they ask."""
    rules, unknown = compile_rules(load_config(RulesConfig, path), path.parent, trie, catalogue_lookup(staging), settings.num_items)
    if unknown:
        print(f"{path}: {unknown:,} rows of its table are of ads that the catalogue does not have; left out", flush=True)
    rules.save(staging)
    requests = settings.requests.model_copy(update={"audience_fields": rules.fields})
    return settings.model_copy(update={"requests": requests})


def journey_settings(config: ExportConfig, data: DataConfig) -> tuple[JourneyConfig, int | None]:
    """The journeys settings of the build, and how many user features come from a users table (none = not said)."""
    path = data.folder / "build.json"
    summary = json.loads(path.read_text()) if path.exists() else {}
    if config.build is None and "journeys" in summary:
        return build_config(JourneyConfig, summary["journeys"], str(path)), summary["num_profile_features"]
    file = config.build or data.build
    if file is None:
        raise ConfigError(f"{path} does not tell how journeys were cut; give the config of launch/build_data.py as build=…")
    file = file if file.exists() else ROOT / file
    return load_config(BuildConfig, file).journeys, None


def read_placements(config: ExportConfig, data: DataConfig) -> dict[str, int]:
    """Raises: ConfigError when the file does not name groups that exist."""
    if config.placements is None:
        return {}
    groups = Eligibility.load(data.folder).num_groups
    try:
        placements = json.loads(config.placements.read_bytes())
    except (OSError, ValueError) as error:
        raise ConfigError(f"placements {config.placements} cannot be read ({error})") from None
    wrong = [n for n, g in placements.items() if not isinstance(g, int) or not 0 <= g < groups] if isinstance(placements, dict) else ["all"]
    if wrong:
        raise ConfigError(f"placements {config.placements}: {wrong[0]} is no row 0 to {groups - 1} of {data.folder}/eligibility.arrow")
    return placements


def item_weights(config: ExportConfig, data: DataConfig, num_items: int) -> np.ndarray:
    """What splits a leaf among its items, and the prior of the search; float [items]."""
    if config.item_weight is not None:
        try:
            return np.load(config.item_weight, allow_pickle=False)
        except (OSError, ValueError) as error:
            raise DataError(f"item_weight {config.item_weight} cannot be read as .npy ({error})") from None
    shards = split_shards(data)
    held_out = [split for split in ("test", "validation") if has_targets(Path(shards[split]))]
    evaluated = config.popularity_before or next(iter(held_out), None)
    if evaluated is None:
        return count_ads(ShardReader(shards["train"], cache_dir=data.loader.cache_dir, storage=data.loader.storage), World(0, 1), num_items)
    return weigh_counts(count_before(shards, evaluated, num_items, config.baselines, World(0, 1)), config.baselines)


@torch.no_grad()
def calibration(config: ExportConfig, data: DataConfig, folder: Path, model: GPRConfig,
                semantic_ids: SemanticIds) -> list[tuple[np.ndarray, np.ndarray]]:
    """Curves of V_0 … V_L fitted on the validation split; none where there is none, or it logs no values."""
    shards = split_shards(data)["validation"]
    if config.calibration_rows == 0 or not has_targets(Path(shards)):
        return []
    network = GPR(model)
    for name, weight in checkpoint.iter_weights(folder):
        network.get_parameter(name).copy_(weight)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    prepare_history(model, data)
    batches = iter_once(shards, LoaderConfig(micro_batch_tokens=16384), World(0, 1), semantic_ids.codes_NL, model.num_mtp_heads,
                        config.calibration_rows, knowledge=data.knowledge,
                        past=open_past(model, data, semantic_ids, Eligibility.load(data.folder)))
    return [(curve.predicted_Q, curve.value_Q) for curve in calibrate(predict_values(network.eval().to(device), batches, device))]


def data_facts(data: DataConfig) -> list[dict[str, Any]]:
    """Rows, targets and time span of every split there is."""
    facts = []
    for split, shards in split_shards(data).items():
        if "://" in str(shards) or (Path(shards) / "manifest.json").exists():
            manifest = ShardReader(shards, cache_dir=data.loader.cache_dir, storage=data.loader.storage).manifest
            facts.append({"split": split, "rows": manifest.num_rows, "tokens": manifest.num_tokens, "targets": manifest.num_targets,
                          "first": manifest.first_timestamp, "last": manifest.last_timestamp, "fingerprint": manifest.fingerprint})
    return facts


def reports(folder: Path) -> list[dict[str, Any]]:
    """Evaluation reports of exactly this checkpoint, found beside it."""
    found = []
    for path in sorted(folder.parent.glob("evaluation-*.json")):
        report = json.loads(path.read_text())
        if Path(report.get("checkpoint", "")).name == folder.name:
            found.append(report | {"file": path.name})
    return found


if __name__ == "__main__":
    run_cli(main)
