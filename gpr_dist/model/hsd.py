"""HSD, the Heterogeneous Sequence-wise Decoder: understands the journey and leaves one intent vector per token (GPR §3.1).

A layer, Eq. 1 and Fig. 2b:  [Q,K,V,U] = SiLU(W·LN_type(x));  A = Softmax(QKᵀ/√d + M)·V ⊙ U;  x' = x + LN_type(FFN_type(A)).
Mixture-of-Recursions takes the place of the plain loop over `self.layers`.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gpr_dist.config import Config
from gpr_dist.model.typed import TypedFFN, TypedNorm, TypeGroups
from gpr_dist.ops.attention import hybrid_mask, jagged_attention
from gpr_dist.ops.rotary import rotary_angles, rotate
from gpr_dist.schema import Batch, TokenType

# B rows  T packed tokens  D width  H heads  K head width


class HSDConfig(Config):
    """The journey encoder."""

    num_layers: int = 2
    """layers"""
    num_heads: int = 4
    """attention heads; must divide the model width"""
    ffn_multiple: float = 2.0
    """inner width of the token-aware FFN over the model width (2 to 4)"""
    dropout: float = 0.0
    """dropout of each layer's output, 0..1"""
    attention: str = "sdpa"
    """sdpa | reference"""
    activation_checkpointing: bool = False
    """recompute each layer in the backward pass instead of keeping its activations"""


@dataclass
class RowContext:
    """What every layer needs to know about the packed rows of a batch; computed once."""

    offsets: list[int]  # [B+1]
    masks: Sequence[Tensor]  # B of bool [t, t]
    cos_T1k: Tensor
    sin_T1k: Tensor
    groups: TypeGroups

    @classmethod
    def build(cls, batch: Batch, head_width: int, dtype: torch.dtype) -> "RowContext":
        offsets = batch.offsets_B1.tolist()
        prompt = batch.token_type_T != TokenType.I
        masks = [hybrid_mask(batch.block_T[a:b], prompt[a:b]) for a, b in itertools.pairwise(offsets)]
        lengths = batch.offsets_B1.diff()
        start = torch.repeat_interleave(batch.offsets_B1[:-1], lengths)
        position = torch.arange(batch.num_tokens, device=start.device) - start
        cos, sin = rotary_angles(position, head_width)
        return cls(offsets, masks, cos, sin, TypeGroups.build(batch.token_type_T, dtype))


class HSDLayer(nn.Module):
    """One layer; see the module docstring."""

    def __init__(self, width: int, config: HSDConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.attention = config.attention
        self.norm_in = TypedNorm(width)
        self.qkvu = nn.Linear(width, 4 * width, bias=False)
        self.ffn = TypedFFN(width, int(config.ffn_multiple * width))
        self.norm_out = TypedNorm(width, gain=0.3)  # a layer starts as a correction to the token, not as its replacement
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x_TD: Tensor, rows: RowContext) -> Tensor:
        q, k, v, u = F.silu(self.qkvu(self.norm_in(x_TD, rows.groups))).chunk(4, dim=-1)
        q, k, v = (part.unflatten(-1, (self.num_heads, -1)) for part in (q, k, v))
        q, k = rotate(q, rows.cos_T1k, rows.sin_T1k), rotate(k, rows.cos_T1k, rows.sin_T1k)
        attended = jagged_attention(q, k, v, rows.offsets, rows.offsets, rows.masks, self.attention).flatten(1) * u
        return x_TD + self.dropout(self.norm_out(self.ffn(attended, rows.groups), rows.groups))


class HSD(nn.Module):
    """The stack of layers."""

    def __init__(self, width: int, config: HSDConfig) -> None:
        super().__init__()
        self.head_width = width // config.num_heads
        self.activation_checkpointing = config.activation_checkpointing
        self.layers = nn.ModuleList(HSDLayer(width, config) for _ in range(config.num_layers))
        self.norm = nn.LayerNorm(width)

    def forward(self, x_TD: Tensor, batch: Batch) -> Tensor:
        """Returns: intents [T, D]; the intents of a request are those up to its prediction site."""
        rows = RowContext.build(batch, self.head_width, x_TD.dtype)
        for layer in self.layers:
            if self.activation_checkpointing and self.training:
                x_TD = checkpoint(layer, x_TD, rows, use_reentrant=False)
            else:
                x_TD = layer(x_TD, rows)
        return self.norm(x_TD)
