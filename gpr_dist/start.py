"""What every training job does around its loop: missing data made, process group, engine, loader, validation, resume, tracker.

launch/pretrain.py, launch/finetune.py and launch/hepo.py are tables of contents over this file; what a job is made of is in job.py.
"""

import contextlib
import os
import platform
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data_pipeline.build import BuildConfig, build_data
from data_pipeline.tokenize_items import FitTokenizerConfig, build_tokenizer
from gpr_dist.config import load_config, public, to_yaml
from gpr_dist.data.candidates import ItemCandidates
from gpr_dist.data.counts import count_ads
from gpr_dist.data.eligibility import Eligibility
from gpr_dist.data.legal import LegalCodes
from gpr_dist.data.loader import Loader, build_loader
from gpr_dist.data.past import PastItems
from gpr_dist.data.reader import ShardReader
from gpr_dist.data.sampler import World
from gpr_dist.errors import CheckpointError, ConfigError, DataError, run_cli
from gpr_dist.evaluation.baselines import weigh_counts
from gpr_dist.evaluation.validate import build_validation, count_before, has_targets, open_catalogue, save_popularity
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
from gpr_dist.objectives.vaft import VaftConfig
from gpr_dist.schema import write_atomic
from gpr_dist.tokenizer.semantic_ids import SemanticIds
from gpr_dist.training import checkpoint
from gpr_dist.training.engine import Engine, init_distributed
from gpr_dist.training.init_from import init_from
from gpr_dist.training.loop import Objective, Progress, fit, measure_peak_flops
from gpr_dist.training.plots import plot_losses
from gpr_dist.training.spikes import Tracer
from gpr_dist.training.tracker import Tracker
from gpr_dist.training.value_weights import ValueWeights, open_value_weights
from gpr_dist.training.watchdog import no_orphans, watch_progress

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Job:
    """An opened training job: the parts its loop is made of, on every rank."""

    config: PretrainConfig  # of the job's own class, completed by data and tokenizer
    fingerprints: dict[str, str]  # that its checkpoints must carry
    semantic_ids: SemanticIds
    engine: Engine
    eligibility: Eligibility
    legal: LegalCodes | None  # what the training softmax runs over; none = all codes
    candidates: ItemCandidates | None  # none without an item head
    past: PastItems | None  # none without a pointer
    loader: Loader  # of the training split

    @property
    def run(self) -> Path:
        """Its run folder."""
        return self.config.run.folder / self.config.run.name


@dataclass(frozen=True)
class Start:
    """Where a job begins: its own newest checkpoint, or else the weights it was told to start from, or random ones."""

    restored: checkpoint.Restored | None
    progress: Progress
    origin: dict[str, Any] | None  # where the run's first weights came from; none = random ones


def open_job(config: PretrainConfig) -> Job:
    """Join the ranks, make data that is missing, and open every part of the job, with random weights (collective)."""
    no_orphans()
    init_distributed(config.engine.timeout_seconds)
    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    share_cpu_cores()
    together(lambda: prepare_shards(config.data), only_if=rank == 0)
    together(lambda: prepare_history(config.model, config.data), only_if=rank == 0)
    prepare_tokenizer(config.data)
    config, semantic_ids, fingerprints = resolve(config)

    torch.manual_seed(config.run.seed)
    engine = Engine(GPR(config.model), config.engine)
    eligibility = Eligibility.load(config.data.folder)
    legal = open_legal_codes(engine, config, semantic_ids, eligibility)
    candidates = open_item_candidates(engine, config, semantic_ids, eligibility)
    past = open_past(config.model, config.data, semantic_ids, eligibility)
    loader = build_loader(train_shards(config.data), config.data.loader, World(rank, world_size), semantic_ids.codes_NL,
                          config.model.num_mtp_heads, legal, config.data.knowledge, candidates, past, config.model.drops)
    return Job(config, fingerprints, semantic_ids, engine, eligibility, legal, candidates, past, loader)


def open_start(job: Job) -> Start:
    """Resume the run's newest checkpoint, loader included, or take over the weights of `init_from` (collective)."""
    restored = checkpoint.load_latest(job.engine, job.run, job.fingerprints)
    if restored:
        stage = restored.state.get("stage", PretrainConfig.stage)
        if stage != job.config.stage:
            raise CheckpointError(f"{restored.folder} is of the stage {stage}, this job is of the stage {job.config.stage}; choose another "
                                  f"run.name, and init_from={job.run} to start from it")
        job.loader.load_state_dict(restored.state["loader"])
        return Start(restored, Progress(**restored.state["progress"]), restored.state.get("origin"))
    source = job.config.init_from
    return Start(None, Progress(), init_from(job.engine, source, job.config.model, job.fingerprints) if source else None)


@contextlib.contextmanager
def open_tracker(job: Job, start: Start) -> Iterator[Tracker]:
    """Logging, after rank 0 has written the run's config and said what begins; closed at the end, as failed after an error.

    While it is open, a rank where nothing finishes for `engine.timeout_seconds` leaves.
    """
    config, engine = job.config, job.engine
    tracker = Tracker(config.tracker, job.run, public(config), engine.rank, config.train.schedule.num_steps,
                      start.progress.step)
    if engine.rank == 0:
        write_atomic(job.run / "config.yaml", to_yaml(config).encode())
        parameters = sum(count_parameters(config.model).values())
        source = f" from {start.origin['source']}" if start.origin else ""
        tracker.event(start.progress.step, "resume" if start.restored else "start", commit=commit(), world_size=engine.world_size,
                      device=engine.device.type, host=platform.node(), num_steps=config.train.schedule.num_steps, parameters=parameters)
        begins = f"resuming {start.restored.folder}" if start.restored else f"starting {job.run}{source}"
        tracker.say(f"{begins}: {parameters:,} parameters, ZeRO-{config.engine.zero_stage} {config.engine.precision}, "
                    f"{engine.world_size} rank(s) on {engine.device.type}, {job.loader.steps_per_epoch} steps per epoch")
    stacks = job.run / "stacks" / f"rank-{engine.rank:05d}.txt"
    try:
        with watch_progress(config.engine.timeout_seconds, stacks, lambda: engine.last_progress):
            yield tracker
    except BaseException as error:
        if isinstance(error, CheckpointError):
            tracker.alert(start.progress.step, "checkpoint_failed", str(error))
        tracker.event(start.progress.step, "end", status="failed", error=f"{type(error).__name__}: {error}")
        tracker.close(exit_code=1)  # ends the progress bar's line, so that the error has one of its own
        raise
    finished = start.progress.step == config.train.schedule.num_steps
    tracker.event(start.progress.step, "end", status="finished" if finished else "stopped")
    tracker.close()


def checkpoint_facts(job: Job, start: Start) -> dict[str, Any]:
    """What every checkpoint of the run says beside its counters: plain JSON values."""
    return {"fingerprints": job.fingerprints, "config": public(job.config), "origin": start.origin,
            "stage": job.config.stage}


def run_fit(job: Job, objective: Objective, value_weights: ValueWeights | None = None) -> int:
    """Resume or start, train to the end or to a stop signal, and leave the loss curves behind (collective).

    Args: value_weights: of value-aware fine-tuning (`open_vaft`); none = every target counts 1.
    Returns: the job's exit code.
    """
    config, engine = job.config, job.engine
    validate = open_validation(job, objective)
    start = open_start(job)
    with open_tracker(job, start) as tracker:
        if value_weights:
            tracker.say(value_weights.made_of)
            if start.restored:
                value_weights.load_state_dict(start.restored.state["weighing"])
        if validate is None:
            tracker.say(f"no validation: {split_shards(config.data)['validation']} does not exist or has no targets")
        peak = measure_peak_flops(config.engine.precision, engine.device)
        fit(engine, job.loader, objective, config.train, config.model, job.run, tracker, start.progress, checkpoint_facts(job, start),
            validate, peak, value_weights, open_tracer(job))
    if engine.rank == 0:
        print(f"run folder: {job.run}\nloss curves: {plot_losses(job.run)}", flush=True)
    engine.close()
    return exit_code(config, start.progress)


def exit_code(config: PretrainConfig, progress: Progress) -> int:
    """0 of a finished run, `run.stopped_exit_code` of one that a stop signal ended before its last step."""
    return 0 if progress.step >= config.train.schedule.num_steps else config.run.stopped_exit_code


def open_validation(job: Job, objective: Objective) -> Callable[[], dict[str, float]] | None:
    """What `fit` calls to validate; none without a validation split. Popularity is counted first, each rank its share (collective)."""
    config, engine = job.config, job.engine
    shards = split_shards(config.data)
    if not has_targets(Path(shards["validation"])):
        return None
    settings = config.validation.baselines
    counts_3I = count_before(shards, "validation", job.semantic_ids.num_items, settings, World(engine.rank, engine.world_size))
    popularity_I = weigh_counts(engine.all_reduce(torch.from_numpy(counts_3I)).cpu().numpy(), settings)
    together(lambda: save_popularity(job.run / "popularity.npy", popularity_I), only_if=engine.rank == 0)
    catalogue = open_catalogue(job.semantic_ids, job.eligibility, popularity_I, engine.device)
    return build_validation(engine, shards["validation"], catalogue, objective, config.validation, config.data.loader,
                            config.model.num_mtp_heads, job.legal, config.data.softmax, config.data.knowledge, job.candidates, job.past)


def open_tracer(job: Job) -> Tracer:
    """What describes the rows of a step whose loss is unusual."""
    return Tracer(job.loader.reader, job.config.data.folder / "catalogue" / "catalogue.arrow")


def commit() -> str | None:
    """Of this code, with a + where files differ from it; none outside a git checkout."""
    if not (ROOT / ".git").exists():
        return None
    with contextlib.suppress(OSError):  # no git here
        told = subprocess.run(["git", "-C", str(ROOT), "describe", "--always", "--dirty=+", "--abbrev=12"], capture_output=True, text=True)
        return told.stdout.strip() or None
    return None


def open_vaft(job: Job, config: VaftConfig) -> ValueWeights:
    """What weighs the training split's targets (collective). Raises: DataError for data without values."""
    reader = ShardReader(train_shards(job.config.data), cache_dir=job.config.data.loader.cache_dir, storage=job.config.data.loader.storage)
    return open_value_weights(job.engine, reader, config)


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
        fit_config = load_config(FitTokenizerConfig, _from_root(config.fit_tokenizer)) if config.fit_tokenizer else None
        made = (fit_config.data.resolve(), fit_config.out.resolve()) if fit_config else None
        if made != (config.folder.resolve(), bundle.resolve()):
            other = f" (data.fit_tokenizer={config.fit_tokenizer} makes {fit_config.out} from {fit_config.data})" if fit_config else ""
            raise DataError(f"no tokenizer in {bundle}{other}; correct data.tokenizer, or fit it: "
                            f"python launch/fit_tokenizer.py data={config.folder} out={bundle}")
        build_tokenizer(fit_config)


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
    reader = ShardReader(train_shards(config.data), cache_dir=config.data.loader.cache_dir, storage=config.data.loader.storage)
    mine = count_ads(reader, World(engine.rank, engine.world_size), semantic_ids.num_items)
    return engine.all_reduce(torch.from_numpy(mine)).cpu().numpy()


def check_resume(config: RunConfig) -> None:
    """Raises: ConfigError when the run has checkpoints and may not continue them."""
    steps = checkpoint.list_steps(config.folder / config.name)
    if steps and not config.resume:
        raise ConfigError(f"{steps[-1].parent} already has checkpoints up to {steps[-1].name}; choose another run.name, or run.resume=true")


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


def together(action: Callable[[], Any], only_if: bool) -> None:
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


def run_job(main: Callable[[], int]) -> None:
    """`run_cli` for jobs of many ranks: leaves without interpreter shutdown, where gloo's threads may abort and fail a good run, and a
    failed one may wait for ever for a thread of the loader or for ranks that are gone.
    """
    code = 0
    try:
        run_cli(main)
    except SystemExit as exit_request:
        code = exit_request.code or 0
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else 1)


def _from_root(path: Path) -> Path:
    return path if path.exists() else ROOT / path
