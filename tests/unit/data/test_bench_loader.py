"""The loader benchmark runs and every contender that is installed delivers all journeys."""

import json
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from journeys_fixture import stored_rows

sys.path.insert(0, str(Path(__file__).parents[3] / "launch"))
import bench_loader


def test_contenders_deliver_everything(tmp_path, capsys):
    out = str(tmp_path / "out.json")
    config = bench_loader.LoaderBenchConfig(num_rows=300, median_tokens=20, repetitions=1, micro_batch_tokens=500, out=out)
    bench_loader.run_bench(config)  # asserts the counts of rows and tokens
    result = json.loads((tmp_path / "out.json").read_text())
    assert {"ours, arrow", "ours, webdataset", "webdataset, msgpack per sample"} <= set(result["results"])
    printed = capsys.readouterr().out
    assert all(name in printed for name in [*result["results"], *result["absent"]])


@pytest.mark.parametrize("types", ["int64", "stored"])
def test_minimal_and_peer_batches_hold_the_same_tokens(types):
    config = bench_loader.LoaderBenchConfig(num_rows=100, median_tokens=20)
    journeys = bench_loader.generate_journeys(config)
    views = bench_loader._RowViews(journeys)
    peer = next(bench_loader.pack((views[i] for i in range(100)), 10**9, partial(bench_loader._tensors, types=types)))
    rows = stored_rows(journeys.select(bench_loader.OUR_COLUMNS)).take(np.arange(100))
    ours = bench_loader._columns_only(rows, np.arange(100), types=types)
    assert peer.keys() == ours.keys()
    assert (ours["token_type"].dtype == torch.int64) == (types == "int64")
    assert all(peer[k].dtype == ours[k].dtype and torch.equal(torch.nan_to_num(peer[k]), torch.nan_to_num(ours[k])) for k in ours)
