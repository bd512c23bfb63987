"""launch/plan.py on the default config without data, its numbers against arithmetic from the shapes of the layers."""

import re

import numpy as np
import pytest
from documents import ROOT, launch_module

from gpr_dist.config import load_config
from gpr_dist.job import PretrainConfig
from gpr_dist.model.gpr import GPRConfig

plan = launch_module("plan")
SIZES = ["data.loader.global_batch_size=32", "model.num_mtp_heads=4", "model.hsd.num_layers=2", "model.hsd.ffn_multiple=2",
         "model.ptd.num_layers=1", "model.ptd.ffn_multiple=2", "engine.precision=fp32"]  # the quickstart may be tuned


def run_plan(monkeypatch, capsys, *arguments):
    monkeypatch.setattr("sys.argv", ["plan.py", *arguments])
    plan.main()
    return capsys.readouterr().out


def printed(text, pattern):
    return re.search(pattern, text)[1].replace(",", "")


@pytest.mark.parametrize(("width", "ranks", "overrides"), [
    (96, 8, ["model.width=96"]), (512, 64, ["machine.world_size=64", "model.width=512"])])
def test_numbers_of_the_default_config(monkeypatch, capsys, tmp_path, width, ranks, overrides):
    monkeypatch.chdir(tmp_path)  # there is no data here
    text = run_plan(monkeypatch, capsys, "--config", str(ROOT / "configs" / "pretrain.yaml"), *SIZES, "model.pointer.width=0", *overrides)
    assert "assumed, because" in text and list(tmp_path.iterdir()) == []

    d, f = width, 2 * width  # 2 HSD layers, 1 PTD block, 4 token types, 4 heads, 3 levels of 256 codes; no U and E fields without data
    parameters = {
        "codes": 3 * 256 * d + 3 * 256,
        "tokens": d + d + (4 + 5 + 256 + 32 + 24 + 7) * d + (2 * d + d),
        "hsd": 2 * (4 * 2 * d + d * 4 * d + 4 * (d * f + f * d) + 4 * 2 * d) + 2 * d,
        "ptd": 4 * d + 4 * d * d + 3 * d + 3 * 2 * d + d * d + 2 * d * d + d * d + 3 * d * d + d * d + (d * f + f) + (f * d + d) + 2 * d,
        "hte": (d * d + d) + (d + 1) + 3 * ((2 * d * d + d) + (d + 1))}
    for part, count in parameters.items():
        assert int(printed(text, rf" {part} +([\d,]+)\n")) == count, part
    total = sum(parameters.values())
    assert int(printed(text, r" all +([\d,]+)\n")) == total

    # float32: 4 bytes of weight, 4 of gradient, 8 of Adam moments
    for stage, size in enumerate((16.0, 8 + 8 / ranks, 4 + 12 / ranks, 16 / ranks)):
        assert float(printed(text, rf"ZeRO-{stage} +([\d.]+) \+")) == pytest.approx(total * size / 2**30, abs=5.1e-4)
    assert float(printed(text, r"([\d.e-]+) GB by each rank")) == pytest.approx(12 * total / ranks / 1e9, rel=1e-3)

    # 32 journeys of 400 tokens and 60 ads; heads 2 to 4 have a target for every other ad
    tokens, pairs, openings, targets = 32 * 400, 32 * 400 * 400 // 2, 32 * 30 * 4, 32 * (60 + 3 * 30)
    decoded = openings + 2 * targets
    assert int(printed(text, r"([\d,]+) tokens,")) == tokens and int(printed(text, r"([\d,]+) target ads")) == 32 * 60
    forward = {
        "hsd.dense": 2 * tokens * 2 * (d * 4 * d + 2 * d * f),
        "hsd.attention": 2 * 2 * pairs * d * 2,
        "ptd.dense": 2 * (decoded * (d * d + d * d + 3 * d * d + d * d + 2 * d * f) + tokens * d * 2 * d),
        "ptd.attention": 2 * 2 * decoded * 200 * d,
        "ptd.codes": 2 * targets * 3 * d * 256,
        "hte": 2 * targets * (d * d + d + 3 * (2 * d * d + d))}
    for part, flops in forward.items():
        assert float(printed(text, rf" {part} +(\S+) FLOP")) == pytest.approx(3 * flops, rel=1e-3), part
    step = 3 * sum(forward.values())
    assert float(printed(text, r" all +(\S+) FLOP")) == pytest.approx(step, rel=1e-3)
    assert float(printed(text, r"ranks: (\S+) s per step")) == pytest.approx(step / (ranks * 989e12 * 0.3), rel=1e-3)


def test_it_reads_any_training_config_and_defaults_to_the_quickstart(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    text = run_plan(monkeypatch, capsys, "--dry-run", "train.schedule.lr=1e-4")
    (tmp_path / "plan.yaml").write_text(text)
    planned = load_config(plan.PlanConfig, tmp_path / "plan.yaml")
    expected = load_config(PretrainConfig, ROOT / "configs" / "pretrain.yaml", ["train.schedule.lr=1e-4"])
    assert PretrainConfig(**planned.model_dump(exclude={"machine"})) == expected


def test_work_of_journeys_of_several_lengths():
    """Their squares count for attention; the intent window bounds what a decoder position reads."""
    lengths = np.array([100, 300])
    work = plan.step_work(GPRConfig(), 10, lengths, 5.0)
    assert (work.tokens, work.token_pairs) == (2000, 10 * 50_000 // 2)
    assert (work.openings, work.targets) == (10 * 5 / 2 * 4, 10 * (5 + 3 * 5 / 2))
    assert work.target_intents == work.targets * 50_000 / 200 / 2
    short = plan.step_work(GPRConfig(ptd={"intent_window": 16}), 10, lengths, 5.0)
    assert (short.opening_intents, short.target_intents) == (16 * short.openings, 16 * short.targets)
