"""Evaluate a checkpoint on a held-out split, beside popularity, personal frequency and a first-order Markov chain.

All rankers see the same requests, the same eligible ads and only what happened before each request. Works without a GPU and without
DeepSpeed: the weights are read from a checkpoint of any world size.
"""

import json
from pathlib import Path
from typing import Any, Literal

import torch

from gpr_dist.config import Config, build_config, parse_cli
from gpr_dist.data.eligibility import Eligibility
from gpr_dist.data.loader import LoaderConfig, OnePass, iter_once
from gpr_dist.data.reader import ShardReader
from gpr_dist.data.sampler import World
from gpr_dist.decoding.model_decoder import ModelDecoder
from gpr_dist.errors import CheckpointError, run_cli
from gpr_dist.evaluation.baselines import evaluate_baselines, popularity
from gpr_dist.evaluation.evaluate import comparison_table, evaluate_generation
from gpr_dist.evaluation.validate import ValidationConfig, has_targets, open_catalogue, open_journeys
from gpr_dist.evaluation.values import Values, calibrate, format_values, measure_values, predict_values
from gpr_dist.job import DataConfig, split_shards
from gpr_dist.model.gpr import GPR, GPRConfig
from gpr_dist.schema import KnowledgeManifest, write_atomic
from gpr_dist.tokenizer.semantic_ids import SemanticIds
from gpr_dist.training import checkpoint

SPLITS = ("train", "validation", "test")


class EvaluateConfig(Config):
    """What to evaluate and on what."""

    checkpoint: Path = Path("runs/quickstart")
    """run folder (its newest intact checkpoint) or one step folder"""
    data: Path | None = None
    """data set folder; none = the one the run was trained on"""
    tokenizer: Path | None = None
    """tokenizer bundle; none = the run's"""
    knowledge: Path | None = None
    """external knowledge for that data; none = the run's"""
    split: Literal["validation", "test"] = "test"
    """what is held out"""
    baselines: bool = True
    """evaluate the baselines too"""
    micro_batch_tokens: int = 16384
    """journey tokens encoded at once"""
    settings: ValidationConfig = ValidationConfig()
    """cut-offs, beam, baselines"""
    out: Path | None = None
    """JSON report; none = <run>/evaluation-<split>.json, on other data than the run's <run>/evaluation-<split>-<name of the data>.json"""


def main() -> int:
    config, args = parse_cli(EvaluateConfig, __doc__)
    folder = find_checkpoint(config.checkpoint)
    state = checkpoint.read_state(folder)
    trained = build_config(DataConfig, state["config"]["data"], str(folder))
    data = trained if is_trained_data(config, trained) else DataConfig(folder=config.data)
    shards = split_shards(data)
    semantic_ids = SemanticIds.load(config.tokenizer or trained.tokenizer or data.folder / "tokenizer")
    semantic_ids.check_codebooks(state["fingerprints"]["tokenizer"], str(folder))
    semantic_ids.check_catalogue(ShardReader(shards[config.split]).manifest.catalogue_fingerprint, shards[config.split])
    knowledge = check_knowledge(config.knowledge or trained.knowledge, state, folder)
    out = config.out or report_path(config, folder, trained)
    if args.dry_run:
        print(f"would evaluate {folder} on the {config.split} split of {data.folder}, report in {out}")
        return 0

    read = {split: shards[split] for split in SPLITS[: SPLITS.index(config.split) + 1]}
    log = open_journeys(read, config.split, config.settings.max_rows)
    counts_I = popularity(log, semantic_ids.num_items, config.settings.baselines)
    catalogue = open_catalogue(semantic_ids, Eligibility.load(data.folder), counts_I, "cpu")
    model = load_model(folder, state["config"]["model"])
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    catalogue.trie = catalogue.trie.to(device)

    def batches(split: str) -> OnePass:
        return iter_once(shards[split], LoaderConfig(micro_batch_tokens=config.micro_batch_tokens), World(0, 1), semantic_ids.codes_NL,
                         model.config.num_mtp_heads, config.settings.max_rows, knowledge=knowledge)

    decode = ModelDecoder(model.to(device), device)
    results = {f"GPR {folder.name}": evaluate_generation(
        decode, batches(config.split), catalogue.trie, catalogue.eligibility, catalogue.item_weight, config.settings.ks,
        config.settings.beam_width, trained.softmax)}
    if config.baselines:
        results |= evaluate_baselines(log, catalogue.eligibility, semantic_ids.num_items, config.settings.baselines, config.settings.ks)
    values = None
    if config.split == "test" and has_targets(Path(shards["validation"])):
        values = evaluate_values(predict_values(model, batches("validation"), device), predict_values(model, batches("test"), device))
    report(results, values, config, folder, data.folder, out)
    return 0


def evaluate_values(validation: Values, test: Values) -> dict[str, Any] | None:
    """The value head on the test split, calibrated on the split before it; None where no values were logged."""
    curves = calibrate(validation)
    return measure_values(test, curves, float(validation.logged_N.mean())) if curves and len(test.logged_N) else None


def check_knowledge(knowledge: Path | None, state: dict[str, Any], folder: Path) -> Path | None:
    """The folder of external knowledge, if the model has any. Raises: CheckpointError when the model cannot read its vectors."""
    wanted = state["fingerprints"].get("knowledge")
    found = None if knowledge is None else KnowledgeManifest.load(knowledge).fingerprint
    if found != wanted:
        raise CheckpointError(f"{folder} was trained with knowledge {wanted}, {knowledge} has {found}: other vectors or another encoder; "
                              "give knowledge made with the same encoder (embedding.source=same)")
    return knowledge


def is_trained_data(config: EvaluateConfig, trained: DataConfig) -> bool:
    return config.data is None or config.data.resolve() == trained.folder.resolve()


def report_path(config: EvaluateConfig, folder: Path, trained: DataConfig) -> Path:
    """Beside the step folders; a report on other data than the run's own carries their name and leaves the run's own report alone."""
    suffix = "" if is_trained_data(config, trained) else f"-{config.data.resolve().name}"
    return folder.parent / f"evaluation-{config.split}{suffix}.json"


def find_checkpoint(path: Path) -> Path:
    """A step folder as given, or the newest intact one of a run folder. Raises: CheckpointError."""
    if checkpoint.STEP_FOLDER.fullmatch(path.name):
        problem = checkpoint.verify(path)
        if problem:
            raise CheckpointError(f"{path}: {problem}")
        return path
    for folder in reversed(checkpoint.list_steps(path)):
        if checkpoint.verify(folder) is None:
            return folder
    raise CheckpointError(f"{path} has no complete checkpoint; train first, or give a step folder")


def load_model(folder: Path, config: dict[str, Any]) -> GPR:
    """The model of a checkpoint, float32, in evaluation mode."""
    model = GPR(build_config(GPRConfig, config, str(folder)))
    model.load_state_dict(dict(checkpoint.iter_weights(folder)))
    return model.eval()


def report(results: dict[str, dict[str, float]], values: dict[str, Any] | None, config: EvaluateConfig, folder: Path, data: Path,
           out: Path) -> None:
    """Print the tables and write everything as JSON."""
    document = {"checkpoint": str(folder), "data": str(data), "split": config.split, "results": results, "values": values}
    write_atomic(out, json.dumps(document, indent=1).encode())
    model = next(iter(results.values()))
    print(f"\n{config.split} split of {data}: {model['num_requests']:.0f} requests, {model['num_targets']:.0f} ads, "
          f"ranked among the ads eligible at each request\n")
    print(comparison_table(results, config.settings.ks))
    if values:
        print(f"\n{format_values(values)}")
    print(f"\nillegal items emitted: {model['illegal_items']:.0f}   {model['requests_per_s']:.0f} requests/s   report: {out}", flush=True)


if __name__ == "__main__":
    run_cli(main)
