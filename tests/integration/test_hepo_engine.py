"""What HEPO asks of the engine: forwards with other weights, learning rates of parts, a hand-over with and without the critic; and a step
of the policy optimisation, which must not depend on how it is split."""

import pytest
import torch
from ranks import run_ranks

from gpr_dist.errors import ConfigError
from gpr_dist.training.engine import parameter_groups

KINDS = {1: [{"zero_stage": 3}, {"zero_stage": 0}],
         2: [{"zero_stage": 3}, {"zero_stage": 3, "persistence_elements": 0, "precision": "bf16"}, {"zero_stage": 2}]}
STEPS = {"hepo": {}, "grpo": {"algorithm": "grpo"}, "dpo": {"algorithm": "dpo"}, "kl": {"kl_weight": 0.5}, "old": {"old": True},
         "rehearse": {"rehearse": True}, "truth": {"truth": True}}
SPLITS = {1: (1, 2), 2: (1,)}
"""Micro-batches of a rank, by ranks."""


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """Results of each worker, from every rank, by ranks."""
    found = {}
    for ranks, kinds in KINDS.items():
        folder = tmp_path_factory.mktemp(f"ranks-{ranks}")
        steps = [settings | {"parts": parts} for settings in STEPS.values() for parts in SPLITS[ranks]]
        calls = {"other_weights": {"cases": kinds}, "own_rates": {"runs": str(folder / "rates"), "cases": kinds},
                 "hand_over": {"runs": str(folder / "runs")}, "single_steps": {"cases": steps}}
        results = run_ranks("hepo_workers:run_all", ranks, folder, timeout=400, calls=list(calls.items()))
        found[ranks] = {name: [of_rank[number] for of_rank in results] for number, name in enumerate(calls)}
    return found


@pytest.mark.parametrize("ranks", KINDS)
def test_a_copy_gives_the_old_numbers_and_training_does_not_notice(found, ranks):
    for results in found[ranks]["other_weights"]:
        for kind, result in zip(KINDS[ranks], results, strict=True):
            assert result["same"] and result["undisturbed"] and result["moved"] > 1e-3, (kind, result)


@pytest.mark.parametrize("ranks", KINDS)
def test_parameters_with_a_learning_rate_of_their_own(found, ranks):
    for results in found[ranks]["own_rates"]:
        for kind, result in zip(KINDS[ranks], results, strict=True):
            assert result["moved"] == pytest.approx({"critic": 1e-2, "hte": 5e-4, "codes": 1e-3}, rel=1e-2), (kind, result)
            assert result["same"], kind


def test_a_parameter_has_one_learning_rate():
    with pytest.raises(ConfigError, match="2 entries for weight"):
        parameter_groups(torch.nn.Linear(2, 2), {"w": 2.0, "weig": 3.0})


@pytest.mark.parametrize("ranks", KINDS)
def test_the_critic_may_be_missing_on_either_side_of_a_hand_over(found, ranks):
    for result in found[ranks]["hand_over"]:
        first, second, third = (dict(result[name]) for name in ("first", "second", "third"))
        critics = [models.pop("critic") for models in (first, second, third)]
        assert first == second == third
        assert first["policy"] == first["nll"], "without dropout the policy is what was trained"
        assert critics[0] is critics[2] is None
        assert not any(any(row) for row in critics[1]) and len(critics[1][0]) == 3, "a new critic says 0"
        assert result["twins"], "its hidden layers are the HTE's"


def metrics_of(found, kind, ranks=1, parts=1):
    """Of a step, the same on every rank."""
    cases = [(name, split) for name in STEPS for split in SPLITS[ranks]]
    results = [of_rank[cases.index((kind, parts))] for of_rank in found[ranks]["single_steps"]]
    assert all(result == results[0] and result["applied"] for result in results)
    return results[0]["metrics"]


@pytest.mark.parametrize("kind", STEPS)
def test_a_step_does_not_depend_on_how_it_is_split(found, kind):
    whole = metrics_of(found, kind)
    for ranks, parts in ((1, 2), (2, 1)):
        assert metrics_of(found, kind, ranks, parts) == pytest.approx(whole, rel=1e-4, abs=1e-5), (ranks, parts)


def test_what_the_parts_of_a_step_add(found):
    plain, old, rehearse, truth, kl = (metrics_of(found, kind) for kind in ("hepo", "old", "rehearse", "truth", "kl"))
    assert plain["ratio_deviation"] == 0 and old["ratio_deviation"] > 0.01
    assert rehearse["requests"] > plain["requests"] and rehearse["candidates"] > plain["candidates"]
    assert rehearse["rows"] == plain["rows"] and rehearse["stabiliser_loss"] == plain["stabiliser_loss"]
    assert "guard/divergence" in truth and "guard/truth" not in plain and truth["policy_loss"] == plain["policy_loss"]
    assert plain["guard/kl"] == pytest.approx(0, abs=1e-5) and kl["kl"] == pytest.approx(0, abs=1e-5)
    assert plain["skipped_requests"] > 0, "groups with one ad, and with none"
