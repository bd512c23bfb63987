"""The picture of a run's loss curves, drawn from its metrics.jsonl."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from gpr_dist.training.tracker import read_metrics


def plot_losses(run_folder: Path) -> Path:
    """Write `loss.png`: training loss, loss per head and per level, validation loss and HitR over steps. Returns its path."""
    lines = read_metrics(run_folder / "metrics.jsonl")
    figure, axes = plt.subplots(1, 3, figsize=(15, 4), constrained_layout=True)
    _curves(axes[0], lines, ["loss", "validation/loss"], "loss (nats per ad)")
    keys = sorted({key for line in lines for key in line})
    _curves(axes[1], lines, [k for k in keys if k.startswith(("loss_head/", "loss_level/"))], "loss by head and level (nats)")
    _curves(axes[2], lines, [k for k in keys if k.startswith("validation/hitr@")], "validation HitR")
    figure.suptitle(run_folder.name)
    path = run_folder / "loss.png"
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


def _curves(axis: plt.Axes, lines: list[dict], keys: list[str], title: str) -> None:
    for key in keys:
        points = [(line["step"], line[key]) for line in lines if isinstance(line.get(key), int | float)]
        if points:
            marker = "o" if key.startswith("validation") else None
            axis.plot(*zip(*points, strict=True), label=key, linewidth=1, marker=marker, markersize=3)
    axis.set(title=title, xlabel="step")
    axis.grid(alpha=0.3)
    if axis.lines:
        axis.legend(fontsize=7)
