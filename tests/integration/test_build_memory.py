"""Memory of a build is bounded by its setting: six times the data take the same memory."""

import os
import subprocess
import sys
from pathlib import Path

REPO = Path(__file__).parents[2]
SCRIPT = """
import resource, sys
from pathlib import Path
import numpy as np, pyarrow as pa, pyarrow.parquet as pq
from data_pipeline.build import BuildConfig, build_data
from gpr_dist.config import build_config

root = Path(sys.argv[1])
rng = np.random.default_rng(0)
def write(folder, parts):
    folder.mkdir()
    for part in range(parts):
        n = 300_000
        pq.write_table(pa.table({
            "uid": pa.array(rng.integers(0, 3000 * parts, n)).cast(pa.string()),
            "item": pa.array(rng.integers(0, 20_000, n)).cast(pa.string()),
            "ts": rng.integers(0, 10**7, n)}), folder / f"{part}.parquet", row_group_size=50_000)
def build(name):
    build_data(build_config(BuildConfig, {
        "source": {"format": "files", "logs": [{"path": str(root / name), "user_id": "uid", "item_id": "item", "timestamp": "ts",
                   "time_format": "s", "kind": "ad", "action": "click"}]},
        "out": str(root / f"{name}_out"), "memory_limit_bytes": 64 << 20, "journeys": {"user_tokens": "none"}}, "test"))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
write(root / "small", 1)
write(root / "big", 6)
small = build("small")
print("PEAKS", small, build("big"))
"""


def test_memory_does_not_grow_with_the_data(tmp_path):
    result = subprocess.run([sys.executable, "-c", SCRIPT, str(tmp_path)], capture_output=True, text=True, cwd=REPO,
                            env=os.environ | {"PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"})
    assert result.returncode == 0, result.stderr
    small, big = (float(value) for value in result.stdout.split("PEAKS")[1].split())
    assert big - small < 200, f"peak {small:.0f} MB with 0.3 M rows, {big:.0f} MB with 1.8 M rows"
