"""Evaluate a checkpoint on a held-out split beside its baselines: a table, a JSON report and an HTML page.

All rankers see the same requests, the same eligible ads and only what happened before each request. Works without a GPU and without
DeepSpeed: the weights are read from a checkpoint of any world size.

    python launch/evaluate.py checkpoint=runs/quickstart 'compare.baselines=[popularity, personal frequency, Markov chain, SASRec]'
    python launch/evaluate.py checkpoint=runs/beauty compare.exclude_seen=true    # the protocol of the published leave-one-out tables
"""

import json
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import field_validator

from gpr_dist.config import Config, build_config, parse_cli, public
from gpr_dist.data.eligibility import Eligibility
from gpr_dist.data.loader import LoaderConfig, OnePass, iter_once
from gpr_dist.data.reader import ShardReader
from gpr_dist.data.sampler import World
from gpr_dist.decoding.model_decoder import ModelDecoder
from gpr_dist.errors import ConfigError, run_cli
from gpr_dist.evaluation.compare import GENERATIVE, ITEM_HEAD, MIX, CompareConfig, check_choices, leaves, open_requests, rank_all
from gpr_dist.evaluation.evaluate import GenerativeRanker
from gpr_dist.evaluation.exposure import read_advertisers
from gpr_dist.evaluation.intervals import BootstrapConfig
from gpr_dist.evaluation.item_ranker import ItemRanker
from gpr_dist.evaluation.names import check_names, read_value_names
from gpr_dist.evaluation.rankings import Ranker, Requests
from gpr_dist.evaluation.report import build_report, format_text
from gpr_dist.evaluation.report_page import report_page
from gpr_dist.evaluation.segments import target_features
from gpr_dist.evaluation.trained import check_knowledge, load_model
from gpr_dist.evaluation.validate import Catalogue, ValidationConfig, has_targets, open_catalogue
from gpr_dist.evaluation.values import Values, calibrate, format_values, measure_values, predict_values
from gpr_dist.job import DataConfig, open_past, prepare_history, split_shards
from gpr_dist.model.gpr import GPR
from gpr_dist.schema import write_atomic
from gpr_dist.tokenizer.semantic_ids import SemanticIds
from gpr_dist.training import checkpoint


class EvaluateConfig(Config):
    """What to evaluate and on what."""

    checkpoint: Path = Path("runs/quickstart")
    """run folder (its newest intact checkpoint) or one step folder"""
    best: bool = False
    """of a run folder: the checkpoint that validated best (train.best_metric), instead of the newest"""
    data: Path | None = None
    """data set folder; none = the one the run was trained on"""
    tokenizer: Path | None = None
    """tokenizer bundle; none = the run's"""
    knowledge: Path | None = None
    """external knowledge for that data; none = the run's"""
    split: Literal["validation", "test"] = "test"
    """what is held out"""
    compare: CompareConfig = CompareConfig()
    """baselines, mix, protocol"""
    baselines: bool = True
    """false = none, a short form of compare.baselines=[]"""
    features: tuple[str, ...] | None = None
    """user and environment features the report is broken down by; none = the user features"""
    advertiser: str | None = None
    """column of the catalogue that names an ad's advertiser; none = "advertiser", where there is one"""
    micro_batch_tokens: int = 16384
    """journey tokens encoded at once"""
    settings: ValidationConfig = ValidationConfig()
    """cut-offs, beam, weights of the baselines"""
    bootstrap: BootstrapConfig = BootstrapConfig()
    """intervals"""
    out: Path | None = None
    """JSON report, the page beside it; none = <run>/evaluation-<split>.json, on other data than the run's
    <run>/evaluation-<split>-<name of the data>.json"""

    @field_validator("settings")
    @classmethod
    def _check(cls, value: ValidationConfig) -> ValidationConfig:
        if not value.ks or min(value.ks) < 1:
            raise ValueError(f"ks={list(value.ks)} must be cut-offs >= 1")
        return value


def main() -> int:
    config, args = parse_cli(EvaluateConfig, __doc__)
    folder = checkpoint.find_checkpoint(config.checkpoint, config.best)
    state = checkpoint.read_state(folder)
    trained = build_config(DataConfig, state["config"]["data"], str(folder))
    data = trained if is_trained_data(config, trained) else DataConfig(folder=config.data, history_events=trained.history_events)
    shards = split_shards(data)
    manifest = ShardReader(shards[config.split]).manifest
    semantic_ids = SemanticIds.load(config.tokenizer or trained.tokenizer or data.folder / "tokenizer")
    semantic_ids.check_codebooks(state["fingerprints"]["tokenizer"], str(folder))
    semantic_ids.check_catalogue(manifest.catalogue_fingerprint, shards[config.split])
    knowledge = check_knowledge(config.knowledge or trained.knowledge, state, folder)
    out = config.out or report_path(config, folder, trained)
    check_report(out, data.folder)
    features = manifest.user_features if config.features is None else config.features
    check_names("features", features, (*manifest.user_features, *manifest.env_features))
    advertiser_I = read_advertisers(data.folder / "catalogue" / "catalogue.arrow", config.advertiser)
    compare = config.compare if config.baselines else config.compare.model_copy(update={"baselines": ()})
    model = load_model(folder, state["config"]["model"])
    parts = check_choices(compare, config.settings, config.split, [GENERATIVE, ITEM_HEAD] if model.config.items.has_head else [GENERATIVE])
    if args.dry_run:
        print(f"would evaluate {folder} on the {config.split} split of {data.folder}, report in {out}")
        return 0

    requests = open_requests(shards, config.split, semantic_ids.num_items, config.settings, compare.exclude_seen, config.settings.max_rows)
    catalogue = open_catalogue(semantic_ids, Eligibility.load(data.folder), requests.popularity_I, "cpu")
    prepare_history(model.config, data)
    past = open_past(model.config, data, semantic_ids, catalogue.eligibility)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    catalogue.trie = catalogue.trie.to(device)

    def batches(split: str, max_rows: int | None = config.settings.max_rows) -> OnePass:
        return iter_once(shards[split], LoaderConfig(micro_batch_tokens=config.micro_batch_tokens), World(0, 1), semantic_ids.codes_NL,
                         model.config.num_mtp_heads, max_rows, knowledge=knowledge, past=past)

    rankers = open_rankers(model.to(device), device, catalogue, config.settings, trained)
    mixed = rank_all(requests, config.split, rankers, parts, shards, batches, catalogue, config.settings, compare, folder.parent)
    models = [*rankers, *([MIX] if mixed else [])]
    values, head_score_N = None, {}
    if config.split == "test" and has_targets(Path(shards["validation"])):
        predicted = predict_values(model, batches("test"), device)
        values = evaluate_values(predict_values(model, batches("validation"), device), predicted)
        head_score_N = score_targets(predicted, requests)
    found = build_report(requests, models, catalogue.eligibility, leaves(catalogue), config.settings.ks, config.bootstrap,
                         target_features(requests.log, manifest.user_features, manifest.env_features, features), advertiser_I, head_score_N,
                         read_value_names(data.folder))
    write_report({"checkpoint": str(folder), "data": str(data.folder), "split": config.split, "models": models, "ks": config.settings.ks,
                  "exclude_seen": compare.exclude_seen, "level": config.bootstrap.level, **found, "values": values, "mix": mixed,
                  "settings": public(config)}, out)
    return 0


def open_rankers(model: GPR, device: torch.device, catalogue: Catalogue, settings: ValidationConfig,
                 trained: DataConfig) -> dict[str, Ranker]:
    """The ways this model ranks, by name."""
    k = max(settings.ks)
    rankers: dict[str, Ranker] = {GENERATIVE: GenerativeRanker(ModelDecoder(model, device), catalogue.trie, catalogue.eligibility,
                                                               catalogue.item_weight, k, settings.beam_width, trained.softmax)}
    if model.config.items.has_head:
        rankers[ITEM_HEAD] = ItemRanker(model, device, catalogue.semantic_ids.codes_NL, catalogue.eligibility, k)
    return rankers


def evaluate_values(validation: Values, test: Values) -> dict[str, Any] | None:
    """The value head on the test split, calibrated on the split before it; None where no values were logged."""
    curves = calibrate(validation)
    return measure_values(test, curves, float(validation.logged_N.mean())) if curves and len(test.logged_N) else None


def score_targets(predicted: Values, requests: Requests) -> dict[str, np.ndarray]:
    """V_L as a score of every target with a logged value; the predictions come in the log's order."""
    log = requests.log
    valued = np.isfinite(log.target_value_N)
    assert np.array_equal(predicted.logged_N, log.target_value_N[valued]), "the predictions are of other targets than the log's"
    score_N = np.full(len(valued), np.nan)
    score_N[valued] = predicted.predicted_NL1[:, -1]
    return {"value head V_L": score_N} if valued.any() else {}


def is_trained_data(config: EvaluateConfig, trained: DataConfig) -> bool:
    return config.data is None or config.data.resolve() == trained.folder.resolve()


def report_path(config: EvaluateConfig, folder: Path, trained: DataConfig) -> Path:
    """Beside the step folders; a report on other data than the run's own carries their name and leaves the run's own report alone."""
    suffix = "" if is_trained_data(config, trained) else f"-{config.data.resolve().name}"
    return folder.parent / f"evaluation-{config.split}{suffix}.json"


def check_report(out: Path, data: Path) -> None:
    """Raises: ConfigError when `out` is a file that is not a report on the same data, which would be lost."""
    if out.exists():
        try:
            found = json.loads(out.read_bytes())["data"]
        except (ValueError, KeyError, TypeError):
            raise ConfigError(f"out={out} is there and is no evaluation report; choose another file") from None
        if Path(found).resolve() != data.resolve():
            raise ConfigError(f"out={out} is the report on {found}, not on {data}; choose another file")


def write_report(report: dict[str, Any], out: Path) -> None:
    """Print the tables, write JSON and page."""
    page = out.with_suffix(".html")
    write_atomic(out, json.dumps(report, indent=1).encode())
    write_atomic(page, report_page(report).encode())
    result = next(iter(report["results"].values()))
    left_out = ", items met before left out" if report["exclude_seen"] else ""
    print(f"\n{report['split']} split of {report['data']}: {result['num_requests']:,} requests, {result['num_targets']:,} ads,\n"
          f"ranked among the ads eligible at each request{left_out}; ± half the {report['level']:.0%} interval\n")
    print(format_text(report, report["models"], report["ks"]))
    if report["mix"]:
        print("\nmix: " + ", ".join(f"{weight:.2f} {name}" for name, weight in report["mix"]["weights"].items()) + ", chosen on validation")
    if report["values"]:
        print(f"\n{format_values(report['values'])}")
    illegal = sum(each["illegal_items"] for each in report["results"].values())
    print(f"\nillegal items emitted: {illegal}   {result['requests_per_s']:.0f} requests/s   report: {out}   page: {page}", flush=True)


if __name__ == "__main__":
    run_cli(main)
