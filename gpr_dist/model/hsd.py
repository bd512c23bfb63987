"""HSD, the Heterogeneous Sequence-wise Decoder: understands the journey and leaves one intent vector per token (GPR §3.1).

A layer, Eq. 1 and Fig. 2b:  [Q,K,V,U] = SiLU(W·LN_type(x));  A = Attention(Q,K,V) ⊙ U;  x' = x + LN_type(FFN_type(A)).
With `recursions` the layers between the first and the last are one group that a token passes as often as its router says
(Mixture-of-Recursions, 2507.10524: middle-cycle sharing, token-choice routing). Every part can be switched off, down to plain HSTU.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gpr_dist.config import Config
from gpr_dist.model.typed import TypedFFN, TypedNorm, TypeGroups
from gpr_dist.ops.attention import Implementation, RelativeBias, Score, Spans, check_implementation, hybrid_attention, hybrid_spans
from gpr_dist.ops.noise import dropout
from gpr_dist.ops.rotary import rotary_angles, rotate
from gpr_dist.schema import Batch, TokenType

# B rows  T packed tokens  t those of them that go on  D width  H heads  K head width  R most recursions  P, G bias buckets


class HSDConfig(Config):
    """The journey encoder."""

    num_layers: int = Field(2, ge=1)
    """layers with parameters of their own"""
    num_heads: int = Field(4, ge=1)
    """attention heads; must divide the model width"""
    ffn_multiple: float = Field(2.0, ge=0)
    """inner width of the FFN over the model width (2 to 4); 0 = a single linear map, as in HSTU"""
    dropout: float = Field(0.0, ge=0, lt=1)
    """dropout of each layer's output, 0..1; a token that passes a layer again has the same mask"""
    score: Score = "softmax"
    """softmax (Eq. 1) | silu (HSTU's pointwise SiLU/N)"""
    silu_length: int = Field(256, ge=1)
    """HSTU's N: what the sum of SiLU scores is divided by"""
    mask: Literal["hybrid", "causal"] = "hybrid"
    """hybrid: the tokens of a request's prompt see one another (Eq. 2) | causal"""
    position: Literal["rotary", "relative", "none"] = "rotary"
    """rotary | relative: HSTU's bias by position and logarithm of time | none"""
    position_buckets: int = Field(256, ge=32)
    """distances in positions with a relative bias of their own"""
    time_buckets: int = Field(64, ge=1)
    """distances in time with a relative bias of their own, each half a power of two of seconds"""
    bias_per_head: bool = True
    """each head has a relative bias of its own | one for all heads of a layer, as in HSTU's code: less to look up and to add up"""
    token_aware_norm: bool = True
    """norms have parameters per token type"""
    token_aware_ffn: bool = True
    """FFNs have parameters per token type"""
    recursions: int = Field(1, ge=1)
    """how often a token may pass the middle layers (N_r); 1 = no recursion"""
    router_balance: float = Field(0.1, ge=0)
    """weight of the loss that keeps the recursion depths equally frequent"""
    router_z: float = Field(1e-5, ge=0)
    """weight of the loss that keeps the router's logits small"""
    attention: Implementation = "auto"
    """auto | torch | flex | triton | reference"""
    activation_checkpointing: bool = False
    """recompute each layer in the backward pass instead of keeping its activations"""

    @model_validator(mode="after")
    def _check(self) -> "HSDConfig":
        if self.recursions > 1 and self.num_layers < 3:
            raise ValueError(f"recursions={self.recursions} repeats the layers between the first and the last, but num_layers="
                             f"{self.num_layers} has none; set it to 3 or more")
        check_implementation(self.attention, self.score, "attention=flex with score=silu")
        return self


@dataclass
class RowContext:
    """What every layer needs to know about the packed rows of a batch; computed once."""

    spans: Spans
    groups: TypeGroups
    position_T: Tensor  # in the row
    seconds_T: Tensor
    cos_T1k: Tensor
    sin_T1k: Tensor
    bias_buckets: dict
    noise_T: Tensor | None

    @classmethod
    def build(cls, batch: Batch, head_width: int, dtype: torch.dtype, causal: bool) -> "RowContext":
        offsets = batch.offsets_B1.tolist()
        spans = hybrid_spans(batch.block_T, batch.token_type_T != TokenType.I, offsets, causal)
        start_T = torch.repeat_interleave(batch.offsets_B1[:-1], batch.offsets_B1.diff())
        position_T = torch.arange(batch.num_tokens, device=start_T.device) - start_T
        cos, sin = rotary_angles(position_T, head_width)
        return cls(spans, TypeGroups.build(batch.token_type_T, dtype), position_T, batch.timestamp_T, cos, sin, {},
                   batch.noise_T)

    def select(self, index_t: Tensor) -> "RowContext":
        """Only these tokens (increasing): they see one another as before, and nothing of the tokens left out."""
        return RowContext(self.spans.select(index_t), self.groups.select(index_t), self.position_T[index_t], self.seconds_T[index_t],
                          self.cos_T1k[index_t], self.sin_T1k[index_t], {}, None if self.noise_T is None else self.noise_T[index_t])


class HSDLayer(nn.Module):
    """One layer; see the module docstring."""

    def __init__(self, width: int, config: HSDConfig, number: int = 0) -> None:
        super().__init__()
        self.config, self.number = config, number
        self.norm_in = TypedNorm(width, token_aware=config.token_aware_norm)
        self.qkvu = nn.Linear(width, 4 * width, bias=False)
        self.ffn = TypedFFN(width, int(config.ffn_multiple * width), config.token_aware_ffn)
        # a layer starts as a correction to the token, not as its replacement
        self.norm_out = TypedNorm(width, gain=0.3, token_aware=config.token_aware_norm)
        if config.position == "relative":
            heads = config.num_heads if config.bias_per_head else 1
            self.bias_position_PH = nn.Parameter(torch.zeros(config.position_buckets, heads))
            self.bias_time_GH = nn.Parameter(torch.zeros(config.time_buckets, heads))

    def forward(self, x_TD: Tensor, rows: RowContext) -> Tensor:
        width, heads = x_TD.shape[1], self.config.num_heads
        qk, v, u = F.silu(self.qkvu(self.norm_in(x_TD, rows.groups))).split((2 * width, width, width), dim=-1)
        qk, v, bias = qk.unflatten(-1, (2 * heads, -1)), v.unflatten(-1, (heads, -1)), None
        if self.config.position == "rotary":
            qk = rotate(qk, rows.cos_T1k, rows.sin_T1k)
        elif self.config.position == "relative":
            bias = RelativeBias(self.bias_position_PH, self.bias_time_GH, rows.position_T, rows.seconds_T, rows.bias_buckets)
        q, k = qk.chunk(2, dim=1)
        attended = hybrid_attention(q, k, v, rows.spans, self.config.score, bias, self.config.silu_length, self.config.attention)
        out_TD = self.norm_out(self.ffn(attended.flatten(1) * u, rows.groups), rows.groups)
        return x_TD + dropout(out_TD, self.config.dropout, self.training, rows.noise_T, salt=self.number)


class Router(nn.Module):
    """How often each token passes the middle layers: the depth of highest probability, from the token alone, so that nothing leaks."""

    def __init__(self, width: int, config: HSDConfig) -> None:
        super().__init__()
        self.config = config
        self.logits = nn.Linear(width, config.recursions)

    def forward(self, x_TD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns: depth int64 [T] from 1, its probability [T], and the balance and z losses as one number, a mean over tokens."""
        logits_TR = self.logits(x_TD).float()
        p_TR = logits_TR.softmax(-1)
        gate_T, choice_T = p_TR.max(-1)
        num_tokens = max(1, len(x_TD))
        share_R = torch.bincount(choice_T, minlength=self.config.recursions) / num_tokens
        balance = self.config.recursions * (share_R * p_TR.sum(0) / num_tokens).sum()
        z = logits_TR.logsumexp(-1).square().sum() / num_tokens
        return choice_T + 1, gate_T.to(x_TD.dtype), self.config.router_balance * balance + self.config.router_z * z


class HSD(nn.Module):
    """The stack of layers."""

    def __init__(self, width: int, config: HSDConfig) -> None:
        super().__init__()
        self.config = config
        self.head_width = width // config.num_heads
        self.layers = nn.ModuleList(HSDLayer(width, config, number) for number in range(config.num_layers))
        self.router = Router(width, config) if config.recursions > 1 else None
        self.norm = nn.LayerNorm(width)

    def forward(self, x_TD: Tensor, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """Returns: intents [T, D], of which a request's are those up to its prediction site; the router's loss, if there is a router."""
        rows = RowContext.build(batch, self.head_width, x_TD.dtype, self.config.mask == "causal")
        if self.router is None:
            return self.norm(self._run(self.layers, x_TD, rows)), None
        x_TD = self._run(self.layers[:1], x_TD, rows)
        depth_T, gate_T, loss = self.router(x_TD)
        passed_TD = self._run(self.layers[1:-1], x_TD, rows)
        for depth in range(2, self.config.recursions + 1):  # as often on every rank, also without a token left
            index_t = (depth_T >= depth).nonzero().squeeze(1)
            again_tD = self._run(self.layers[1:-1], passed_TD.index_select(0, index_t), rows.select(index_t))
            passed_TD = passed_TD.index_copy(0, index_t, again_tD)
        x_TD = x_TD + gate_T[:, None] * (passed_TD - x_TD)
        return self.norm(self._run(self.layers[-1:], x_TD, rows)), loss

    def _run(self, layers: nn.ModuleList, x_TD: Tensor, rows: RowContext) -> Tensor:
        for layer in layers:
            if self.config.activation_checkpointing and self.training:
                x_TD = checkpoint(layer, x_TD, rows, use_reentrant=False)
            else:
                x_TD = layer(x_TD, rows)
        return x_TD
