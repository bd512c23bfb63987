"""Guards of the policy optimisation: numbers that show a policy exploiting its reward model, limits on them, and the early stop.

All are expectations under the policy renormalised over a request's candidates, so that they cost nothing but one forward with the start
weights. Guards measure and stop; they never change a reward.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from pydantic import Field
from torch import Tensor

from gpr_dist.config import Config
from gpr_dist.errors import ConfigError
from gpr_dist.objectives.hepo import group_kl, group_log_softmax
from gpr_dist.schema import Batch, TokenType

# N candidates, by request  R requests  M catalogue items  G groups of items (advertisers)  S ad tokens

MAX_GROUPS = 1 << 20
"""counters of shares; more groups than that share counters"""
MEMORY = 0.8
"""share of the past that the running reward and truth keep at a check: single steps see other requests"""


class GuardConfig(Config):
    """When a run stops by itself."""

    every_steps: int = Field(10, ge=0)
    """steps between checks; 0 = never"""
    patience: int = Field(3, ge=1)
    """checks in a row outside a limit that stop the run"""
    max_kl: float | None = Field(5.0, gt=0)
    """largest KL from the start weights, nats, of the policies over a request's candidates; none = no limit, as below"""
    min_entropy: float | None = Field(0.01, ge=0, le=1)
    """least entropy over a request's candidates, as a share of the largest possible"""
    max_group_share: float | None = Field(None, gt=0, le=1)
    """largest share of the exposure that goes to one advertiser"""
    group_column: str | None = "advertiser"
    """column of the catalogue that names an ad's advertiser; where it is missing every item is a group of its own; none = likewise"""
    max_repetition: float | None = Field(None, gt=0, le=1)
    """largest share of the exposure that goes to ads the user's journey already shows"""
    max_divergence: float | None = Field(None, gt=0)
    """most that the relative gain in reward since the first check may exceed the gain in what a truth says; only with a truth"""


def item_groups(data_folder: Path, column: str | None, num_items: int) -> np.ndarray:
    """Group of every catalogue item, int64 [M] below MAX_GROUPS; the items themselves without such a column."""
    path = data_folder / "catalogue" / "catalogue.arrow"
    with pa.memory_map(str(path)) as file:
        reader = pa.ipc.open_file(file)
        if column is None or column not in reader.schema.names:
            return np.arange(num_items) % MAX_GROUPS
        values = reader.read_all().column(column)
    if pa.types.is_nested(values.type):
        raise ConfigError(f"guards.group_column={column} holds {values.type} in {path}; name a column with one value per item")
    encoded = values.combine_chunks().dictionary_encode()
    unknown = len(encoded.dictionary)
    groups = encoded.indices.fill_null(unknown).to_numpy(zero_copy_only=False).astype(np.int64)
    younger = np.full(num_items - len(groups), unknown)  # than this catalogue: the tokenizer may know them
    return np.concatenate([groups, younger]) % MAX_GROUPS


def exposure_sums(log_p_N: Tensor, reference_N: Tensor, batch: Batch, counts_R: Tensor, value_N: Tensor,
                  truth_N: Tensor | None) -> dict[str, Tensor]:
    """Sums over the requests that count, float64 scalars; each divided by `requests` is a mean.

    Args:
        log_p_N, reference_N: log-probability of each candidate's whole path, now and with the start weights. counts_R: bool.
        value_N: its reward. truth_N: what it is truly worth, if anything says so.
    """
    group_N, num_requests = batch.target_request_N, len(counts_R)
    share_N = group_log_softmax(log_p_N, group_N, num_requests)
    exposure_N = share_N.exp() * counts_R[group_N]
    count_R = torch.bincount(group_N, minlength=num_requests).double()
    entropy_N = -exposure_N * share_N / count_R.log().clamp_min(1e-9)[group_N]
    kl_R = group_kl(log_p_N, reference_N, group_N, num_requests)
    sums = {"requests": counts_R.sum(), "kl": (kl_R * counts_R).sum(), "entropy": entropy_N.sum(),
            "candidate_mass": (log_p_N.exp() * counts_R[group_N]).sum(), "repetition": (exposure_N * seen_before(batch)).sum(),
            "reward": (exposure_N * value_N).sum()}
    if truth_N is not None:
        sums["truth"] = (exposure_N * truth_N).sum()
    return {name: value.double() for name, value in sums.items()}


def exposure_by_group(log_p_N: Tensor, batch: Batch, counts_R: Tensor, group_of_item_M: Tensor) -> Tensor:
    """Expected exposure of each group of items, float64 [G]; sums up over micro-batches and ranks."""
    request_N = batch.target_request_N
    exposure_N = group_log_softmax(log_p_N, request_N, len(counts_R)).exp() * counts_R[request_N]
    size = int(group_of_item_M.max()) + 1 if len(group_of_item_M) else 1
    total = torch.zeros(size, dtype=torch.float64, device=log_p_N.device)
    return total.index_add_(0, group_of_item_M[batch.target_item_N], exposure_N.double())


def seen_before(batch: Batch) -> Tensor:
    """Which candidates are ads that the row shows before the request, bool [N]."""
    ad_S = (batch.token_type_T == int(TokenType.I)).nonzero().squeeze(1)
    row_S = torch.searchsorted(batch.offsets_B1, ad_S, right=True) - 1
    stride = int(torch.cat((batch.item_T, batch.target_item_N)).max()) + 1 if batch.num_tokens else 1
    key_S = row_S * stride + batch.item_T[ad_S]
    order_S = key_S.argsort(stable=True)  # the first occurrence first
    key_S, ad_S = key_S[order_S], ad_S[order_S]
    request_N = batch.target_request_N
    key_N = batch.request_row_R[request_N] * stride + batch.target_item_N
    if not len(key_S):
        return torch.zeros_like(key_N, dtype=torch.bool)
    place_N = torch.searchsorted(key_S, key_N).clamp_max(len(key_S) - 1)
    return (key_S[place_N] == key_N) & (ad_S[place_N] <= batch.request_token_R[request_N])


@dataclass
class Guards:
    """The limits, and how long each has been exceeded."""

    config: GuardConfig
    strikes: dict[str, int] = field(default_factory=dict)
    first: dict[str, float] = field(default_factory=dict)  # of reward and truth
    running: dict[str, float] = field(default_factory=dict)
    stopped: str | None = None  # why

    def is_due(self, step: int) -> bool:
        """Args: step: from 0."""
        return self.config.every_steps > 0 and step % self.config.every_steps == 0

    def check(self, metrics: dict[str, float]) -> dict[str, float]:
        """Note a check. Args: metrics: kl, entropy, group_share, repetition, reward, and truth if known. Returns: them and divergence."""
        if "truth" in metrics:
            metrics = metrics | {"divergence": self._divergence(metrics)}
        c = self.config
        limits = {"kl": (c.max_kl, 1), "entropy": (c.min_entropy, -1), "group_share": (c.max_group_share, 1),
                  "repetition": (c.max_repetition, 1), "divergence": (c.max_divergence, 1)}
        for name, (limit, sign) in limits.items():
            if limit is None or name not in metrics:
                continue
            outside = sign * metrics[name] > sign * limit
            self.strikes[name] = self.strikes.get(name, 0) + 1 if outside else 0
            if self.strikes[name] >= c.patience:
                self.stopped = (f"guard {name} = {metrics[name]:.4g} is {'above' if sign > 0 else 'below'} its limit {limit} for "
                                f"{c.patience} checks")
        return metrics

    def _divergence(self, metrics: dict[str, float]) -> float:
        """Relative gain in reward less that in truth since the first check, of running means."""
        gains = []
        for name in ("reward", "truth"):
            first = self.first.setdefault(name, metrics[name])
            self.running[name] = MEMORY * self.running.get(name, metrics[name]) + (1 - MEMORY) * metrics[name]
            gains.append((self.running[name] - first) / max(abs(first), 1e-12))
        return gains[0] - gains[1]

    def state(self) -> dict[str, Any]:
        """For checkpoints: plain JSON values."""
        return {"limits": self.config.model_dump(mode="json"), "strikes": self.strikes, "first": self.first, "running": self.running,
                "stopped": self.stopped}

    @classmethod
    def of(cls, config: GuardConfig, state: dict[str, Any] | None) -> "Guards":
        """Continue from a checkpoint; a stopped run stays stopped until its limits are changed."""
        if state is None:
            return cls(config)
        same = state["limits"] == config.model_dump(mode="json")
        return cls(config, state["strikes"] if same else {}, state["first"], state["running"], state["stopped"] if same else None)
