"""Layers with separate parameters per token type (GPR Fig. 2b, "token-aware" norm and FFN), or one set for all types.

Each holds ONE stacked parameter used whatever types a batch contains: under ZeRO-3 a parameter that some ranks skip hangs the job,
and one that all ranks skip is updated again with a stale gradient. Each token passes through the weights of its own type only.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gpr_dist.schema import TokenType

# T packed tokens  C token types (1 without token-awareness)  D width  F inner width

NUM_TYPES = len(TokenType)


@dataclass
class TypeGroups:
    """Tokens grouped by type, computed once per batch and shared by all layers."""

    token_type_T: Tensor
    order_T: Tensor  # int64, token at each place of the grouped order
    inverse_T: Tensor  # int64, place of each token in the grouped order
    counts: list[int]  # tokens per type
    one_hot_TC: Tensor  # float, in token order

    @classmethod
    def build(cls, token_type_T: Tensor, dtype: torch.dtype) -> "TypeGroups":
        order = torch.argsort(token_type_T, stable=True)
        inverse = torch.empty_like(order)
        inverse[order] = torch.arange(order.numel(), device=order.device)
        counts = torch.bincount(token_type_T, minlength=NUM_TYPES).tolist()
        return cls(token_type_T, order, inverse, counts, F.one_hot(token_type_T, NUM_TYPES).to(dtype))

    def split(self, x_TD: Tensor) -> list[Tensor]:
        """The tokens of each type."""
        return list(_Permuted.apply(x_TD, self.order_T, self.inverse_T).split(self.counts))

    def join(self, parts: list[Tensor]) -> Tensor:
        """What `split` gave, in token order again [T, D]."""
        return _Permuted.apply(torch.cat(parts), self.inverse_T, self.order_T)

    def select(self, index_t: Tensor) -> "TypeGroups":
        """Of some of the tokens."""
        return TypeGroups.build(self.token_type_T[index_t], self.one_hot_TC.dtype)


class _Permuted(torch.autograd.Function):
    """x[order], where `inverse` undoes `order`: the gradient is a gather too, and not an addition row by row."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, order_T: Tensor, inverse_T: Tensor) -> Tensor:
        ctx.save_for_backward(inverse_T)
        return x_TD.index_select(0, order_T)

    @staticmethod
    def backward(ctx: Any, gradient_TD: Tensor) -> tuple[Tensor, None, None]:
        return gradient_TD.index_select(0, *ctx.saved_tensors), None, None


class TypedNorm(nn.Module):
    """LayerNorm whose gain and bias belong to the token's type, or to all."""

    def __init__(self, width: int, gain: float = 1.0, token_aware: bool = True) -> None:
        super().__init__()
        num_types = NUM_TYPES if token_aware else 1
        self.weight_CD = nn.Parameter(torch.full((num_types, width), gain))
        self.bias_CD = nn.Parameter(torch.zeros(num_types, width))

    def forward(self, x_TD: Tensor | list[Tensor], groups: TypeGroups) -> Tensor:
        """Args: x_TD: in token order, or the tokens of each type. Returns: [T, D] in token order."""
        if isinstance(x_TD, list):
            weights, biases = (x.expand(NUM_TYPES, -1) for x in (self.weight_CD, self.bias_CD))
            return groups.join([F.layer_norm(x_tD, x_tD.shape[-1:], weight_D, bias_D)
                                for x_tD, weight_D, bias_D in zip(x_TD, weights, biases, strict=True)])
        if len(self.weight_CD) == 1:
            return F.layer_norm(x_TD, x_TD.shape[-1:], self.weight_CD[0], self.bias_CD[0])
        # One-hot products instead of indexing: the backward of an index is a slow scatter-add into four rows.
        normed = F.layer_norm(x_TD, x_TD.shape[-1:])
        return torch.addcmul(groups.one_hot_TC @ self.bias_CD, normed, groups.one_hot_TC @ self.weight_CD)


class TypedFFN(nn.Module):
    """Two-layer FFN whose weights belong to the token's type, or to all; tokens are grouped so that each is computed once.

    `inner` 0 = a single linear map, HSTU's.
    """

    def __init__(self, width: int, inner: int, token_aware: bool = True) -> None:
        super().__init__()
        num_types = NUM_TYPES if token_aware else 1
        if inner:
            self.up_CDF = nn.Parameter(torch.randn(num_types, width, inner) * width**-0.5)
        self.down_CFD = nn.Parameter(torch.randn(num_types, inner or width, width) * (inner or width) ** -0.5)

    def forward(self, x_TD: Tensor, groups: TypeGroups) -> Tensor | list[Tensor]:
        """Args: x_TD: in token order. Returns: [T, D], or where weights differ by type the outputs of each type: a norm can join them."""
        up = getattr(self, "up_CDF", None)
        if len(self.down_CFD) == 1:
            return self._feed(x_TD, None if up is None else up[0], self.down_CFD[0])
        ups = [None] * NUM_TYPES if up is None else up
        return [self._feed(x_tD, up_DF, down_FD) for x_tD, up_DF, down_FD in zip(groups.split(x_TD), ups, self.down_CFD, strict=True)]

    @staticmethod
    def _feed(x_tD: Tensor, up_DF: Tensor | None, down_FD: Tensor) -> Tensor:
        return (x_tD if up_DF is None else F.silu(x_tD @ up_DF)) @ down_FD
