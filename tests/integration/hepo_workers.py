"""What the rank processes of test_hepo_engine.py run."""

from pathlib import Path

import torch
from engine_workers import LR, TIMEOUT_S, model_config, share_loss, step_rows
from random_batches import concat_batches, random_batch

from gpr_dist.model.gpr import GPR
from gpr_dist.training import checkpoint
from gpr_dist.training.engine import Engine, EngineConfig, init_distributed
from gpr_dist.training.init_from import init_from


def other_weights(cases: list[dict]) -> list[dict]:
    """Train, copy, train on; the copy must give the numbers it gave, and training must go on as if it had never been used."""
    init_distributed(TIMEOUT_S)
    results = []
    for case in cases:
        losses = {}
        for used in (False, True):
            torch.manual_seed(0)
            engine = Engine(GPR(model_config(critic=True)), EngineConfig(**case, timeout_seconds=TIMEOUT_S))
            probe = random_batch(77 + engine.rank, num_rows=2)

            def measure(engine=engine, probe=probe) -> float:
                with torch.no_grad():
                    return float(engine(probe).nll_NL.sum())

            losses[used], probes, copy = [], [], None
            for step in range(6):
                rows = concat_batches(step_rows(step)[engine.rank :: engine.world_size])
                if step == 2:
                    copy = engine.copy_weights()
                    before = measure()
                if used and step >= 2:
                    with engine.weights(copy):
                        probes.append(measure())
                loss = share_loss(engine, rows, 100)
                engine.backward(loss)
                engine.step(LR)
                losses[used].append(float(loss.detach()))
            after = measure()
        results.append({"same": probes == [before] * 4, "moved": abs(after - before), "undisturbed": losses[True] == losses[False]})
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    return results


def hand_over(runs: str) -> dict:
    """Weights saved by a job without the critic start one with it, whose weights start one without it again."""
    init_distributed(TIMEOUT_S)
    probe, found = random_batch(5), {}
    fingerprints = {"tokenizer": "t", "data": "d"}

    def engine_with(critic: bool, seed: int) -> Engine:
        torch.manual_seed(seed)
        return Engine(GPR(model_config(critic=critic)), EngineConfig(timeout_seconds=TIMEOUT_S, persistence_elements=100))

    def measure(engine: Engine) -> dict:
        with torch.no_grad():
            output, policy = engine(probe), engine(probe, task="policy")
        return {"nll": output.nll_NL.tolist(), "values": output.values_NL1.tolist(), "policy": policy.nll_NL.tolist(),
                "critic": None if policy.value_NL is None else policy.value_NL.tolist()}

    def save(engine: Engine, name: str, critic: bool) -> Path:
        state = {"fingerprints": fingerprints, "config": {"model": model_config(critic=critic).model_dump(mode="json")}, "progress": {}}
        return checkpoint.save(engine, Path(runs) / name, 1, state)

    first = engine_with(False, seed=1)
    second = engine_with(True, seed=2)
    init_from(second, save(first, "first", False), model_config(critic=True), fingerprints)
    third = engine_with(False, seed=3)
    init_from(third, save(second, "second", True), model_config(), fingerprints)
    found = {name: measure(engine) for name, engine in {"first": first, "second": second, "third": third}.items()}
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    return found
