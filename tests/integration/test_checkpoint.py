"""Checkpoints with real processes: bit-identical on the same ranks, the same rows and losses on any other number, nothing pickled."""

import json
import shutil
import zipfile
from pathlib import Path
from typing import Any

import pytest
from ranks import run_ranks
from safetensors import safe_open

from gpr_dist.training import checkpoint

TOTAL, SAVED_AT = 8, 3  # 5 steps are an epoch, so the resumed part crosses from one into the next
KINDS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "dropout": {"dropout": 0.2, "background": False},  # the others are written in the background
    "bf16": {"precision": "bf16", "dropout": 0.2},
    "stage 2": {"zero_stage": 2},
    "stage 0": {"zero_stage": 0},
}
RESHARDED = ("fp32", "stage 2", "stage 0")
BEST = [5.0, 4.0, 1.0, 3.0, 3.0, 3.0, 3.0, 3.0]


def run(folder: Path, world_size: int, cases: dict[str, dict]) -> dict[str, list]:
    """Results of `fit_tiny` for each case by name, one entry per rank."""
    results = run_ranks("engine_workers:run_cases", world_size, folder, timeout=240, function="fit_tiny", cases=list(cases.values()))
    return {name: [rank[number] for rank in results] for number, name in enumerate(cases)}


@pytest.fixture(scope="module")
def runs(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list]:
    """Uninterrupted runs on 1 and 2 ranks that leave step 3 behind, and what 1, 2 and 4 ranks make of those checkpoints.

    Keys: "2 fp32" = uninterrupted on 2 ranks, "2→1 fp32" = its step 3 continued on 1. Values: one result per rank.
    """
    root = tmp_path_factory.mktemp("checkpoints")

    def straight(world: int, kind: str) -> dict:
        return {"data": str(tiny / "data"), "run": str(root / f"{world} {kind}"), "until": TOTAL, "total": TOTAL, "every": SAVED_AT,
                **KINDS[kind]}

    def resumed(before: int, after: int, kind: str) -> dict:
        folder = root / f"{before}→{after} {kind}"
        shutil.copytree(root / f"{before} {kind}" / f"step-{SAVED_AT:06d}", folder / f"step-{SAVED_AT:06d}")
        return straight(after, kind) | {"run": str(folder)}

    retention = straight(2, "fp32") | {"run": str(root / "retention"), "every": 1, "keep_last": 2, "keep_every": 4, "validation": BEST}
    results = run(root / "a", 2, {f"2 {kind}": straight(2, kind) for kind in KINDS} | {"retention": retention})
    results |= run(root / "b", 1, {"1 fp32": straight(1, "fp32")} | {f"2→1 {kind}": resumed(2, 1, kind) for kind in RESHARDED})
    results |= run(root / "c", 2, {f"2→2 {kind}": resumed(2, 2, kind) for kind in KINDS} | {"1→2 fp32": resumed(1, 2, "fp32")})
    results |= run(root / "d", 4, {"2→4 fp32": resumed(2, 4, "fp32")})
    return results | {"root": root}


def rows_by_step(ranks: list[dict]) -> dict[int, list[int]]:
    start = ranks[0]["start"]
    return {start + 1 + n: sorted(row for rank in ranks for row in rank["rows"][n]) for n in range(len(ranks[0]["rows"]))}


@pytest.mark.parametrize("kind", KINDS)
def test_same_ranks_resume_bit_identically(runs, kind):
    for straight, resumed in zip(runs[f"2 {kind}"], runs[f"2→2 {kind}"], strict=True):
        assert resumed["error"] is None and resumed["start"] == SAVED_AT and straight["start"] == 0 and resumed["pid"] != straight["pid"]
        later = {step: loss for step, loss in straight["losses"].items() if int(step) > SAVED_AT}
        assert len(later) == TOTAL - SAVED_AT and resumed["losses"] == later
        assert resumed["rows"] == straight["rows"][SAVED_AT:]
        assert resumed["random"] == straight["random"], "the random state was not restored"
    if KINDS[kind].get("dropout"):
        assert runs[f"2 {kind}"][0]["random"] != runs[f"2 {kind}"][1]["random"]
        assert runs["2 fp32"][0]["losses"] != runs["2 dropout"][0]["losses"]


@pytest.mark.parametrize("change", ["1→2 fp32", *(f"2→1 {kind}" for kind in RESHARDED), "2→4 fp32"])
def test_other_ranks_continue_the_same_rows(runs, change):
    before, kind = change.split("→")[0], change.split(" ", 1)[1]
    straight, resumed = runs[f"{before} {kind}"], runs[change]
    assert {rank["start"] for rank in resumed} == {SAVED_AT} and not any(rank["error"] for rank in resumed)
    for step in range(SAVED_AT + 1, TOTAL + 1):
        assert abs(resumed[0]["losses"][str(step)] - straight[0]["losses"][str(step)]) < 1e-5
    expected = rows_by_step(straight)
    assert rows_by_step(resumed) == {step: rows for step, rows in expected.items() if step > SAVED_AT}
    assert all(len(rows) == len(set(rows)) > 0 for rows in expected.values())


def test_an_epoch_is_every_row_once(runs):
    rows = rows_by_step(runs["2 fp32"])
    first_epoch = sorted(row for step in range(1, 6) for row in rows[step])
    assert first_epoch == list(range(len(first_epoch))) and len(first_epoch) > 4 * 64


def test_nothing_is_pickled(runs):
    """Every file of every step folder is JSON or safetensors, and holds what the manifest says."""
    folders = sorted(runs["root"].glob("*/step-*"))
    assert len(folders) > 10
    for folder in folders:
        manifest = json.loads((folder / "manifest.json").read_text())
        assert checkpoint.verify(folder) is None
        names = {path.name for path in folder.iterdir()}
        assert names == set(manifest["files"]) | {"manifest.json"}
        for path in folder.iterdir():
            assert path.suffix in (".json", ".safetensors") and not zipfile.is_zipfile(path)
            if path.suffix == ".json":
                json.loads(path.read_text())
            else:
                with safe_open(path, "np") as file:
                    assert "rng" in file.keys() and len(file.keys()) > 10  # noqa: SIM118  not a dictionary


def test_retention(runs):
    kept = [folder.name for folder in checkpoint.list_steps(runs["root"] / "retention")]
    assert kept == ["step-000003", "step-000004", "step-000007", "step-000008"]  # the best, a multiple of 4, the last two
    assert all(checkpoint.verify(runs["root"] / "retention" / name) is None for name in kept)


def test_weights_of_a_run_do_not_depend_on_how_they_were_sharded(runs):
    def weights(name: str, step: int) -> dict:
        return dict(checkpoint.iter_weights(runs["root"] / name / f"step-{step:06d}"))

    one, two = weights("1 fp32", SAVED_AT), weights("2 fp32", SAVED_AT)
    assert one.keys() == two.keys() and len(one) > 20
    assert all(one[name].shape == two[name].shape and (one[name] - two[name]).abs().max() < 1e-3 for name in one)
    same = weights("2→2 fp32", TOTAL), weights("2 fp32", TOTAL)
    assert all((same[0][name] == same[1][name]).all() for name in same[0])


def test_any_damage_is_found(runs, tmp_path):
    """One altered byte, a cut or a missing file: every file of a checkpoint, the manifest included."""
    whole = runs["root"] / "2 fp32" / f"step-{SAVED_AT:06d}"
    for number, name in enumerate(sorted(path.name for path in whole.iterdir())):
        size = (whole / name).stat().st_size
        for position in [0, size // 3, size // 2, size - 2] + [17 * k % size for k in range(1, 20)]:
            folder = tmp_path / f"altered-{number}-{position}"
            shutil.copytree(whole, folder)
            content = bytearray((folder / name).read_bytes())
            content[position] ^= 1
            (folder / name).write_bytes(content)
            assert checkpoint.verify(folder), f"byte {position} of {name} was altered and nobody noticed"
            shutil.rmtree(folder)
        for what in ("cut", "missing"):
            folder = tmp_path / f"{what}-{number}"
            shutil.copytree(whole, folder)
            if what == "cut":
                (folder / name).write_bytes((folder / name).read_bytes()[: size // 2])
            else:
                (folder / name).unlink()
            problem = checkpoint.verify(folder)
            assert problem and (name in problem)
