"""Table 1: no item is fitted on and measured, rows differ in the method only, the table's numbers are those of the definitions."""

import importlib
import json
import sys
from itertools import combinations

import numpy as np
import pytest
from documents import ROOT

from gpr_dist.config import build_config
from gpr_dist.errors import ConfigError
from gpr_dist.tokenizer.config import TokenizerConfig


@pytest.fixture(scope="module")
def table1():
    sys.path.insert(0, str(ROOT / "launch"))
    yield importlib.import_module("bench_table1")
    sys.path.remove(str(ROOT / "launch"))


def clustered(num_items: int = 400, dim: int = 6) -> np.ndarray:
    random = np.random.default_rng(0)
    centres = random.normal(size=(20, dim))
    return (centres[random.integers(20, size=num_items)] + 0.2 * random.normal(size=(num_items, dim))).astype(np.float32)


def test_no_item_is_fitted_on_and_measured_and_validation_never_sees_the_test_part(table1):
    for seed in (0, 1):
        test_fit, test = table1.split(1001, seed, table1.Table1Config(data=("x.npy",)))
        fit, validation = table1.split(1001, seed, table1.Table1Config(data=("x.npy",), part="validation"))
        assert len(test) == len(validation) == 200
        assert sorted([*test_fit, *test]) == list(range(1001)) and sorted([*fit, *validation, *test]) == list(range(1001))


def test_rows_differ_in_the_method_only(table1):
    base = TokenizerConfig(codebook_size=8, num_levels=2)
    rows = {name: table1.method_config(base, name, 3) for name in table1.METHODS}
    assert {name: (row.method, row.rq_vae.init) for name, row in rows.items() if row.method == "rq_vae"} == {
        "rq_vae_random": ("rq_vae", "random"), "rq_vae": ("rq_vae", "kmeans")}
    same = {row.model_copy(update={"method": "rq_vae", "rq_vae": base.rq_vae}).model_dump_json() for row in rows.values()}
    assert len(same) == 1 and {row.seed for row in rows.values()} == {3}


def test_similarity_of_groups_is_the_brute_force_mean(table1):
    random = np.random.default_rng(1)
    embeddings, codes = random.normal(size=(60, 5)), random.integers(0, 4, size=(60, 2)).astype(np.int32)
    unit = embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)
    means = []
    for group in {tuple(code) for code in codes.tolist()}:
        members = np.flatnonzero((codes == group).all(1))
        if len(members) > 1:
            means.append(np.mean([unit[a] @ unit[b] for a, b in combinations(members, 2)]))
    assert table1.similarity_of_groups(embeddings, codes, 4) == pytest.approx(np.mean(means))
    assert table1.similarity_of_groups(embeddings[:1], codes[:1], 4) is None


def test_floor_counts_equal_embeddings(table1):
    assert table1.floor(np.array([[0.0, 1], [0, 1], [0, 1], [2, 3]])) == 0.5
    assert table1.floor(clustered()) == 0


def test_the_table_is_made_and_every_number_written(table1, tmp_path, capsys):
    np.save(tmp_path / "items.npy", clustered())
    tokenizer = {"num_levels": 2, "codebook_size": 8, "device": "cpu", "rq_vae": {"hidden": [8], "epochs": 2}}
    config = build_config(table1.Table1Config, {"data": [tmp_path / "items.npy"], "seeds": [0, 1], "tokenizer": tokenizer,
                                                "out": tmp_path / "out" / "table.json"}, "test")
    table1.run_bench(config)
    results = json.loads((tmp_path / "out" / "table.json").read_text())["results"]
    assert [(row["method"], row["seed"]) for row in results] == [(name, seed) for seed in (0, 1) for name in config.methods]
    assert all(row["num_fit"] == 320 and row["num_held"] == 80 and 0 < row["collision"] < 1 for row in results)
    text = capsys.readouterr().out
    plus, plain = ([row["collision"] for row in results if row["method"] == name] for name in ("rq_kmeans_plus", "rq_kmeans"))
    change = np.subtract(plus, plain)
    spread, wins = f"{change.mean():.4f} ± {change.std(ddof=1):.4f}", (change < 0).sum()
    assert f"rq_kmeans_plus - rq_kmeans: collision {spread}, better in {wins} of 2 seeds" in text
    assert f"{np.mean(plus):.4f} ± {np.std(plus, ddof=1):.4f}" in text


def test_data_must_be_given(table1):
    with pytest.raises(ConfigError, match="data"):
        build_config(table1.Table1Config, {}, "test")
