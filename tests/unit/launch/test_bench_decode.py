"""Decoding benchmark: lawful catalogues and prefix tables, results counted honestly, ours beside brute force, absent peers named."""

import itertools
import json

import pytest
import torch
from documents import launch_module

from gpr_dist.config import load_config
from gpr_dist.errors import ConfigError, GPRError

SETTINGS = {"seed": 3, "num_levels": 3, "codebook_size": 4, "items": [20], "beams": [5], "batches": [2], "clock": "wall"}


@pytest.fixture(scope="module")
def bench():
    return launch_module("bench_decode")


@pytest.fixture(scope="module")
def peers():
    return launch_module("bench_decode_peers")


def tiny(bench, **settings):
    return bench.DecodeBenchConfig(**{
        "items": (60,), "beams": (4,), "batches": (1, 2), "tokens": 8, "organic": 2, "width": 8, "num_heads": 2, "codebook_size": 8,
        "encoder_layers": 1, "decoder_layers": 1, "seconds": 0.01, "rounds": 2, **settings})


def test_a_catalogue_has_distinct_items_and_is_the_same_for_all(peers):
    codes = peers.catalogue(60, SETTINGS)
    assert codes.shape == (60, 3) and len(codes.unique(dim=0)) == 60 and set(codes.flatten().tolist()) == {0, 1, 2, 3}
    assert torch.equal(codes, peers.catalogue(60, SETTINGS)) and not torch.equal(codes, peers.catalogue(60, {**SETTINGS, "seed": 4}))


def test_the_prefix_table_allows_exactly_the_catalogue(peers):
    codes = peers.catalogue(20, SETTINGS)
    table = peers.prefix_table(codes, 4)
    allowed = {(a, b, c) for a in table[()] for b in table[(a,)] for c in table[(a, b)]}
    assert allowed == {tuple(1 + 4 * level + code for level, code in enumerate(row)) for row in codes.tolist()}


def test_illegal_and_missing_results_are_counted(peers):
    codes = torch.tensor(list(itertools.product(range(2), repeat=3)))
    whole = codes[None, [0, 5, 3]]
    assert peers.check(whole, codes, 4) == {"illegal": 0, "missing": 0}
    assert peers.check(codes[None, [0, 0, 3]], codes, 4) == {"illegal": 0, "missing": 1}  # twice the same
    changed = whole.clone()
    changed[0, 1] = torch.tensor([0, 1, 3])
    assert peers.check(changed, codes, 4) == {"illegal": 1, "missing": 1}
    changed[0, 1] = -1
    assert peers.check(changed, codes, 4) == {"illegal": 0, "missing": 1}
    more_than_there_are = torch.cat((codes[None], torch.full((1, 2, 3), -1)), 1)
    assert peers.check(more_than_there_are, codes, 4) == {"illegal": 0, "missing": 0}


def test_calls_fill_the_time_and_are_checked(peers):
    codes, numbers = peers.catalogue(20, SETTINGS), []

    def decoder(given, beams, batch):
        assert torch.equal(given, codes) and (beams, batch) == (5, 2)
        return lambda number: (numbers.append(number), codes[None, :5].repeat(2, 1, 1))[1]

    steps = peers.decode_steps(decoder, {**SETTINGS, "seconds": 0.005}, torch.device("cpu"))
    answer = steps["20 5 2"]()
    assert list(steps) == ["20 5 2"] and answer["illegal"] == answer["missing"] == 0
    assert numbers == list(range(len(answer["calls"]))) and sum(wall for wall, _ in answer["calls"]) >= 0.005


def test_long_calls_are_foreseen(bench):
    known = {(100, 10, 1): 0.1, (100, 10, 4): 0.3}
    assert bench.expected_seconds((100, 50, 4), known) == pytest.approx(1.5)
    assert bench.expected_seconds((200, 50, 4), known) == bench.expected_seconds((100, 5, 1), known) == 0


def test_rates_are_of_all_calls(bench):
    config = tiny(bench, clock="cpu")
    answers = [{"calls": [[2.0, 1.0], [4.0, 3.0]], "illegal": 0, "missing": 1}, {"calls": [[6.0, 4.0]], "illegal": 2, "missing": 0}]
    found = bench.summary(config, 60, 4, 2, {"ours": answers, "t5": [{"calls": [[9.0, 8.0]], "illegal": 0, "missing": 0}], "gpt2": []})
    ours = found["contenders"]["ours"]
    assert (ours["requests_per_s"], ours["requests_per_s_wall"], ours["calls"]) == pytest.approx((6 / 8, 6 / 12, 3))
    assert (ours["wall_p50_s"], ours["cpu_p50_s"], ours["illegal"], ours["missing"]) == (4.0, 3.0, 2, 1)
    assert found["times"] == {"t5": pytest.approx(6 / 8 / (2 / 8))} and "gpt2" not in found["contenders"]


def test_the_best_batches_are_compared(bench):
    def result(beams, batch, **rates):
        return {"items": 60, "beams": beams, "batch": batch, "contenders": {name: {"requests_per_s": rate} for name, rate in rates.items()}}

    results = [result(4, 1, ours=10.0, t5=4.0), result(4, 2, ours=30.0, t5=2.0), result(8, 1, ours=5.0)]
    assert bench.best_times(results, "t5") == {(60, 4): 7.5}


def test_ours_runs_and_absent_peers_are_named(bench, tmp_path, capsys):
    config = tiny(bench, transformers_python="no/python", out=tmp_path / "out.json")
    bench.run_bench(config)
    text, found = capsys.readouterr().out, json.loads((tmp_path / "out.json").read_text())
    assert found["brute_force"]["largest_difference"] < bench.TOLERANCE and found["brute_force"]["same_order"] > 0.9
    assert [result["batch"] for result in found["results"]] == [1, 2]
    for result in found["results"]:
        ours = result["contenders"]["ours"]
        assert ours["illegal"] == ours["missing"] == 0 and ours["requests_per_s"] > 0 and ours["calls"] >= 2
    assert found["absent"]["gpr_recsys"] == "no path given" and found["absent"]["t5"].startswith("no/python: ")
    assert "T5, Hugging Face generate      does not run here: no/python" in text


def test_a_search_that_is_not_brute_force_is_refused(bench, monkeypatch):
    monkeypatch.setattr(bench, "TOLERANCE", -1.0)
    with pytest.raises(GPRError, match="is broken"):
        bench.run_bench(tiny(bench, contenders=()))


def test_more_items_than_codes_can_tell_apart_are_refused(bench):
    with pytest.raises(ConfigError, match="cannot tell 1,000 items apart"):
        load_config(bench.DecodeBenchConfig, None, ["items=[1000]", "codebook_size=4"])
