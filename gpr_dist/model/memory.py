"""Bytes per rank by arithmetic: training state exactly by ZeRO stage, activations as an estimate."""

from gpr_dist.model.flops import Work
from gpr_dist.model.gpr import GPRConfig
from gpr_dist.ops.cross_entropy import LOSS_CHUNK_BYTES

# What is kept of a token in one encoder layer, and of a position in one decoder layer, in model widths, attention included; the FFN's inner
# activations come on top. Measured on the saved tensors of a training step (bench.py step), widths 96 and 256, and rounded up.
_HSD_WIDTHS, _HSD_INNER = 24, 2
_PTD_WIDTHS, _PTD_INNER = 23, 2
_HTE_WIDTHS = 18  # of a target
_PAIR_BYTES = 44  # of a (request, past event) pair the pointer scores: score, indices of request, event, age and kind


def state_bytes(num_parameters: int, zero_stage: int, world_size: int, precision: str) -> float:
    """Parameters, float32 gradients, float32 master weights and two Adam moments, sharded as the stage says (ZeRO, 1910.02054)."""
    parameters, gradients, optimizer = (4.0, 4.0, 8.0) if precision == "fp32" else (2.0, 4.0, 12.0)
    if zero_stage >= 1:
        optimizer /= world_size
    if zero_stage >= 2:
        gradients /= world_size
    if zero_stage >= 3:
        parameters /= world_size
    return num_parameters * (parameters + gradients + optimizer)


def checkpoint_bytes(num_parameters: int, world_size: int) -> float:
    """What one rank writes of a checkpoint, and its copy takes of host memory: float32 weights and two moments, shared at any stage."""
    return 12.0 * num_parameters / world_size


def activation_bytes(config: GPRConfig, work: Work, share: float, precision: str) -> float:
    """Activations kept for the backward pass of one micro-batch: an estimate that counts the large tensors and errs upwards.

    Args: work: of a step. share: of it in the micro-batch.
    """
    size = 4 if precision == "fp32" else 2
    d = config.width
    per_layer = d if config.hsd.activation_checkpointing else _HSD_WIDTHS * d + _HSD_INNER * int(config.hsd.ffn_multiple * d)
    hsd = work.tokens * per_layer * config.hsd.num_layers
    ptd_layer = _PTD_WIDTHS * d + _PTD_INNER * int(config.ptd.ffn_multiple * d)
    positions = work.openings * (config.ptd.num_thinking + 1) + work.targets * (config.num_levels - 1)
    logits = min(share * work.targets * config.num_levels * config.codebook_size * (size + 8), 3 * LOSS_CHUNK_BYTES)
    pointer = _PAIR_BYTES * share * work.copy_pairs + size * share * (work.tokens + work.past_events) * (config.pointer.width and d)
    # float32 gradients of the candidates, and the scores and probabilities of a chunk
    items = 2 * 4 * config.items.num_candidates * d + min(2 * LOSS_CHUNK_BYTES, 8 * int(share * work.item_scores))
    hte = work.targets * _HTE_WIDTHS * d
    return items + pointer + share * size * (hsd + positions * ptd_layer * config.ptd.num_layers + hte + work.tokens * 2 * d) + logits
