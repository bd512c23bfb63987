"""GPR: assembles input embedding → HSD → PTD → HTE and nothing more (GPR, arXiv 2511.10138, Fig. 2).

Every use of the network goes through `GPR.forward`, also encoding and decoding at evaluation: DeepSpeed's ZeRO-3 hooks start at the
root module's call.
"""

from dataclasses import dataclass
from typing import Any

import torch
from pydantic import model_validator
from torch import Tensor, nn

from gpr_dist.config import Config
from gpr_dist.hashing import row_keys
from gpr_dist.model.embedding import CodeEmbedding, EmbeddingConfig, TokenEmbedding
from gpr_dist.model.hsd import HSD, HSDConfig
from gpr_dist.model.hte import HTE, Critic
from gpr_dist.model.items import Items, ItemsConfig
from gpr_dist.model.knowledge import Knowledge, KnowledgeConfig
from gpr_dist.model.pointer import Copying, Pointer, PointerConfig
from gpr_dist.model.ptd import PTD, Intents, Opening, PTDConfig
from gpr_dist.ops.noise import dropout
from gpr_dist.schema import Batch, Candidates

# T packed tokens  D width  R requests  Q openings (request, head)  N targets  L levels  V codes per level


class GPRConfig(Config):
    """The whole model. The last five fields are filled in from the data and the tokenizer."""

    width: int = 128
    """model width D"""
    num_mtp_heads: int = 4
    """MTP heads P; head j predicts the j-th next ad"""
    embedding: EmbeddingConfig = EmbeddingConfig()
    """input embeddings"""
    items: ItemsConfig = ItemsConfig()
    """identity of items: an embedding beside the codes', and the item head"""
    hsd: HSDConfig = HSDConfig()
    """journey encoder"""
    ptd: PTDConfig = PTDConfig()
    """code decoder"""
    knowledge: KnowledgeConfig = KnowledgeConfig()
    """external knowledge, read by the code decoder"""
    pointer: PointerConfig = PointerConfig()
    """copying from the user's own past, beside generating"""
    critic: bool = False
    """whether the model has the critic of HEPO; launch/hepo.py switches it on"""
    num_levels: int = 3
    """levels L of a semantic ID (from the tokenizer)"""
    codebook_size: int = 256
    """codes V per level (from the tokenizer)"""
    num_user_features: int = 0
    """categorical fields of a U token (from the shards)"""
    num_env_features: int = 0
    """categorical fields of an E token (from the shards)"""

    @property
    def drops(self) -> bool:
        """Whether any part has dropout, so that batches need keys for it."""
        return self.embedding.dropout + self.items.dropout + self.items.head_dropout + self.hsd.dropout + self.ptd.head_dropout > 0

    @model_validator(mode="after")
    def _check(self) -> "GPRConfig":
        problems = []
        for part, heads in (("hsd", self.hsd.num_heads), ("ptd", self.ptd.num_heads)):
            if self.width % heads or self.width // heads % 2:
                problems.append(f"{part}.num_heads={heads} must divide width={self.width} into even head widths")
        if problems:
            raise ValueError("; ".join(problems))
        return self


@dataclass
class GPROutput:
    """What the objectives need, for each target of the batch."""

    nll_NL: Tensor  # -log p of every true code, nats
    values_NL1: Tensor  # [N, L+1], log1p units
    refining_N: Tensor | None  # diffusion loss; none without refining
    item_nll: Tensor | None  # sum of -log p(item) over the targets of head 0; none without an item head
    router: Tensor | None  # the router's weighted losses, a mean over the batch's tokens; none without recursion


@dataclass
class PolicyOutput:
    """What HEPO needs for each candidate, given as a target of the batch."""

    nll_NL: Tensor  # -log pi of every code, nats
    value_NL: Tensor | None  # V before each code, units of the scaled reward; none without the critic


class GPR(nn.Module):
    """The one model."""

    def __init__(self, config: GPRConfig) -> None:
        super().__init__()
        self.config = config
        self.codes = CodeEmbedding(config.num_levels, config.codebook_size, config.width)
        self.items = Items(config.width, config.items) if config.items.buckets else None
        self.tokens = TokenEmbedding(config.embedding, config.width, config.num_user_features, config.num_env_features)
        self.hsd = HSD(config.width, config.hsd)
        knowledge = Knowledge(config.width, config.knowledge) if config.knowledge.num_vectors else None
        self.ptd = PTD(config.width, config.num_mtp_heads, config.num_levels, config.ptd, knowledge)
        self.hte = HTE(config.width, config.num_levels)
        self.pointer = Pointer(config.width, config.num_mtp_heads, config.pointer) if config.pointer.width else None
        self.critic = Critic(config.width, config.num_levels) if config.critic else None

    def forward(self, batch: Batch, task: str = "train", **arguments: Any) -> Any:
        """train → GPROutput of the batch's targets; policy → PolicyOutput of them; logits → theirs [N, L, V]; encode →
        Opening; decode → log p of the next code; values → V of paths one code longer; rank_items → the item head's best items of every
        request; item_outputs → what they are scored with."""
        tasks = {"train": self._train, "policy": self._policy, "logits": self._logits, "encode": self._encode, "decode": self._decode,
                 "values": self._values, "rank_items": self._rank_items, "item_outputs": self._item_outputs}
        return tasks[task](batch, **arguments)

    def _copy(self, intents: Intents, batch: Batch) -> Copying | None:
        if self.pointer is None:
            return None
        assert batch.copy_request_M is not None, "a model with a pointer reads batches of a loader that was given PastItems"
        past_XD = None if batch.past_item_X is None else self.codes(batch.past_codes_XL).sum(1)
        return Copying(*self.pointer(intents.hidden_TD, past_XD, batch))

    def _read(self, batch: Batch) -> tuple[Intents, Tensor | None]:
        hidden_TD, router = self.hsd(self.tokens(batch, self.codes, self.items if self.config.items.has_input else None), batch)
        return self.ptd(hidden_TD, task="read", batch=batch), router

    def _targets(self, batch: Batch) -> tuple[Opening, Tensor, Tensor, Tensor | None]:
        """Opening, code embeddings [N, L, D] and states [N, L, D] of the batch's targets, and the router's loss."""
        intents, router = self._read(batch)
        heads = self.config.num_mtp_heads
        pair_Q = torch.unique(batch.target_request_N * heads + batch.target_head_N)
        opening = self.ptd(intents, task="open", request_Q=pair_Q // heads, head_Q=pair_Q % heads)
        code_NLD = self.codes(batch.target_codes_NL)
        state_NLD = self.ptd(opening, task="generate", request_N=batch.target_request_N, head_N=batch.target_head_N,
                             prefix_NlD=code_NLD[:, :-1])
        return opening, code_NLD, state_NLD, router

    def _train(self, batch: Batch) -> GPROutput:
        opening, code_NLD, state_NLD, router = self._targets(batch)
        noise_NL = None if batch.noise_T is None else _target_keys(batch, state_NLD.shape[1])
        read_NLD = dropout(state_NLD, self.config.ptd.head_dropout, self.training, noise_NL, salt=103)
        nll_NL = self.codes(read_NLD, task="nll", codes_NL=batch.target_codes_NL, offset_NLV=batch.target_offset_NLV)
        if copying := self._copy(opening.intents, batch):
            nll_NL = copying.mixed_nll(nll_NL, batch)
        refining_N = None
        if self.config.ptd.refining:
            refining_N = self.ptd(opening, task="refine", request_N=batch.target_request_N, head_N=batch.target_head_N,
                                  ad_ND=code_NLD.sum(1))
        item_nll = None
        if self.config.items.has_head:
            site_RD = opening.intents.hidden_TD.index_select(0, batch.request_token_R)
            item_nll = self.items(site_RD, task="nll", batch=batch, code_CD=self._candidate_codes(batch.candidates))
        return GPROutput(nll_NL, self.hte(state_NLD, code_NLD), refining_N, item_nll, router)

    def _policy(self, batch: Batch) -> PolicyOutput:
        """As in training, without dropout of states, and without the parts that a policy does not have."""
        opening, code_NLD, state_NLD, _ = self._targets(batch)
        nll_NL = self.codes(state_NLD, task="nll", codes_NL=batch.target_codes_NL, offset_NLV=batch.target_offset_NLV)
        if copying := self._copy(opening.intents, batch):
            nll_NL = copying.mixed_nll(nll_NL, batch)
        return PolicyOutput(nll_NL, None if self.critic is None else self.critic(state_NLD, code_NLD))

    def _candidate_codes(self, candidates: Candidates) -> Tensor | None:
        return self.codes(candidates.codes_CL).sum(1) if self.config.items.head_codes else None

    def _rank_items(self, batch: Batch, candidates: Candidates, opening: Opening | None = None, **arguments: Any) -> tuple[Tensor, Tensor]:
        """`Items._rank` of every request of the batch. Args: opening: the batch as encoded already; None = read it."""
        hidden_TD = (self._read(batch)[0] if opening is None else opening.intents).hidden_TD
        code_CD = None if arguments.get("outputs") is not None else self._candidate_codes(candidates)
        site_RD = hidden_TD.index_select(0, batch.request_token_R)
        return self.items(site_RD, task="rank", candidates=candidates, code_CD=code_CD, **arguments)

    def _item_outputs(self, batch: Batch | None, candidates: Candidates) -> tuple[Tensor, Tensor]:
        """What the item head scores candidates with, (vectors [C, D], biases [C]), for `rank_items` of many batches."""
        return self.items(candidates.item_C, task="outputs", code_CD=self._candidate_codes(candidates))

    def _logits(self, batch: Batch) -> Tensor:
        return self.codes(self._targets(batch)[2], task="logits")

    def _encode(self, batch: Batch, heads: tuple[int, ...] | None = None) -> Opening:
        """Everything that decoding any request of the batch by these MTP heads (none = all) has in common."""
        intents, _ = self._read(batch)
        head_H = torch.tensor(range(self.config.num_mtp_heads) if heads is None else heads, device=intents.hidden_TD.device)
        request_R = torch.arange(len(batch.request_row_R), device=head_H.device)
        opening = self.ptd(intents, task="open", request_Q=request_R.repeat_interleave(len(head_H)), head_Q=head_H.repeat(len(request_R)))
        opening.copying = self._copy(intents, batch)
        return opening

    def _decode(self, batch: Batch, opening: Opening, request_N: Tensor, head_N: Tensor, prefix_Nl: Tensor,
                with_state: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """Log-probabilities [N, V] of the code after each prefix, float32; requests in any order. With what task="values" reads: the
        states that predict them and the sums of the prefixes' embeddings, [N, 2, D]."""
        prefix_NlD = self.codes(prefix_Nl)
        state_ND = self.ptd(opening, task="extend", request_N=request_N, head_N=head_N, prefix_Nl=prefix_Nl, prefix_NlD=prefix_NlD)
        log_probs_NV = self.codes(state_ND[:, None], task="logits", first_level=prefix_Nl.shape[1])[:, 0].float().log_softmax(-1)
        return (log_probs_NV, torch.stack((state_ND, prefix_NlD.sum(1)), 1)) if with_state else log_probs_NV

    def _values(self, batch: Batch, state_M2D: Tensor, code_M: Tensor, level: int) -> Tensor:
        """V_{level+1} [M] of choosing a code of `level` (from 0) in these states, log1p units, float32."""
        code_MD = self.codes(code_M[:, None] + level * self.config.codebook_size)[:, 0]
        return self.hte(state_M2D[:, :1], torch.stack((state_M2D[:, 1], code_MD), 1), level=level)[:, 0]


def _target_keys(batch: Batch, num_levels: int) -> Tensor:
    """A key for dropout of every target's level, int64 [N, L]."""
    site_N = batch.noise_T[batch.request_token_R[batch.target_request_N]]
    key_N = row_keys(site_N, batch.target_item_N * 64 + batch.target_head_N, 0)
    return key_N[:, None] + torch.arange(num_levels, device=key_N.device)
