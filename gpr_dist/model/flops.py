"""Floating-point operations and parameters of the model by arithmetic, for MFU and for launch/plan.py.

Convention, stated beside every MFU we print: a multiply-add is 2 operations; matrix products of the three decoders, the item head, the
pointer's keys and scores, and attention scores only (no input embedding, head adapters, norms, gates, softmax, attention among the L codes
of a target); attention counts only the pairs the mask allows; training costs 3 times the forward pass; recomputation by activation
checkpointing is not counted.
"""

from dataclasses import dataclass

import torch

from gpr_dist.model.gpr import GPR, GPRConfig
from gpr_dist.schema import Batch

TRAINING_FACTOR = 3  # forward + two products in the backward pass


@dataclass(frozen=True)
class Work:
    """Sizes of some training work that decide its cost."""

    tokens: int = 0
    token_pairs: int = 0  # (query, key) pairs the journey encoder's mask allows, about sum of t²/2
    openings: int = 0  # (request, MTP head) pairs with a target: what all ads of a request share is decoded once for each
    opening_intents: int = 0  # intents they read, in all
    targets: int = 0  # of all heads
    target_intents: int = 0
    past_events: int = 0  # older than their rows, which a pointer reads
    copy_pairs: int = 0  # (request, event of its row or older) a pointer scores
    item_scores: int = 0  # (request, candidate item) pairs that the item head scores

    def __add__(self, other: "Work") -> "Work":
        return Work(*(mine + others for mine, others in zip(vars(self).values(), vars(other).values(), strict=True)))


def work_of(batch: Batch, num_heads: int, intent_window: int = 0) -> Work:
    """Count a micro-batch; pairs of a prompt with later tokens of its own block are left out (a few per request)."""
    lengths = batch.offsets_B1.diff()
    site_R = batch.request_token_R - batch.offsets_B1[batch.request_row_R] + 1
    if intent_window:
        site_R = site_R.clamp_max(intent_window)
    openings = torch.unique(batch.target_request_N * num_heads + batch.target_head_N)
    older = torch.zeros_like(lengths) if batch.past_offsets_B1 is None else batch.past_offsets_B1.diff()
    copy_pairs = 0 if batch.copy_request_M is None else int((lengths + older)[batch.request_row_R].sum())
    return Work(batch.num_tokens, int((lengths * (lengths + 1) // 2).sum()), len(openings), int(site_R[openings // num_heads].sum()),
                len(batch.target_head_N), int(site_R[batch.target_request_N].sum()), int(older.sum()), copy_pairs, _item_scores(batch))


def _item_scores(batch: Batch) -> int:
    if batch.candidates is None:
        return 0
    return len(torch.unique(batch.target_request_N[batch.target_head_N == 0])) * len(batch.candidates.item_C)


def forward_flops(config: GPRConfig, work: Work) -> dict[str, float]:
    """Forward operations by part. A token is counted as passing the recursive layers half of the possible times more than once."""
    d, hsd, ptd = config.width, config.hsd, config.ptd
    inner = int(hsd.ffn_multiple * d)
    hsd_token = 4 * d * d + (2 * d * inner if inner else d * d)
    layers = hsd.num_layers if hsd.recursions == 1 else 2 + (hsd.num_layers - 2) * (1 + (hsd.recursions - 1) / 2)
    position = (1 + 1 + 3 + 1) * d * d + 2 * d * int(ptd.ffn_multiple * d)
    own, shared = config.num_levels - 1, ptd.num_thinking + 1  # positions of a target and of its opening
    positions = work.openings * shared + work.targets * own
    hte_target = config.num_levels * (2 * d * d + d) + d * d + d
    flops = {
        "hsd.dense": 2.0 * work.tokens * hsd_token * layers,
        "hsd.attention": 4.0 * work.token_pairs * d * layers,
        "ptd.dense": 2.0 * (positions * position + work.tokens * 2 * d * d) * ptd.num_layers,
        "ptd.attention": 4.0 * (work.opening_intents * shared + work.target_intents * own) * d * ptd.num_layers,
        "ptd.codes": 2.0 * work.targets * config.num_levels * d * config.codebook_size,
        "hte": 2.0 * work.targets * hte_target,
    }
    if config.items.has_head:
        flops["items"] = 2.0 * work.item_scores * d
    if width := config.pointer.width:
        flops["pointer"] = 2.0 * width * ((work.tokens + work.past_events) * d + work.copy_pairs)
    if ptd.refining:
        # time embedding, q k v of two tokens, scores, two projections, FFN
        denoiser = (2 * d + d * d) + 6 * d * d + 4 * d + 2 * d * d + 2 * d * max(d, int(ptd.ffn_multiple * d))
        flops["ptd.refining"] = 2.0 * ((work.openings * ptd.refining_steps + work.targets) * denoiser + work.openings * d * d)
    return flops


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
