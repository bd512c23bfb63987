"""What the rank processes of test_hepo_engine.py run."""

from pathlib import Path
from typing import Any

import torch
from engine_workers import LR, TIMEOUT_S, model_config, share_loss, step_rows
from random_batches import concat_batches, random_batch
from rl_market import CODES, ELIGIBILITY, ITEMS, TRIE, TableReward, joined, market_batch
from tiny_model import V, tiny_model

from gpr_dist.data.legal import LegalCodes
from gpr_dist.data.loader import Step
from gpr_dist.model.gpr import GPR
from gpr_dist.rl.guards import GuardConfig, Guards
from gpr_dist.rl.hepo_step import Parts, hepo_step
from gpr_dist.rl.policy import PolicyConfig
from gpr_dist.rl.rewards import RewardScale
from gpr_dist.rl.rollout import RolloutConfig, Sampler, take_requests
from gpr_dist.schema import Batch
from gpr_dist.training import checkpoint, saver
from gpr_dist.training.engine import Engine, EngineConfig, init_distributed
from gpr_dist.training.init_from import init_from
from gpr_dist.training.objective import mtp_objective


def run_all(calls: list[tuple[str, dict[str, Any]]]) -> list[Any]:
    """Call functions of this module one after another in one process group: starting it costs more than they do."""
    init_distributed(TIMEOUT_S)
    results = [globals()[name](**arguments) for name, arguments in calls]
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    return results


def other_weights(cases: list[dict]) -> list[dict]:
    """Train, copy, train on; the copy must give the numbers it gave, and training must go on as if it had never been used."""
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
            for step in range(3):
                rows = concat_batches(step_rows(step)[engine.rank :: engine.world_size])
                if step == 1:
                    copy = engine.copy_weights()
                    before = measure()
                if used and step >= 1:
                    with engine.weights(copy):
                        probes.append(measure())
                loss = share_loss(engine, rows, 100)
                engine.backward(loss)
                engine.step(LR)
                losses[used].append(float(loss.detach()))
            after = measure()
        results.append({"same": probes == [before] * 2, "moved": abs(after - before), "undisturbed": losses[True] == losses[False]})
    return results


def hand_over(runs: str) -> dict:
    """Weights saved by a job without the critic start one with it, whose weights start one without it again."""
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
        return saver.save(engine, Path(runs) / name, 1, state)

    first = engine_with(False, seed=1)
    second = engine_with(True, seed=2)
    init_from(second, save(first, "first", False), model_config(critic=True), fingerprints)
    third = engine_with(False, seed=3)
    init_from(third, save(second, "second", True), model_config(), fingerprints)
    masters = {shard.name: shard.tensors["param"] for shard in second.state_shards()}
    hidden = [name for name in masters if name.startswith("critic.") and name.split(".")[-2] == "0"]
    twins = len(hidden) > 1 and all(torch.equal(masters[name], masters[name.replace("critic.", "hte.")]) for name in hidden)
    found = {"twins": twins} | {name: measure(engine) for name, engine in {"first": first, "second": second, "third": third}.items()}
    return found


def single_steps(cases: list[dict]) -> list[dict]:
    """One step of the policy optimisation on the same four rows, however they are dealt out; its metrics.

    Of each case: parts = micro-batches of a rank; rehearse, truth, old = whether there is one; algorithm and further policy settings.
    """
    results = []
    for case in cases:
        case = dict(case)
        parts_of_rank, switches = case.pop("parts"), {name: case.pop(name, False) for name in ("rehearse", "truth", "old")}
        model = tiny_model(critic=case.get("algorithm", "hepo") == "hepo")
        engine = Engine(model, EngineConfig(timeout_seconds=TIMEOUT_S, persistence_elements=100))
        rows = [market_batch(seed, num_rows=1) for seed in range(1, 5)][engine.rank :: engine.world_size]
        legal = LegalCodes(CODES, V, ELIGIBILITY)
        batches = [legal.add_to(joined(*rows[part::parts_of_rank]), counted=False) for part in range(parts_of_rank)]
        sample = Sampler(engine, engine.device, TRIE, ELIGIBILITY, legal, None, TableReward(), RolloutConfig(num_candidates=6),
                         engine.all_reduce)
        policy = PolicyConfig(**case)
        run = Parts(engine, sample, policy, V, torch.arange(ITEMS) % 4, mtp_objective(4, 0.1), reference=engine.copy_weights(),
                    rehearse=(lambda batch, _: last_requests(batch)) if switches["rehearse"] else None,
                    truth=TableReward(seed=1) if switches["truth"] else None)
        old = engine.copy_weights()
        if switches["old"]:  # another policy than the one that is updated
            for part in old:
                part.mul_(0.9)
        old = old if switches["old"] else None
        outcome = hepo_step(run, Step(0, 0, batches), 0, old, RewardScale(), Guards(GuardConfig()), 1e-3, False)
        clock = ("_s", "seconds")
        metrics = {name: value for name, value in outcome.metrics.items() if not name.endswith(clock)}
        results.append({"metrics": metrics, "applied": outcome.applied})
    return results


def last_requests(batch: Batch) -> Batch:
    """A stand-in for the rehearsal: each row's last request once more."""
    row_R = batch.request_row_R
    return take_requests(batch, torch.cat((row_R[1:] != row_R[:-1], torch.ones(min(1, len(row_R)), dtype=torch.bool))))


def own_rates(runs: str, cases: list[dict]) -> list[dict]:
    """The largest change of a first step with AdamW, which is the learning rate, by part; and whether a checkpoint brings it all back."""
    results = []
    for number, case in enumerate(cases):
        case = case | {"lr_scales": {"critic.": 10.0, "hte.": 0.5}, "weight_decay": 0.0, "timeout_seconds": TIMEOUT_S}

        def start(case=case) -> Engine:
            torch.manual_seed(0)
            return Engine(GPR(model_config(critic=True)), EngineConfig(**case))

        def train(engine: Engine, steps: range) -> None:
            for step in steps:
                batch = random_batch(10 * step + engine.rank)
                share = share_loss(engine, batch, 30)
                engine.backward(share)
                engine.backward((engine(batch, task="policy").value_NL - 1).square().sum() / 30)
                engine.step(1e-3)

        engine = start()
        before = {(s.name, s.lo): s.tensors["param"].clone() for s in engine.state_shards()}
        train(engine, range(1))
        moved = {"critic": 0.0, "hte": 0.0, "codes": 0.0}
        for shard in engine.state_shards():
            part = shard.name.split(".")[0]
            if part in moved:
                moved[part] = max(moved[part], float((shard.tensors["param"] - before[shard.name, shard.lo]).abs().max()))
        fingerprints, run = {"tokenizer": "t"}, Path(runs) / str(number)
        saver.save(engine, run, 1, {"fingerprints": fingerprints, "config": {}, "progress": {}})
        train(engine, range(1, 3))
        again = start()
        checkpoint.load_latest(again, run, fingerprints)
        train(again, range(1, 3))
        pairs = zip(engine.state_shards(), again.state_shards(), strict=True)
        same = all(torch.equal(a.tensors[key], b.tensors[key]) for a, b in pairs for key in a.tensors)
        results.append({"moved": {k: float(engine.all_reduce(torch.tensor(v), "max")) for k, v in moved.items()}, "same": same})
    return results
