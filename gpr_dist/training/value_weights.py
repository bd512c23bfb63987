"""Value-aware fine-tuning's step-wide part: weighs all targets of a step, over all ranks and micro-batches, before its first forward.

Keeps the running means that the weights are relative to; they are part of every checkpoint, so a resumed run gives the same weights.
The formulas are in objectives/vaft.py.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from gpr_dist.data.reader import ShardReader
from gpr_dist.errors import ConfigError, DataError
from gpr_dist.objectives.vaft import ACTIONS, RunningMeans, VaftConfig, action_index, ad_worth, vaft_weights
from gpr_dist.schema import Batch, TokenType
from gpr_dist.training.engine import Engine

# N targets  A actions: impression, click, conversion

LOOKED_AT_BATCHES = 64
"""record batches, evenly spread over the split, that tell which columns are logged"""
_BUILD_AGAIN = "name the columns in the config of launch/build_data.py and build again"


class ValueWeights:
    """Give `fit` to weigh every step's targets."""

    def __init__(self, config: VaftConfig, divided_A: Tensor, last_mature: int, made_of: str = "") -> None:
        """Args: divided_A: bool, actions whose value is divided by the logged probabilities; last_mature: s, ads shown later are left
        out; made_of: a line for the log."""
        self.config, self._divided_A, self._last_mature, self.made_of = config, divided_A, last_mature, made_of
        self.means = RunningMeans.empty()

    def __call__(self, engine: Engine, batches: list[Batch]) -> tuple[list[Batch], dict[str, float]]:
        """This rank's micro-batches (on the CPU) with `target_weight_N`, without immature targets; and metrics of the step (collective).

        The mean weight of the step's targets is 1, so that the learning rate keeps its meaning; all are 0 if no ad is worth anything.
        """
        kept = [batch.keep_targets(batch.target_time_N <= self._last_mature) for batch in batches]
        immature = sum(len(before.target_time_N) - len(after.target_time_N) for before, after in zip(batches, kept, strict=True))
        worths = [ad_worth(b.target_action_N, b.target_value_N, b.target_pctr_N, b.target_pcvr_N, self._divided_A) for b in kept]
        kind_N, worth_N = torch.cat([action_index(batch.target_action_N) for batch in kept]), torch.cat(worths)
        is_known_N = worth_N.isfinite()
        unknown = float(len(worth_N) - is_known_N.sum())
        *known, immature, unknown = _sum(engine, _by_action(kind_N[is_known_N], worth_N[is_known_N]), [immature, unknown])
        self.means = self.means.updated(*torch.tensor(known, dtype=torch.float64).view(2, -1), self.config.memory)

        weights = [vaft_weights(b.target_action_N, worth, self.means.mean_A, self.config) for b, worth in zip(kept, worths, strict=True)]
        weight_N = torch.cat(weights)
        low, high = self.config.ratio_range
        ratio_N = worth_N / self.means.mean_A[kind_N]
        clipped = float(((ratio_N < low) | (ratio_N > high)).sum())
        *sums, clipped = _sum(engine, _by_action(kind_N, weight_N), [clipped])
        weight_A, count_A = torch.tensor(sums, dtype=torch.float64).view(2, -1)
        total, count = float(weight_A.sum()), max(1.0, float(count_A.sum()))
        scale = count / total if total > 0 else 0.0
        weighted = [_with_weights(batch, weight * scale) for batch, weight in zip(kept, weights, strict=True)]
        metrics = {"vaft/immature_targets": immature, "vaft/unknown_frac": unknown / count, "vaft/clipped_frac": clipped / count}
        metrics |= {f"vaft/weight_frac/{name}": float(weight_A[a]) / max(total, 1e-300) for a, name in enumerate(ACTIONS)}
        metrics |= {f"vaft/mean_worth/{name}": float(self.means.mean_A[a]) for a, name in enumerate(ACTIONS) if self.means.count_A[a] > 0}
        return weighted, metrics

    def state_dict(self) -> dict[str, Any]:
        """Plain JSON values; the same on every rank."""
        return {"sum": self.means.sum_A.tolist(), "count": self.means.count_A.tolist()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.means = RunningMeans(*(torch.tensor(state[key], dtype=torch.float64) for key in ("sum", "count")))


def open_value_weights(engine: Engine, reader: ShardReader, config: VaftConfig) -> ValueWeights:
    """Look at what the training split logs, and decide what an ad's worth is made of (collective: each rank looks at its share).

    Raises: DataError that names the columns which are missing; ConfigError when no target would be old enough.
    """
    numbers = np.unique(np.linspace(0, reader.num_batches - 1, LOOKED_AT_BATCHES).astype(int))[engine.rank :: engine.world_size]
    mine_A4 = sum((count_logged(reader, int(number)) for number in numbers), torch.zeros(len(ACTIONS), 4, dtype=torch.float64))
    logged_A4 = engine.all_reduce(mine_A4).cpu()
    divided_A, made_of = choose_worth(logged_A4, config, str(reader.folder))
    manifest = reader.manifest
    if config.maturity_seconds >= manifest.last_timestamp - manifest.first_timestamp:
        raise ConfigError(f"vaft.maturity_seconds={config.maturity_seconds} leaves no target: {reader.folder} spans "
                          f"{manifest.last_timestamp - manifest.first_timestamp} seconds")
    return ValueWeights(config, divided_A, manifest.last_timestamp - config.maturity_seconds, made_of)


def count_logged(reader: ShardReader, number: int) -> Tensor:
    """Of a record batch's ads by action: how many, with a value, with value and pCTR, with value and both; float64 [A, 4]."""
    batch = reader.read_batch(number)
    columns = {name: torch.from_numpy(batch.column(name).flatten().to_numpy().copy())
               for name in ("token_type", "action", "value", "pctr", "pcvr")}
    is_ad = columns["token_type"] == int(TokenType.I)
    kind_N = action_index(columns["action"][is_ad].long())
    is_valued, has_pctr, has_pcvr = (columns[name][is_ad].isfinite() for name in ("value", "pctr", "pcvr"))
    flags_N4 = torch.stack([torch.ones_like(is_valued), is_valued, is_valued & has_pctr, is_valued & has_pctr & has_pcvr], 1)
    return torch.zeros(len(ACTIONS), 4, dtype=torch.float64).index_add_(0, kind_N, flags_N4.double())


def choose_worth(logged_A4: Tensor, config: VaftConfig, where: str) -> tuple[Tensor, str]:
    """Which actions' values are divided by logged probabilities: those where most valued ads have them.

    Args: logged_A4: sums of `count_logged`.
    Returns: (bool [A], a line for the log). Raises: DataError naming missing columns.
    """
    never = torch.zeros(len(ACTIONS), dtype=torch.bool)
    if config.weights == "ones":
        return never, "VAFT with weights of 1: the loss of pretraining"
    if not logged_A4[:, 1].any():
        raise DataError(f"vaft.weights={config.weights} needs the column value of every ad (its eCPM), and pctr and pcvr to divide that "
                        f"of clicks and conversions; {where} logs no value: {_BUILD_AGAIN}, or set vaft.weights=ones")
    of_action_A4 = torch.where(logged_A4[:, 1:2] > 0, logged_A4, logged_A4.sum(0))  # an action that was not seen: as the others
    is_logged_A = torch.stack([of_action_A4[1, 2], of_action_A4[2, 3]]) > of_action_A4[1:, 1] / 2
    divided_A = torch.cat([never[:1], is_logged_A])
    lacking = {ACTIONS[a]: columns for a, columns in ((1, "pctr"), (2, "pctr and pcvr")) if logged_A4[a, 0] and not divided_A[a]}
    if config.weights == "raw" and lacking:
        name, columns = next(iter(lacking.items()))
        raise DataError(f"vaft.weights=raw needs {columns} of every {name} beside its value, and {where} does not log that: "
                        f"{_BUILD_AGAIN}, or set vaft.weights=clipped, which then takes the value alone")
    alone = "".join(f"; {name}s have no {columns}: their value is taken alone" for name, columns in lacking.items())
    seen = ", ".join(f"{int(logged_A4[a, 0])} {name}s ({float(logged_A4[a, 1] / logged_A4[a, 0]):.0%} with a value)"
                     for a, name in enumerate(ACTIONS) if logged_A4[a, 0])
    return divided_A, f"VAFT with {config.weights} weights; looked at {seen}{alone}"


def _by_action(kind_N: Tensor, values_N: Tensor) -> Tensor:
    """Sums and counts, float64 [2 A]."""
    sums = torch.zeros(2, len(ACTIONS), dtype=torch.float64)
    sums[0].index_add_(0, kind_N, values_N)
    sums[1].index_add_(0, kind_N, torch.ones_like(values_N))
    return sums.flatten()


def _sum(engine: Engine, sums: Tensor, more: list[float]) -> list[float]:
    """Over all ranks (collective)."""
    return engine.all_reduce(torch.cat([sums, torch.tensor(more, dtype=torch.float64)])).tolist()


def _with_weights(batch: Batch, weight_N: Tensor) -> Batch:
    batch.target_weight_N = weight_N.float()
    return batch
