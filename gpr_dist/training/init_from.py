"""Start a job from the weights of another: a checkpoint of any world size, or a hand-off bundle. Weights only, no optimizer state.

Every rank reads the ranges it owns under ZeRO-3, as a resume does. What must agree is checked before anything changes: what the codes
mean (the tokenizer's codebooks), what knowledge vectors mean, and the model. Data may differ: that is what fine-tuning is for. Parts
that only one kind of job has (the critic) may be missing on either side: they start from a twin or fresh, or are left behind.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gpr_dist import bundle
from gpr_dist.config import build_config
from gpr_dist.errors import CheckpointError
from gpr_dist.model.gpr import GPRConfig
from gpr_dist.training import checkpoint
from gpr_dist.training.engine import Engine

# settings that say how the network is computed or trained, not which network it is
FREE_SETTINGS = frozenset({"hsd.dropout", "embedding.dropout", "items.dropout", "items.head_dropout", "ptd.head_dropout", "hsd.attention",
                           "ptd.attention", "hsd.activation_checkpointing", "hsd.router_balance", "hsd.router_z",
                           "items.full_softmax_items", "items.num_sampled", "items.num_items", "critic"})
OPTIONAL_PARTS = ("critic.",)
CHECKED_FINGERPRINTS = ("tokenizer", "knowledge")


@dataclass(frozen=True)
class InitialWeights:
    """Weights that a job may start from."""

    source: Path  # the step folder or bundle that was chosen
    model: GPRConfig
    fingerprints: Mapping[str, str]
    shapes: Mapping[str, tuple[int, ...]]
    read: Callable[[Tensor, int, int, str], None]  # (target, lo, hi, name) fills target with flat elements [lo, hi)


def init_from(engine: Engine, source: Path, model: GPRConfig, fingerprints: Mapping[str, str],
              free: frozenset[str] = FREE_SETTINGS) -> dict[str, Any]:
    """Fill a fresh engine with the weights of `source` (collective).

    Args:
        source: run folder (its newest intact checkpoint), step folder, or bundle.
        model: of this job. fingerprints: of this job; those of tokenizer and knowledge must be the source's.
        free: settings of `model` (dotted) that may differ from the source's.
    Returns: where the weights come from, for the run's checkpoints: plain JSON values.
    Raises: CheckpointError on every rank when the source is damaged, incomplete or belongs to another model or tokenizer.
    """
    source = _choose(engine, source)
    weights = open_weights(source)  # every rank reads the same files, so all of them go on or all of them raise
    check_same_model(weights, model, fingerprints, {name: tuple(shape) for name, shape in engine.shapes.items()}, free)
    for shard in engine.loadable_shards():
        name = shard.name if shard.name in weights.shapes else stand_in(shard.name, weights.shapes)
        if name is not None:
            weights.read(shard.tensors["param"], shard.lo, shard.hi, name)
    engine.finish_loading(0)
    return {"source": str(weights.source), "fingerprints": dict(weights.fingerprints)}


def open_weights(source: Path) -> InitialWeights:
    """Args: source: a step folder, or a bundle. Raises: CheckpointError when it cannot be read; checksums are the caller's."""
    if bundle.is_bundle(source):
        manifest = bundle.read_manifest(source)
        shapes = bundle.weight_shapes(source)
        model = build_config(GPRConfig, manifest.model, f"{source}/{bundle.MANIFEST}")

        def from_bundle(target: Tensor, lo: int, hi: int, name: str) -> None:
            bundle.read_weight_range(target, lo, hi, source, name)

        return InitialWeights(source, model, manifest.fingerprints, shapes, from_bundle)

    state, ranges = checkpoint.read_state(source), checkpoint.read_manifest(source)["ranges"]
    files: dict[str, Any] = {}

    def from_checkpoint(target: Tensor, lo: int, hi: int, name: str) -> None:
        checkpoint.read_range(target, lo, hi, ranges.get(name, []), files, source, name, "param")

    return InitialWeights(source, build_config(GPRConfig, state["config"]["model"], f"{source}/state.json"), state["fingerprints"],
                          {name: tuple(shape) for name, shape in state["shapes"].items()}, from_checkpoint)


def stand_in(name: str, shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    """Whose weights an optional part takes that the source does not have; None = it keeps its first values.

    The critic's hidden layers begin as those of the HTE, which has learned what prefixes are worth from the same states; its last layers
    stay 0, for its numbers are others.
    """
    *_, layer, _ = name.split(".")
    twin = name.replace("critic.", "hte.", 1)
    return twin if name.startswith("critic.") and layer == "0" and twin in shapes else None


def _choose(engine: Engine, source: Path) -> Path:
    """The step folder or bundle meant by `source`, intact; each rank compares its share of the checksums (collective)."""
    if bundle.is_bundle(source):
        problem = bundle.verify(source, bundle.read_manifest(source), [bundle.WEIGHTS]) if engine.rank == 0 else None
        if _any(engine, problem):
            raise CheckpointError(f"bundle {source}: {problem or 'rank 0 found it damaged'}; export it again with launch/export.py")
        return source
    is_step = checkpoint.STEP_FOLDER.fullmatch(source.name)
    for folder in [source] if is_step else reversed(checkpoint.list_steps(source)):
        problem = checkpoint.verify(folder, engine.rank, engine.world_size)
        if not _any(engine, problem):
            return folder
        if is_step:
            raise CheckpointError(f"init_from {folder}: {problem or 'another rank found it damaged'}")
    raise CheckpointError(f"init_from {source}: no complete checkpoint and no bundle there; give a run folder, a step folder or a bundle")


def _any(engine: Engine, problem: str | None) -> bool:
    return bool(engine.all_reduce(torch.tensor([float(problem is not None)]), "max").item())


def check_same_model(weights: InitialWeights, model: GPRConfig, fingerprints: Mapping[str, str], shapes: Mapping[str, tuple[int, ...]],
                     free: frozenset[str] = FREE_SETTINGS) -> None:
    """Raises: CheckpointError naming both sides of the first difference."""
    for kind in CHECKED_FINGERPRINTS:
        found, wanted = weights.fingerprints.get(kind), fingerprints.get(kind)
        if found != wanted:
            way_out = "; use the same tokenizer, or take the checkpoint over with launch/migrate.py" if kind == "tokenizer" else ""
            raise CheckpointError(f"init_from {weights.source} was trained with {kind} {found}, this job uses {kind} {wanted}{way_out}")
    theirs, ours = _flat(weights.model.model_dump(mode="json")), _flat(model.model_dump(mode="json"))
    for name in sorted(theirs.keys() | ours.keys()):
        if name not in free and theirs.get(name) != ours.get(name):
            raise CheckpointError(f"init_from {weights.source} has model.{name}={theirs.get(name)}, this job has model.{name}="
                                  f"{ours.get(name)}; set it to {theirs.get(name)}")
    buckets, sizes = model.items.buckets, (weights.model.items.num_items, model.items.num_items)
    if buckets and (buckets < sizes[0]) != (buckets < sizes[1]):  # a row of its own in one model, shared rows in the other
        raise CheckpointError(f"init_from {weights.source} was trained on {sizes[0]} items, this job has {sizes[1]}, and model.items."
                              f"buckets={buckets} lies between: rows would change their items; start from random weights")
    for name in sorted(weights.shapes.keys() | shapes.keys()):
        if name.startswith(OPTIONAL_PARTS) and not (name in weights.shapes and name in shapes):
            continue
        if weights.shapes.get(name) != shapes.get(name):
            raise CheckpointError(f"init_from {weights.source} has {name} of shape {weights.shapes.get(name)}, this job's model has "
                                  f"{shapes.get(name)}; the code that trained it was another version")


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    out = {}
    for name, value in values.items():
        out |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return out
