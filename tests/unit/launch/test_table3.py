"""Table 3: the chain of stages, what is trained and what is not repeated, a table of whatever is there, its arithmetic."""

import json
import sys

import pytest
from documents import ROOT, launch_module

from gpr_dist.config import load_config
from gpr_dist.errors import ConfigError, GPRError

table3 = launch_module("table3")


@pytest.fixture
def config(tmp_path):
    shipped = load_config(table3.Table3Config, ROOT / "configs/table3.yaml")
    for name in ("data/shards/test/manifest.json", "data/tokenizer/tokenizer.json", "data/simulator/simulator.json", "raw/truth"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    return shipped.model_copy(update={"name": "t", "data": tmp_path / "data", "market": tmp_path / "raw", "runs": tmp_path / "runs",
                                      "seeds": (3, 4), "metrics": ("ndcg", "served_revenue", "training_s")})


def finish(config, name, seed, value):
    path = table3.report_file(config, name, seed)
    path.parent.mkdir(parents=True)
    both = {"metrics": {"ndcg": [value, 0, 1]}, "totals": {"served_total_clicks": 5.0}}
    logged = {"metrics": {"served_revenue": [7.0, 6, 8]}, "totals": {"served_total_revenue": 99.0}}
    first = name == "mtp"
    path.write_text(json.dumps({"policies": {"policy": both, **({"cascade": both, "production": logged} if first else {})}}))
    lines = [{"step": 1, "seconds": 2.0, "grad_norm": 1.0}, {"step": 1, "validation/reward": 3.0}, {"step": 1, "checkpoint/seconds": 9.0}]
    (path.parent / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))


def write(config, tmp_path):
    path = tmp_path / "table3.yaml"
    path.write_text(json.dumps(config.model_dump(mode="json")))
    return str(path)


def test_every_stage_starts_from_the_one_before_it(config, tmp_path):
    train, value = table3.commands(config, "hepo+arr", 4)
    assert "launch/hepo.py" in train and f"init_from={tmp_path / 'runs/t-vaft-4'}" in train and "arr.share=0.2" in train
    assert {"run.seed=4", "data.loader.seed=4", "rollout.seed=4", f"simulator={tmp_path / 'data/simulator'}"} <= set(train)
    assert f"checkpoint={tmp_path / 'runs/t-hepo+arr-4'}" in value and "policies=[policy]" in value
    first = table3.commands(config, "mtp", 4)
    assert f"data.folder={tmp_path / 'data'}" in first[0] and not any(word.startswith("init_from=") for word in first[0])
    assert "policies=[policy, cascade, production]" in first[1]


def test_what_a_variant_starts_from_is_trained_too(config):
    assert table3.chosen(config.model_copy(update={"only": ("hepo",)})) == ["mtp", "vaft", "hepo"]
    with pytest.raises(ConfigError, match="must be a variant before it"):
        load_config(table3.Table3Config, ROOT / "configs/table3.yaml", ["variants.vaft.start=hepo"])


def test_finished_runs_are_not_repeated(config, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["table3.py", "--config", write(config, tmp_path), "only=[mtp, vaft]"])
    calls = []

    def run(command, _):
        calls.append(command)
        if "launch/evaluate_policy.py" in command:
            folder = next(word for word in command if word.startswith("checkpoint="))
            finish(config, *folder.rsplit("-", 2)[1:], 0.5)

    monkeypatch.setattr(table3, "run", run)
    finish(config, "mtp", 3, 0.25)
    table3.main()
    assert len(calls) == 3 * 2 and not any("run.name=t-mtp-3" in call for call in calls)
    printed = capsys.readouterr().out
    assert "| mtp | 0.3750 ± 0.1768 | – | 2.000 ± 0.000 |" in printed and "| vaft | 0.5000 ± 0.0000 |" in printed
    assert "| production | – | 7.000 ± 0.000 | – |" in printed and (tmp_path / "runs/t.md").read_text() in printed


def test_a_table_of_what_is_there(config, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["table3.py", "--config", write(config, tmp_path), "--table"])
    monkeypatch.setattr(table3, "run", lambda *_: pytest.fail("nothing is trained"))
    with pytest.raises(ConfigError, match="no run of t that was valued"):
        table3.main()
    finish(config, "mtp", 4, 0.25)
    table3.main()
    assert "| mtp | 0.2500 |" in capsys.readouterr().out


def test_missing_data_and_failures_are_named(config, tmp_path, monkeypatch):
    (tmp_path / "data/simulator/simulator.json").unlink()
    monkeypatch.setattr(sys, "argv", ["table3.py", "--config", write(config, tmp_path)])
    with pytest.raises(ConfigError, match=r"simulator\.json does not exist; make it with launch/fit_simulator\.py"):
        table3.main()
    with pytest.raises(GPRError, match="exit code 3 from"):
        table3.run([sys.executable, "-c", "raise SystemExit(3)"], config)
