"""Layers with separate parameters per token type (GPR Fig. 2b, "token-aware" norm and FFN).

Each holds ONE stacked parameter used whatever types a batch contains: under ZeRO-3 a parameter that some ranks skip hangs the job,
and one that all ranks skip is updated again with a stale gradient. Each token passes through the weights of its own type only.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gpr_dist.schema import TokenType

# T packed tokens  C token types  D width  F inner width

NUM_TYPES = len(TokenType)


@dataclass
class TypeGroups:
    """Tokens grouped by type, computed once per batch and shared by all layers."""

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
        return cls(order, inverse, counts, F.one_hot(token_type_T, NUM_TYPES).to(dtype))


class TypedNorm(nn.Module):
    """LayerNorm whose gain and bias belong to the token's type."""

    def __init__(self, width: int, gain: float = 1.0) -> None:
        super().__init__()
        self.weight_CD = nn.Parameter(torch.full((NUM_TYPES, width), gain))
        self.bias_CD = nn.Parameter(torch.zeros(NUM_TYPES, width))

    def forward(self, x_TD: Tensor, groups: TypeGroups) -> Tensor:
        # One-hot products instead of indexing: the backward of an index is a slow scatter-add into four rows.
        normed = F.layer_norm(x_TD, x_TD.shape[-1:])
        return normed * (groups.one_hot_TC @ self.weight_CD) + groups.one_hot_TC @ self.bias_CD


class TypedFFN(nn.Module):
    """Two-layer FFN whose weights belong to the token's type; tokens are grouped so that each is computed once."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.up_CDF = nn.Parameter(torch.randn(NUM_TYPES, width, inner) * width**-0.5)
        self.down_CFD = nn.Parameter(torch.randn(NUM_TYPES, inner, width) * inner**-0.5)

    def forward(self, x_TD: Tensor, groups: TypeGroups) -> Tensor:
        parts = x_TD[groups.order_T].split(groups.counts)
        outputs = [F.silu(part @ up) @ down for part, up, down in zip(parts, self.up_CDF, self.down_CFD, strict=True)]
        return torch.cat(outputs)[groups.inverse_T]
