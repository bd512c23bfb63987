"""Pretrain GPR on shards: `deepspeed launch/pretrain.py`, `torchrun --nproc-per-node 2 launch/pretrain.py`, `python launch/pretrain.py`.

Resumes by itself from the newest complete checkpoint of the run, on any number of ranks. Without shards, the default config builds
the quickstart's (The Complete Journey). SIGTERM or SIGUSR1: save and leave.
"""

import os
import sys
from pathlib import Path

import torch

from data_pipeline.build import BuildConfig, build_data
from data_pipeline.tokenize_items import FitTokenizerConfig, build_tokenizer
from gpr_dist.config import Config, load_config, parse_cli, to_yaml
from gpr_dist.data.loader import LoaderConfig, build_loader
from gpr_dist.data.reader import ShardReader
from gpr_dist.data.sampler import World
from gpr_dist.errors import ConfigError, DataError, run_cli
from gpr_dist.evaluation.validate import ValidationConfig, build_validation, default_popularity, open_catalogue
from gpr_dist.model.flops import count_parameters
from gpr_dist.model.gpr import GPR, GPRConfig
from gpr_dist.schema import write_atomic
from gpr_dist.tokenizer.semantic_ids import SemanticIds
from gpr_dist.training import checkpoint
from gpr_dist.training.engine import Engine, EngineConfig, init_distributed
from gpr_dist.training.loop import FitConfig, Progress, fit, measure_peak_flops
from gpr_dist.training.objective import mtp_objective
from gpr_dist.training.plots import plot_losses
from gpr_dist.training.tracker import Tracker, TrackerConfig

ROOT = Path(__file__).resolve().parents[1]


class DataConfig(Config):
    """What is trained on."""

    folder: Path = Path("data/complete_journey")
    """data set made by launch/build_data.py: catalogue/, shards/, eligibility.arrow"""
    shards: str | None = None
    """folder or URI of the training split, if it is not <folder>/shards/train; s3://, gs://, hdfs:// work"""
    tokenizer: Path | None = None
    """tokenizer bundle; none = <folder>/tokenizer"""
    build: Path | None = None
    """config of launch/build_data.py, run first when the data set is missing"""
    fit_tokenizer: Path | None = None
    """config of launch/fit_tokenizer.py, run first when the tokenizer is missing"""
    loader: LoaderConfig = LoaderConfig()
    """order, batch sizes, prefetching"""


class RunConfig(Config):
    """Where results go."""

    name: str = "pretrain"
    """run name; the run folder is <folder>/<name>"""
    folder: Path = Path("runs")
    """parent of run folders"""
    seed: int = 0
    """of initial weights and dropout"""
    resume: bool = True
    """continue the run's newest complete checkpoint if there is one; false = refuse a run folder that has checkpoints"""


class PretrainConfig(Config):
    """Everything a pretraining run depends on."""

    run: RunConfig = RunConfig()
    """names and folders"""
    data: DataConfig = DataConfig()
    """input"""
    model: GPRConfig = GPRConfig()
    """network"""
    engine: EngineConfig = EngineConfig()
    """sharding, precision, optimizer"""
    train: FitConfig = FitConfig()
    """loop"""
    value_loss_weight: float = 0.1
    """weight of the value regression beside the MTP loss"""
    validation: ValidationConfig = ValidationConfig(max_rows=128)
    """quality during training"""
    tracker: TrackerConfig = TrackerConfig()
    """logging"""


def prepare_data(config: DataConfig) -> None:
    """Build shards and tokenizer that are missing and whose build is configured."""
    train = config.folder / "shards" / "train" / "manifest.json"
    if config.shards is None and not train.exists():
        if config.build is None:
            raise DataError(f"no shards in {train.parent}: run launch/build_data.py, or set data.folder (or data.build to have them built)")
        build_data(load_config(BuildConfig, _from_root(config.build), [f"out={config.folder}"]))
    bundle = tokenizer_folder(config)
    if not (bundle / "tokenizer.json").exists():
        if config.fit_tokenizer is None:
            raise DataError(f"no tokenizer in {bundle}: run launch/fit_tokenizer.py, or set data.tokenizer (or data.fit_tokenizer)")
        build_tokenizer(load_config(FitTokenizerConfig, _from_root(config.fit_tokenizer), [f"data={config.folder}", f"out={bundle}"]))


def tokenizer_folder(config: DataConfig) -> Path:
    return config.tokenizer or config.folder / "tokenizer"


def resolve(config: PretrainConfig) -> tuple[PretrainConfig, SemanticIds, dict[str, str]]:
    """Fill in what data and tokenizer decide. Returns: (config, semantic IDs, fingerprints that checkpoints must carry)."""
    manifest = ShardReader(train_shards(config.data), cache_dir=config.data.loader.cache_dir).manifest
    semantic_ids = SemanticIds.load(tokenizer_folder(config.data))
    semantic_ids.check_catalogue(manifest.catalogue_fingerprint, str(train_shards(config.data)))
    model = config.model.model_copy(update={"num_levels": semantic_ids.num_levels, "codebook_size": semantic_ids.codebook_size,
                                            "num_user_features": len(manifest.user_features),
                                            "num_env_features": len(manifest.env_features)})
    fingerprints = {"tokenizer": semantic_ids.codebook_fingerprint, "data": manifest.fingerprint}
    return config.model_copy(update={"model": model}), semantic_ids, fingerprints


def train_shards(config: DataConfig) -> str:
    return config.shards or str(config.folder / "shards" / "train")


def check_resume(config: RunConfig) -> None:
    steps = checkpoint.list_steps(config.folder / config.name)
    if steps and not config.resume:
        raise ConfigError(f"{steps[-1].parent} already has checkpoints up to {steps[-1].name}; choose another run.name, or run.resume=true")


def main() -> int:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    config, args = parse_cli(PretrainConfig, __doc__, ROOT / "configs" / "pretrain.yaml")
    check_resume(config.run)
    if args.dry_run:
        return dry_run(config)

    init_distributed(config.engine.timeout_seconds)
    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    share_cpu_cores()
    together(lambda: prepare_data(config.data), only_if=rank == 0)
    config, semantic_ids, fingerprints = resolve(config)
    run = config.run.folder / config.run.name

    torch.manual_seed(config.run.seed)
    engine = Engine(GPR(config.model), config.engine)
    torch.manual_seed(config.run.seed * 1_000_003 + rank)  # dropout differs between ranks
    loader = build_loader(train_shards(config.data), config.data.loader, World(rank, world_size), semantic_ids.codes_NL,
                          config.model.num_mtp_heads)
    objective = mtp_objective(config.model.num_mtp_heads, config.value_loss_weight)
    popularity = default_popularity(config.data.folder, semantic_ids, config.validation.baselines)
    catalogue = open_catalogue(config.data.folder, semantic_ids, popularity, engine.device)
    validate = build_validation(engine, config.data.folder, catalogue, objective, config.validation, config.data.loader,
                                config.model.num_mtp_heads)

    restored = checkpoint.load_latest(engine, run, fingerprints)
    progress = Progress(**restored.state["progress"]) if restored else Progress()
    if restored:
        loader.load_state_dict(restored.state["loader"])
    tracker = Tracker(config.tracker, run, config.model_dump(mode="json"), rank, config.train.schedule.num_steps, progress.step)
    if rank == 0:
        write_atomic(run / "config.yaml", to_yaml(config).encode())
        parameters = sum(count_parameters(config.model).values())
        tracker.say(f"{'resuming ' + str(restored.folder) if restored else 'starting ' + str(run)}: {parameters:,} parameters, "
                    f"ZeRO-{config.engine.zero_stage} {config.engine.precision}, {world_size} rank(s) on {engine.device.type}, "
                    f"{loader.steps_per_epoch} steps per epoch")
    save_state = {"fingerprints": fingerprints, "config": config.model_dump(mode="json")}
    peak = measure_peak_flops(config.engine.precision, engine.device)
    fit(engine, loader, objective, config.train, config.model, run, tracker, progress, save_state, validate, peak)
    tracker.close()
    if rank == 0:
        print(f"run folder: {run}\nloss curves: {plot_losses(run)}", flush=True)
    engine.close()
    return 0


def dry_run(config: PretrainConfig) -> int:
    """Check the config against the data as far as it exists, print it, build the model without allocating it."""
    if (config.data.folder / "shards").exists() or config.data.shards:
        config, _, _ = resolve(config)
    print(to_yaml(config))
    for part, count in count_parameters(config.model).items():
        print(f"{part:>8} {count:>14,} parameters")
    return 0


def share_cpu_cores() -> None:
    """Without a GPU the ranks of this host divide its cores; more threads than cores make every rank slower."""
    if not torch.cuda.is_available():
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
