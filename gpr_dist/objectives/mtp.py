"""Multi-token prediction (GPR Eq. 3, and Eq. 4 with weights), and the value regression that trains the HTE beside it. Pure functions."""

import torch
import torch.nn.functional as F
from torch import Tensor

# N targets (request, head, ad)  P MTP heads  L levels  V codes per level


def mtp_loss(nll_NL: Tensor, head_N: Tensor, head_weight_P: Tensor, num_targets: float, weight_N: Tensor | None = None) -> Tensor:
    """Multi-token prediction loss (GPR, arXiv 2511.10138, Eq. 3); with weights per target the value-aware one (Eq. 4).

        loss = sum_n sum_l head_weight[head_n] * weight_n * nll_nl / num_targets

    Args:
        nll_NL: -log p of every true code (`ops.cross_entropy.code_nll`); nats.
        head_N: 0-based MTP head of each target.
        head_weight_P: simplex over heads, sums to 1.
        num_targets: head-0 targets of the whole step, over all ranks and micro-batches, so that the result does not depend on the
            split; times the share that is drawn when targets are sampled.
        weight_N: w^V of each target (objectives/vaft.py); none = 1, which gives the same bits as a tensor of ones.
    Returns: this micro-batch's share of the step loss, nats per ad; 0 without targets. The shares of a step sum to its loss.
    Raises: ValueError if num_targets is not positive.
    Differs from the paper: divided by num_targets (the paper sums); PAPER.md.
    """
    if num_targets <= 0:
        raise ValueError(f"num_targets must be positive, got {num_targets}; a step without targets should not reach the loss")
    weight_of_N = head_weight_P[head_N] if weight_N is None else head_weight_P[head_N] * weight_N
    return (weight_of_N * nll_NL.sum(1)).sum() / num_targets


def value_loss(values_NL1: Tensor, value_N: Tensor, head_N: Tensor, head_weight_P: Tensor, num_targets: float) -> Tensor:
    """Regression of every V_0 … V_L on the logged value (gpr_spec §3.3): Huber on log1p, mean over levels.

    Args: value_N: logged value, NaN where it was not logged (such targets count 0). Others as in `mtp_loss`.
    """
    known = value_N.isfinite()
    wanted = value_N.nan_to_num(0.0).clamp_min(0).log1p()[:, None].expand_as(values_NL1)
    error = F.smooth_l1_loss(values_NL1, wanted, reduction="none").mean(1)
    return (head_weight_P[head_N] * error * known).sum() / num_targets


def refining_loss(refining_N: Tensor, head_N: Tensor, head_weight_P: Tensor, num_targets: float) -> Tensor:
    """Diffusion loss of the refining token (gpr_spec §3.2), weighted as the targets are. Arguments as in `mtp_loss`."""
    return (head_weight_P[head_N] * refining_N).sum() / num_targets


def item_loss(item_nll: Tensor, num_targets: float) -> Tensor:
    """Softmax over items at the prediction sites, nats per ad (`ops.cross_entropy.item_nll` is this micro-batch's weighted sum)."""
    return item_nll / num_targets


def uniform_head_weights(num_heads: int, device: torch.device | str = "cpu") -> Tensor:
    """w_j = 1/P (the paper is silent on the weights)."""
    return torch.full((num_heads,), 1.0 / num_heads, device=device)
