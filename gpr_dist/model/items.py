"""Item identity: an embedding and an output vector per catalogue item, beside the codes that items share.

Codes let rare items learn from their neighbours; an identity lets frequent ones differ from them, and lets the model know exact
successions. Rows are found by hash, so that new items and catalogues of 10⁸ need no growing table: with at least as many buckets as
items every item has a row of its own, with fewer it is the sum of `num_hashes` rows, and two items share all of them only with
probability buckets^-num_hashes. Under ZeRO-3 the table is gathered whole in every step: buckets x width numbers must fit beside the
model, 4 million x 256 in bf16 are 2 GiB.
"""

from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from gpr_dist.data.candidates import CandidatesConfig
from gpr_dist.ops.cross_entropy import item_nll
from gpr_dist.ops.noise import dropout
from gpr_dist.schema import Batch, Candidates

# T packed tokens  D width  R requests, r scored together  N targets  C candidate items  K ranked items  b rows of an item

ITEM_STD, HEAD_STD = 0.3, 0.02
_MULTIPLIERS = (0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9, 0xD6E8FEB86659FD93)
SCORES_PER_CHUNK = 1 << 24  # float32 scores held at once when ranking


class ItemsConfig(CandidatesConfig):
    """Item identity; off with 0 buckets."""

    buckets: int = Field(0, ge=0)
    """rows of the table; at least num_items = a row for every item, more leave room for new ones; 0 = items have no identity"""
    num_hashes: int = Field(2, ge=1, le=4)
    """rows that add up to an item where there are fewer buckets than items"""
    num_items: int = Field(0, ge=0)
    """items of the catalogue (from the tokenizer)"""
    input: bool = True
    """add the item's embedding to the codes' at O and I tokens"""
    dropout: float = Field(0.0, ge=0, lt=1)
    """dropout of that embedding, 0..1"""
    head: Literal["none", "tied", "untied"] = "untied"
    """scores of items from the state at the prediction site, an auxiliary loss and a ranker: none; with the input's table; with its own"""
    head_codes: bool = False
    """an item's output vector is its row plus its code embeddings, so that rare items are scored by what they share"""
    head_dropout: float = Field(0.0, ge=0, lt=1)
    """dropout of the state that scores items, 0..1"""

    @model_validator(mode="after")
    def _check(self) -> "ItemsConfig":
        if self.buckets and not self.input and self.head != "untied":
            raise ValueError(f"input=false with head={self.head} leaves the {self.buckets} rows without a use; set buckets=0")
        return self

    @property
    def num_candidates(self) -> int:
        """Columns of the item softmax where every ad is eligible, by the catalogue's size."""
        if not self.has_head:
            return 0
        return self.num_items if self.num_items <= self.full_softmax_items else self.num_sampled

    @property
    def has_input(self) -> bool:
        return bool(self.buckets) and self.input

    @property
    def has_head(self) -> bool:
        return bool(self.buckets) and self.head != "none"


class Items(nn.Module):
    """The table, the head, and everything that reads them."""

    def __init__(self, width: int, config: ItemsConfig) -> None:
        super().__init__()
        self.config = config
        self.exact = config.buckets >= config.num_items
        if config.input or config.head == "tied":
            self.table = nn.Embedding(config.buckets, width)
            nn.init.normal_(self.table.weight, std=ITEM_STD)
        if config.head == "untied":
            self.output = nn.Embedding(config.buckets, width)
            nn.init.normal_(self.output.weight, std=HEAD_STD)
        if config.head != "none":
            self.bias = nn.Embedding(config.buckets, 1)
            nn.init.zeros_(self.bias.weight)
            self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor, task: str, **arguments: Any) -> Any:
        """embed: items [T] → [T, D]. nll: states [R, D] → sum over head 0's targets of -log p. rank: states [R, D] → the best items.
        outputs: items [C] → their output vectors and biases.

        All go through this one call because ZeRO-3 gathers a module's parameters around its forward.
        """
        return {"embed": self._embed, "nll": self._nll, "rank": self._rank, "outputs": self._outputs}[task](x, **arguments)

    def _embed(self, item_T: Tensor, noise_T: Tensor | None) -> Tensor:
        return dropout(self._lookup(self.table, item_T.clamp_min(0)), self.config.dropout, self.training, noise_T, salt=101)

    def _nll(self, state_RD: Tensor, batch: Batch, code_CD: Tensor | None) -> Tensor:
        """Args: code_CD: summed code embeddings of the candidates, with head_codes."""
        candidates = batch.candidates
        noise_R = None if batch.noise_T is None else batch.noise_T[batch.request_token_R]
        state_RD = dropout(self.norm(state_RD), self.config.head_dropout, self.training, noise_R, salt=102)
        is_first_N = batch.target_head_N == 0
        request_N, column_N = batch.target_request_N[is_first_N], batch.target_column_N[is_first_N]
        asked = torch.unique(request_N)  # with a share of the targets, requests without one cost nothing
        group_r = None if candidates.group_R is None else candidates.group_R[asked]
        weight_CD, bias_C = self._outputs(candidates.item_C, code_CD)
        return item_nll(state_RD.index_select(0, asked), weight_CD, bias_C, torch.searchsorted(asked, request_N), column_N,
                        candidates.offset_C, candidates.legal_GC, group_r,
                        weight_N=None if batch.target_weight_N is None else batch.target_weight_N[is_first_N])

    @torch.no_grad()
    def _rank(self, state_RD: Tensor, candidates: Candidates, legal_GC: Tensor, group_R: Tensor, code_CD: Tensor | None, k: int,
              excluded: tuple[Tensor, Tensor] | None = None, outputs: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """The k best legal items of each request: (item_RK int64, -1 where there are fewer; score_RK float32 log p, -inf there).

        The softmax is over the legal items, those excluded among them: it is the distribution that was trained.

        Args: excluded: (request, column) pairs that are not ranked. outputs: of the candidates, where they are known already.
        """
        state_RD = self.norm(state_RD)
        weight_CD, bias_C = self._outputs(candidates.item_C, code_CD) if outputs is None else outputs
        rows = max(1, SCORES_PER_CHUNK // max(1, len(weight_CD)))
        items, scores = [], []
        for lo in range(0, len(state_RD), rows):
            score_rC = torch.addmm(bias_C, state_RD[lo:lo + rows], weight_CD.T).float()
            score_rC.masked_fill_(~legal_GC[group_R[lo:lo + rows]], -torch.inf)
            score_rC -= score_rC.logsumexp(1, keepdim=True).clamp_min(torch.finfo(torch.float32).min)
            if excluded is not None:
                here = (excluded[0] >= lo) & (excluded[0] < lo + rows)
                score_rC[excluded[0][here] - lo, excluded[1][here]] = -torch.inf
            best_rK, column_rK = score_rC.topk(min(k, score_rC.shape[1]), dim=1)
            items.append(torch.where(best_rK > -torch.inf, candidates.item_C[column_rK], -1))
            scores.append(best_rK)
        shape = (0, min(k, len(weight_CD)))
        item_RK = torch.cat([candidates.item_C.new_empty(shape), *items])
        score_RK = torch.cat([state_RD.new_empty(shape, dtype=torch.float32), *scores])
        short = k - item_RK.shape[1]
        return nn.functional.pad(item_RK, (0, short), value=-1), nn.functional.pad(score_RK, (0, short), value=-torch.inf)

    def _outputs(self, item_C: Tensor, code_CD: Tensor | None) -> tuple[Tensor, Tensor]:
        """Output vectors [C, D] and biases [C]."""
        table = self.output if self.config.head == "untied" else self.table
        size = len(item_C)
        if self.exact and size and int(item_C[-1]) == size - 1:  # ascending and distinct: the first rows in order, no gather
            weight_CD, bias_C = table.weight[:size], self.bias.weight[:size, 0]
        else:
            weight_CD, bias_C = self._lookup(table, item_C), self._lookup(self.bias, item_C)[:, 0]
        return weight_CD if code_CD is None else weight_CD + code_CD * code_CD.shape[1] ** -0.5, bias_C

    def _lookup(self, table: nn.Embedding, item_T: Tensor) -> Tensor:
        if self.exact:
            return table(item_T % self.config.buckets)  # items added since training, when there is no room for them, share rows
        return table(item_rows(item_T, self.config.buckets, self.config.num_hashes)).sum(1)


def item_rows(item_T: Tensor, buckets: int, num_hashes: int) -> Tensor:
    """Rows [T, b] of hashed items: multiplicative hashes, each over its own part of the table so that an item's rows are distinct."""
    part = buckets // num_hashes
    rows = []
    for number in range(num_hashes):
        hashed = (item_T + 1) * (_MULTIPLIERS[number] - 2**64 if _MULTIPLIERS[number] >= 2**63 else _MULTIPLIERS[number])
        hashed = hashed ^ ((hashed >> 32) & 0xFFFFFFFF)
        rows.append((hashed & 0x7FFFFFFFFFFFFFFF) % part + number * part)
    return torch.stack(rows, -1)
