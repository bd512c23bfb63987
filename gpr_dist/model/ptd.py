"""PTD, the Progressive Token-wise Decoder: Thinking → Refining → Generation of the codes of an ad (GPR §3.2, Fig. 2a and 2c).

A sequence belongs to a request and an MTP head: a start (the head's query plus its view of the intent), `num_thinking` latent thinking
tokens, each made from the one before, and one generation start, whose state predicts z_1. All ads of the request share this opening;
only Emb(z_1) … Emb(z_{L-1}) are positions of their own, so that a basket costs little more than one ad. A block is cross-attention to
the intents → causal self-attention → FFN. Keys and values of the intents are projected once per batch and block.
"""

from dataclasses import dataclass

import torch
from pydantic import Field
from torch import Tensor, nn

from gpr_dist.config import Config
from gpr_dist.model.knowledge import Knowledge
from gpr_dist.model.pointer import Copying
from gpr_dist.model.refining import Refiner, clean
from gpr_dist.ops.attention import Implementation, Spans, hybrid_attention, intent_spans
from gpr_dist.schema import Batch

# T packed tokens  B rows  D width  H heads  K head width  R requests  P MTP heads  Q openings (request, head)  N targets
# m knowledge vectors  l new positions  c cached positions  L levels


class PTDConfig(Config):
    """The code decoder."""

    num_layers: int = Field(1, ge=1)
    """blocks"""
    num_heads: int = Field(4, ge=1)
    """attention heads; must divide the model width"""
    ffn_multiple: float = Field(2.0, gt=0)
    """inner width of the FFN over the model width"""
    intent_window: int = Field(0, ge=0)
    """tokens before the prediction site that a request reads; 0 = all"""
    num_thinking: int = Field(0, ge=0)
    """latent thinking tokens, one after another (the paper draws 3)"""
    refining: bool = False
    """whether generation starts from a refining token, a diffusion sample given the thinking tokens"""
    head_dropout: float = Field(0.0, ge=0, lt=1)
    """dropout of the states that predict codes, 0..1"""
    refining_steps: int = Field(2, ge=1)
    """DDIM steps of the refining token (2 to 4)"""
    attention: Implementation = "auto"
    """auto | torch | flex | triton | reference"""


@dataclass
class Cache:
    """Keys and values of positions already decoded, of one block."""

    k_QcHK: Tensor
    v_QcHK: Tensor

    def extended(self, k_QlHK: Tensor, v_QlHK: Tensor) -> "Cache":
        return Cache(torch.cat((self.k_QcHK, k_QlHK), 1), torch.cat((self.v_QcHK, v_QlHK), 1))

    def select(self, index_N: Tensor) -> "Cache":
        return Cache(self.k_QcHK.index_select(0, index_N), self.v_QcHK.index_select(0, index_N))


@dataclass
class Intents:
    """What requests are decoded from; made once per batch."""

    hidden_TD: Tensor
    batch: Batch
    keys_values: list[tuple[Tensor, Tensor]]  # of each block, [T, H, K]
    offsets: list[int]


@dataclass
class Decoded:
    """Prefixes of codes and what their children need of them."""

    place_N: Tensor  # of their openings
    prefix_Nl: Tensor
    caches: list[Cache]  # of each block

    def find(self, place_M: Tensor, prefix_Ml: Tensor) -> Tensor | None:
        """Where each of M prefixes stands among the N; None where one of them is missing."""
        if not len(self.place_N) or prefix_Ml.shape[1] != self.prefix_Nl.shape[1]:
            return None
        key_N, key_M = (_mixed(place, prefix) for place, prefix in ((self.place_N, self.prefix_Nl), (place_M, prefix_Ml)))
        key_N, order_N = key_N.sort()
        index_M = order_N[torch.searchsorted(key_N, key_M).clamp_max(len(key_N) - 1)]
        # Keys may collide; the prefixes themselves decide.
        same = (self.place_N[index_M] == place_M).all() & (self.prefix_Nl[index_M] == prefix_Ml).all()
        return index_M if same else None


def _mixed(place_N: Tensor, prefix_Nl: Tensor) -> Tensor:
    """One number per prefix, int64 that wraps around."""
    key_N = place_N
    for code_N in prefix_Nl.unbind(1):
        key_N = key_N * 1_000_003 + code_N
    return key_N


@dataclass
class Opening:
    """Sequences decoded up to the generation start, [Q] of them in the order of their rows."""

    intents: Intents
    request_Q: Tensor
    head_Q: Tensor
    state_QD: Tensor  # predicts z_1
    caches: list[Cache]  # of each block
    condition_QD: Tensor  # C of the refiner
    place_RP: Tensor  # of the opening of a request and head among the Q; -1 = none
    decoded: Decoded | None = None  # by the last `extend`
    copying: Copying | None = None  # of the batch's requests, from a model with a pointer


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

    def forward(self, x: Tensor, task: str = "decode", keys_values: tuple[Tensor, Tensor] | None = None, spans: Spans | None = None,
                cache: Cache | None = None) -> "tuple[Tensor, Cache] | tuple[Tensor, Tensor]":
        """decode: new positions [Q, l, D] → the same, and the cache with them. keys_values: intents [T, D] → their keys and values.
        cache: vectors [Q, c, D] that every later position reads → their self-attention keys and values.

        One call for all because ZeRO-3 gathers a module's parameters around its forward.
        """
        if task == "keys_values":
            return self._heads(self.key_value(x).chunk(2, dim=-1))
        if task == "cache":
            return self._heads(self.qkv(self.norms[1](x)).chunk(3, dim=-1)[1:])
        x = x + self._cross(self.norms[0](x), keys_values, spans)
        attended, cache = self._causal(self.norms[1](x), cache)
        x = x + attended
        return x + self.ffn(self.norms[2](x)), cache

    def _heads(self, parts: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return tuple(part.unflatten(-1, (self.num_heads, -1)) for part in parts)

    def _cross(self, x_QlD: Tensor, keys_values: tuple[Tensor, Tensor], spans: Spans) -> Tensor:
        (q,) = self._heads((self.query(x_QlD.flatten(0, 1)),))
        out = hybrid_attention(q, *keys_values, spans, implementation=self.attention)
        return self.cross_out(out.flatten(1)).unflatten(0, x_QlD.shape[:2])

    def _causal(self, x_QlD: Tensor, cache: Cache | None) -> tuple[Tensor, Cache]:
        # A handful of positions: the scores are a few numbers per sequence, so plain products beat any attention kernel.
        q, k, v = self._heads(self.qkv(x_QlD).chunk(3, dim=-1))
        cache = Cache(k, v) if cache is None else cache.extended(k, v)
        length = x_QlD.shape[1]
        if length == 1:  # a product per head and sequence is too small to be worth a matrix multiplication
            wide = torch.promote_types(q.dtype, torch.float32)
            scores_QcH1 = (q.to(wide) * cache.k_QcHK).sum(-1, keepdim=True) * q.shape[-1] ** -0.5
            attended_Q1HK = (scores_QcH1.softmax(1) * cache.v_QcHK).sum(1, keepdim=True)
            return self.self_out(attended_Q1HK.to(v.dtype).flatten(2)), cache
        scores = torch.einsum("qlhk,qchk->qhlc", q, cache.k_QcHK).float() * q.shape[-1] ** -0.5
        if length > 1:
            future = torch.ones(length, scores.shape[-1], dtype=torch.bool, device=x_QlD.device).triu(1 + scores.shape[-1] - length)
            scores = scores.masked_fill(future, float("-inf"))
        weights = scores.softmax(-1).to(v.dtype)
        return self.self_out(torch.einsum("qhlc,qchk->qlhk", weights, cache.v_QcHK).flatten(2)), cache


class PTD(nn.Module):
    """The decoder shared by the P heads; a head differs by its query vector and its linear adapter."""

    def __init__(self, width: int, num_heads_mtp: int, num_levels: int, config: PTDConfig, knowledge: Knowledge | None = None) -> None:
        super().__init__()
        self.config = config
        self.query_PD = nn.Parameter(torch.randn(num_heads_mtp, width) * 0.02)
        self.adapter_PDD = nn.Parameter(torch.eye(width).repeat(num_heads_mtp, 1, 1) + torch.randn(num_heads_mtp, width, width) * 0.02)
        self.position_LD = nn.Parameter(torch.randn(config.num_thinking + num_levels, width) * 0.02)
        self.blocks = nn.ModuleList(PTDBlock(width, config) for _ in range(config.num_layers))
        self.refiner = Refiner(width, config.ffn_multiple, config.refining_steps) if config.refining else None
        if config.refining:
            self.refined = nn.Linear(width, width)
        self.knowledge = knowledge
        self.norm = nn.LayerNorm(width)

    def forward(self, intents: "Intents | Opening | Tensor", task: str, **arguments: Tensor) -> "Intents | Opening | Tensor":
        """read: HSD output → Intents. open: (request, head) pairs → Opening. generate: codes so far → states. extend: the last of them,
        level by level. refine: diffusion loss.

        One call for all because ZeRO-3 gathers a module's parameters around its forward.
        """
        return {"read": self._read, "open": self._open, "generate": self._generate, "extend": self._extend,
                "refine": self._refine}[task](intents, **arguments)

    def _read(self, hidden_TD: Tensor, batch: Batch) -> Intents:
        keys_values = [block(hidden_TD, task="keys_values") for block in self.blocks]
        return Intents(hidden_TD, batch, keys_values, batch.offsets_B1.tolist())

    def _open(self, intents: Intents, request_Q: Tensor, head_Q: Tensor) -> Opening:
        """Args: request_Q, head_Q: distinct pairs, in any order."""
        batch, thinking = intents.batch, self.config.num_thinking
        order_Q = batch.request_row_R[request_Q].argsort(stable=True)
        request_Q, head_Q = request_Q[order_Q], head_Q[order_Q]
        place_RP = torch.full((len(batch.request_row_R), len(self.query_PD)), -1, device=request_Q.device)
        place_RP[request_Q, head_Q] = torch.arange(len(request_Q), device=request_Q.device)
        spans = self._spans(intents, request_Q, 1)
        caches: list[Cache | None] = [None] * len(self.blocks)
        if self.knowledge:
            vectors_BmD, row_Q = self.knowledge(batch), batch.request_row_R[request_Q]
            caches = [Cache(*block(vectors_BmD, task="cache")).select(row_Q) for block in self.blocks]

        seen_RPD = torch.einsum("rd,pde->rpe", intents.hidden_TD.index_select(0, batch.request_token_R), self.adapter_PDD) + self.query_PD
        start_QD = x_QD = seen_RPD.flatten(0, 1).index_select(0, request_Q * len(self.query_PD) + head_Q)
        thoughts = []
        for position in range(thinking):
            x_QD, caches = self._step(x_QD + self.position_LD[position], intents, spans, caches)
            thoughts.append(x_QD)
        condition_QD = self.norm(torch.stack(thoughts).sum(0) if thoughts else start_QD)
        if thinking or self.refiner:
            x_QD = x_QD + self.query_PD.index_select(0, head_Q)
        if self.refiner:
            x_QD = x_QD + self.refined(self.refiner(condition_QD, self._noise_key(batch, request_Q, head_Q)))
        x_QD, caches = self._step(x_QD + self.position_LD[thinking], intents, spans, caches)
        return Opening(intents, request_Q, head_Q, self.norm(x_QD), caches, condition_QD, place_RP)

    def _step(self, x_QD: Tensor, intents: Intents, spans: Spans, caches: list[Cache | None]) -> tuple[Tensor, list[Cache]]:
        x_QlD, caches = self._decode(x_QD[:, None], intents, spans, caches)
        return x_QlD[:, 0], caches

    def _decode(self, x_QlD: Tensor, intents: Intents, spans: Spans, caches: list[Cache | None]) -> tuple[Tensor, list[Cache]]:
        grown = []
        for block, keys_values, cache in zip(self.blocks, intents.keys_values, caches, strict=True):
            x_QlD, extended = block(x_QlD, keys_values=keys_values, spans=spans, cache=cache)
            grown.append(extended)
        return x_QlD, grown

    def _generate(self, opening: Opening, request_N: Tensor, head_N: Tensor, prefix_NlD: Tensor) -> Tensor:
        """Decode targets, in any order.

        Args: prefix_NlD: embeddings of the first l codes, l from 0 to L-1.
        Returns: states [N, l+1, D]; position i predicts the code of level i from the codes before it.
        """
        place_N = opening.place_RP[request_N, head_N]
        first_N1D = opening.state_QD.index_select(0, place_N)[:, None]
        length = prefix_NlD.shape[1]
        if length == 0:
            return first_N1D
        order_N = place_N.argsort(stable=True)  # openings are in the order of their rows
        place_N = place_N[order_N]
        spans = self._spans(opening.intents, opening.request_Q[place_N], length)
        caches = [cache.select(place_N) for cache in opening.caches]
        start = self.config.num_thinking + 1
        x_NlD = prefix_NlD.index_select(0, order_N) + self.position_LD[start:start + length]
        x_NlD, _ = self._decode(x_NlD, opening.intents, spans, caches)
        return torch.cat((first_N1D, self.norm(x_NlD).index_select(0, order_N.argsort())), dim=1)

    def _extend(self, opening: Opening, request_N: Tensor, head_N: Tensor, prefix_Nl: Tensor, prefix_NlD: Tensor) -> Tensor:
        """State [N, D] that predicts the code after each prefix, in any order: the last of `_generate`.

        A search asks level by level: where the last call decoded all the prefixes but for their last code, that is the only position new.
        Args: prefix_Nl, prefix_NlD: the codes so far, and their embeddings.
        """
        place_N, length, thinking = opening.place_RP[request_N, head_N], prefix_Nl.shape[1], self.config.num_thinking
        if length == 0:
            return opening.state_QD.index_select(0, place_N)
        order_N = None if (place_N[1:] >= place_N[:-1]).all() else place_N.argsort(stable=True)  # a search asks in order
        if order_N is not None:
            place_N, prefix_Nl, prefix_NlD = place_N[order_N], prefix_Nl[order_N], prefix_NlD.index_select(0, order_N)
        parent_N = opening.decoded.find(place_N, prefix_Nl[:, :-1]) if opening.decoded else None
        if parent_N is None:
            new, caches = length, [cache.select(place_N) for cache in opening.caches]
        else:
            new, caches = 1, [cache.select(parent_N) for cache in opening.decoded.caches]
        end = thinking + 1 + length
        x_NlD = prefix_NlD[:, length - new:] + self.position_LD[end - new:end]
        x_NlD, caches = self._decode(x_NlD, opening.intents, self._spans(opening.intents, opening.request_Q[place_N], new), caches)
        is_last = end == len(self.position_LD)
        opening.decoded = None if is_last else Decoded(place_N, prefix_Nl, caches)
        state_ND = self.norm(x_NlD[:, -1])
        return state_ND if order_N is None else state_ND.index_select(0, order_N.argsort())

    def _refine(self, opening: Opening, request_N: Tensor, head_N: Tensor, ad_ND: Tensor) -> Tensor:
        """Diffusion loss [N] of the targets' summed code embeddings."""
        batch = opening.intents.batch
        key_N = self._noise_key(batch, request_N, head_N) + batch.target_item_N
        return self.refiner(opening.condition_QD.index_select(0, opening.place_RP[request_N, head_N]), key_N, clean(ad_ND))

    def _spans(self, intents: Intents, request_Q: Tensor, length: int) -> Spans:
        """What `length` positions of each sequence read; sequences are in the order of their rows."""
        batch = intents.batch
        row_Q = batch.request_row_R[request_Q]
        counts_B = torch.bincount(row_Q, minlength=len(intents.offsets) - 1)
        query_offsets = [0, *(length * counts_B.cumsum(0)).tolist()]
        site_Q, start_Q = (x.repeat_interleave(length) for x in (batch.request_token_R[request_Q], batch.offsets_B1[row_Q]))
        return intent_spans(site_Q, start_Q, query_offsets, intents.offsets, self.config.intent_window)

    def _noise_key(self, batch: Batch, request_Q: Tensor, head_Q: Tensor) -> Tensor:
        """A number that belongs to the request and head wherever its row is computed."""
        row_Q = batch.request_row_R[request_Q]
        site_Q = batch.request_token_R[request_Q] - batch.offsets_B1[row_Q]
        return ((batch.row_ids_B[row_Q] * 65_537 + site_Q) * 64 + head_Q) * 1_000_003
