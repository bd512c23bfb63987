"""Objectives in the form the loop wants: one micro-batch in, this rank's `LossShare` out. The formulas are in gpr_dist/objectives."""

import torch

from gpr_dist.objectives.mtp import item_loss, mtp_loss, refining_loss, uniform_head_weights, value_loss
from gpr_dist.schema import Batch
from gpr_dist.training.engine import Engine
from gpr_dist.training.loop import LossShare, Objective

# N targets  P MTP heads  L levels


def mtp_objective(num_heads: int, value_loss_weight: float, head_weights: tuple[float, ...] | None = None,
                  refining_loss_weight: float = 0.1, item_loss_weight: float = 0.0) -> Objective:
    """Multi-token prediction (GPR Eq. 3, head weights uniform if none), plus the weighted losses of values, refining token, items and
    router. Batches with `target_weight_N` make it the value-aware loss (Eq. 4): codes and items are weighted, the rest is not.

    The router's loss is a mean over the tokens of a micro-batch that counts by its targets: the one part that depends on the split.
    """

    def share(engine: Engine, batch: Batch, num_targets: float) -> LossShare:
        weight_P = uniform_head_weights(num_heads) if head_weights is None else torch.tensor(head_weights)
        weight_P = weight_P.to(engine.device)
        output = engine(batch)
        nll_NL, head_N = output.nll_NL, batch.target_head_N
        value = value_loss(output.values_NL1, batch.target_value_N, head_N, weight_P, num_targets)
        loss = mtp_loss(nll_NL, head_N, weight_P, num_targets, batch.target_weight_N) + value_loss_weight * value
        if output.refining_N is not None:
            loss = loss + refining_loss_weight * refining_loss(output.refining_N, head_N, weight_P, num_targets)
        item = value.new_zeros(())
        if output.item_nll is not None:
            item = item_loss(output.item_nll, num_targets)
            loss = loss + item_loss_weight * item
        if output.router is not None:
            loss = loss + output.router * (batch.num_targets / num_targets)
        nll_PL = torch.zeros(num_heads, nll_NL.shape[1], dtype=torch.float64, device=engine.device)
        nll_PL.index_add_(0, head_N, nll_NL.detach().double())
        count_P = torch.bincount(head_N, minlength=num_heads).double()
        return LossShare(loss, nll_PL, count_P, value.detach(), item.detach(), nll_NL.detach().sum(1))

    return share
