"""The picture of the losses: made from whatever lines there are."""

import json

import matplotlib.image
import pytest

from gpr_dist.training.plots import plot_losses


def write(folder, lines):
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def ink(path):
    return float((matplotlib.image.imread(path)[..., :3] < 0.9).any(-1).mean())


def test_curves_are_drawn_where_there_are_numbers(tmp_path):
    write(tmp_path, [])
    empty = plot_losses(tmp_path)
    assert empty == tmp_path / "loss.png"
    before = ink(empty)
    write(tmp_path, [{"step": s, "loss": 5 - s / 10, "loss_head/1": 4 - s / 10, "loss_level/1": 3.0} for s in range(30)]
          + [{"step": 29, "validation/loss": 2.0, "validation/hitr@10": 0.3}])
    assert ink(plot_losses(tmp_path)) > before


@pytest.mark.parametrize("loss", ["nan", "inf", None])
def test_steps_without_a_finite_loss_are_left_out(tmp_path, loss):
    write(tmp_path, [{"step": 1, "loss": 1.0}, {"step": 2, "loss": loss}, {"step": 3, "loss": 0.5}])
    assert plot_losses(tmp_path).stat().st_size > 1000
