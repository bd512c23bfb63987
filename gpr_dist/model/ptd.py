"""PTD, the Progressive Token-wise Decoder: from a request's intents to the codes of an ad, one level after another (GPR §3.2).

Sequence of a target: [query_p + adapter_p·intent, Emb(z_1), …, Emb(z_{L-1})] → states that predict z_1 … z_L. A block is
cross-attention to the intents → causal self-attention over the L positions → FFN. Thinking and refining tokens will stand before
the query's position: `first_input` is their place.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gpr_dist.config import Config
from gpr_dist.ops.attention import intent_mask, jagged_attention
from gpr_dist.schema import Batch

# T packed tokens  D width  H heads  K head width  R requests  N targets  P MTP heads  l positions so far  L levels  V codes


class PTDConfig(Config):
    """The code decoder."""

    num_layers: int = 1
    """blocks"""
    num_heads: int = 4
    """attention heads; must divide the model width"""
    ffn_multiple: float = 2.0
    """inner width of the FFN over the model width"""
    intent_window: int = 0
    """tokens before the prediction site that a request reads; 0 = all"""
    attention: str = "sdpa"
    """sdpa | reference"""


class Intents:
    """Intents of a batch and how requests look at them; made once per batch, read by every block and level."""

    def __init__(self, hidden_TD: Tensor, batch: Batch, window: int) -> None:
        self.hidden_TD = hidden_TD
        self.offsets = batch.offsets_B1.tolist()
        self.row_R = batch.request_row_R
        self.site_R = batch.request_token_R - batch.offsets_B1[batch.request_row_R]  # position inside the row
        self.site_hidden_RD = hidden_TD[batch.request_token_R]
        self.window = window

    def queries(self, request_N: Tensor) -> "Queries":
        """Group targets, given in any order, by the row whose intents they read."""
        num_rows = len(self.offsets) - 1
        row_N = self.row_R[request_N]
        order_N = row_N.argsort(stable=True)  # a batch brings them head by head
        offsets = [0, *torch.bincount(row_N, minlength=num_rows).cumsum(0).tolist()]
        site = self.site_R[request_N[order_N]]
        masks = [intent_mask(site[offsets[b] : offsets[b + 1]], self.offsets[b + 1] - self.offsets[b], self.window)
                 for b in range(num_rows)]
        return Queries(order_N, order_N.argsort(), offsets, masks)


@dataclass
class Queries:
    """Targets grouped by row, as the attention wants them."""

    order_N: Tensor  # target at each place of the grouped order
    inverse_N: Tensor  # place of each target
    offsets: list[int]  # [B+1]
    masks: list[Tensor]  # B of bool [targets of the row, tokens of the row]


class PTDBlock(nn.Module):
    """Cross-attention → causal self-attention → FFN, each pre-norm with a residual."""

    def __init__(self, width: int, config: PTDConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.attention = config.attention
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3))
        self.query = nn.Linear(width, width, bias=False)
        self.key_value = nn.Linear(width, 2 * width, bias=False)
        self.cross_out = nn.Linear(width, width, bias=False)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.self_out = nn.Linear(width, width, bias=False)
        inner = int(config.ffn_multiple * width)
        self.ffn = nn.Sequential(nn.Linear(width, inner), nn.SiLU(), nn.Linear(inner, width))

    def forward(self, x_NlD: Tensor, intents: Intents, queries: Queries) -> Tensor:
        x_NlD = x_NlD + self._cross(self.norms[0](x_NlD), intents, queries)
        x_NlD = x_NlD + self._causal(self.norms[1](x_NlD))
        return x_NlD + self.ffn(self.norms[2](x_NlD))

    def _cross(self, x_NlD: Tensor, intents: Intents, queries: Queries) -> Tensor:
        length = x_NlD.shape[1]
        q = self.query(x_NlD).flatten(0, 1).unflatten(-1, (self.num_heads, -1))
        k, v = (part.unflatten(-1, (self.num_heads, -1)) for part in self.key_value(intents.hidden_TD).chunk(2, dim=-1))
        masks = [mask.repeat_interleave(length, dim=0) for mask in queries.masks]
        out = jagged_attention(q, k, v, [length * offset for offset in queries.offsets], intents.offsets, masks, self.attention)
        return self.cross_out(out.flatten(1)).unflatten(0, (-1, length))

    def _causal(self, x_NlD: Tensor) -> Tensor:
        # At most L positions: the scores are a few numbers per target, so plain products beat any attention kernel.
        q, k, v = (part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for part in self.qkv(x_NlD).chunk(3, dim=-1))
        length = x_NlD.shape[1]
        future = torch.ones(length, length, dtype=torch.bool, device=x_NlD.device).triu(1)
        scores = (q @ k.transpose(-1, -2)).float() / q.shape[-1] ** 0.5
        weights = scores.masked_fill(future, float("-inf")).softmax(-1).to(v.dtype)
        return self.self_out((weights @ v).transpose(1, 2).flatten(2))


class PTD(nn.Module):
    """The decoder shared by the P heads; a head differs by its query vector and its linear adapter."""

    def __init__(self, width: int, num_heads_mtp: int, num_levels: int, config: PTDConfig) -> None:
        super().__init__()
        self.config = config
        self.query_PD = nn.Parameter(torch.randn(num_heads_mtp, width) * 0.02)
        self.adapter_PDD = nn.Parameter(torch.eye(width).repeat(num_heads_mtp, 1, 1) + torch.randn(num_heads_mtp, width, width) * 0.02)
        self.position_LD = nn.Parameter(torch.randn(num_levels, width) * 0.02)
        self.blocks = nn.ModuleList(PTDBlock(width, config) for _ in range(config.num_layers))
        self.norm = nn.LayerNorm(width)

    def first_input(self, intents: Intents, request_N: Tensor, head_N: Tensor) -> Tensor:
        """Input of the first position, [N, D]: the head's query plus its view of the intent at the prediction site."""
        seen_RPD = torch.einsum("rd,pde->rpe", intents.site_hidden_RD, self.adapter_PDD) + self.query_PD
        return seen_RPD.flatten(0, 1).index_select(0, request_N * self.query_PD.shape[0] + head_N)

    def forward(self, intents: Intents, request_N: Tensor, head_N: Tensor, prefix_NlD: Tensor) -> Tensor:
        """Decode targets, in any order.

        Args: prefix_NlD: embeddings of the first l codes, l from 0 to L-1.
        Returns: states [N, l+1, D]; position i predicts the code of level i from the codes before it.
        """
        queries = intents.queries(request_N)
        x_NlD = torch.cat((self.first_input(intents, request_N, head_N)[:, None], prefix_NlD), dim=1).index_select(0, queries.order_N)
        length = x_NlD.shape[1]
        x_NlD = x_NlD + self.position_LD[:length]
        for block in self.blocks:
            x_NlD = block(x_NlD, intents, queries)
        return self.norm(x_NlD).index_select(0, queries.inverse_N)


def log_probs(logits: Tensor) -> Tensor:
    """Log-softmax over the codes, float32 (bf16 keeps two to three digits)."""
    return F.log_softmax(logits.float(), dim=-1)
