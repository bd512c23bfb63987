"""Item identities and dropout under ZeRO with real processes: the number of ranks and a restart change nothing."""

import shutil
from pathlib import Path
from typing import Any

import pytest
from ranks import run_ranks

ITEMS = {"buckets": 64, "dropout": 0.4, "head_dropout": 0.2, "head_codes": True}
KINDS: dict[str, dict[str, Any]] = {
    "full": {"items": ITEMS},
    "sampled, tied": {"items": {**ITEMS, "head": "tied", "full_softmax_items": 1, "num_sampled": 16}},
    "stage 0": {"items": ITEMS, "zero_stage": 0},
}
TOTAL, SAVED_AT = 5, 2


@pytest.fixture(scope="module")
def runs(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list]:
    """Losses per step, by number of ranks and kind; "2→1": step 2 of the run on 2 ranks continued on 1."""
    root = tmp_path_factory.mktemp("items")

    def losses(world: int, names: dict[str, str]) -> dict[str, dict]:
        cases = [{"data": str(tiny / "data"), "run": str(root / name), "until": TOTAL, "total": TOTAL, "every": SAVED_AT, "dropout": 0.3,
                  **KINDS[kind]} for name, kind in names.items()]
        results = run_ranks("engine_workers:run_cases", world, root / f"ranks-{world}", timeout=240, function="fit_tiny", cases=cases)
        assert not any(case["error"] for rank in results for case in rank)
        return {name: {int(step): loss for step, loss in results[0][number]["losses"].items()} for number, name in enumerate(names)}

    found = losses(2, {f"2 {kind}": kind for kind in KINDS})
    shutil.copytree(root / "2 full" / f"step-{SAVED_AT:06d}", root / "2→1 full" / f"step-{SAVED_AT:06d}")
    return found | losses(1, {f"1 {kind}": kind for kind in KINDS} | {"2→1 full": "full"})


@pytest.mark.parametrize("kind", KINDS)
def test_losses_with_dropout_do_not_depend_on_the_number_of_ranks(runs, kind):
    one, two = runs[f"1 {kind}"], runs[f"2 {kind}"]
    assert list(one) == list(range(1, TOTAL + 1)) and two == pytest.approx(one, rel=2e-5)
    assert one[TOTAL] < one[1]


def test_a_restart_on_fewer_ranks_drops_the_same(runs):
    assert list(runs["2→1 full"]) == list(range(SAVED_AT + 1, TOTAL + 1))
    assert runs["2→1 full"] == pytest.approx({step: loss for step, loss in runs["2 full"].items() if step > SAVED_AT}, rel=2e-5)
