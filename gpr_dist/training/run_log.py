"""A run folder read back: its curves, what happened to it, and how it ended. Needs no checkpoint, no data and no GPU."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml

from gpr_dist.errors import DataError
from gpr_dist.training.spikes import read_traces
from gpr_dist.training.tracker import read_events, read_metrics

BEGINNINGS = ("start", "resume")


class Curve(NamedTuple):
    """A metric over steps; values that are not finite are left out."""

    steps: np.ndarray
    values: np.ndarray


@dataclass(frozen=True)
class RunLog:
    """Everything the run page shows of one run."""

    name: str
    config: dict[str, str]
    """flat: dotted name → value"""
    curves: dict[str, Curve]
    """by the name in metrics.jsonl"""
    events: list[dict[str, Any]]
    traces: list[dict[str, Any]]
    """of spikes.py"""

    @property
    def step(self) -> int:
        """The last step logged."""
        return max((int(curve.steps[-1]) for curve in self.curves.values() if len(curve.steps)), default=0)

    @property
    def num_steps(self) -> int:
        return int(self.config.get("train.schedule.num_steps", 0))

    @property
    def status(self) -> str:
        """finished, stopped (by a signal or a guard), failed, or without an end: running or killed."""
        marks = [event for event in self.events if event["event"] in (*BEGINNINGS, "end")]
        if marks:
            return marks[-1]["status"] if marks[-1]["event"] == "end" else "running or killed"
        return "finished" if self.step >= self.num_steps else "unfinished"

    @property
    def error(self) -> str:
        """What ended a run that failed."""
        return next((event.get("error", "") for event in reversed(self.events) if event["event"] == "end"), "")

    @property
    def began(self) -> dict[str, Any]:
        """Facts of the last start: commit, world_size, device; empty for a run of an older version."""
        return next((event for event in reversed(self.events) if event["event"] in BEGINNINGS), {})

    @property
    def restarts(self) -> list[int]:
        """Steps at which the run was resumed with something left to do."""
        return [event["step"] for event in self.events if event["event"] == "resume" and event["step"] < self.num_steps]

    @property
    def alerts(self) -> list[dict[str, Any]]:
        return [event for event in self.events if event["event"] == "alert"]

    def last(self, metric: str, share: float = 0.05) -> float | None:
        """Mean over the last part of a curve; none without one."""
        values = self.curves[metric].values if metric in self.curves else ()
        return float(np.mean(values[-max(1, round(share * len(values))):])) if len(values) else None

    def total(self, metric: str) -> float:
        return float(self.curves[metric].values.sum()) if metric in self.curves else 0.0


def read_run(folder: Path) -> RunLog:
    """Raises: DataError for a folder that is no run."""
    path = folder / "metrics.jsonl"
    if not path.is_file():
        raise DataError(f"{folder} is no run folder: no metrics.jsonl; give one that launch/pretrain.py, finetune.py or hepo.py made")
    config = folder / "config.yaml"
    settings = yaml.safe_load(config.read_text(encoding="utf-8")) if config.exists() else {}
    return RunLog(folder.resolve().name, flatten(settings), curves_of(read_metrics(path)), read_events(folder), read_traces(folder))


def curves_of(lines: Sequence[dict[str, Any]]) -> dict[str, Curve]:
    """Columns of metrics.jsonl: finite numbers only."""
    found: dict[str, tuple[list[int], list[float]]] = {}
    for line in lines:
        for name, value in line.items():
            if name != "step" and isinstance(value, int | float):
                steps, values = found.setdefault(name, ([], []))
                steps.append(line["step"])
                values.append(value)
    return {name: Curve(np.array(steps), np.array(values, float)) for name, (steps, values) in found.items()}


def flatten(settings: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested settings by dotted names, as texts."""
    rows: dict[str, str] = {}
    for name, value in settings.items():
        rows |= flatten(value, f"{prefix}{name}.") if isinstance(value, dict) and value else {f"{prefix}{name}": str(value)}
    return rows


def differences(runs: Sequence[RunLog]) -> list[tuple[str, ...]]:
    """Settings that are not the same in all runs: (name, value in each); "-" where a run has no such setting."""
    names = sorted({name for run in runs for name in run.config} - {"run.name", "run.folder"})
    rows = [(name, *(run.config.get(name, "-") for run in runs)) for name in names]
    return [row for row in rows if len(set(row[1:])) > 1]
