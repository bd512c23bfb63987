"""A refit in the middle of a run: refused without launch/migrate.py, and with it the run goes on, on any number of ranks."""

import json
import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from documents import launch_module
from pretrain_runs import logged_losses, run_pretraining, write_configs

from data_pipeline.build import BuildConfig, build_data
from data_pipeline.tokenize_items import FitTokenizerConfig, build_tokenizer
from gpr_dist.config import load_config
from gpr_dist.errors import run_cli
from gpr_dist.tokenizer.semantic_ids import SemanticIds
from gpr_dist.training import checkpoint

AT, MORE = 12, 4  # the step migrated, and how many steps follow


@pytest.fixture
def launch(monkeypatch, capsys, tmp_path):
    """Run a script in this process, in `tmp_path`: starting one costs seconds. Returns (exit code, stdout, our error's line)."""
    monkeypatch.chdir(tmp_path)

    def run(script, *arguments):
        monkeypatch.setattr("sys.argv", [f"{script}.py", *arguments])
        capsys.readouterr()
        with pytest.raises(SystemExit) as left:
            run_cli(launch_module(script).main)
        printed = capsys.readouterr()
        return left.value.code, printed.out, [line for line in printed.err.splitlines() if line.split(":")[0].endswith("Error")]

    launch_module("evaluate")  # migrate imports it as a script beside it
    return run


@pytest.fixture(scope="module")
def refit(tiny, tmp_path_factory):
    """Another seed and two codes more per level, in a folder of its own."""
    folder = tmp_path_factory.mktemp("refit")
    values = yaml.safe_load((tiny / "tokenizer.yaml").read_text())
    values |= {"out": str(folder / "tokenizer-2"), "tokenizer": values["tokenizer"] | {"seed": 1, "codebook_size": 18}}
    (folder / "tokenizer.yaml").write_text(yaml.safe_dump(values))
    return build_tokenizer(load_config(FitTokenizerConfig, folder / "tokenizer.yaml"))


@pytest.fixture(scope="module")
def trained(tiny, tmp_path_factory):
    """A run folder whose newest checkpoint is of step AT, written by two ranks."""
    folder = tmp_path_factory.mktemp("trained")
    run_pretraining(folder / "job", [f"data.folder={tiny}/data", f"run.folder={folder}/runs", "run.name=daily",
                                     f"train.schedule.num_steps={AT}", "train.schedule.shape=constant", "validation.max_rows=4"])
    return folder / "runs" / "daily"


def continue_run(tiny, refit, folder, name, ranks, **options):
    overrides = [f"data.folder={tiny}/data", f"data.tokenizer={refit.folder}", f"run.folder={folder}", f"run.name={name}",
                 f"train.schedule.num_steps={AT + MORE}", "train.schedule.shape=constant"]
    return run_pretraining(folder / f"job-{name}-{ranks}", overrides, ranks=ranks, **options)


def test_a_run_goes_on_with_the_refitted_tokenizer(tiny, trained, refit, launch, tmp_path):
    runs = tmp_path / "runs"
    shutil.copytree(trained, runs / "refused", ignore=shutil.ignore_patterns("wandb"))
    refused = continue_run(tiny, refit, runs, "refused", 1, expect=2, launcher="python")
    named = (SemanticIds.load(tiny / "data" / "tokenizer").codebook_fingerprint, refit.codebook_fingerprint, "launch/migrate.py")
    assert any(all(name in line for name in named) for line in refused.errors()), refused.describe()

    before = {path: path.read_bytes() for path in trained.glob("step-*/*")}
    arguments = [f"checkpoint={trained}", f"tokenizer={refit.folder}", "out=runs/daily-2"]
    code, looked, _ = launch("migrate", *arguments, "--dry-run")
    assert code == 0 and "would migrate" in looked and not (runs / "daily-2").exists()
    code, done, errors = launch("migrate", *arguments)
    assert code == 0, errors
    assert done.splitlines()[:6] == looked.splitlines()[:6]
    assert {path: path.read_bytes() for path in trained.glob("step-*/*")} == before

    shutil.copytree(runs / "daily-2", runs / "daily-2-on-one")
    losses = {}
    for name, ranks, launcher in (("daily-2", 2, "torchrun"), ("daily-2-on-one", 1, "python")):
        continue_run(tiny, refit, runs, name, ranks, launcher=launcher)
        losses[name] = logged_losses(runs / name)
        assert sorted(losses[name]) == list(range(AT + 1, AT + MORE + 1))
        assert checkpoint.verify(checkpoint.step_folder(runs / name, AT + MORE)) is None
    assert all(abs(losses["daily-2"][step] - losses["daily-2-on-one"][step]) < 1e-4 for step in losses["daily-2"])

    code, _, errors = launch("evaluate", "checkpoint=runs/daily-2", "settings.max_rows=4", "settings.beam_width=4", "settings.ks=[2]",
                             "baselines=false")
    assert code == 0, errors
    assert json.loads((runs / "daily-2" / "evaluation-test.json").read_text())["results"]


@pytest.fixture(scope="module")
def grown(tiny, tmp_path_factory):
    """The same users see 30 new ads: another data set, whose catalogue continues the old one, and a tokenizer fitted on it."""
    folder = tmp_path_factory.mktemp("grown")
    shutil.copytree(tiny / "logs", folder / "logs")
    ads = pq.read_table(folder / "logs" / "ads.parquet")
    new = ads.slice(0, 300).set_column(1, "item", pa.array([f"ad-new-{n % 30}" for n in range(300)]))
    pq.write_table(pa.concat_tables([ads, new]), folder / "logs" / "ads.parquet")
    write_configs(folder)
    values = yaml.safe_load((folder / "build.yaml").read_text()) | {"catalogue": {"base": str(tiny / "data" / "catalogue")}}
    (folder / "build.yaml").write_text(yaml.safe_dump(values))
    build_data(load_config(BuildConfig, folder / "build.yaml"))
    bundle = build_tokenizer(load_config(FitTokenizerConfig, folder / "tokenizer.yaml", ["embedding.max_missing_frac=0.2"]))
    assert bundle.num_items == SemanticIds.load(tiny / "data" / "tokenizer").num_items + 30
    return folder / "data"


def test_a_run_goes_on_with_a_grown_catalogue(trained, grown, launch, tmp_path):
    overrides = [f"checkpoint={trained}", f"tokenizer={grown}/tokenizer", "out=runs/grown"]
    code, _, errors = launch("migrate", *overrides)
    assert code == 2 and "is of catalogue" in errors[0], errors
    code, done, errors = launch("migrate", *overrides, f"data={grown}")
    assert code == 0 and done.startswith("250 common items, "), errors
    run_pretraining(tmp_path / "job", [f"data.folder={grown}", f"run.folder={tmp_path}/runs", "run.name=grown", "validation.max_rows=4",
                                       f"train.schedule.num_steps={AT + MORE}", "train.schedule.shape=constant"], launcher="python")
    assert sorted(logged_losses(tmp_path / "runs" / "grown")) == list(range(AT + 1, AT + MORE + 1))


def test_what_cannot_be_migrated_is_one_line(tiny, trained, refit, launch, tmp_path):
    def refused(*overrides):
        code, _, errors = launch("migrate", *overrides)
        assert code == 2 and len(errors) == 1 and not (tmp_path / "out").exists(), errors
        return errors[0]

    common = [f"checkpoint={trained}", "out=out"]
    assert "there is nothing to migrate" in refused(*common, f"tokenizer={tiny}/data/tokenizer")
    assert "checkpoint's own tokenizer as before=" in refused(*common, f"tokenizer={refit.folder}", f"before={refit.folder}")
    (tmp_path / "popularity.npy").write_bytes(b"no array")
    assert "cannot be read as .npy" in refused(*common, f"tokenizer={refit.folder}", "popularity=popularity.npy")
    values = yaml.safe_load((tiny / "tokenizer.yaml").read_text())
    values |= {"out": str(tmp_path / "two-levels"), "tokenizer": values["tokenizer"] | {"num_levels": 2}}
    (tmp_path / "tokenizer.yaml").write_text(yaml.safe_dump(values))
    build_tokenizer(load_config(FitTokenizerConfig, tmp_path / "tokenizer.yaml"))
    assert "has 3 levels, the new one 2" in refused(*common, f"tokenizer={tmp_path}/two-levels")
