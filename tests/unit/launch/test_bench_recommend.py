"""The bench of a bundle: every request of every call is answered, by each ranker; requests of one's own are taken; bad ones stop it."""

import json

import pytest
from documents import launch_module

from gpr_dist.errors import DataError, GPRError

RANKERS = ("generative", "item head", "mix")


@pytest.fixture(scope="module")
def bench():
    return launch_module("bench_recommend")


def tiny(bench, **settings):
    model = {"width": 8, "hsd": {"num_heads": 2, "num_layers": 1}, "ptd": {"num_heads": 2, "num_layers": 1}, "num_levels": 2,
             "codebook_size": 8, "items": {"buckets": 300}, "num_user_features": 1, "num_env_features": 1}
    return bench.RecommendBenchConfig(**{"items": (300,), "batches": (1, 3), "rankers": RANKERS, "beam": 6, "k": 4, "history": 7,
                                         "model": model, "max_tokens": 160, "seconds": 0.01, "rounds": 1,
                                         "clock": "cpu", **settings})


def test_every_case_is_measured(bench, tmp_path, capsys):
    results = bench.run_bench(tiny(bench, out=tmp_path / "out.json"))
    assert [(found["ranker"], found["batch"]) for found in results] == [(ranker, batch) for ranker in RANKERS
                                                                        for batch in (1, 3)]
    assert all(found["calls"] >= 3 and found["requests_per_s"] > 0 and found["p99_ms"] >= found["p50_ms"] > 0 for found in results)
    assert json.loads((tmp_path / "out.json").read_text())["results"] == results
    assert "item head     3" in capsys.readouterr().out


def test_given_requests_are_repeated_and_must_be_answered(bench, tmp_path):
    path = tmp_path / "requests.jsonl"
    path.write_text('{"time": 1512120000}\n\n{"time": 1512120000, "k": 2}\n')
    config = tiny(bench, requests=path, rankers=("generative",))
    assert len(bench.read_requests(config)) == 6 and len(bench.run_bench(config)) == 2
    for text, message in (('{"time": 1, "eligible": []}', "no eligible ad"), ('{"tiem": 1}', "did you mean time"), ("", "no line")):
        path.write_text(text)
        with pytest.raises(DataError, match=message):
            bench.run_bench(config)
    with pytest.raises(GPRError, match="needs a model with an item head"):
        bench.run_bench(tiny(bench, model=tiny(bench).model.model_copy(update={"items": type(config.model.items)()})))
