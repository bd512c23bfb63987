"""A small GPR, the loss of one micro-batch in plain PyTorch, and ways to change a batch, for the tests of the model side."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gpr_dist.model.gpr import GPR, GPRConfig
from gpr_dist.objectives.mtp import mtp_loss, refining_loss, uniform_head_weights, value_loss
from gpr_dist.schema import Batch

# T packed tokens  N targets

P, L, V = 4, 3, 16


def tiny_model(dtype: torch.dtype = torch.float32, hsd: dict | None = None, ptd: dict | None = None, **settings: Any) -> GPR:
    """Same weights at every call with the same shapes; norms and constants are moved off 1 and 0 so that they matter."""
    torch.manual_seed(0)
    config = GPRConfig(**{"width": 16, "codebook_size": V, "num_levels": L, "num_user_features": 2, "num_env_features": 2,
                          "hsd": {"num_layers": 2, **(hsd or {})}, "ptd": {"num_layers": 2, **(ptd or {})}, **settings})
    model = GPR(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.to(dtype)


def loss_share(model: nn.Module, batch: Batch, num_targets: int, value_weight: float = 0.1) -> Tensor:
    """The training objective without an engine; values stay in the model's precision."""
    output, weights = model(batch), uniform_head_weights(P)
    values = value_loss(output.values_NL1, batch.target_value_N, batch.target_head_N, weights, num_targets)
    loss = mtp_loss(output.nll_NL, batch.target_head_N, weights, num_targets) + value_weight * values
    if output.refining_N is not None:
        loss = loss + 0.1 * refining_loss(output.refining_N, batch.target_head_N, weights, num_targets)
    return loss


def loss_and_gradients(model: nn.Module, batches: Sequence[Batch], num_targets: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Sums over micro-batches; every parameter must have a gradient."""
    model.zero_grad(set_to_none=True)
    total = torch.zeros((), dtype=torch.float64)
    for batch in batches:
        share = loss_share(model, batch, num_targets)
        share.backward()
        total += share.detach().double()
    missing = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert not missing, f"no gradient at {missing}"
    return total, {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def assert_same(found: tuple[Tensor, dict[str, Tensor]], expected: tuple[Tensor, dict[str, Tensor]], tolerance: float = 1e-6) -> None:
    """Losses and gradients agree up to `tolerance` of each parameter's largest gradient."""
    torch.testing.assert_close(found[0], expected[0], rtol=tolerance, atol=tolerance)
    for name, gradient in expected[1].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=0, atol=tolerance * float(gradient.abs().max()) + 1e-12,
                                   msg=lambda text, name=name: f"{name}: {text}")


def reorder_targets(batch: Batch, order_N: Tensor) -> Batch:
    """The same targets in another order."""
    targets = [f.name for f in dataclasses.fields(Batch) if f.name.startswith("target_") and getattr(batch, f.name) is not None]
    return dataclasses.replace(batch, **{name: getattr(batch, name)[order_N] for name in targets})


def edit_tokens(batch: Batch, where_T: Tensor, delay_s: int = 0) -> Batch:
    """Other items, codes, actions, scenes, values and features at the chosen tokens, types unchanged; they come `delay_s` later."""
    is_item = where_T & (batch.item_T >= 0)
    new_value = torch.where(batch.value_T.isnan(), 7.0, batch.value_T * 3 + 5)
    at_user, at_env = where_T[batch.token_type_T == 0], where_T[batch.token_type_T == 2]
    return dataclasses.replace(
        batch, item_T=torch.where(is_item, batch.item_T + 1, batch.item_T),
        codes_TL=torch.where(is_item[:, None], (batch.codes_TL + 5) % V, batch.codes_TL),
        action_T=torch.where(is_item, batch.action_T % 4 + 1, batch.action_T),
        scene_T=torch.where(is_item, batch.scene_T + 1, batch.scene_T), value_T=torch.where(is_item, new_value, batch.value_T),
        timestamp_T=batch.timestamp_T + delay_s * where_T,
        user_features_UF=batch.user_features_UF + 17 * at_user[:, None], env_features_EF=batch.env_features_EF + 17 * at_env[:, None])


def row_of_token(batch: Batch) -> Tensor:
    """Row of each packed token, [T]."""
    return torch.repeat_interleave(torch.arange(batch.num_rows), batch.offsets_B1.diff())


def row_of_target(batch: Batch) -> Tensor:
    """Row of each target, [N]."""
    return batch.request_row_R[batch.target_request_N]
