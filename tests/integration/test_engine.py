"""The engine with real processes: equal to plain PyTorch at every ZeRO stage, and deaf to values that are not finite."""

import json
import math
import statistics
from pathlib import Path

import pytest
import torch
from engine_workers import BETAS, LR, WEIGHT_DECAY, TwoParts, plain_training, two_parts_input
from ranks import run_ranks

from gpr_dist.training.spikes import read_traces
from gpr_dist.training.tracker import read_events, read_metrics

TOLERANCE = 1e-5


def run(folder: Path, world_size: int, function: str, cases: dict[str, dict]) -> dict[str, list]:
    """Results of each case by name, one entry per rank."""
    results = run_ranks("engine_workers:run_cases", world_size, folder, timeout=240, function=function, cases=list(cases.values()))
    return {name: [rank[number] for rank in results] for number, name in enumerate(cases)}


def largest_difference(a: list[float], b: list[float]) -> float:
    assert len(a) == len(b) > 0
    return max(abs(x - y) for x, y in zip(a, b, strict=True))


@pytest.fixture(scope="module")
def clip() -> float:
    """A largest gradient norm that the first steps meet from both sides, whatever the model's initial weights are."""
    return statistics.median(plain_training(4, clip=math.inf)["norms"])


@pytest.fixture(scope="module")
def plain(clip: float) -> dict[str, list[float]]:
    return plain_training(20, clip)


TWO_RANKS = {
    "20 steps": {"num_steps": 20},
    "nothing persistent": {"num_steps": 4, "persistence": 0},
    "one micro-batch": {"num_steps": 4, "split": "one"},
    "uneven": {"num_steps": 4, "split": "uneven"},
    "stage 0": {"num_steps": 5, "zero_stage": 0},
    "stage 1": {"num_steps": 5, "zero_stage": 1},
    "stage 2": {"num_steps": 5, "zero_stage": 2},
    "stage 2 uneven": {"num_steps": 4, "zero_stage": 2, "split": "uneven"},
}


@pytest.fixture(scope="module")
def two_ranks(clip: float, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list]:
    return run(tmp_path_factory.mktemp("two"), 2, "train_engine", {name: case | {"clip": clip} for name, case in TWO_RANKS.items()})


@pytest.mark.parametrize("name", TWO_RANKS)
def test_equal_to_plain_pytorch_on_two_ranks(two_ranks, plain, clip, name):
    for rank in two_ranks[name]:
        steps = TWO_RANKS[name]["num_steps"]
        assert largest_difference(rank["losses"], plain["losses"][:steps]) < TOLERANCE
        assert largest_difference(rank["norms"], plain["norms"][:steps]) < 1e-4
        assert all(rank["applied"]) and rank["state_finite"]
    assert max(plain["norms"][:4]) > clip > min(plain["norms"][:4]), "clipping was not exercised both ways"


@pytest.mark.parametrize("world_size", [1, 3])
def test_equal_to_plain_pytorch_on_other_rank_counts(plain, clip, world_size, tmp_path):
    cases = {"even": {"num_steps": 5, "clip": clip}, "stage 2 uneven": {"num_steps": 3, "zero_stage": 2, "split": "uneven", "clip": clip}}
    for name, ranks in run(tmp_path, world_size, "train_engine", cases).items():
        for rank in ranks:
            assert largest_difference(rank["losses"], plain["losses"][: cases[name]["num_steps"]]) < TOLERANCE


NAN_KINDS = [("fp32", 3), ("fp32", 2), ("fp32", 0), ("bf16", 3), ("bf16", 2)]


@pytest.fixture(scope="module")
def with_nans(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list]:
    cases = {}
    for precision, stage in NAN_KINDS:
        kind = {"num_steps": 5, "precision": precision, "zero_stage": stage, "split": "one"}
        cases[f"{precision} {stage} without"] = {**kind, "skip_steps": [2]}
        for where in ("gradient", "loss"):
            cases[f"{precision} {stage} {where}"] = {**kind, "nan_step": 2, "nan_where": where}
    return run(tmp_path_factory.mktemp("nan"), 2, "train_engine", cases)


@pytest.mark.parametrize("where", ["gradient", "loss"])
@pytest.mark.parametrize(("precision", "stage"), NAN_KINDS)
def test_nan_of_one_rank_leaves_no_trace(with_nans, precision, stage, where):
    for rank, without in zip(with_nans[f"{precision} {stage} {where}"], with_nans[f"{precision} {stage} without"], strict=True):
        assert rank["applied"] == [True, True, False, True, True] and rank["state_finite"]
        assert rank["losses"][:2] + rank["losses"][3:] == without["losses"], "training did not go on as if the step had been left out"


def reference_two_parts(both_at: list[int], num_steps: int, micro_batches: int = 1) -> list[dict[str, torch.Tensor]]:
    """Plain AdamW over the mean of two ranks' losses; an unused parameter has gradient zero, as under ZeRO."""
    model = TwoParts()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, betas=BETAS, weight_decay=WEIGHT_DECAY)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    history = []
    for step in range(num_steps):
        optimizer.zero_grad(set_to_none=False)
        for part in range(micro_batches):
            for rank in range(2):
                (model(two_parts_input(step, rank), step in both_at and part == micro_batches - 1) / 2).backward()
        optimizer.step()
        history.append({name: p.detach().clone().view(-1) for name, p in model.named_parameters()})
    return history


def test_gradients_do_not_outlive_their_step(tmp_path):
    """DeepSpeed 0.19.8 applies a parameter's last gradient again in steps that do not use it, and adds to it in a later micro-batch."""
    both_at, steps = [0, 1, 4], 6
    cases = {f"stage {stage}, {parts}": {"zero_stage": stage, "both_at": both_at, "num_steps": steps, "micro_batches": parts}
             for stage in (3, 2, 0) for parts in (1, 2)}
    cases["nan"] = {"zero_stage": 3, "both_at": [0, 1], "num_steps": 4, "nan_step": 1}
    results = run(tmp_path, 2, "train_two_parts", cases)
    for rank in results.pop("nan"):
        assert rank["applied"] == [True, False, True, True], "a NaN left in an unused parameter's gradient stops every later step"
    for name, ranks in results.items():
        expected = reference_two_parts(both_at, steps, cases[name]["micro_batches"])
        seen = 0
        for rank in ranks:
            for step, shards in enumerate(rank["history"]):
                for parameter, lo, values in shards:
                    wanted = expected[step][parameter][lo : lo + len(values)]
                    difference = float((torch.tensor(values) - wanted).abs().max()) if values else 0.0
                    assert difference < 1e-5, f"{name}, step {step}: {parameter} differs by {difference}"
                    seen += len(values)
        assert seen == steps * sum(math.prod(p.shape) for p in TwoParts().parameters()), "the ranks' shards do not tile the weights"


def test_policies_for_values_that_are_not_finite(tiny, tmp_path):
    base = {"data": str(tiny / "data"), "until": 6}
    cases = {"stop": {**base, "run": str(tmp_path / "stop"), "nan_steps": [3], "every": 1},
             "skip": {**base, "run": str(tmp_path / "skip"), "nan_steps": [2, 3, 5], "policy": "skip", "max_skipped": 3,
                      "precision": "bf16"},
             "bounded": {**base, "run": str(tmp_path / "bounded"), "nan_steps": [2, 3, 4, 5], "policy": "skip", "max_skipped": 2},
             "watched": {**base, "run": str(tmp_path / "watched"), "until": 8, "spike_step": 7, "spike_rows": list(range(0, 1000, 3)),
                         "slow_rank": 1}}
    results = run(tmp_path, 2, "fit_tiny", cases)
    for rank in range(2):
        stop, skip, bounded = (results[name][rank] for name in ("stop", "skip", "bounded"))
        assert all(result["state_finite"] for result in (stop, skip, bounded))
        assert stop["error"].startswith("TrainingError") and "step 3 on rank(s) [1]" in stop["error"]
        assert "step-000002" in stop["error"] and not (tmp_path / "stop" / "step-000003").exists()
        assert skip["error"] is None and skip["skipped"] == 3 and (tmp_path / "skip" / "step-000006").exists()
        assert [line["nonfinite/step"] for line in skip["nonfinite"]] == [2, 3, 5]
        assert "step 3 on rank(s) [1]" in bounded["error"]
    rows = results["stop"][1]["rows"][2]
    left = sorted((tmp_path / "stop").glob("nonfinite-*.json"))
    assert [path.name for path in left] == ["nonfinite-step-000003-rank-00001.json"]
    assert [row for batch in json.loads(left[0].read_text())["micro_batches"] for row in batch] == rows
    assert [(trace["step"], trace["reason"]) for trace in read_traces(tmp_path / "skip")] == [(2, "not finite"), (3, "not finite"),
                                                                                            (5, "not finite")]
    check_watched(tmp_path / "watched", results["watched"])


def check_watched(folder, ranks):
    """A spike at step 7 of every third row, on two ranks of which the second is slow, under ZeRO-3: nothing but that is told."""
    assert [(event["step"], event["kind"]) for event in read_events(folder)] == [(7, "loss_spike")]
    [trace] = read_traces(folder)
    given = {rank: result["rows"][6] for rank, result in enumerate(ranks)}
    assert {row["rank"] for row in trace["rows"]} == {0, 1} and all(row["row"] in given[row["rank"]] for row in trace["rows"])
    assert trace["step"] == 7 and all(row["row"] % 3 == 0 and row["mean_nll"] > 20 for row in trace["rows"][:10])
    assert all(ad["item_id"].startswith("ad-") for row in trace["rows"] for ad in row["ads"])
    lines = [line for line in read_metrics(folder / "metrics.jsonl") if "loss" in line]
    assert len(lines) == 8 and all(line["straggler_rank"] == 1 and line["straggler_gap"] > 1.1 for line in lines[1:])
    assert all(1 <= line["work_gap"] < 1.5 and line["loss_action/click"] == pytest.approx(line["loss_head/1"]) for line in lines[:6])
