"""Traces a step's loss to its rows: which journeys, in which file, with which ads and advertisers, made it what it was.

Nothing is computed before it is asked for: a step only keeps the losses of its own targets, a float each. Every rank describes its own
rows in a file of its own; one small reduction decides which ranks do.
"""

import hashlib
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from gpr_dist.data.reader import ShardReader
from gpr_dist.errors import GPRError
from gpr_dist.schema import Batch, write_atomic
from gpr_dist.training.engine import Engine

# B rows of a micro-batch  N targets  W ranks

FOLDER = "spikes"
MAX_RANKS, MAX_ROWS, MAX_ADS = 8, 20, 5


@dataclass(frozen=True)
class Tracer:
    """What rows and items are called."""

    reader: ShardReader
    """of the training split"""
    catalogue: Path
    """catalogue.arrow; columns item_id and, where there is one, advertiser"""

    def trace(self, engine: Engine, run: Path, step: int, reason: str, batches: Sequence[Batch], nll: Sequence[Tensor],
              usual: float) -> None:
        """Write the rows that raised the loss of a step most, of the ranks concerned most (collective).

        A row's excess is the sum over its targets of (nll - usual), nats: what it added to the step's sum of losses above the mean;
        infinite where a target's loss is not finite.
        Args: batches: this rank's micro-batches, on the CPU; nll: of their targets, summed over levels; usual: nats per target of the
            step, over all ranks.
        """
        losses = [nll_N.cpu() for nll_N in nll]
        rows = [(excess, number, row) for number, batch in enumerate(batches)
                for row, excess in enumerate(row_excess(batch, losses[number], usual).tolist()) if excess > 0]
        rows = sorted(rows, reverse=True)[:MAX_ROWS]
        worst_W = torch.zeros(engine.world_size, dtype=torch.float64)
        worst_W[engine.rank] = rows[0][0] if rows else 0.0
        worst_W = engine.all_reduce(worst_W.clamp_max(1e300), "max").cpu()
        if not rows or engine.rank not in worst_W.argsort(descending=True, stable=True)[:MAX_RANKS].tolist():
            return
        path = run / FOLDER / f"step-{step:06d}-rank-{engine.rank:05d}.json"
        try:
            names = self._names(torch.cat([batch.target_item_N for batch in batches]).unique().numpy())
            described = [self._describe(batches[number], row, excess, losses[number], names) for excess, number, row in rows]
            path.parent.mkdir(exist_ok=True)
            write_atomic(path, json.dumps({"step": step, "rank": engine.rank, "reason": reason, "usual_nll": usual, "rows": described},
                                          indent=1).encode())
        except (OSError, GPRError) as error:  # a rank that ends here would leave the others waiting
            print(f"WARNING: {path} could not be written: {error}", file=sys.stderr, flush=True)

    def _describe(self, batch: Batch, row: int, excess: float, nll_N: Tensor, names: dict[int, dict[str, str]]) -> dict[str, Any]:
        of_row_n = torch.nonzero(batch.request_row_R[batch.target_request_N] == row).flatten()
        worst_n = of_row_n[nll_N[of_row_n].nan_to_num(float("inf")).argsort(descending=True, stable=True)][:MAX_ADS]
        ads = [{"nll": _number(nll), "head": head + 1, "item": item, **names[item]} for nll, head, item in
               zip(nll_N[worst_n].tolist(), batch.target_head_N[worst_n].tolist(), batch.target_item_N[worst_n].tolist(),
                   strict=True)]
        number = int(batch.row_ids_B[row])
        return {"row": number, "where": self.reader.locate(number), "user": self._user(number), "targets": len(of_row_n),
                "mean_nll": _number(float(nll_N[of_row_n].mean())), "excess": _number(excess), "ads": ads}

    def _user(self, row: int) -> str:
        """A digest: enough to see that two rows are one user's, not who it is."""
        number = int(np.searchsorted(self.reader.first_row, row, side="right")) - 1
        user = self.reader.read_batch(number).column("user_id")[row - int(self.reader.first_row[number])].as_py()
        return hashlib.sha256(user.encode()).hexdigest()[:16]

    def _names(self, items: np.ndarray) -> dict[int, dict[str, str]]:
        with pa.memory_map(str(self.catalogue)) as file:
            table = pa.ipc.open_file(file).read_all()
            found = table.select([name for name in ("item_id", "advertiser") if name in table.column_names]).take(items).to_pylist()
        return {item: {name: str(value) for name, value in values.items()} for item, values in zip(items.tolist(), found, strict=True)}


def row_excess(batch: Batch, nll_N: Tensor, usual: float) -> Tensor:
    """What each row added to the sum of losses above `usual` per target, float64 [B]; infinite where a loss is not finite."""
    above_N = torch.where(nll_N.isfinite(), nll_N.double() - usual, float("inf"))
    return above_N.new_zeros(batch.num_rows).index_add_(0, batch.request_row_R[batch.target_request_N], above_N)


def read_traces(run: Path) -> list[dict[str, Any]]:
    """Every rank's traces of a run, by step; rows of a step over all its ranks, the worst first."""
    steps: dict[int, dict[str, Any]] = {}
    for path in sorted((run / FOLDER).glob("step-*-rank-*.json")):
        trace = json.loads(path.read_text())
        step = steps.setdefault(trace["step"], {**trace, "rows": []})
        step["rows"] += [{**row, "rank": trace["rank"]} for row in trace["rows"]]
    return [{**step, "rows": sorted(step["rows"], key=lambda row: -float(row["excess"]))} for _, step in sorted(steps.items())]


def _number(value: float) -> float | str:
    """JSON has no infinity."""
    return value if np.isfinite(value) else str(value)
