"""Computing with other weights than those that are trained, at every ZeRO stage, with parameters kept gathered and not."""

import pytest
from ranks import run_ranks

KINDS = [{"zero_stage": 3}, {"zero_stage": 3, "persistence_elements": 0}, {"zero_stage": 3, "precision": "bf16"}, {"zero_stage": 2},
         {"zero_stage": 0}]


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_copy_gives_the_old_numbers_and_training_does_not_notice(world_size, tmp_path):
    for results in run_ranks("hepo_workers:other_weights", world_size, tmp_path, cases=KINDS):
        for kind, result in zip(KINDS, results, strict=True):
            assert result["same"] and result["undisturbed"] and result["moved"] > 1e-3, (kind, result)


def test_the_critic_may_be_missing_on_either_side_of_a_hand_over(tmp_path):
    for found in run_ranks("hepo_workers:hand_over", 2, tmp_path, runs=str(tmp_path)):
        critics = {name: result.pop("critic") for name, result in found.items()}
        assert found["first"] == found["second"] == found["third"]
        assert found["first"]["policy"] == found["first"]["nll"], "without dropout the policy is what was trained"
        assert critics["first"] is critics["third"] is None
        assert not any(any(row) for row in critics["second"]) and len(critics["second"][0]) == 3, "a new critic says 0"
