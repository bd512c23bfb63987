"""Computing with other weights than those that are trained, at every ZeRO stage, with parameters kept gathered and not."""

import pytest
import torch
from ranks import run_ranks

from gpr_dist.errors import ConfigError
from gpr_dist.training.engine import parameter_groups

KINDS = [{"zero_stage": 3}, {"zero_stage": 3, "persistence_elements": 0}, {"zero_stage": 3, "precision": "bf16"}, {"zero_stage": 2},
         {"zero_stage": 0}]


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_copy_gives_the_old_numbers_and_training_does_not_notice(world_size, tmp_path):
    for results in run_ranks("hepo_workers:other_weights", world_size, tmp_path, cases=KINDS):
        for kind, result in zip(KINDS, results, strict=True):
            assert result["same"] and result["undisturbed"] and result["moved"] > 1e-3, (kind, result)


def test_the_critic_may_be_missing_on_either_side_of_a_hand_over(tmp_path):
    for found in run_ranks("hepo_workers:hand_over", 2, tmp_path, runs=str(tmp_path)):
        critics = {name: result.pop("critic") for name, result in found.items() if name != "twins"}
        assert found["first"] == found["second"] == found["third"]
        assert found["first"]["policy"] == found["first"]["nll"], "without dropout the policy is what was trained"
        assert critics["first"] is critics["third"] is None
        assert not any(any(row) for row in critics["second"]) and len(critics["second"][0]) == 3, "a new critic says 0"
        assert found["twins"], "its hidden layers are the HTE's"


@pytest.mark.parametrize("world_size", [1, 2])
def test_parameters_with_a_learning_rate_of_their_own(world_size, tmp_path):
    for results in run_ranks("hepo_workers:own_rates", world_size, tmp_path, runs=str(tmp_path), cases=KINDS):
        for kind, result in zip(KINDS, results, strict=True):
            assert result["moved"] == pytest.approx({"critic": 1e-2, "hte": 5e-4, "codes": 1e-3}, rel=1e-2), (kind, result)
            assert result["same"], kind


def test_a_parameter_has_one_learning_rate():
    with pytest.raises(ConfigError, match="2 entries for weight"):
        parameter_groups(torch.nn.Linear(2, 2), {"w": 2.0, "weig": 3.0})


STEPS = {"hepo": {}, "grpo": {"algorithm": "grpo"}, "dpo": {"algorithm": "dpo"}, "kl": {"kl_weight": 0.5}, "old": {"old": True},
         "rehearse": {"rehearse": True}, "truth": {"truth": True}}


@pytest.fixture(scope="module")
def single_steps(tmp_path_factory):
    """Metrics of a step by (kind, ranks, micro-batches of a rank)."""
    found = {}
    for ranks in (1, 2):
        cases = {(name, ranks, parts): settings | {"parts": parts} for name, settings in STEPS.items() for parts in (1, 2)}
        for results in run_ranks("hepo_workers:single_steps", ranks, tmp_path_factory.mktemp("steps"), cases=list(cases.values())):
            assert all(result["applied"] for result in results)
            found |= {key: result["metrics"] for key, result in zip(cases, results, strict=True)}
    return found


@pytest.mark.parametrize("kind", STEPS)
def test_a_step_does_not_depend_on_how_it_is_split(single_steps, kind):
    whole = single_steps[kind, 1, 1]
    for ranks, parts in ((1, 2), (2, 1), (2, 2)):
        assert single_steps[kind, ranks, parts] == pytest.approx(whole, rel=1e-4, abs=1e-5), (ranks, parts)


def test_what_the_parts_of_a_step_add(single_steps):
    plain, old, rehearse, truth, kl = (single_steps[kind, 1, 1] for kind in ("hepo", "old", "rehearse", "truth", "kl"))
    assert plain["ratio_deviation"] == 0 and old["ratio_deviation"] > 0.01
    assert rehearse["requests"] > plain["requests"] and rehearse["candidates"] > plain["candidates"]
    assert rehearse["rows"] == plain["rows"] and rehearse["stabiliser_loss"] == plain["stabiliser_loss"]
    assert "guard/divergence" in truth and "guard/truth" not in plain and truth["policy_loss"] == plain["policy_loss"]
    assert plain["guard/kl"] == pytest.approx(0, abs=1e-5) and kl["kl"] == pytest.approx(0, abs=1e-5)
    assert plain["skipped_requests"] > 0, "groups with one ad, and with none"
