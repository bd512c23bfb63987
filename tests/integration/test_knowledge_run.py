"""External knowledge from launch/build_knowledge.py through training and resume to evaluation: what is read, and what is refused."""

import json
import os
import re
import subprocess
import sys

import pytest
import yaml
from documents import launch_module
from pretrain_runs import logged_losses, run_in_one_group, run_pretraining, run_script_here
from ranks import ROOT

from data_pipeline.knowledge import BuildKnowledgeConfig, build_knowledge
from gpr_dist.config import build_config, load_config
from gpr_dist.errors import CheckpointError, ConfigError, DataError
from gpr_dist.job import PretrainConfig, resolve
from gpr_dist.schema import KnowledgeManifest
from gpr_dist.training.checkpoint import read_state


def launch(script, cwd, *arguments):
    return subprocess.run([sys.executable, ROOT / "launch" / script, *arguments], cwd=cwd, capture_output=True, text=True, timeout=120,
                          env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"})


def settings(tiny, folder, **changes):
    values = {"data": str(tiny / "data"), "out": str(folder), "template": {"every_days": 7, "words": 1}, "max_missing_frac": 1.0,
              "embedding": {"dim": 6}}
    return values | changes


@pytest.fixture(scope="module")
def knowledge(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("knowledge")
    (folder / "knowledge.yaml").write_text(yaml.safe_dump(settings(tiny, folder / "first")))
    done = launch("build_knowledge.py", folder, "--config", "knowledge.yaml")
    assert done.returncode == 0, done.stderr
    assert re.search(r"^user [0-9a-f]{32}$", done.stdout, re.MULTILINE), "ids are hashes"
    assert "  habits: about " in done.stdout and 'without a text ("absent")' in done.stdout
    return folder / "first"


def overrides(tiny, tmp_path, knowledge, steps):
    folder = "null" if knowledge is None else knowledge
    return [f"data.folder={tiny}/data", f"run.folder={tmp_path}/runs", "run.name=known", f"data.knowledge={folder}",
            f"train.schedule.num_steps={steps}", "train.checkpoint.every_steps=2", f"train.validate_every_steps={steps}"]


def test_train_resume_and_evaluate_with_knowledge(tiny, knowledge, tmp_path):
    run = tmp_path / "runs" / "known"
    run_pretraining(tmp_path / "two_ranks", overrides(tiny, tmp_path, knowledge, 4))
    first = logged_losses(run)
    trained = yaml.safe_load((run / "config.yaml").read_text())
    assert trained["model"]["knowledge"] == {"num_vectors": 3, "width": 6}
    assert json.loads((run / "step-000004" / "state.json").read_text())["fingerprints"]["knowledge"] == \
        KnowledgeManifest.load(knowledge).fingerprint

    # One rank is as good as two; other vectors of the same sizes make other losses, from the same weights.
    template = {"every_days": 7, "words": 1, "aspects": ["promotions", "interests", "habits"]}
    build_knowledge(build_config(BuildKnowledgeConfig, settings(tiny, tmp_path / "other", template=template), "test"))
    refreshed = settings(tiny, tmp_path / "refreshed", template={"every_days": 3, "words": 1},
                         embedding={"source": "same", "path": str(knowledge)})
    build_knowledge(build_config(BuildKnowledgeConfig, refreshed, "test"))
    assert KnowledgeManifest.load(tmp_path / "refreshed").vectors != KnowledgeManifest.load(knowledge).vectors
    jobs = {name: [*overrides(tiny, tmp_path, folder, 4), f"run.name={name}", "train.validate_every_steps=0"]
            for name, folder in (("same", knowledge), ("other", tmp_path / "other"))}
    jobs |= {"refused": overrides(tiny, tmp_path, tmp_path / "other", 6), "goes on": overrides(tiny, tmp_path, tmp_path / "refreshed", 6)}
    ended = run_in_one_group(tmp_path / "one_rank", jobs)
    same, other = (logged_losses(tmp_path / "runs" / name) for name in ("same", "other"))
    assert same == pytest.approx(first, rel=1e-4) and abs(other[1] / same[1] - 1) > 1e-6

    # A run goes on with other vectors of the same encoder and with no others.
    assert [name for name, error in ended.items() if error] == ["refused"]
    assert "trained with knowledge" in ended["refused"] and "CheckpointError" in ended["refused"]
    assert list(logged_losses(run)) == list(range(1, 7))

    arguments = [f"checkpoint={run}", "settings.max_rows=7", "settings.beam_width=8", "settings.ks=[2]", "baselines=false"]
    run_script_here("evaluate", tmp_path, *arguments)
    evaluated = json.loads((run / "evaluation-test.json").read_text())["results"]["generative"]
    assert evaluated["num_requests"] > 0
    folder, state = run / "step-000006", read_state(run / "step-000006")
    evaluate = launch_module("evaluate")
    assert evaluate.check_knowledge(tmp_path / "refreshed", state, folder) == tmp_path / "refreshed"
    for unreadable in (tmp_path / "other", None):
        with pytest.raises(CheckpointError, match="other vectors or another encoder"):
            evaluate.check_knowledge(unreadable, state, folder)


def test_knowledge_that_does_not_fit_the_job_is_one_line(tiny, tmp_path):
    without = load_config(PretrainConfig, None, [f"data.folder={tiny}/data", "model.knowledge.num_vectors=2", "model.knowledge.width=6"])
    with pytest.raises(ConfigError, match=r"num_vectors=2, but data.knowledge names no folder"):
        resolve(without)
    nowhere = load_config(PretrainConfig, None, [f"data.folder={tiny}/data", f"data.knowledge={tmp_path}/nowhere"])
    with pytest.raises(DataError, match=r"nowhere/knowledge.json cannot be read .*; make it with launch/build_knowledge.py"):
        resolve(nowhere)
