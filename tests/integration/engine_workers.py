"""What the rank processes of test_engine.py run."""

import torch

from gpr_dist.model.gpr import GPR, GPRConfig
from gpr_dist.objectives.mtp import code_nll, mtp_loss, uniform_head_weights, value_loss
from gpr_dist.training.engine import Engine, EngineConfig, init_distributed
from random_batches import concat_batches, empty_batch, random_batch

ROWS_PER_STEP = 8
LR = 3e-3


def model_config() -> GPRConfig:
    return GPRConfig.model_validate({"width": 16, "codebook_size": 16, "num_user_features": 2, "num_env_features": 2,
                                     "hsd": {"num_heads": 2}, "ptd": {"num_heads": 2}, "embedding": {"feature_buckets": 64, "scene_buckets": 8}})


def build_model() -> GPR:
    torch.manual_seed(0)
    return GPR(model_config())


def step_rows(step: int) -> list:
    """The rows of a global step, one batch each; the same for every world size."""
    return [random_batch(1000 * step + row, num_rows=1) for row in range(ROWS_PER_STEP)]


def share_loss(model, batch, num_targets: int) -> torch.Tensor:
    weights = uniform_head_weights(4)
    output = model(batch)
    nll = code_nll(output.logits_NLV, batch.target_codes_NL)
    value = value_loss(output.values_NL1, batch.target_value_N, batch.target_head_N, weights, num_targets)
    return mtp_loss(nll, batch.target_head_N, weights, num_targets) + 0.1 * value


def plain_losses(num_steps: int, clip: float = 1.0) -> list[float]:
    """The reference: one process, no DeepSpeed."""
    model = build_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, betas=(0.9, 0.98), weight_decay=0.01)
    losses = []
    for step in range(num_steps):
        batch = concat_batches(step_rows(step))
        loss = share_loss(model, batch, batch.num_targets)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def engine_losses(num_steps: int, zero_stage: int = 3, precision: str = "fp32", persistence: int = 10_000, uneven: bool = False,
                  nan_step: int = -1, nan_where: str = "gradient", skip_steps: tuple = ()) -> dict:
    """Train on this rank's rows of every step; `uneven` gives rank 0 all rows, in more micro-batches than it has."""
    init_distributed(60)
    engine = Engine(build_model(), EngineConfig(zero_stage=zero_stage, precision=precision, persistence_elements=persistence, timeout_seconds=60))
    losses, norms, applied = [], [], []
    for step in range(num_steps):
        if step in skip_steps:
            continue
        rows = step_rows(step)
        total = sum(batch.num_targets for batch in rows)
        mine = (rows if engine.rank == 0 else []) if uneven else rows[engine.rank :: engine.world_size]
        loss_sum = 0.0
        for part in range(3 if uneven else 2):
            picked = mine[part :: 3 if uneven else 2]
            batch = concat_batches(picked) if picked else empty_batch()
            loss = share_loss(engine, batch, total)
            loss_sum += float(loss.detach())
            if step == nan_step and engine.rank == engine.world_size - 1 and part == 0:
                loss = poison(engine, loss, nan_where)
            engine.backward(loss)
        finite = engine.gradients_are_finite() and loss_sum == loss_sum
        everywhere = engine.all_reduce(torch.tensor([0.0 if finite else 1.0])).item() == 0
        norm, was_applied = engine.step(LR, apply=everywhere)
        losses.append(float(engine.all_reduce(torch.tensor([loss_sum], dtype=torch.float64))))
        norms.append(norm)
        applied.append(was_applied)
    weights_finite = all(bool(t.isfinite().all()) for shard in engine.state_shards() for t in shard.tensors.values())
    engine.close()
    return {"losses": losses, "norms": norms, "applied": applied, "weights_finite": weights_finite}


def poison(engine, loss: torch.Tensor, where: str) -> torch.Tensor:
    if where == "loss":
        return loss * float("nan")
    parameter = next(iter(engine.module.parameters()))

    def spoil(grad: torch.Tensor) -> torch.Tensor:
        handle.remove()
        return torch.full_like(grad, float("nan"))

    handle = parameter.register_hook(spoil)
    return loss


def train_save_resume(run: str, first_steps: int, total_steps: int, zero_stage: int = 3, precision: str = "fp32", persistence: int = 10_000) -> dict:
    """Resume if the run has a checkpoint, train up to `first_steps` or `total_steps`, save when stopping early."""
    from pathlib import Path

    from gpr_dist.training import checkpoint

    init_distributed(60)
    engine = Engine(build_model(), EngineConfig(zero_stage=zero_stage, precision=precision, persistence_elements=persistence, timeout_seconds=60))
    restored = checkpoint.load_latest(engine, Path(run), {"tokenizer": "t"})
    start = restored.state["step"] if restored else 0
    losses = []
    for step in range(start, total_steps if restored else first_steps):
        rows = step_rows(step)
        mine = rows[engine.rank :: engine.world_size]
        loss = share_loss(engine, concat_batches(mine) if mine else empty_batch(), sum(b.num_targets for b in rows))
        engine.backward(loss)
        engine.step(LR)
        losses.append(float(engine.all_reduce(loss.detach().double()[None])))
    if not restored:
        checkpoint.save(engine, Path(run), first_steps, {"fingerprints": {"tokenizer": "t"}})
    engine.close()
    return {"losses": losses, "start": start}
