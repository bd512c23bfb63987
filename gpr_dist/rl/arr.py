"""ARR, Anticipatory Request Rehearsal (GPR §4.3): the requests that active users are about to make, before they make them.

A clock ticks every 2 hours for very active users and every 4 for the others. At the tick after one of a user's requests the next one is
put together from what is known by then: the journey so far, organic content consumed since included, the user's features as they are,
and an environment like that of the user's latest request at the hour of the tick. What happened at the tick or later is cut off.
hepo_step.py rolls these requests out and trains on them beside the logged ones.
"""

from collections.abc import Sequence
from dataclasses import MISSING, fields, replace
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from pydantic import Field
from torch import Tensor

from gpr_dist.config import Config
from gpr_dist.data.past import PastItems
from gpr_dist.hashing import TIME_FEATURES, feature_id, time_feature
from gpr_dist.ops.noise import hashed_uniform
from gpr_dist.schema import Batch, TokenType

# B rows  T tokens  R requests  S anticipated requests, one for each of some rows  X tokens of these rows

HOUR_S, DAY_S = 3600, 86_400
SEED = 23  # tells these draws from other uses of the same keys


class ArrConfig(Config):
    """Anticipated requests among the rollouts."""

    share: float = Field(0.0, ge=0, lt=1)
    """share of the requests rolled out that are anticipated, at most one of each journey and step; 0 = none, the paper's mix is 0.2 here"""
    active_hours: float = Field(2.0, gt=0)
    """period of the clock for very active users"""
    other_hours: float = Field(4.0, gt=0)
    """period of the clock for the others"""
    active_events: int = Field(8, ge=1)
    """organic items and ads within the 24 hours up to a request that make a user very active"""
    seed: int = 0
    """of the choice of journeys and moments"""


class Rehearsal:
    """Makes the anticipated requests of a micro-batch (`hepo_step.Parts.rehearse`)."""

    def __init__(self, config: ArrConfig, requests_per_row: int, env_features: Sequence[str], past: PastItems | None = None) -> None:
        """Args: requests_per_row: logged requests of a journey that are rolled out in a step. env_features: names, of the manifest.
        past: of a model with a pointer."""
        self.config, self._requests_per_row, self._env_features, self._past = config, requests_per_row, tuple(env_features), past

    def __call__(self, batch: Batch, step: int) -> Batch:
        """Requests to come of some users of a micro-batch of the loader (on the CPU): their rows up to a tick, without targets.

        What is drawn for a row depends on it, the step and the seed alone.
        """
        anchor_S = choose_anchors(batch, self.config, self._requests_per_row, step)
        made = anticipate(batch, anchor_S, ticks(batch, anchor_S, self.config), self._env_features)
        return made if self._past is None else self._past.add_to(made)


def choose_anchors(batch: Batch, config: ArrConfig, requests_per_row: int, step: int) -> Tensor:
    """Requests after which the next one is anticipated, int64 [S] into R, at most one of each row, ascending."""
    count_B = torch.bincount(batch.request_row_R, minlength=batch.num_rows)
    draw_B2 = hashed_uniform(batch.row_ids_B, 2, (config.seed * 1_000_003 + step) * 1_000 + SEED)
    wanted_B = config.share / (1 - config.share) * count_B.clamp(max=requests_per_row)
    chosen_S = (draw_B2[:, 0] < wanted_B).nonzero().squeeze(1)
    first_S = torch.searchsorted(batch.request_row_R, chosen_S)
    place_S = (draw_B2[chosen_S, 1].double() * count_B[chosen_S]).long()
    return first_S + torch.minimum(place_S, count_B[chosen_S] - 1)


def ticks(batch: Batch, anchor_S: Tensor, config: ArrConfig) -> Tensor:
    """The clock's next tick after each anchor by its user's tier, int64 seconds [S]."""
    row_S, time_S = batch.request_row_R[anchor_S], batch.request_time_R[anchor_S]
    until_B = torch.full((batch.num_rows,), torch.iinfo(torch.int64).min // 2).index_put_((row_S,), time_S)
    until_T = until_B.repeat_interleave(batch.offsets_B1.diff())
    recent_T = (batch.item_T >= 0) & (batch.timestamp_T <= until_T) & (batch.timestamp_T > until_T - DAY_S)
    num_events_S = _sum_rows(batch, recent_T)[row_S]
    period_S = torch.where(num_events_S >= config.active_events, int(config.active_hours * HOUR_S), int(config.other_hours * HOUR_S))
    return (torch.div(time_S, period_S, rounding_mode="floor") + 1) * period_S


def anticipate(batch: Batch, anchor_S: Tensor, tick_S: Tensor, env_features: Sequence[str]) -> Batch:
    """The rows of some requests up to the tick after them, each with one request at the tick and nothing later.

    The request's block is the one that organic content since the last request has opened, or a new one. It gets an E token like the
    row's latest, with the features of the time (`TIME_FEATURES`) of the tick, and a U token where every block has one. Eligible is what
    was eligible at the row's latest request before the tick. Rows of data with environments but without an E token before are left out.

    Args: anchor_S: int64 into R, of different rows, ascending; requests before the tick.
    Returns: a batch as the loader makes it for journeys that end with such a request, but without targets, dropout keys, item candidates
        and pairs of the pointer.
    """
    row_S, start_S = batch.request_row_R[anchor_S], batch.offsets_B1[batch.request_row_R[anchor_S]]
    tick_B = torch.full((batch.num_rows,), torch.iinfo(torch.int64).min).index_put_((row_S,), tick_S)
    before_T = batch.timestamp_T < tick_B.repeat_interleave(batch.offsets_B1.diff())  # times do not fall within a row: a prefix of it
    count_S = _sum_rows(batch, before_T)[row_S]
    last_S = start_S + count_S - 1
    env_S, user_S = (_last_of(batch, kind, last_S) for kind in (TokenType.E, TokenType.U))
    has_env = batch.env_features_EF.shape[1] > 0
    if has_env and not bool((env_S >= start_S).all()):
        kept_S = env_S >= start_S
        return anticipate(batch, anchor_S[kept_S], tick_S[kept_S], env_features)

    is_closed_S = (batch.token_type_T[last_S] == TokenType.I) | (batch.token_type_T[last_S] == TokenType.E)
    block_S = batch.block_T[last_S] + is_closed_S.long()
    has_user_S = is_closed_S & (user_S > start_S)  # a U token beyond the row's first one: every block has its own
    length_S = count_S + has_user_S.long() + int(has_env)
    offsets_S1 = torch.zeros(len(row_S) + 1, dtype=torch.int64)
    torch.cumsum(length_S, 0, out=offsets_S1[1:])
    of_X = torch.repeat_interleave(length_S)
    place_X = torch.arange(len(of_X)) - offsets_S1[of_X]
    source_X = torch.where(place_X < count_S[of_X], start_S[of_X] + place_X, torch.where(
        has_user_S[of_X] & (place_X == count_S[of_X]), user_S[of_X], env_S[of_X]))  # what is added is a copy at another time
    is_new_X = place_X >= count_S[of_X]

    tokens = {f.name: getattr(batch, f.name)[source_X] for f in fields(Batch) if f.name.endswith(("_T", "_TL")) and f.name != "noise_T"}
    tokens["block_T"] = torch.where(is_new_X, block_S[of_X], tokens["block_T"])
    tokens["timestamp_T"] = torch.where(is_new_X, tick_S[of_X], tokens["timestamp_T"])
    is_env_X = tokens["token_type_T"] == TokenType.E
    env_EF = batch.env_features_EF[_rank_of(batch, TokenType.E)[source_X[is_env_X]]]
    new_env = is_new_X[is_env_X].nonzero().squeeze(1)
    for column, name in enumerate(env_features if has_env else ()):
        if name in TIME_FEATURES:
            env_EF[new_env, column] = _time_ids(name, tick_S)
    latest_S = torch.searchsorted(batch.request_row_R, row_S) + torch.bincount(
        batch.request_row_R[batch.request_time_R < tick_B[batch.request_row_R]], minlength=batch.num_rows)[row_S] - 1
    nothing = {f.name: getattr(batch, f.name)[:0] if f.default is MISSING else None for f in fields(Batch) if f.name.startswith("target_")}
    return replace(
        batch, offsets_B1=offsets_S1, row_ids_B=batch.row_ids_B[row_S], **tokens, env_features_EF=env_EF,
        user_features_UF=batch.user_features_UF[_rank_of(batch, TokenType.U)[source_X[tokens["token_type_T"] == TokenType.U]]],
        request_token_R=offsets_S1[1:] - 1, request_row_R=torch.arange(len(row_S)), request_time_R=tick_S,
        request_eligibility_R=batch.request_eligibility_R[latest_S], **nothing, candidates=None, noise_T=None,
        knowledge_BmE=None if batch.knowledge_BmE is None else batch.knowledge_BmE[row_S], copy_request_M=None, copy_source_M=None,
        **_older_events(batch, row_S))


def _older_events(batch: Batch, row_S: Tensor) -> dict[str, Any]:
    """Events older than the rows."""
    if batch.past_offsets_B1 is None:
        return {}
    length_S = batch.past_offsets_B1.diff()[row_S]
    offsets_S1 = torch.zeros(len(row_S) + 1, dtype=torch.int64)
    torch.cumsum(length_S, 0, out=offsets_S1[1:])
    of_X = torch.repeat_interleave(length_S)
    source_X = batch.past_offsets_B1[row_S][of_X] + torch.arange(len(of_X)) - offsets_S1[of_X]
    names = ("past_item_X", "past_codes_XL", "past_time_X", "past_action_X")
    return {"past_offsets_B1": offsets_S1, **{name: getattr(batch, name)[source_X] for name in names}}


def _sum_rows(batch: Batch, flag_T: Tensor) -> Tensor:
    """How many tokens of each row have the flag, int64 [B]."""
    total_T1 = torch.zeros(batch.num_tokens + 1, dtype=torch.int64)
    torch.cumsum(flag_T, 0, out=total_T1[1:])
    return total_T1[batch.offsets_B1].diff()


def _last_of(batch: Batch, kind: TokenType, last_S: Tensor) -> Tensor:
    """The last token of a kind at or before each position, perhaps of an earlier row; -1 = none."""
    at = (batch.token_type_T == kind).nonzero().squeeze(1)
    place_S = torch.searchsorted(at, last_S, right=True) - 1
    return torch.where(place_S >= 0, at[place_S.clamp_min(0)], -1) if len(at) else torch.full_like(last_S, -1)


def _rank_of(batch: Batch, kind: TokenType) -> Tensor:
    """Number of each token among those of a kind, int64 [T]."""
    return (batch.token_type_T == kind).cumsum(0) - 1


def _time_ids(name: str, time_S: Tensor) -> Tensor:
    """The feature of the times, as the data pipeline stores it."""
    values = pa.chunked_array([pa.array(time_S.numpy(), pa.int64())])
    return torch.from_numpy(np.asarray(feature_id(time_feature(name, values), name), np.int64))
