"""The pCTR and pCVR rankers of the simulator: a small network over what was known before a request, and one candidate ad.

Owns features and network. Where labels come from is examples.py's, training fitting.py's, calibration calibration.py's. Everything is a
function of (the tokens of the request's own row up to its site, the candidate): targets, look-ahead, other rows and other candidates
are never read. Hashed tables keep the size independent of the catalogue.
"""

import itertools
from typing import NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import normalize

from gpr_dist.config import Config
from gpr_dist.schema import Action, Batch, TokenType

# R requests  N (request, candidate) pairs  T packed tokens  S item tokens of the batch  H events of a request's past, latest first
# L levels  D width  C most candidates of one request  W weightings of the past: action x half-life  Y content width

ACTIONS = (Action.CONSUME, Action.IMPRESSION, Action.CLICK, Action.CONVERSION)
DAY_S = 86_400
WEEK_S = 7 * DAY_S
FIELD_STEP = 2_654_435_761  # separates the fields of one hashed table
NUM_LOGITS = 3
COMPARED_AT_ONCE = 1 << 22  # candidates x past events held at a time


class RankerConfig(Config):
    """Sizes of the rankers, and how much of the past they read."""

    width: int = Field(16, ge=1)
    """of an item's, a user's and a request's embedding"""
    hidden: tuple[int, ...] = (64, 32)
    """widths of the hidden layers"""
    item_buckets: int = Field(1 << 16, ge=1)
    """most rows of the item table; with fewer than items, some items share one (their codes still tell them apart)"""
    feature_buckets: int = Field(1 << 12, ge=1)
    """rows of each of the two hashed tables of U and E features"""
    history_events: int = Field(256, ge=1)
    """most O and I tokens of the row before the request that are read, the latest ones"""
    content_width: int = Field(32, ge=1)
    """dimensions that are kept of the codebooks' centroids, by which past and candidate are compared"""
    sharpness: float = Field(8.0, gt=0)
    """a past event of cosine c to the candidate counts e^(sharpness (c - 1))"""
    half_lives_s: tuple[float, ...] = Field((3600.0, float(DAY_S), 30.0 * DAY_S), min_length=1)
    """past events are weighted by 2^(-age / half-life), once for each of these, seconds"""
    conversion_delay_s: float = Field(0.0, ge=0)
    """a past ad converted less than so long before a request is read as clicked: logs know conversions before they happened, seconds"""


class Past(NamedTuple):
    """The latest item tokens before each request."""

    token_RH: Tensor  # int64, position in the batch
    known_RH: Tensor  # bool, false where the past is shorter than H
    weight_RHW: Tensor  # float32, 0 where unknown; actions of `ACTIONS` x half-lives
    age_R: Tensor  # float32, seconds since the latest one; inf = none


class EncodedRequests(NamedTuple):
    """What the rankers know about the requests of a batch, whatever the candidate."""

    vector_RX: Tensor  # request's part of the network's input
    user_RD: Tensor
    env_RD: Tensor
    past_RD: Tensor
    pooled_RWD: Tensor  # weighted means of past items
    past: Past
    item_RH: Tensor  # int64, -1 where unknown
    codes_RHL: Tensor  # int64
    content_RHY: Tensor  # float32, length 1


class Rankers(nn.Module):
    """Three logits per candidate: of a click, of a conversion given a click, and of being shown rather than a random eligible ad."""

    def __init__(self, config: RankerConfig, num_levels: int, codebook_size: int, num_user_features: int, num_env_features: int) -> None:
        super().__init__()
        self.config, self.num_levels, self.codebook_size = config, num_levels, codebook_size
        self.num_user_features, self.num_env_features = num_user_features, num_env_features
        d, w = config.width, len(ACTIONS) * len(config.half_lives_s)
        self.register_buffer("half_life_K", torch.tensor(config.half_lives_s), persistent=False)
        self.items, self.item_bias = nn.Embedding(config.item_buckets, d), nn.Embedding(config.item_buckets, NUM_LOGITS)
        self.codes, self.code_bias = nn.Embedding(num_levels * codebook_size, d), nn.Embedding(num_levels * codebook_size, NUM_LOGITS)
        self.user, self.env = nn.Embedding(config.feature_buckets, d), nn.Embedding(config.feature_buckets, d)
        for table in (self.items, self.codes, self.user, self.env):
            nn.init.normal_(table.weight, std=0.05)
        for table in (self.item_bias, self.code_bias):
            nn.init.zeros_(table.weight)
        self.register_buffer("content", torch.zeros(num_levels * codebook_size, config.content_width))
        self.pool = nn.Linear(w * d, d)
        widths = [3 * d + w + 6 + 4 * d + w + w * (num_levels + 2), *config.hidden]
        layers = [layer for before, after in itertools.pairwise(widths) for layer in (nn.Linear(before, after), nn.SiLU())]
        self.head = nn.Sequential(*layers, nn.Linear(widths[-1], NUM_LOGITS))

    @torch.no_grad()
    def set_content(self, codebooks_LVK: Tensor) -> None:
        """Let the tokenizer's centroids say which items are alike, by their main directions: frozen, and where the embeddings start."""
        centroids = codebooks_LVK.flatten(0, 1).to(self.content.device)
        _, _, directions = torch.linalg.svd(centroids - centroids.mean(0), full_matrices=False)
        projected = centroids @ directions[: self.config.content_width].T
        self.content[:, : projected.shape[1]] = projected
        start = projected[:, : self.codes.embedding_dim]
        self.codes.weight[:, : start.shape[1]] = start * (0.1 / start.std().clamp_min(1e-12))

    def forward(self, batch: Batch, request_N: Tensor, item_N: Tensor, codes_NL: Tensor) -> Tensor:
        """Logits of (click, conversion given a click, shown), float32 [N, 3].

        Args: request_N: int64 requests of the batch, in any order. item_N: int64 catalogue indices. codes_NL: their semantic IDs.
        """
        return self.score(self.encode(batch), request_N, item_N, codes_NL)

    def encode(self, batch: Batch) -> EncodedRequests:
        past = recent_past(batch, self.config, self.half_life_K)
        token_RH = past.token_RH
        is_item_S = (batch.item_T >= 0).nonzero().squeeze(1)
        place_T = torch.zeros_like(batch.item_T).index_put_((is_item_S,), torch.arange(len(is_item_S), device=batch.item_T.device))
        embedded_SD = self.embed(batch.item_T[is_item_S], batch.codes_TL[is_item_S])
        total_RW = past.weight_RHW.sum(1)
        pooled_RWD = past.weight_RHW.transpose(1, 2) @ embedded_SD[place_T[token_RH]] / (1 + total_RW[:, :, None])
        user_RD = _sum_features(self.user, batch.user_features_UF, *_last_before(batch, TokenType.U))
        env_RD = _sum_features(self.env, batch.env_features_EF, *_at_site(batch))
        past_RD = self.pool(pooled_RWD.flatten(1))
        vector_RX = torch.cat([user_RD, env_RD, past_RD, total_RW.log1p(), _time_features(batch.request_time_R, past.age_R)], 1)
        item_RH = torch.where(past.known_RH, batch.item_T[token_RH], -1)
        content_SY = self._content(batch.codes_TL[is_item_S])
        return EncodedRequests(vector_RX, user_RD, env_RD, past_RD, pooled_RWD, past, item_RH, batch.codes_TL[token_RH],
                               content_SY[place_T[token_RH]])

    def score(self, requests: EncodedRequests, request_N: Tensor, item_N: Tensor, codes_NL: Tensor) -> Tensor:
        """As `forward`, of encoded requests."""
        x_ND = self.embed(item_N, codes_NL)
        dot_NW = (requests.pooled_RWD[request_N] * x_ND[:, None]).sum(2)
        match_NW = self._matches(requests, request_N, item_N, codes_NL)
        crossed = [part[request_N] * x_ND for part in (requests.user_RD, requests.env_RD, requests.past_RD)]
        logits_N3 = self.head(torch.cat([requests.vector_RX[request_N], x_ND, *crossed, dot_NW, match_NW], 1))
        return logits_N3 + self.item_bias(item_N % self.config.item_buckets) + self.code_bias(self._code_rows(codes_NL)).sum(1)

    def embed(self, item_S: Tensor, codes_SL: Tensor) -> Tensor:
        """Embedding of items, [S, D]."""
        return self.items(item_S % self.config.item_buckets) + self.codes(self._code_rows(codes_SL)).sum(1)

    def _code_rows(self, codes_SL: Tensor) -> Tensor:
        return codes_SL + torch.arange(self.num_levels, device=codes_SL.device) * self.codebook_size

    def _content(self, codes_SL: Tensor) -> Tensor:
        return normalize(self.content[self._code_rows(codes_SL)].sum(1), dim=1)

    def _matches(self, requests: EncodedRequests, request_N: Tensor, item_N: Tensor, codes_NL: Tensor) -> Tensor:
        """log1p of the weights of past events that share the candidate's first 1 .. L codes, that are the candidate itself, and of all by
        their likeness: [N, (L+2) W]."""
        num_requests, num_weights = requests.past.weight_RHW.shape[0], requests.past.weight_RHW.shape[2]
        cell_N, width = _cells(request_N, num_requests)
        found = item_N.new_zeros((num_requests, width, self.num_levels + 2, num_weights), dtype=torch.float32)
        item_RC, codes_RCL, content_RCY = (_lay_out(x, cell_N, num_requests, width) for x in (item_N, codes_NL, self._content(codes_NL)))
        step = max(COMPARED_AT_ONCE // max(width * requests.item_RH.shape[1], 1), 1)
        for first in range(0, num_requests, step):
            part = slice(first, first + step)
            same_rCHL = requests.codes_RHL[part, None] == codes_RCL[part, :, None]
            is_item_rCH = requests.item_RH[part, None] == item_RC[part, :, None]
            likeness_rCH = ((content_RCY[part] @ requests.content_RHY[part].mT - 1) * self.config.sharpness).exp()
            prefix_rCHL = same_rCHL.cumprod(3, dtype=torch.uint8)
            kinds_rCZH = torch.cat([prefix_rCHL.movedim(3, 2).float(), is_item_rCH[:, :, None].float(), likeness_rCH[:, :, None]], 2)
            found[part] = (kinds_rCZH.flatten(1, 2) @ requests.past.weight_RHW[part]).unflatten(1, (width, self.num_levels + 2))
        return found.flatten(0, 1)[cell_N].log1p().flatten(1)


def _cells(request_N: Tensor, num_requests: int) -> tuple[Tensor, int]:
    """A place request x C + c for every candidate, where c numbers the candidates of a request, and C: the past is then read once for
    all of them."""
    order = request_N.argsort(stable=True)
    count_R = request_N.bincount(minlength=num_requests)
    width = int(count_R.max()) if num_requests else 0
    number = torch.arange(len(order), device=order.device) - (count_R.cumsum(0) - count_R)[request_N[order]]
    return torch.empty_like(order).index_put_((order,), request_N[order] * width + number), width


def _lay_out(x_N: Tensor, cell_N: Tensor, num_requests: int, width: int) -> Tensor:
    """[R, C, ...] with 0 in cells without a candidate."""
    out = x_N.new_zeros((num_requests * width, *x_N.shape[1:]))
    out[cell_N] = x_N
    return out.unflatten(0, (num_requests, width))


def recent_past(batch: Batch, config: RankerConfig, half_life_K: Tensor) -> Past:
    """O and I tokens of each request's row up to its prediction site, latest first; H is the longest past of the batch."""
    token_S = (batch.item_T >= 0).nonzero().squeeze(1)
    end_R = torch.searchsorted(token_S, batch.request_token_R, right=True)
    count_R = end_R - torch.searchsorted(token_S, batch.offsets_B1[batch.request_row_R])
    longest = min(int(count_R.max()) if len(count_R) else 0, config.history_events)
    back_H = torch.arange(longest, device=end_R.device)
    known_RH = back_H < count_R[:, None]
    token_RH = token_S[(end_R[:, None] - 1 - back_H).clamp_min(0)]
    age_RH = (batch.request_time_R[:, None] - batch.timestamp_T[token_RH]).clamp_min(0).float()
    action_RH = batch.action_T[token_RH]
    action_RH = torch.where((action_RH == Action.CONVERSION) & (age_RH < config.conversion_delay_s), int(Action.CLICK), action_RH)
    is_action_RHC = action_RH[:, :, None] == torch.tensor(ACTIONS, device=action_RH.device)
    decay_RHK = torch.exp2(-age_RH[:, :, None] / half_life_K) * known_RH[:, :, None]
    weight_RHW = (is_action_RHC[..., None] * decay_RHK[:, :, None]).flatten(2)
    age_R = age_RH[:, 0].masked_fill(count_R == 0, torch.inf) if longest else age_RH.new_full((len(end_R),), torch.inf)
    return Past(token_RH, known_RH, weight_RHW, age_R)


def _last_before(batch: Batch, token_type: TokenType) -> tuple[Tensor, Tensor]:
    """(number among all tokens of that type, position; -1 = none) of the last one of the request's row up to its site, [R] each."""
    position_U = (batch.token_type_T == token_type).nonzero().squeeze(1)
    number_R = torch.searchsorted(position_U, batch.request_token_R, right=True) - 1
    position_R = torch.cat([position_U, position_U.new_full((1,), -1)])[number_R]
    return number_R, torch.where(position_R >= batch.offsets_B1[batch.request_row_R], position_R, -1)


def _at_site(batch: Batch) -> tuple[Tensor, Tensor]:
    """The request's own E: its site, where that is an E; the E of an earlier block says nothing about this one."""
    number_R, position_R = _last_before(batch, TokenType.E)
    return number_R, torch.where(position_R == batch.request_token_R, position_R, -1)


def _sum_features(table: nn.Embedding, features_UF: Tensor, number_R: Tensor, position_R: Tensor) -> Tensor:
    """Sum of a token's hashed categories, [R, D]; 0 where there is no token or no field."""
    if not len(features_UF) or not features_UF.shape[1]:
        return table.weight.new_zeros((len(number_R), table.embedding_dim))
    field = torch.arange(features_UF.shape[1], device=features_UF.device) * FIELD_STEP
    rows_RF = (features_UF[number_R.clamp_min(0)] + field) % table.num_embeddings
    return table(rows_RF).sum(1) * (position_R >= 0)[:, None]


def _time_features(time_R: Tensor, age_R: Tensor) -> Tensor:
    """Time of day and of week on circles, time since the last event; [R, 6]."""
    angle_R2 = torch.stack([time_R % DAY_S / DAY_S, time_R % WEEK_S / WEEK_S], 1) * (2 * torch.pi)
    known_R = age_R.isfinite()
    gap_R = torch.where(known_R, age_R, 0).log1p() / 10
    return torch.cat([angle_R2.sin(), angle_R2.cos(), torch.stack([gap_R, known_R.float()], 1)], 1)
