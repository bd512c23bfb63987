"""What a pretraining job is made of: its config, and what data and tokenizer decide about the model.

launch/pretrain.py runs it, launch/plan.py only looks at it.
"""

from pathlib import Path

from pydantic import Field, model_validator

from data_pipeline.history import build_history, is_history_of
from gpr_dist.config import Config
from gpr_dist.data.eligibility import Eligibility
from gpr_dist.data.loader import LoaderConfig
from gpr_dist.data.past import PastItems
from gpr_dist.data.reader import ShardReader
from gpr_dist.decoding.beam_search import Softmax
from gpr_dist.errors import ConfigError, DataError
from gpr_dist.evaluation.validate import ValidationConfig
from gpr_dist.model.gpr import GPRConfig
from gpr_dist.model.knowledge import KnowledgeConfig
from gpr_dist.schema import KnowledgeManifest
from gpr_dist.tokenizer.semantic_ids import SemanticIds
from gpr_dist.training.engine import EngineConfig
from gpr_dist.training.loop import FitConfig
from gpr_dist.training.tracker import TrackerConfig


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


def tokenizer_folder(config: DataConfig) -> Path:
    return config.tokenizer or config.folder / "tokenizer"


def resolve(config: PretrainConfig) -> tuple[PretrainConfig, SemanticIds, dict[str, str]]:
    """Fill in what data, tokenizer and knowledge decide. Returns: (config, semantic IDs, fingerprints that checkpoints must carry)."""
    manifest = ShardReader(train_shards(config.data), cache_dir=config.data.loader.cache_dir).manifest
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
