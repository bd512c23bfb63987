"""A trained model and what it must be evaluated with, from a checkpoint of any world size, without DeepSpeed."""

from pathlib import Path
from typing import Any

from gpr_dist.config import build_config
from gpr_dist.errors import CheckpointError
from gpr_dist.model.gpr import GPR, GPRConfig
from gpr_dist.schema import KnowledgeManifest
from gpr_dist.training import checkpoint


def load_model(folder: Path, config: dict[str, Any]) -> GPR:
    """The model of a checkpoint, float32, in evaluation mode."""
    model = GPR(build_config(GPRConfig, config, str(folder)))
    model.load_state_dict(dict(checkpoint.iter_weights(folder)))
    return model.eval()


def check_knowledge(knowledge: Path | None, state: dict[str, Any], folder: Path) -> Path | None:
    """The folder of external knowledge, if the model has any. Raises: CheckpointError when the model cannot read its vectors."""
    wanted = state["fingerprints"].get("knowledge")
    found = None if knowledge is None else KnowledgeManifest.load(knowledge).fingerprint
    if found != wanted:
        raise CheckpointError(f"{folder} was trained with knowledge {wanted}, {knowledge} has {found}: other vectors or another encoder; "
                              "give knowledge made with the same encoder (embedding.source=same)")
    return knowledge
