"""Tokens to vectors: the unified input schema (GPR Fig. 2a, gpr_spec §1).

U and E tokens: an MLP per type over hashed categorical fields. O and I tokens: the sum of their semantic ID's code embeddings plus
action, scene and logged value. All: token type, calendar and the time since the previous token. Positions are the attention's.
"""

from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from gpr_dist.config import Config
from gpr_dist.model.items import Items
from gpr_dist.ops.cross_entropy import code_logits, code_nll
from gpr_dist.ops.noise import dropout
from gpr_dist.schema import Action, Batch, TokenType

# T packed tokens  D width  L levels  V codes per level  UF / EF tokens x fields of U / E

NUM_GAP_BUCKETS = 32  # log2 of seconds: bucket 31 is 68 years
HOURS, WEEKDAYS = 24, 7
CODE_STD = 0.6


class EmbeddingConfig(Config):
    """Input embeddings."""

    feature_buckets: int = 4096
    """rows of the hashed table shared by all U and E fields"""
    feature_width: int = 16
    """width of one categorical field before the type's MLP"""
    scene_buckets: int = 256
    """rows of the hashed scene table"""
    dropout: float = Field(0.0, ge=0, lt=1)
    """dropout of the sum of a token's embeddings, 0..1"""


class CodeEmbedding(nn.Module):
    """One table for the codes of all levels: input of journey tokens, input of the decoder, and output weights of the decoder.

    Tying the output too lets the model repeat: what attention brings from a past item is already the direction of its codes' logits.
    """

    def __init__(self, num_levels: int, codebook_size: int, width: int) -> None:
        super().__init__()
        self.codebook_size = codebook_size
        self.table = nn.Embedding(num_levels * codebook_size, width)
        self.bias_LV = nn.Parameter(torch.zeros(num_levels, codebook_size))
        # Three codes add up to entries of about 1, the size of what a layer adds; smaller ones drown in it and cannot be repeated.
        nn.init.normal_(self.table.weight, std=CODE_STD)

    def forward(self, x: Tensor, task: str = "embed", **arguments: Any) -> Tensor:
        """embed: codes [N, l] of the first l levels → [N, l, D]. logits: states [N, l, D] → logits [N, l, V] of the l levels from
        `first_level`. nll: states [N, L, D] and codes → `ops.cross_entropy.code_nll`.

        All go through this one call because ZeRO-3 gathers a module's parameters around its forward.
        """
        if task == "embed":
            return self.table(x + torch.arange(x.shape[1], device=x.device) * self.codebook_size)
        weight_LVD = self.table.weight.unflatten(0, (-1, self.codebook_size))
        if task == "nll":
            return code_nll(x, weight_LVD, self.bias_LV, **arguments)
        assert task == "logits", task
        levels = slice(first := arguments.get("first_level", 0), first + x.shape[1])
        return code_logits(x, weight_LVD[levels], self.bias_LV[levels])


class FieldEmbedding(nn.Module):
    """MLP over the concatenated embeddings of one token type's categorical fields; no fields gives a learned constant."""

    def __init__(self, num_fields: int, config: EmbeddingConfig, width: int) -> None:
        super().__init__()
        self.buckets = config.feature_buckets
        self.constant = nn.Parameter(torch.zeros(width))
        self.num_fields = num_fields
        if num_fields:
            self.table = nn.Embedding(config.feature_buckets, config.feature_width)
            nn.init.normal_(self.table.weight, std=config.feature_width**-0.5)
            self.mlp = nn.Sequential(nn.Linear(num_fields * config.feature_width, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, features_UF: Tensor) -> Tensor:
        if not self.num_fields:
            return self.constant.expand(features_UF.shape[0], -1)
        # The field number enters the hash, so that "3" as an age and "3" as a store do not share a row.
        field = torch.arange(self.num_fields, device=features_UF.device) * 2_654_435_761
        embedded = self.table((features_UF + field) % self.buckets)
        return self.mlp(embedded.flatten(1)) + self.constant


class TokenEmbedding(nn.Module):
    """Sum of everything known about a token."""

    def __init__(self, config: EmbeddingConfig, width: int, num_user_features: int, num_env_features: int) -> None:
        super().__init__()
        self.config = config
        self.scene_buckets = config.scene_buckets
        self.user = FieldEmbedding(num_user_features, config, width)
        self.env = FieldEmbedding(num_env_features, config, width)
        tables = {"token_type": len(TokenType), "action": len(Action), "scene": config.scene_buckets, "gap": NUM_GAP_BUCKETS,
                  "hour": HOURS, "weekday": WEEKDAYS}
        self.tables = nn.ModuleDict({name: nn.Embedding(rows, width) for name, rows in tables.items()})
        for table in self.tables.values():
            nn.init.normal_(table.weight, std=0.1)
        self.value = nn.Linear(2, width)

    def forward(self, batch: Batch, codes: CodeEmbedding, items: Items | None = None) -> Tensor:
        """Args: items: adds an embedding of the item itself. Returns: [T, D]."""
        is_item = (batch.item_T >= 0)[:, None]
        item = codes(batch.codes_TL.clamp_min(0)).sum(1)
        if items is not None:
            item = item + items(batch.item_T, task="embed", noise_T=batch.noise_T)
        item = item * is_item
        action_scene = self.tables["action"](batch.action_T) + self.tables["scene"](batch.scene_T % self.scene_buckets) * is_item
        x_TD = item + action_scene + self.tables["token_type"](batch.token_type_T) + self._time(batch)
        known = batch.value_T.isfinite()
        value = torch.stack((batch.value_T.nan_to_num(0.0).clamp_min(0).log1p(), known.float()), dim=1)
        x_TD = x_TD + self.value(value.to(x_TD.dtype)) * is_item
        parts = ((TokenType.U, self.user, batch.user_features_UF), (TokenType.E, self.env, batch.env_features_EF))
        for token_type, embed, features in parts:
            where = (batch.token_type_T == token_type).nonzero().squeeze(1)
            x_TD = x_TD.index_add(0, where, embed(features).to(x_TD.dtype))
        return dropout(x_TD, self.config.dropout, self.training, batch.noise_T, salt=100)

    def _time(self, batch: Batch) -> Tensor:
        seconds = batch.timestamp_T
        gap = torch.diff(seconds, prepend=seconds[:1])
        gap[batch.offsets_B1[:-1]] = 0  # the first token of a row has no predecessor
        bucket = (gap.clamp_min(0) + 1).double().log2().long().clamp_max(NUM_GAP_BUCKETS - 1)
        hour = seconds // 3600 % HOURS
        weekday = seconds // 86_400 % WEEKDAYS
        return self.tables["gap"](bucket) + self.tables["hour"](hour) + self.tables["weekday"](weekday)
