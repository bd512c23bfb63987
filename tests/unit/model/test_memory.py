"""Memory by arithmetic beside what autograd really keeps: a plan that promises too little ends in an out-of-memory error."""

import pytest
import torch
from documents import launch_module

from gpr_dist.model.gpr import GPRConfig
from gpr_dist.model.memory import activation_bytes, state_bytes

SIZE = {"rows": 4, "tokens": 120, "organic": 4, "ads": 3, "spread": 0.4}
MODEL = {"width": 96, "num_user_features": 4, "num_env_features": 4}


@pytest.mark.parametrize("changes", [
    {}, {"num_mtp_heads": 1}, {"width": 192}, {"ptd": {"num_thinking": 2}}, {"hsd": {"num_layers": 4, "ffn_multiple": 4}},
    {"hsd": {"activation_checkpointing": True}}])
def test_activations_kept_for_the_backward_are_what_the_plan_says_or_a_little_less(changes):
    ours = launch_module("bench_step_ours")
    config = GPRConfig(**MODEL | changes)
    training = ours.Training(config, ours.generate_batch(config, seed=0, **SIZE), {"seed": 0, "precision": "fp32"})
    parameters = {parameter.untyped_storage().data_ptr() for parameter in training.model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = training.loss(training.model(training.batch))
    assert 0.75 < sum(kept.values()) / activation_bytes(config, training.work, 1.0, "fp32") < 1.0
    assert loss.requires_grad


def test_a_micro_batch_holds_its_share_and_bf16_half_of_it():
    config = GPRConfig(**MODEL)
    ours = launch_module("bench_step_ours")
    work = ours.Training(config, ours.generate_batch(config, seed=0, **SIZE), {"seed": 0, "precision": "fp32"}).work
    whole = activation_bytes(config, work, 1.0, "fp32")
    assert activation_bytes(config, work, 0.25, "fp32") == pytest.approx(whole / 4)
    assert activation_bytes(config, work, 1.0, "bf16") < 0.65 * whole  # the loss keeps float32


def test_zero_shards_what_its_stage_says():
    by_stage = [state_bytes(1000, stage, 10, "bf16") for stage in range(4)]
    assert by_stage == pytest.approx([18_000, 7_200, 3_600, 1_800])
