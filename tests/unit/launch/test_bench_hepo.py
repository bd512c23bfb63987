"""The bench of the policy optimisation runs its steps, counts its candidates and writes what it prints."""

import json
import os
import subprocess
import sys

import pytest
from documents import ROOT


@pytest.mark.parametrize("algorithm", ["hepo", "dpo"])
def test_every_case_is_measured(algorithm, tmp_path):
    model = '{"width": 8, "hsd": {"num_heads": 2}, "ptd": {"num_heads": 2}, "codebook_size": 8, "num_user_features": 1, '\
            f'"num_env_features": 1, "critic": {str(algorithm == "hepo").lower()}}}'
    overrides = ["items=[300]", "candidates=[3, 6]", "steps=3", "rows=4", "tokens=40", "clock=cpu", f"model={model}",
                 f"policy.algorithm={algorithm}", f"out={tmp_path}/out.json", f"reward={'table' if algorithm == 'dpo' else 'rankers'}"]
    done = subprocess.run([sys.executable, ROOT / "launch" / "bench.py", "hepo", *overrides], cwd=tmp_path, text=True, capture_output=True,
                          timeout=120, env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "out.json").read_text())["results"]
    assert [found["candidates"] for found in results] == [3, 6] and len(done.stdout.splitlines()) == 4
    for found in results:
        assert found["sampled"] == 8 * found["candidates"]
        assert found["seconds"] == pytest.approx(found["rollout_s"] + found["update_s"], rel=0.2)
        assert found["plain_s"] > 0
