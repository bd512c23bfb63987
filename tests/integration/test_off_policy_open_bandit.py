"""Open Bandit: what uniformly random logs say about Thompson sampling agrees with Thompson sampling's own click rate, and the other
way round; bad input ends in one line."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]
SHARED = Path(os.environ.get("GPR_SHARED_DATA", REPO.parent / "shared" / "data"))


def off_policy(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "launch/off_policy.py", *arguments], cwd=REPO, capture_output=True, text=True, timeout=120,
                          env={**os.environ, "PYTHONPATH": str(REPO)})


@pytest.mark.parametrize(("logs", "target", "estimators"), [
    ("random", "bts", ("ips", "snips", "dr")),
    ("bts", "random", ("ips", "snips", "dr")),  # weights up to 220: wide, and still right
])
def test_one_policy_from_the_others_logs(tmp_path: Path, logs: str, target: str, estimators: tuple[str, ...]) -> None:
    folder = SHARED / "open_bandit"
    if not folder.exists():
        pytest.skip("needs open_bandit under GPR_SHARED_DATA or ../shared/data")
    out = tmp_path / "report.json"
    done = off_policy(f"folder={folder}", f"logs={logs}/all/all.csv", f"target={target}/all/all.csv", f"out={out}")
    assert done.returncode == 0, done.stderr
    report = json.loads(out.read_text())
    own = report["target"][0]
    for name in estimators:
        value, low, high = report["estimators"][name]
        assert low <= own <= high and low < value < high, f"{name}: {report['estimators'][name]}, own mean {own}"
    assert 0.85 < report["mean_weight"] < 1.15


def write_logs(folder: Path, name: str, propensity: str = "0.5") -> None:
    (folder / name).write_text("item_id,position,click,propensity_score\n" + "".join(
        f"{number % 2},1,{int(number % 5 == 0)},{propensity}\n" for number in range(40)))


def test_bad_input_is_one_line(tmp_path: Path) -> None:
    write_logs(tmp_path, "good.csv")
    write_logs(tmp_path, "zero.csv", "0")
    common = [f"folder={tmp_path}", "target=good.csv", "features=[position]"]
    for arguments, message in (
        (["logs=none.csv"], "none.csv does not exist"),
        (["logs=good.csv", "reward=clik"], "click"),
        (["logs=zero.csv"], "impression 0 has propensity 0.0"),
        (["logs=good.txt"], "expected one of .csv"),
    ):
        done = off_policy(*common, *arguments)
        assert done.returncode == 2 and message in done.stderr and len(done.stderr.strip().splitlines()) == 1, done.stderr
    done = off_policy(*common, "logs=good.csv")
    assert done.returncode == 0 and "doubly robust" in done.stdout, done.stderr
