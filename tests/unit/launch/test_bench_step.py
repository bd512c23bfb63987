"""Step benchmark: lawful journeys, parts that are the step, rates that follow from what was measured, peers named when absent."""

import json

import pytest
import torch
from documents import launch_module

from gpr_dist.config import load_config
from gpr_dist.errors import ConfigError
from gpr_dist.model.flops import training_flops, work_of
from gpr_dist.model.gpr import GPRConfig
from gpr_dist.schema import TokenType

TINY = GPRConfig(width=16, codebook_size=8, num_user_features=2, num_env_features=2)
SETTINGS = {"seed": 0, "precision": "fp32", "threads": 1}


@pytest.fixture(scope="module")
def bench():
    return launch_module("bench_step")


@pytest.fixture(scope="module")
def ours():
    return launch_module("bench_step_ours")


def test_journeys_have_the_size_asked_for_and_every_request_is_a_target(ours):
    batch = ours.generate_batch(TINY, rows=200, tokens=60, organic=2, ads=3, spread=0.3, seed=0)
    assert batch.num_tokens / batch.num_rows == pytest.approx(60, rel=0.1)
    is_env, is_ad = batch.token_type_T == TokenType.E, batch.token_type_T == TokenType.I
    assert torch.equal(batch.request_token_R, is_env.nonzero().squeeze(1))
    assert batch.num_targets == int(is_ad.sum()) and is_ad[batch.request_token_R + 1].all()
    assert torch.equal((batch.token_type_T == TokenType.U).nonzero().squeeze(1), batch.offsets_B1[:-1])
    assert torch.equal(batch.item_T >= 0, batch.token_type_T % 2 == 1)


def test_both_readings_of_the_peers_rows(ours):
    shape = {"rows": 3, "positions": 20, "organic": 5, "seed": 0}
    one = ours.peer_batch(TINY, every_request=False, **shape)
    every = ours.peer_batch(TINY, every_request=True, **shape)
    assert one.num_tokens == every.num_tokens == 60 and torch.equal(one.token_type_T, every.token_type_T)
    assert one.num_targets == 3 and torch.bincount(one.target_head_N).tolist() == [3, 3, 3, 3]
    assert torch.equal(one.request_token_R, every.offsets_B1[1:] - 2)
    assert every.num_targets == 3 * 13 and torch.bincount(every.target_head_N).tolist() == [39, 36, 33, 30]


@pytest.mark.parametrize("extra", [{}, {"hsd": {"num_layers": 3, "recursions": 2}, "ptd": {"num_thinking": 2, "refining": True}}])
def test_parts_are_made_of_the_step(ours, extra):
    config = GPRConfig(**{**TINY.model_dump(), **extra})
    batch = ours.generate_batch(config, rows=3, tokens=30, organic=2, ads=2, spread=0.3, seed=1)
    training = ours.Training(config, batch, SETTINGS)
    steps = training.steps()
    assert sum(steps["describe"]()["flops"].values()) == training_flops(config, work_of(batch, config.num_mtp_heads))
    first = steps["step"]()["loss"]
    assert all(steps["step"]()["loss"] < first for _ in range(3))
    flops = steps["describe"]()["flops"]
    for decoder in ("hsd", "ptd"):  # those of a handful of tokens are left out; routers and what refining adds are products too
        assert 0.9 < steps[f"products: {decoder.upper()}"]()["flops"] / flops[f"{decoder}.dense"] < (1.2 if decoder == "hsd" else 2)
    touched = set()
    for name, run in steps.items():
        if name.startswith("part: ") and name != "part: optimizer":
            training.model.zero_grad()
            run()
            touched |= {name for name, parameter in training.model.named_parameters() if parameter.grad is not None}
    assert touched == {name for name, _ in training.model.named_parameters()}
    before = {name: parameter.clone() for name, parameter in training.model.named_parameters()}
    steps["part: optimizer"]()
    assert all(not torch.equal(before[name], parameter) for name, parameter in training.model.named_parameters())


def test_what_a_part_keeps_for_its_backward_grows_with_the_rows_alone(ours):
    kept = []
    for rows in (2, 4):
        batch = ours.generate_batch(TINY, rows=rows, tokens=40, organic=2, ads=2, spread=0.0, seed=1)
        kept.append(ours.Training(TINY, batch, SETTINGS).kept())
    assert set(kept[0]) == set(ours.PARTS) - {"optimizer"}
    for part in ("HSD without attention", "PTD generation", "code loss"):
        assert kept[1][part] == pytest.approx(2 * kept[0][part], rel=0.3)
    inputs = torch.zeros(7, 3, requires_grad=True)
    linear = ours.Part(torch.nn.Linear(3, 5), lambda x: torch.nn.functional.silu(x @ x.new_ones(3, 5)), inputs)
    assert linear.kept_bytes() == 4 * (3 * 5 + 7 * 5)  # the product's right side and silu's input; its left side needs none


def test_bf16_step_updates_float32_masters(ours):
    batch = ours.generate_batch(TINY, rows=2, tokens=30, organic=2, ads=2, spread=0.0, seed=1)
    training = ours.Training(TINY, batch, {**SETTINGS, "precision": "bf16"})
    losses = [training.step()["loss"] for _ in range(4)]
    assert losses[-1] < losses[0]
    for master, parameter in zip(training.update.masters, training.model.parameters(), strict=True):
        assert master.dtype == torch.float32 and torch.equal(master.bfloat16(), parameter)


def test_operations_by_nvidias_convention_at_their_shape(ours):
    assert ours.hstu_flops(32, 4099, 1024, 8)["nvidia"] == pytest.approx(63.89e12, rel=2e-3)  # PERF_ANALYSIS.md: 63.89 TFLOP


def test_sampled_softmax_is_the_one_over_fetched_vectors(ours):
    state, table, item = torch.nn.functional.normalize(torch.randn(7, 4), dim=1), torch.randn(10, 4), torch.randint(1, 10, (7,))
    torch.manual_seed(3)
    found = ours.sampled_softmax(state, table, item, num_negatives=5)
    torch.manual_seed(3)
    negatives = torch.randint(1, 10, (7, 5))
    unit = torch.nn.functional.normalize(table, dim=1)
    losses = []
    for n in range(7):
        kept = [item[n], *(m for m in negatives[n] if m != item[n])]
        losses.append(-torch.log_softmax(torch.stack([state[n] @ unit[m] for m in kept]) / 0.05, 0)[0])
    assert float(found) == pytest.approx(float(torch.stack(losses).mean()), rel=1e-5)


def test_our_full_softmax_is_the_peers(ours):
    torch.manual_seed(0)
    state, table = (torch.randn(rows, 4, dtype=torch.float64, requires_grad=True) for rows in (7, 10))
    item = torch.randint(1, 10, (7,))
    losses = [loss(torch.nn.functional.normalize(state, dim=1), table, item)
              for loss in (ours.chunked_softmax, launch_module("bench_step_peers").full_softmax)]
    found, expected = ((loss, *torch.autograd.grad(loss, (state, table))) for loss in losses)
    assert all(torch.allclose(a.double(), b.double(), rtol=1e-5, atol=1e-6) for a, b in zip(found, expected, strict=True))


def test_rates_follow_from_seconds(bench):
    about = {"memory_bytes": 3, "tokens": 100, "targets": 10,
             "flops": {"hsd.dense": 6e9, "hsd.attention": 1e9, "ptd.dense": 2e9, "hte": 1e9}}
    parts = {"input embedding": 0.1, "HSD without attention": 0.5, "PTD keys and values": 0.1, "PTD opening": 0.1,
             "PTD generation": 0.2, "of which PTD attention": 0.15}
    products = {"products: HSD": 0.4, "products: PTD": 0.2}
    found = bench.size_metrics(about, {"step": 2.0, "matmul": 0.5, **{f"part: {k}": v for k, v in parts.items()}, **products}, 10e9, 7)
    assert found["hsd_products_mfu"] == pytest.approx(6 / 0.4 / 20) and found["hsd_dense_of_products"] == pytest.approx(0.8)
    assert found["ptd_products_mfu"] == pytest.approx(2 / 0.2 / 20) and found["ptd_dense_of_products"] == pytest.approx(0.8)
    assert (found["tokens_per_s"], found["targets_per_s"], found["mfu"]) == pytest.approx((50, 5, 10 / 2 / 20))
    assert found["hsd_dense_mfu"] == pytest.approx(6 / 0.5 / 20) and found["ptd_dense_mfu"] == pytest.approx(2 / 0.25 / 20)
    assert found["dense_mfu"] == pytest.approx(8 / 0.75 / 20) and found["parts_s"] == pytest.approx(1.0)
    assert found["memory_bytes"] == 7


def test_settings_are_laid_over_the_presets(bench):
    config = load_config(bench.StepBenchConfig, None, ["sizes.small.rows=3", "switches.hsd.score=silu", "sizes.own.model.width=32"])
    assert config.sizes["small"].rows == 3 and config.sizes["small"].model.width == bench.SIZES["small"]["model"]["width"]
    assert all(size.model.hsd.score == "silu" for size in config.sizes.values()) and config.sizes["own"].model.width == 32
    assert bench.StepBenchConfig(**config.model_dump()) == config
    with pytest.raises(ConfigError, match="widht"):
        load_config(bench.StepBenchConfig, None, ["sizes.small.model.widht=3"])


def test_the_table_is_made_and_absent_peers_are_named(bench, tmp_path, capsys):
    tiny = {"rows": 2, "tokens": 30, "model": TINY.model_dump(mode="json")}
    config = bench.StepBenchConfig(
        sizes={"tiny": tiny}, hstu={"tiny_hstu": {"width": 8, "num_heads": 2, "num_layers": 1, "length": 6, "rows": 2, "num_items": 9}},
        generative_recommenders=tmp_path, contenders=("tiny", "tiny_hstu"), repetitions=1, out=tmp_path / "out.json")
    bench.run_bench(config)
    results = json.loads((tmp_path / "out.json").read_text())["results"]
    assert results["tiny"]["tokens_per_s"] == pytest.approx(results["tiny"]["tokens"] / results["tiny"]["step_s"])
    assert 0 < results["tiny"]["mfu"] < 1 and results["tiny"]["memory_bytes"] > 0
    assert results["tiny"]["heads_cost"] > 0 and results["tiny"]["kept_bytes"]["code loss"] > 0
    assert "ModuleNotFoundError" in results["tiny_hstu"]["encoder"]["absent"]["HSTU"]
    text = capsys.readouterr().out
    assert "HSTU  " in text and "does not run here: ModuleNotFoundError" in text


def test_a_peer_without_a_path_or_a_python_is_named(bench):
    found = bench.run_group(bench.StepBenchConfig(), {"peer": ("gpr_recsys", {"path": None})}, ("step",))
    assert found == ({}, {"peer": "no path given"})
    config = bench.StepBenchConfig(hstu_python="no/python")
    found = bench.run_group(config, {"peer": ("meta_hstu", {"path": "somewhere"})}, ("step",))
    assert found[1]["peer"].startswith("no/python: ")


def test_unknown_contenders_are_refused(bench):
    with pytest.raises(ConfigError, match="unknown smal;"):
        bench.run_bench(bench.StepBenchConfig(contenders=("smal",)))
