"""Floating-point operations and parameters of the model by arithmetic, for MFU and for launch/plan.py.

Convention, stated beside every MFU we print: a multiply-add is 2 operations; matrix products of the three decoders and attention scores
only (no input embedding, head adapters, norms, gates, softmax, attention among the L codes of a target); attention counts only the
pairs the mask allows; training costs 3 times the forward pass; recomputation by activation checkpointing is not counted.
"""

from dataclasses import dataclass

import torch

from gpr_dist.model.gpr import GPR, GPRConfig
from gpr_dist.schema import Batch

TRAINING_FACTOR = 3  # forward + two products in the backward pass


@dataclass(frozen=True)
class Work:
    """Sizes of some training work that decide its cost."""

    tokens: int
    token_pairs: int  # (query, key) pairs the journey encoder's mask allows, about sum of t²/2
    decoded: int  # decoder positions: targets x levels
    decoded_pairs: int  # (decoder position, intent) pairs

    def __add__(self, other: "Work") -> "Work":
        return Work(self.tokens + other.tokens, self.token_pairs + other.token_pairs, self.decoded + other.decoded,
                    self.decoded_pairs + other.decoded_pairs)


def work_of(batch: Batch, num_levels: int, intent_window: int = 0) -> Work:
    """Count a micro-batch; pairs of a prompt with later tokens of its own block are left out (a few per request)."""
    lengths = batch.offsets_B1.diff()
    site = (batch.request_token_R - batch.offsets_B1[batch.request_row_R] + 1)[batch.target_request_N]
    if intent_window:
        site = site.clamp_max(intent_window)
    return Work(batch.num_tokens, int((lengths * (lengths + 1) // 2).sum()), num_levels * len(batch.target_head_N),
                num_levels * int(site.sum()))


def forward_flops(config: GPRConfig, work: Work) -> dict[str, float]:
    """Forward operations by part."""
    d, hsd, ptd = config.width, config.hsd, config.ptd
    hsd_token = 4 * d * d + 2 * d * int(hsd.ffn_multiple * d)
    ptd_token = (1 + 1 + 3 + 1) * d * d + 2 * d * int(ptd.ffn_multiple * d)
    hte_target = config.num_levels * (2 * d * d + d) + d * d + d
    return {
        "hsd.dense": 2.0 * work.tokens * hsd_token * hsd.num_layers,
        "hsd.attention": 4.0 * work.token_pairs * d * hsd.num_layers,
        "ptd.dense": 2.0 * (work.decoded * ptd_token + work.tokens * 2 * d * d) * ptd.num_layers,
        "ptd.attention": 4.0 * work.decoded_pairs * d * ptd.num_layers,
        "ptd.codes": 2.0 * work.decoded * d * config.codebook_size,
        "hte": 2.0 * work.decoded / config.num_levels * hte_target,
    }


def training_flops(config: GPRConfig, work: Work) -> float:
    """Operations of forward and backward."""
    return TRAINING_FACTOR * sum(forward_flops(config, work).values())


def count_parameters(config: GPRConfig) -> dict[str, int]:
    """Parameters by part of the model, without allocating any (meta device)."""
    with torch.device("meta"):
        model = GPR(config)
    counts: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        part = name.split(".")[0]
        counts[part] = counts.get(part, 0) + parameter.numel()
    return counts
