"""Comparisons: which commands run for a variant and seed, what is not repeated, and the table's arithmetic."""

import json
import sys

import pytest
from documents import ROOT, launch_module

from gpr_dist.config import load_config
from gpr_dist.errors import GPRError

compare = launch_module("compare")


@pytest.fixture
def config(tmp_path):
    folders = [f"run.folder={tmp_path / 'runs'}", f"data.folder={tmp_path / 'data'}"]
    return compare.CompareConfig(name="test", common=(*folders, "model.width=32"), seeds=(3, 4), ranks=1, variants={
        "plain": {}, "wide": {"train": ["model.width=64"]}, "other": {"tokenizer": ["tokenizer.seed=7"]}})


def finish(config, name, seed, value, seconds):
    folder = compare.run_folder(config, name, seed)
    folder.mkdir(parents=True)
    result = {"hitr@10": value, "hitr@100": 2 * value, "ndcg@10": value / 2}
    compare.report_file(config, name, seed).write_text(json.dumps({"results": {"GPR": result}}))
    lines = [{"step": 1, "seconds": seconds, "tokens_per_s": 5.0}, {"step": 1, "validation/loss": 3.0, "seconds": 99.0}]
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))


def test_commands_of_a_variant(config, tmp_path):
    fit, train, evaluate = compare.commands(config, "other", 4)
    assert fit[1:2] + fit[4:] == ["launch/fit_tokenizer.py", "tokenizer.seed=7", f"out={tmp_path / 'data' / 'tokenizer-test-other'}"]
    assert {"run.name=test-other-4", "run.seed=4", "data.loader.seed=4", "model.width=32",
            f"data.tokenizer={tmp_path / 'data' / 'tokenizer-test-other'}"} <= set(train)
    assert f"checkpoint={tmp_path / 'runs' / 'test-other-4'}" in evaluate
    assert compare.commands(config, "wide", 3)[0].index("model.width=64") > compare.commands(config, "wide", 3)[0].index("model.width=32")


def test_finished_runs_are_not_repeated_and_a_failure_stops(config, monkeypatch, capsys, tmp_path):
    path, calls = tmp_path / "compare.yaml", []
    path.write_text(json.dumps(config.model_dump(mode="json")))
    monkeypatch.setattr(sys, "argv", ["compare.py", "--config", str(path)])

    def run(command):
        calls.append(next(word for word in command if word.startswith(("run.name=", "checkpoint=", "out="))))
        if command[1] == "launch/evaluate.py":
            finish(config, *calls[-1].rsplit("-", 2)[1:], 0.25, 10.0)

    monkeypatch.setattr(compare, "run", run)
    finish(config, "plain", 3, 0.1, 20.0)
    compare.main()
    # plain once, the others twice; the stand-in writes no tokenizer, so that it is fitted for each seed
    assert not any("plain-3" in call for call in calls) and len(calls) == 5 * 2 + 2
    printed = capsys.readouterr().out
    assert "| plain | 0.1750 ± 0.1061 | 0.3500 ± 0.2121 | 0.0875 ± 0.0530 | 15 |" in printed
    assert json.loads((tmp_path / "runs" / "test.json").read_text())["wide"][0]["hitr@100"] == 0.5
    with pytest.raises(GPRError, match="exit code 3 from"):
        monkeypatch.undo()
        compare.run([sys.executable, "-c", "raise SystemExit(3)"])


@pytest.mark.parametrize("path", sorted((ROOT / "configs/compare").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_comparisons_of_the_repository_are_valid(path):
    config = load_config(compare.CompareConfig, path)
    for name in config.variants:
        load_config(compare.PretrainConfig, config.base, compare.overrides(config, name, 0))


def test_a_data_set_is_built_once_and_every_ranker_of_every_checkpoint_has_a_row(config, tmp_path):
    config = config.model_copy(update={"build_data": "b.yaml", "source": ("source.folder=x",), "checkpoints": ("last", "best"),
                                       "rankers": ("generative", "item head"), "variants": {"plain": config.variants["plain"]},
                                       "evaluate": ("compare.exclude_seen=true",)})
    build, fit = compare.preparation(config)
    assert build[1:] == ["launch/build_data.py", "--config", "b.yaml", "source.folder=x", f"out={tmp_path / 'data'}"]
    assert fit[1] == "launch/fit_tokenizer.py" and fit[-1] == f"out={tmp_path / 'data' / 'tokenizer'}"
    _, last, best = compare.commands(config, "plain", 3)
    assert "best=false" in last and "best=true" in best and "compare.exclude_seen=true" in best and last[-1] != best[-1]
    finish(config, "plain", 3, 0.1, 20.0)
    compare.report_file(config, "plain", 3, "best").write_text(json.dumps({"results": {"generative": {"hitr@10": 0.2}}}))
    for file in ("shards/test/manifest.json", "tokenizer/tokenizer.json"):
        (tmp_path / "data" / file).parent.mkdir(parents=True)
        (tmp_path / "data" / file).touch()
    assert compare.preparation(config) == []
    assert compare.measured(config, "plain, best: generative", "plain", 3, "best") == {"hitr@10": 0.2, "training_s": 20.0}
    with pytest.raises(GPRError, match="no ranker 'item head'; it has generative"):
        compare.measured(config, "plain, best: item head", "plain", 3, "best")
