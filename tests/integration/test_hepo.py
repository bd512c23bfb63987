"""Policy optimisation as a job: on one and two ranks, stopped and resumed, with every algorithm; what it refuses and when it stops."""

from pathlib import Path

import pytest
import torch
from ranks import run_ranks

from data_pipeline.tokenize_items import FitTokenizerConfig, build_tokenizer
from gpr_dist.config import load_config
from gpr_dist.training import checkpoint
from gpr_dist.training.tracker import read_metrics

STEPS = 6
LOOP = ["train.schedule.warmup_steps=0", "train.schedule.lr=1e-3", "train.schedule.shape=constant", "train.validate_every_steps=0",
        "train.checkpoint.keep_last=9", "train.checkpoint.every_steps=2", "policy.refresh_every_steps=2", "rollout.num_candidates=8",
        "guards.every_steps=3", "data.loader.prefetch_steps=0"]


@pytest.fixture(scope="module")
def pretrained(python_run):
    return python_run[1]


@pytest.fixture(scope="module")
def runs(tiny, pretrained, tmp_path_factory):
    """(folder of the runs, error of each job by name)."""
    folder = tmp_path_factory.mktemp("hepo")

    def job(name, *more, steps=STEPS, **table):
        return table, [f"init_from={pretrained}", f"data.folder={tiny}/data", f"run.folder={folder}", f"run.name={name}", *LOOP,
                       f"train.schedule.num_steps={steps}", *more]

    alone = ["policy.stabiliser_weight=0", "engine.weight_decay=0"]
    two = {"two": job("two"), "half": job("resumed", steps=4), "resumed": job("resumed"), "grpo": job("grpo", "policy.algorithm=grpo"),
           "dpo": job("dpo", "policy.algorithm=dpo"), "constant": job("constant", *alone, constant=True),
           "stop": job("stopped", stop_at_call=1), "stopped": job("stopped")}
    one = {"one": job("one"), "kl": job("kl", "policy.kl_weight=0.1", "guards.max_kl=1e-6", "guards.patience=1", "guards.every_steps=2"),
           "kl again": job("kl", "guards.max_kl=1e-6", "guards.patience=1", "guards.every_steps=2"),
           "refresh": job("refresh", "policy.refresh_every_steps=4"), "levels": job("levels", "policy.level_weights=[1,1]"),
           "tokenizer": job("tokenizer", f"data.tokenizer={other_tokenizer(tiny, folder)}"),
           "learns": job("learns", *alone, "train.schedule.lr=5e-3", "policy.refresh_every_steps=1", "train.validate_every_steps=8",
                         "guards.every_steps=0", steps=16)}
    errors = {}
    for ranks, jobs in ((2, two), (1, one)):
        results = run_ranks("hepo_jobs:run_jobs", ranks, folder / f"ranks-{ranks}", timeout=400, jobs=list(jobs.values()))
        assert all(result == results[0] for result in results), "ranks say different things"
        errors |= dict(zip(jobs, results[0], strict=True))
    return folder, errors


def other_tokenizer(tiny: Path, folder: Path) -> Path:
    """Fitted anew on the same items, with other codebooks."""
    overrides = [f"out={folder}/tokenizer", "tokenizer.iterations=1"]
    build_tokenizer(load_config(FitTokenizerConfig, tiny / "tokenizer.yaml", overrides))
    return folder / "tokenizer"


def steps_of(folder, name):
    """metrics.jsonl of the optimisation steps, without what the clock says."""
    lines = [line for line in read_metrics(folder / name / "metrics.jsonl") if "policy_loss" in line]
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1)), "every step once"
    clock = ("_s", "seconds", "memory_gib", "straggler_gap", "straggler_rank")
    return [{key: value for key, value in line.items() if not key.endswith(clock)} for line in lines]


def weights(folder, name, step):
    return dict(checkpoint.iter_weights(folder / name / f"step-{step:06d}"))


def test_a_run_on_two_ranks_does_what_one_rank_does(runs):
    folder, errors = runs
    assert errors["one"] == errors["two"] == ""
    for one, two in zip(steps_of(folder, "one"), steps_of(folder, "two"), strict=True):
        precise = one["step"] == 1  # then Adam makes steps of one size even of gradients that are nothing but rounding
        norm = one.pop("grad_norm"), two.pop("grad_norm")  # feels it first: 2.4 % apart at step 4
        assert norm[0] == pytest.approx(norm[1], rel=1e-5 if precise else 0.1)
        assert one == pytest.approx(two, rel=1e-5 if precise else 1e-2, abs=1e-6 if precise else 5e-3)
    lines = steps_of(folder, "two")
    assert len(lines) == STEPS and all(line["candidates"] == 8 * line["requests"] > 50 for line in lines)
    assert [line["ratio_deviation"] == 0 for line in lines] == [True, False] * 3, "fresh rollouts have ratio exactly 1"
    assert all("kl" in line for line in lines[::3]) and not any("kl" in line for line in lines[1::3])


def test_a_resumed_run_is_bit_identical(runs):
    folder, errors = runs
    assert errors["half"] == errors["resumed"] == ""
    assert steps_of(folder, "resumed") == steps_of(folder, "two")
    first, second = (weights(folder, name, STEPS) for name in ("two", "resumed"))
    assert all(torch.equal(first[name], second[name]) for name in first) and any("critic" in name for name in first)


def test_a_stop_signal_between_renewals_saves_and_the_run_goes_on(runs):
    folder, errors = runs
    assert errors["stop"] == errors["stopped"] == ""
    stopped = [step for step in range(1, STEPS) if (folder / "stopped" / f"step-{step:06d}").exists()]
    lines = steps_of(folder, "stopped")
    assert len(lines) == STEPS and any(step % 2 for step in stopped), f"choose another call for the signal: {stopped}"
    at = next(step for step in stopped if step % 2)
    assert lines[:at] == steps_of(folder, "two")[:at], "until the signal"
    assert lines[at]["ratio_deviation"] == 0, "the old policy is renewed when a run resumes between renewals"


@pytest.mark.parametrize("algorithm", ["grpo", "dpo"])
def test_the_baselines_run_without_a_critic(runs, algorithm):
    folder, errors = runs
    assert errors[algorithm] == ""
    lines = steps_of(folder, algorithm)
    assert len(lines) == STEPS and not any("critic_loss" in line for line in lines)
    assert not any("critic" in name for name in weights(folder, algorithm, STEPS))
    assert lines[0]["policy_loss"] == pytest.approx(0.6931 if algorithm == "dpo" else 0.0, abs=1e-3)


def test_rewards_that_are_equal_change_nothing_and_are_counted(runs, pretrained):
    folder, errors = runs
    assert errors["constant"] == ""
    assert all(line["constant_requests"] == line["requests"] > 5 and line["policy_loss"] == 0 for line in steps_of(folder, "constant"))
    start, end = dict(checkpoint.iter_weights(checkpoint.find_checkpoint(pretrained))), weights(folder, "constant", STEPS)
    assert all(torch.equal(start[name], end[name]) for name in start)


def test_a_guard_stops_the_run_for_good(runs):
    folder, errors = runs
    assert errors["kl"] == errors["kl again"] == ""
    lines = steps_of(folder, "kl")
    assert len(lines) == 3 and lines[-1]["guard/kl"] > 1e-6 and lines[0]["guard/kl"] == pytest.approx(0, abs=1e-6)
    state = checkpoint.read_state(folder / "kl" / "step-000003")
    assert "guard kl" in state["hepo"]["guards"]["stopped"]


def test_what_is_refused(runs):
    _, errors = runs
    assert "train.checkpoint.every_steps=2 is no multiple of policy.refresh_every_steps=4" in errors["refresh"]
    assert "policy.level_weights=[1.0, 1.0] must list 3 levels" in errors["levels"]
    assert "was trained with tokenizer" in errors["tokenizer"] and "0000" in errors["tokenizer"], errors["tokenizer"]


def test_the_policy_learns_what_the_table_pays(runs):
    folder, errors = runs
    assert errors["learns"] == ""
    found = [line["validation/reward"] for line in read_metrics(folder / "learns" / "metrics.jsonl") if "validation/reward" in line]
    assert len(found) == 3 and found[0] + 0.05 < found[1] < found[2] - 0.05, found
