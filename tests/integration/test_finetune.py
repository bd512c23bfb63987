"""Value-aware fine-tuning as a job: from a pretraining run to an evaluated and exported model, killed, on any number of ranks."""

import json
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from pretrain_runs import NUM_STEPS, Pretraining, logged_losses, run_pretraining, run_script_here
from ranks import run_ranks
from test_faults import complete_steps, wait_for

from data_pipeline.shards import ShardConfig, ShardWriter, write_manifest
from gpr_dist.config import load_config
from gpr_dist.data.reader import ShardReader
from gpr_dist.job import FinetuneConfig, PretrainConfig
from gpr_dist.schema import Action, TokenType
from gpr_dist.training import checkpoint
from gpr_dist.training.tracker import read_metrics

STEPS = 6
LOOP = [f"train.schedule.num_steps={STEPS}", "train.schedule.warmup_steps=1", "train.schedule.lr=2e-3", "train.schedule.shape=constant",
        "train.validate_every_steps=0", f"train.checkpoint.keep_last={STEPS}", "train.checkpoint.every_steps=1"]


def edit_train(tiny: Path, folder: Path, **columns: np.ndarray) -> Path:
    """The tiny data with other columns at the ads of the training split, drawn anew for each from the values given."""
    shutil.copytree(tiny / "data", folder, ignore=shutil.ignore_patterns("train"))
    reader, rng = ShardReader(tiny / "data" / "shards" / "train"), np.random.default_rng(0)
    with ShardWriter(folder / "shards" / "train", 0, ShardConfig(rows_per_batch=32)) as writer:
        for number in range(reader.num_batches):
            batch = reader.read_batch(number)
            is_ad = batch.column("token_type").flatten().to_numpy() == TokenType.I
            for name, drawn in columns.items():
                old = batch.column(name)
                values = np.where(is_ad, rng.choice(drawn, len(is_ad)), old.flatten().to_numpy())
                new = pa.ListArray.from_arrays(old.offsets, pa.array(values, old.type.value_type))
                batch = batch.set_column(batch.schema.get_field_index(name), name, new)
            writer.write(batch)
    m = reader.manifest
    write_manifest(folder / "shards" / "train", "train", m.user_features, m.env_features, m.catalogue_fingerprint, m.num_items)
    return folder


@pytest.fixture(scope="module")
def pretrained(python_run):
    return python_run[1]


@pytest.fixture(scope="module")
def priced(tiny, tmp_path_factory):
    """Ads that were seen, clicked and bought, with logged probabilities."""
    return edit_train(tiny, tmp_path_factory.mktemp("priced") / "data", pctr=np.linspace(0.05, 0.4, 50), pcvr=np.linspace(0.02, 0.2, 50),
                      action=np.repeat([Action.IMPRESSION, Action.CLICK, Action.CONVERSION], [7, 2, 1]))


@pytest.fixture(scope="module")
def runs(tiny, priced, pretrained, tmp_path_factory):
    """(folder of the runs, errors by name) of many jobs on two ranks and on one."""
    folder = tmp_path_factory.mktemp("finetune")
    unpriced = edit_train(tiny, folder / "unpriced", value=np.array([np.nan]))
    clicks = edit_train(tiny, folder / "clicks", pctr=np.array([np.nan]))
    first, last = (getattr(ShardReader(priced / "shards" / "train").manifest, f"{end}_timestamp") for end in ("first", "last"))
    bundle = folder / "bundle"
    run_script_here("export", folder, f"checkpoint={pretrained}", f"out={bundle}", "calibration_rows=0")

    def job(name, stage="finetune", data=priced, source=pretrained, *more):
        return stage, [f"init_from={source}", f"data.folder={data}", f"run.folder={folder}", f"run.name={name}", *LOOP, *more]

    config = load_config(PretrainConfig, pretrained / "config.yaml")
    as_pretrained = [f"data.{key}={getattr(config.data, key)}" for key in ("softmax", "history_events")]
    as_pretrained += [f"data.loader.{key}={getattr(config.data.loader, key)}" for key in ("global_batch_size", "micro_batch_tokens")]
    as_pretrained += [f"head_weights={list(config.head_weights)}"]
    two = {"two": job("two"), "raw": job("raw", "finetune", priced, pretrained, "vaft.weights=raw"),
           "mature": job("mature", "finetune", priced, pretrained, f"vaft.maturity_seconds={(last - first) // 4}"),
           "unpriced": job("unpriced", "finetune", unpriced), "no pctr": job("no_pctr", "finetune", clicks, pretrained, "vaft.weights=raw")}
    one = {"one": job("one"), "ones": job("ones", "finetune", priced, pretrained, "vaft.weights=ones"),
           "mtp": ("pretrain", ["--config", str(pretrained / "config.yaml"), *job("mtp")[1]]),
           "unpriced ones": job("unpriced_ones", "finetune", unpriced, pretrained, "vaft.weights=ones"),
           "bundle": job("from_bundle", "finetune", priced, bundle, *as_pretrained),
           "other stage": ("finetune", [f"init_from={pretrained}", f"run.folder={pretrained.parent}", f"run.name={pretrained.name}"]),
           "nowhere": job("nowhere", "finetune", priced, folder / "nowhere")}
    errors = {}
    for world, jobs in ((2, two), (1, one)):
        found = run_ranks("stage_workers:run_stages", world, folder / f"ranks-{world}", timeout=240, jobs=list(jobs.values()))
        assert all(rank == found[0] for rank in found)
        errors |= dict(zip(jobs, found[0], strict=True))
    return folder, errors


def merged_metrics(run):
    """Every number logged at each step, without times."""
    steps = {}
    for line in read_metrics(run / "metrics.jsonl"):
        steps.setdefault(line["step"], {}).update(line)
    return [{key: value for key, value in step.items() if key == "targets" or key.startswith(("loss", "vaft/"))} for step in steps.values()]


def test_every_run_ended_as_it_should(runs):
    _, errors = runs
    assert [name for name, error in errors.items() if error] == ["unpriced", "no pctr", "other stage", "nowhere"]
    assert all(part in errors["unpriced"] for part in ("DataError", "column value", "pctr", "pcvr", "logs no value", "weights=ones"))
    assert "needs pctr of every click" in errors["no pctr"] and "weights=clipped" in errors["no pctr"]
    assert all(part in errors["other stage"] for part in ("is of the stage pretrain", "job is of the stage finetune", "init_from="))
    assert "no complete checkpoint and no bundle there" in errors["nowhere"]


def test_the_number_of_ranks_does_not_matter(runs):
    folder, _ = runs
    one, two = merged_metrics(folder / "one"), merged_metrics(folder / "two")
    assert len(one) == len(two) == STEPS and all(a == pytest.approx(b, rel=2e-5) for a, b in zip(one, two, strict=True))
    assert len({step["vaft/mean_worth/click"] for step in one}) == STEPS
    for step in one:
        assert sum(step[f"vaft/weight_frac/{action}"] for action in ("impression", "click", "conversion")) == pytest.approx(1)
    worth = [one[-1][f"vaft/mean_worth/{action}"] for action in ("impression", "click", "conversion")]
    assert 0.4 < worth[0] < 0.6 and 1.5 < worth[1] < 4 and worth[2] > 10  # uniform 0..1, over chances of 0.05..0.4 and 0.02..0.2


def test_weights_of_1_are_pretraining_bit_for_bit(runs):
    folder, _ = runs
    ones, mtp, clipped, raw = (logged_losses(folder / name) for name in ("ones", "mtp", "one", "raw"))
    assert len(ones) == STEPS and ones == mtp
    assert len({*ones.values(), *clipped.values(), *raw.values()}) == 3 * STEPS
    weights = [dict(checkpoint.iter_weights(folder / name / f"step-{STEPS:06d}")) for name in ("ones", "mtp", "one")]
    assert all(weights[0][name].equal(weights[1][name]) for name in weights[0])
    changed = {name.split(".")[0] for name in weights[0] if not weights[0][name].equal(weights[2][name])}
    assert changed >= {"codes", "tokens", "hsd", "ptd", "hte"}


def test_what_the_config_leaves_open_comes_from_the_source(runs, pretrained):
    folder, _ = runs
    source = load_config(PretrainConfig, pretrained / "config.yaml")
    tuned = load_config(FinetuneConfig, folder / "one" / "config.yaml")
    assert tuned.model == source.model and tuned.head_weights == source.head_weights and tuned.validation == source.validation
    assert tuned.engine == source.engine and tuned.data.loader == source.data.loader and tuned.data.folder != source.data.folder
    assert tuned.data.build is None and tuned.train.schedule.num_steps == STEPS != source.train.schedule.num_steps
    assert logged_losses(folder / "from_bundle") == logged_losses(folder / "one")
    state = checkpoint.read_state(folder / "one" / f"step-{STEPS:06d}")
    assert state["stage"] == "finetune" and state["origin"]["source"] == str(pretrained / f"step-{NUM_STEPS:06d}")


def test_young_labels_are_left_out(runs):
    folder, _ = runs
    mature, everything = merged_metrics(folder / "mature"), merged_metrics(folder / "two")
    assert sum(step["vaft/immature_targets"] for step in mature) > 0 == sum(step["vaft/immature_targets"] for step in everything)
    assert all(a["targets"] <= b["targets"] for a, b in zip(mature, everything, strict=True))


def test_killed_and_resumed(runs, priced, pretrained, tmp_path):
    """By SIGKILL on both ranks; the running means come back with the weights."""
    run = tmp_path / "runs" / "killed"
    overrides = [f"init_from={pretrained}", f"data.folder={priced}", f"run.folder={tmp_path}/runs", "run.name=killed", *LOOP]
    options = {"launcher": "ranks", "stage": "finetune", "tiny": False}
    with Pretraining(tmp_path / "first", overrides, **options) as job:
        wait_for(job, lambda: (run / "step-000003" / "manifest.json").exists(), "checkpoint")
        for pid in job.ranks():
            os.kill(pid, signal.SIGKILL)
        assert job.wait(60) == [-signal.SIGKILL] * 2
    assert 3 <= complete_steps(run)[-1] < STEPS
    again = [option if not option.startswith("init_from") else "init_from=gone" for option in overrides]  # not needed any more
    job = run_pretraining(tmp_path / "second", again, **options)
    assert "resuming" in job.stderr and "VAFT with clipped weights" in job.stderr
    assert merged_metrics(run) == merged_metrics(runs[0] / "two")


def test_a_fine_tuned_run_is_evaluated_and_exported(runs, priced, tmp_path):
    run = runs[0] / "two"
    settings = ["settings.max_rows=7", "settings.beam_width=8", "settings.ks=[2]", "baselines=false"]
    run_script_here("evaluate", tmp_path, f"checkpoint={run}", *settings)
    report = json.loads((run / "evaluation-test.json").read_text())
    assert report["results"]["generative"]["num_requests"] > 0 and report["data"] == str(priced)
    run_script_here("export", tmp_path, f"checkpoint={run}", f"out={tmp_path}/bundle")
    manifest = json.loads((tmp_path / "bundle" / "bundle.json").read_text())
    assert manifest["source"]["run"] == "two" and manifest["source"]["world_size"] == 2 and manifest["source"]["step"] == STEPS
