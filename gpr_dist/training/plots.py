"""The picture of a run's loss curves, drawn from its metrics.jsonl."""

from pathlib import Path
from typing import Any

import numpy as np

from gpr_dist.training.tracker import read_metrics


def plot_losses(run_folder: Path) -> Path:
    """Write `loss.png`: training loss, loss per head and per level, validation loss and HitR over steps. Returns its path."""
    from matplotlib.figure import Figure  # here: only rank 0 draws, at the end

    lines = read_metrics(run_folder / "metrics.jsonl")
    figure = Figure(figsize=(15, 4), layout="constrained")
    axes = figure.subplots(1, 3)
    _curves(axes[0], lines, ["loss", "validation/loss"], "loss, weighted over heads (nats)")
    keys = sorted({key for line in lines for key in line})
    _curves(axes[1], lines, [k for k in keys if k.startswith(("loss_head/", "loss_level/"))], "loss by head and level (nats)")
    _curves(axes[2], lines, [k for k in keys if k.startswith("validation/hitr@")], "validation HitR")
    figure.suptitle(run_folder.name)
    path = run_folder / "loss.png"
    figure.savefig(path, dpi=110)
    return path


def _curves(axis: Any, lines: list[dict], keys: list[str], title: str) -> None:
    for key in keys:
        points = [(line["step"], line[key]) for line in lines if isinstance(line.get(key), int | float)]
        if not points:
            continue
        steps, values = zip(*points, strict=True)
        if key.startswith("validation"):
            axis.plot(steps, values, label=key, marker="o", markersize=3)
        else:  # single steps are noisy: thin line, with the mean of the last 5 % over it
            window = max(1, len(values) // 20)
            line = axis.plot(steps, values, linewidth=0.5, alpha=0.35)[0]
            mean = np.convolve(values, np.ones(window) / window, mode="valid")
            axis.plot(steps[window - 1 :], mean, label=key, color=line.get_color(), linewidth=1.5)
    axis.set(title=title, xlabel="step")
    axis.grid(alpha=0.3)
    if axis.lines:
        axis.legend(fontsize=7, loc="upper right")
