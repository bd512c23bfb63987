"""What a training job is made of: its config, what data and tokenizer decide about the model, and what a later stage takes over.

start.py opens it, launch/plan.py only looks at it.
"""

import contextlib
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from pydantic import Field, model_validator

from data_pipeline.history import build_history, is_history_of
from gpr_dist import bundle
from gpr_dist.config import Config, build_config
from gpr_dist.data.eligibility import Eligibility
from gpr_dist.data.loader import LoaderConfig
from gpr_dist.data.past import PastItems
from gpr_dist.data.reader import ShardReader
from gpr_dist.decoding.beam_search import Softmax
from gpr_dist.errors import CheckpointError, ConfigError, DataError
from gpr_dist.evaluation.validate import ValidationConfig
from gpr_dist.model.gpr import GPRConfig
from gpr_dist.model.knowledge import KnowledgeConfig
from gpr_dist.objectives.vaft import VaftConfig
from gpr_dist.schema import KnowledgeManifest
from gpr_dist.tokenizer.semantic_ids import SemanticIds
from gpr_dist.training import checkpoint
from gpr_dist.training.engine import EngineConfig
from gpr_dist.training.loop import FitConfig
from gpr_dist.training.tracker import TrackerConfig

INHERITED = ("model", "data", "engine", "head_weights", "value_loss_weight", "item_loss_weight", "validation")
"""parts of a config that a later stage takes over from the run it starts from"""
OF_ONE_FOLDER = ("shards", "tokenizer", "build", "fit_tokenizer", "knowledge", "history")
"""settings of `data` that say nothing about another data folder"""

class DataConfig(Config):
    """What is trained on."""

    folder: Path = Path("data/complete_journey")
    """data set made by launch/build_data.py: catalogue/, shards/, eligibility.arrow"""
    shards: str | None = None
    """folder or URI of the training split, if it is not <folder>/shards/train; s3://, gs://, hdfs:// work"""
    tokenizer: Path | None = None
    """tokenizer bundle; none = <folder>/tokenizer"""
    build: Path | None = None
    """config of launch/build_data.py, run first when the data set is missing and the config's `out` is `folder`"""
    fit_tokenizer: Path | None = None
    """config of launch/fit_tokenizer.py, run first when the tokenizer is missing and the config's `data` and `out` are these two folders"""
    knowledge: Path | None = None
    """external knowledge of the users, made by launch/build_knowledge.py for these shards; none = the model has none"""
    history: Path | None = None
    """folder of the users' events by time, for what is older than a row; made when missing; none = <folder>/history"""
    history_events: int = Field(0, ge=0)
    """most events older than its row that a pointer may copy too, the latest ones; 0 = only the row's own"""
    softmax: Softmax = "prior"
    """codes the softmax runs over in training and search: all; legal = those legal at the request (the paper's); prior = the same with
    the log of each code's popularity added to its logit"""
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
    stopped_exit_code: int = Field(0, ge=0, le=255)
    """exit code of a run that a stop signal ended before its last step; 75 where failed jobs are restarted and finished ones are not"""


class PretrainConfig(Config):
    """Everything a pretraining run depends on."""

    stage: ClassVar[str] = "pretrain"  # a run's checkpoints are resumed by its own stage only
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
    head_weights: tuple[float, ...] | None = None
    """weights of the MTP heads in the loss (Eq. 3), adding up to 1; none = uniform"""
    value_loss_weight: float = 0.1
    """weight of the value regression beside the MTP loss"""
    item_loss_weight: float = Field(1.0, ge=0)
    """weight of the item head's softmax beside the MTP loss; counts only with model.items"""
    validation: ValidationConfig = ValidationConfig(max_rows=128)
    """quality during training"""
    tracker: TrackerConfig = TrackerConfig()
    """logging"""
    init_from: Path | None = None
    """start from these weights: a run folder, a step folder or a bundle of the same model and tokenizer; a run that has checkpoints of its
    own goes on with them. None = random weights"""

    @model_validator(mode="after")
    def _check(self) -> "PretrainConfig":
        weights, heads = self.head_weights, self.model.num_mtp_heads
        if weights is not None and (len(weights) != heads or min(weights) < 0 or abs(sum(weights) - 1) > 1e-6):
            raise ValueError(f"head_weights={list(weights)} must be model.num_mtp_heads={heads} weights >= 0 that add up to 1")
        return self


class FinetuneConfig(PretrainConfig):
    """Everything a value-aware fine-tuning run depends on; what it leaves open is taken over from the run it starts from."""

    stage: ClassVar[str] = "finetune"
    run: RunConfig = RunConfig(name="finetune")
    """names and folders"""
    init_from: Path = Path("runs/quickstart")
    """start from these weights: a run folder, a step folder or a bundle; its data, model and losses are taken over too, where this config
    says nothing else"""
    vaft: VaftConfig = VaftConfig()
    """how much the value of an ad counts"""


C = TypeVar("C", bound=PretrainConfig)


def inherit(config: C, missing_ok: bool = False) -> C:
    """Fill what the config leaves open: from the run's own newest checkpoint, else from `init_from`.

    Settings of the config win, one by one. With another data.folder, what belongs to the source's folder (OF_ONE_FOLDER) is not taken
    over, nor ever the critic of HEPO. A bundle gives the model only.
    Args: missing_ok: without a source the config stays as it is; else that is a CheckpointError.
    """
    own = stored_config(config.run.folder / config.run.name)
    stored = own or stored_config(config.init_from)
    if stored is None:
        if missing_ok:
            return config
        raise CheckpointError(f"init_from {config.init_from}: no complete checkpoint and no bundle there; give a run folder, a step folder "
                              "or a bundle")
    given = config.model_dump(exclude_unset=True)
    inherited = {name: stored[name] for name in INHERITED if name in stored}
    folder = given.get("data", {}).get("folder")
    if "data" in inherited and folder is not None and Path(folder) != Path(inherited["data"]["folder"]):
        inherited["data"] = {name: value for name, value in inherited["data"].items() if name not in OF_ONE_FOLDER}
    if not own:
        inherited["model"] = {name: value for name, value in inherited["model"].items() if name != "critic"}
    return build_config(type(config), _merged(inherited, given), f"the config with what {config.init_from} was trained with")


def stored_config(source: Path) -> dict[str, Any] | None:
    """The config a run folder, step folder or bundle was made with; nothing but small files is read. None = there is none."""
    if bundle.is_bundle(source):
        return {"model": bundle.read_manifest(source).model}
    if checkpoint.STEP_FOLDER.fullmatch(source.name):
        return checkpoint.read_state(source)["config"]
    for step in reversed(checkpoint.list_steps(source)):
        with contextlib.suppress(CheckpointError):  # one that is damaged is passed over, as on resume
            return checkpoint.read_state(step)["config"]
    return None


def _merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    both = {name: _merged(base[name], over[name]) for name in base.keys() & over.keys()
            if isinstance(base[name], dict) and isinstance(over[name], dict)}
    return {**base, **over, **both}


def tokenizer_folder(config: DataConfig) -> Path:
    return config.tokenizer or config.folder / "tokenizer"


def resolve(config: PretrainConfig) -> tuple[PretrainConfig, SemanticIds, dict[str, str]]:
    """Fill in what data, tokenizer and knowledge decide. Returns: (config, semantic IDs, fingerprints that checkpoints must carry)."""
    manifest = ShardReader(train_shards(config.data), cache_dir=config.data.loader.cache_dir, storage=config.data.loader.storage).manifest
    semantic_ids = SemanticIds.load(tokenizer_folder(config.data))
    semantic_ids.check_catalogue(manifest.catalogue_fingerprint, str(train_shards(config.data)))
    model = config.model.model_copy(update={"num_levels": semantic_ids.num_levels, "codebook_size": semantic_ids.codebook_size,
                                            "num_user_features": len(manifest.user_features),
                                            "num_env_features": len(manifest.env_features)})
    model = model.model_copy(update={"items": model.items.model_copy(update={"num_items": semantic_ids.num_items})})
    fingerprints = {"tokenizer": semantic_ids.codebook_fingerprint, "data": manifest.fingerprint}
    if config.data.knowledge is not None:
        knowledge = KnowledgeManifest.load(config.data.knowledge)
        sizes = KnowledgeConfig(num_vectors=knowledge.num_vectors, width=knowledge.width)
        model = model.model_copy(update={"knowledge": sizes})
        fingerprints["knowledge"] = knowledge.fingerprint
    elif model.knowledge.num_vectors:
        raise ConfigError(f"model.knowledge.num_vectors={model.knowledge.num_vectors}, but data.knowledge names no folder; make one with "
                          "launch/build_knowledge.py")
    return config.model_copy(update={"model": model}), semantic_ids, fingerprints


def open_past(model: GPRConfig, data: DataConfig, semantic_ids: SemanticIds, eligibility: Eligibility) -> PastItems | None:
    """Finds what a request may repeat; none for a model without a pointer."""
    if not model.pointer.width:
        return None
    return PastItems(semantic_ids.codes_NL, semantic_ids.codebook_size, eligibility, history_folder(data), data.history_events)


def prepare_history(model: GPRConfig, data: DataConfig) -> None:
    """Collect the users' events where a pointer wants them and they are missing; again where the shards beside them are others."""
    history = history_folder(data)
    if not model.pointer.width or history is None:
        return
    known = (history / "history.json").exists()
    if data.shards and "://" in data.shards:
        if not known:
            raise DataError(f"the history of {data.shards} can only be collected where these shards are a folder; do that, and name it "
                            "by data.history, or set data.history_events=0")
        return
    train = Path(data.shards) if data.shards else None
    if not known or (data.history is None and not is_history_of(history, data.folder, train)):
        build_history(data.folder, history, train)


def history_folder(config: DataConfig) -> Path | None:
    """None: a pointer copies from the rows alone."""
    return (config.history or config.folder / "history") if config.history_events else None


def train_shards(config: DataConfig) -> str:
    return config.shards or str(config.folder / "shards" / "train")


def split_shards(config: DataConfig) -> dict[str, str]:
    """Folder or URI of every split, in time order; only the training split may lie elsewhere."""
    return {"train": train_shards(config), **{split: str(config.folder / "shards" / split) for split in ("validation", "test")}}
