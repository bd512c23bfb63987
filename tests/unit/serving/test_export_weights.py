"""Weights stream out of a checkpoint of any world size unchanged, in memory that does not grow with the model."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from checkpoint_files import write_checkpoint
from safetensors.torch import load_file

from gpr_dist.bundle import WEIGHTS
from gpr_dist.errors import CheckpointError, DataError
from gpr_dist.hashing import feature_id, time_feature
from gpr_dist.schema import TokenType
from gpr_dist.serving.export import find_time_features, save_item_weight, write_weights
from gpr_dist.training import checkpoint

ROOT = Path(__file__).resolve().parents[3]


def some_weights():
    torch.manual_seed(0)
    return {"table": torch.randn(37, 5), "scalar": torch.randn(()), "cube": torch.randn(3, 4, 5), "bias": torch.randn(7)}


@pytest.mark.parametrize("world_size", [1, 2, 5])
@pytest.mark.parametrize("piece", [3, 64, 1 << 20])
def test_weights_are_those_of_the_checkpoint(tmp_path, world_size, piece):
    weights = some_weights()
    folder = write_checkpoint(tmp_path / "step-000007", weights, world_size)
    shapes, read = checkpoint.open_weights(folder, mapped_bytes=100)
    assert write_weights(tmp_path, shapes, read, "float32", piece) == sum(w.numel() for w in weights.values())
    found = load_file(tmp_path / WEIGHTS)
    assert found.keys() == weights.keys() and all(torch.equal(found[name], weights[name]) for name in weights)


def test_bfloat16_is_rounded_once(tmp_path):
    weights = some_weights()
    shapes, read = checkpoint.open_weights(write_checkpoint(tmp_path / "step-000007", weights, 2))
    write_weights(tmp_path, shapes, read, "bfloat16", 8)
    found = load_file(tmp_path / WEIGHTS)
    assert all(torch.equal(found[name], weights[name].bfloat16()) for name in weights)


def test_an_incomplete_checkpoint_is_refused(tmp_path):
    folder = write_checkpoint(tmp_path / "step-000007", some_weights(), 2)
    (folder / checkpoint.rank_file(1)).unlink()
    with pytest.raises(CheckpointError, match=r"rank-00001.safetensors is missing"):
        checkpoint.find_checkpoint(folder)
    with pytest.raises(CheckpointError, match="no complete checkpoint"):
        checkpoint.find_checkpoint(tmp_path)
    older = write_checkpoint(tmp_path / "step-000003", some_weights(), 1)
    assert checkpoint.find_checkpoint(tmp_path) == older


MEASURE = """
import json, resource, sys
from pathlib import Path
from gpr_dist.serving.export import write_weights
from gpr_dist.training import checkpoint
def high_water():
    return int(next(l for l in open("/proc/self/status") if l.startswith("VmHWM")).split()[1]) << 10
folder, out = map(Path, sys.argv[1:])
shapes, read = checkpoint.open_weights(folder, mapped_bytes=1 << 24)
write_weights(out, {"small": shapes["small"]}, read, "bfloat16", 1 << 20)
before = high_water()
write_weights(out, shapes, read, "bfloat16", 1 << 20)
print(json.dumps(high_water() - before))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
def test_memory_does_not_grow_with_the_model(tmp_path):
    num_layers, width = 12, 2_600_000  # 10.4 MB each, 125 MB in all, three times that on disk with the moments
    weights = {"small": torch.ones(1 << 21)} | {f"layer{n}": torch.full((width,), float(n)) for n in range(num_layers)}
    folder = write_checkpoint(tmp_path / "step-000001", weights, 3)
    script = tmp_path / "measure.py"
    script.write_text(MEASURE)
    done = subprocess.run([sys.executable, script, folder, tmp_path], capture_output=True, text=True, timeout=120,
                          env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) < 64 << 20  # 16 MiB mapped and a few pieces of 4; all weights are 133 MB
    found = load_file(tmp_path / WEIGHTS)
    assert all(bool((found[f"layer{n}"] == n).all()) for n in range(num_layers))


@pytest.mark.parametrize("weights", [np.ones(3), np.array([1, np.nan, 1, 1]), np.array([1, -1, 1, 1.0])])
def test_item_weights_are_checked(tmp_path, weights):
    with pytest.raises(DataError, match="one for each item"):
        save_item_weight(weights, 4, tmp_path)


def test_time_features_are_found_only_where_all_tokens_agree():
    time = pa.array([7200, 90_000, 400_000, 500_000])
    kinds = [TokenType.E, TokenType.I, TokenType.E, TokenType.I]
    moments = pa.array([7200, 400_000])
    hour, day = (feature_id(time_feature(name, moments), name) for name in ("hour", "day_of_week"))
    wrong = hour.copy()
    wrong[1] = 5

    def batch(*columns):
        return pa.record_batch([pa.array([kinds], pa.list_(pa.uint8())), pa.array([time.to_pylist()], pa.list_(pa.int64())),
                                pa.array([np.stack(columns, 1).ravel().tolist()], pa.list_(pa.int32()))],
                               names=["token_type", "timestamp", "env_features"])

    assert find_time_features(("hour", "day_of_week"), batch(hour, day)) == ("hour", "day_of_week")
    assert find_time_features(("hour", "day_of_week"), batch(wrong, day)) == ("day_of_week",)
    assert find_time_features(("slot", "day_of_week"), batch(hour, day)) == ("day_of_week",)
