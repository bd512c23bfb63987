"""Pretrain GPR on shards: `deepspeed launch/pretrain.py`, `torchrun --nproc-per-node 2 launch/pretrain.py`, `python launch/pretrain.py`.

Resumes by itself from the newest complete checkpoint of the run, on any number of ranks. The default config builds the quickstart's
shards (The Complete Journey) when there are none. SIGTERM or SIGUSR1: save and leave.
"""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data_pipeline.build import BuildConfig, build_data
from data_pipeline.tokenize_items import FitTokenizerConfig, build_tokenizer
from gpr_dist.config import load_config, parse_cli, to_yaml
from gpr_dist.data.candidates import ItemCandidates
from gpr_dist.data.counts import count_ads
from gpr_dist.data.eligibility import Eligibility
from gpr_dist.data.legal import LegalCodes
from gpr_dist.data.loader import build_loader
from gpr_dist.data.past import PastItems
from gpr_dist.data.reader import ShardReader
from gpr_dist.data.sampler import World
from gpr_dist.errors import ConfigError, DataError, run_cli
from gpr_dist.evaluation.validate import build_validation, has_targets, open_catalogue, save_popularity
from gpr_dist.job import (
    DataConfig,
    PretrainConfig,
    RunConfig,
    open_past,
    prepare_history,
    resolve,
    split_shards,
    tokenizer_folder,
    train_shards,
)
from gpr_dist.model.flops import count_parameters
from gpr_dist.model.gpr import GPR
from gpr_dist.schema import write_atomic
from gpr_dist.tokenizer.semantic_ids import SemanticIds
from gpr_dist.training import checkpoint
from gpr_dist.training.engine import Engine, init_distributed
from gpr_dist.training.init_from import init_from
from gpr_dist.training.loop import Objective, Progress, fit, measure_peak_flops
from gpr_dist.training.objective import mtp_objective
from gpr_dist.training.plots import plot_losses
from gpr_dist.training.tracker import Tracker

ROOT = Path(__file__).resolve().parents[1]


def prepare_shards(config: DataConfig) -> None:
    """Build shards that are missing, where the configured build makes exactly these: a misspelt folder is not filled."""
    shards = config.folder / "shards" / "train"
    if config.shards is None and not (shards / "manifest.json").exists():
        build = load_config(BuildConfig, _from_root(config.build)) if config.build else None
        if build is None or build.out.resolve() != config.folder.resolve():
            other = f" (data.build={config.build} makes {build.out})" if build else ""
            raise DataError(f"no shards in {shards}{other}; correct data.folder, or build them: "
                            f"python launch/build_data.py --config YOUR_LOGS.yaml out={config.folder}")
        build_data(build)


def prepare_tokenizer(config: DataConfig) -> None:
    """Fit a tokenizer that is missing, where the configured fit makes exactly this one; every rank takes its share of the work."""
    bundle = tokenizer_folder(config)
    if not (bundle / "tokenizer.json").exists():
        fit = load_config(FitTokenizerConfig, _from_root(config.fit_tokenizer)) if config.fit_tokenizer else None
        if fit is None or (fit.data.resolve(), fit.out.resolve()) != (config.folder.resolve(), bundle.resolve()):
            other = f" (data.fit_tokenizer={config.fit_tokenizer} makes {fit.out} from {fit.data})" if fit else ""
            raise DataError(f"no tokenizer in {bundle}{other}; correct data.tokenizer, or fit it: "
                            f"python launch/fit_tokenizer.py data={config.folder} out={bundle}")
        build_tokenizer(fit)


def check_resume(config: RunConfig) -> None:
    steps = checkpoint.list_steps(config.folder / config.name)
    if steps and not config.resume:
        raise ConfigError(f"{steps[-1].parent} already has checkpoints up to {steps[-1].name}; choose another run.name, or run.resume=true")


def main() -> int:
    config, args = parse_cli(PretrainConfig, __doc__, ROOT / "configs" / "pretrain.yaml")
    check_resume(config.run)
    if args.dry_run:
        return dry_run(config)

    init_distributed(config.engine.timeout_seconds)
    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    share_cpu_cores()
    together(lambda: prepare_shards(config.data), only_if=rank == 0)
    together(lambda: prepare_history(config.model, config.data), only_if=rank == 0)
    prepare_tokenizer(config.data)
    config, semantic_ids, fingerprints = resolve(config)
    run = config.run.folder / config.run.name

    torch.manual_seed(config.run.seed)
    engine = Engine(GPR(config.model), config.engine)
    eligibility = Eligibility.load(config.data.folder)
    legal = open_legal_codes(engine, config, semantic_ids, eligibility)
    candidates = open_item_candidates(engine, config, semantic_ids, eligibility)
    past = open_past(config.model, config.data, semantic_ids, eligibility)
    loader = build_loader(train_shards(config.data), config.data.loader, World(rank, world_size), semantic_ids.codes_NL,
                          config.model.num_mtp_heads, legal, config.data.knowledge, candidates, past, config.model.drops)
    objective = mtp_objective(config.model.num_mtp_heads, config.value_loss_weight, config.head_weights,
                              item_loss_weight=config.item_loss_weight)
    validate = open_validation(engine, config, semantic_ids, eligibility, objective, legal, candidates, past)

    restored = checkpoint.load_latest(engine, run, fingerprints)
    progress = Progress(**restored.state["progress"]) if restored else Progress()
    if restored:
        loader.load_state_dict(restored.state["loader"])
    origin = open_origin(engine, config, fingerprints, restored)
    tracker = Tracker(config.tracker, run, config.model_dump(mode="json"), rank, config.train.schedule.num_steps, progress.step)
    if rank == 0:
        write_atomic(run / "config.yaml", to_yaml(config).encode())
        parameters = sum(count_parameters(config.model).values())
        start = f"resuming {restored.folder}" if restored else f"starting {run}" + (f" from {origin['source']}" if origin else "")
        tracker.say(f"{start}: {parameters:,} parameters, "
                    f"ZeRO-{config.engine.zero_stage} {config.engine.precision}, {world_size} rank(s) on {engine.device.type}, "
                    f"{loader.steps_per_epoch} steps per epoch")
        if validate is None:
            tracker.say(f"no validation: {split_shards(config.data)['validation']} does not exist or has no targets")
    save_state = {"fingerprints": fingerprints, "config": config.model_dump(mode="json"), "origin": origin}
    peak = measure_peak_flops(config.engine.precision, engine.device)
    try:
        fit(engine, loader, objective, config.train, config.model, run, tracker, progress, save_state, validate, peak)
    except BaseException:
        tracker.close(exit_code=1)  # ends the progress bar's line, so that the error has one of its own
        raise
    tracker.close()
    if rank == 0:
        print(f"run folder: {run}\nloss curves: {plot_losses(run)}", flush=True)
    engine.close()
    return 0


def open_origin(engine: Engine, config: PretrainConfig, fingerprints: dict[str, str],
                restored: checkpoint.Restored | None) -> dict[str, Any] | None:
    """Where the run's first weights came from, none = random ones; a fresh run takes them over here (collective)."""
    if restored:
        return restored.state.get("origin")
    return init_from(engine, config.init_from, config.model, fingerprints) if config.init_from else None


def open_legal_codes(engine: Engine, config: PretrainConfig, semantic_ids: SemanticIds, eligibility: Eligibility) -> LegalCodes | None:
    """What the training softmax runs over; the prior's counts are taken from the training split, each rank its share (collective)."""
    if config.data.softmax == "all":
        return None
    counts = count_training_ads(engine, config, semantic_ids) if config.data.softmax == "prior" else None
    return LegalCodes(semantic_ids.codes_NL, semantic_ids.codebook_size, eligibility, counts)


def open_item_candidates(engine: Engine, config: PretrainConfig, semantic_ids: SemanticIds,
                         eligibility: Eligibility) -> ItemCandidates | None:
    """What the item head's softmax runs over; none without an item head (collective)."""
    if not config.model.items.has_head:
        return None
    counts = count_training_ads(engine, config, semantic_ids)
    return ItemCandidates(semantic_ids.codes_NL, eligibility, config.model.items, counts, config.run.seed)


def count_training_ads(engine: Engine, config: PretrainConfig, semantic_ids: SemanticIds) -> np.ndarray:
    """How often each item is a training target, each rank counting its share (collective)."""
    reader = ShardReader(train_shards(config.data), cache_dir=config.data.loader.cache_dir)
    mine = count_ads(reader, World(engine.rank, engine.world_size), semantic_ids.num_items)
    return engine.all_reduce(torch.from_numpy(mine)).cpu().numpy()


def open_validation(engine: Engine, config: PretrainConfig, semantic_ids: SemanticIds, eligibility: Eligibility, objective: Objective,
                    legal: LegalCodes | None, candidates: ItemCandidates | None = None,
                    past: PastItems | None = None) -> Callable[[], dict[str, float]] | None:
    """What `fit` calls to validate; none without a validation split. Rank 0 counts popularity, the others read its file (collective)."""
    shards = split_shards(config.data)
    if not has_targets(Path(shards["validation"])):
        return None
    path = config.run.folder / config.run.name / "popularity.npy"
    earlier = {split: shards[split] for split in ("train", "validation")}
    together(lambda: save_popularity(path, earlier, semantic_ids.num_items, config.validation.baselines), only_if=engine.rank == 0)
    catalogue = open_catalogue(semantic_ids, eligibility, np.load(path, allow_pickle=False), engine.device)
    return build_validation(engine, shards["validation"], catalogue, objective, config.validation, config.data.loader,
                            config.model.num_mtp_heads, legal, config.data.softmax, config.data.knowledge, candidates, past)


def dry_run(config: PretrainConfig) -> int:
    """Check the config against the data as far as it exists, print it, build the model without allocating it."""
    if (config.data.folder / "shards").exists() or config.data.shards:
        config, _, _ = resolve(config)
    print(to_yaml(config))
    for part, count in count_parameters(config.model).items():
        print(f"{part:>8} {count:>14,} parameters")
    return 0


def share_cpu_cores() -> None:
    """Without a GPU the ranks of this host divide its cores, unless OMP_NUM_THREADS says otherwise; more threads than cores are slower."""
    if not torch.cuda.is_available() and "OMP_NUM_THREADS" not in os.environ:
        local = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or os.environ["WORLD_SIZE"])
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local))


def together(action, only_if: bool) -> None:
    """Run `action` on the ranks chosen while the others wait; its error ends all ranks, one of them with the message."""
    problem = None
    if only_if:
        try:
            action()
        except Exception as error:
            problem = error
    failed = torch.tensor([float(problem is not None)])
    if torch.cuda.is_available():
        failed = failed.cuda()
    torch.distributed.all_reduce(failed)
    if problem is not None:
        raise problem
    if failed.item():
        sys.exit(2)


def _from_root(path: Path) -> Path:
    return path if path.exists() else ROOT / path


def finish() -> None:
    """Leave without interpreter shutdown: gloo's threads may abort there, after all work is done, and fail a good run."""
    code = 0
    try:
        run_cli(main)
    except SystemExit as exit_request:
        code = exit_request.code or 0
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else 1)


if __name__ == "__main__":
    finish()
