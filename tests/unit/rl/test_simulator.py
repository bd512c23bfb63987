"""The simulator as a whole: learned from a small log whose rule is known, saved, loaded, asked; and what it refuses."""

import json
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
import torch
from click_logs import CATALOGUE, NUM_ADS, NUM_ITEMS, NUM_TOPICS, click_rate, conversion_rate, tokenizer, write_click_logs, write_table
from documents import launch_module

from gpr_dist.config import load_config
from gpr_dist.data.loader import LoaderConfig, iter_once
from gpr_dist.data.sampler import World
from gpr_dist.errors import DataError, TokenizerError
from gpr_dist.rl.bids import BidConfig
from gpr_dist.rl.examples import LabelConfig
from gpr_dist.rl.fitting import SimulatorConfig, TrainingConfig, fit_simulator, format_report
from gpr_dist.rl.rankers import RankerConfig
from gpr_dist.rl.simulator import FinalValue, FinalValueConfig, Simulator
from gpr_dist.schema import Action

SMALL = SimulatorConfig(rankers=RankerConfig(width=8, hidden=(16,), item_buckets=64, feature_buckets=64, history_events=32),
                        training=TrainingConfig(epochs=4, rows_per_step=16, lr=1e-2), bids=BidConfig(smoothing=1e-3))
BRIEF = SMALL.model_copy(update={"training": TrainingConfig(epochs=1, max_steps=3, rows_per_step=16)})


def shards_of(folder):
    return {split: str(folder / "shards" / split) for split in ("train", "validation", "test")}


def fit(folder, config=SMALL, semantic_ids=None):
    return fit_simulator(folder, shards_of(folder), semantic_ids or tokenizer(), config)


def batch_of(folder, split="test", tokens=4096):
    return next(iter(iter_once(folder / "shards" / split, LoaderConfig(micro_batch_tokens=tokens), World(0, 1), tokenizer().codes_NL, 1)))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_click_logs(folder)
    return folder


@pytest.fixture(scope="module")
def fitted(data):
    return fit(data)


def every_pair(batch):
    requests = len(batch.request_token_R)
    return torch.arange(requests).repeat_interleave(NUM_ADS), torch.arange(NUM_ADS).repeat(requests)


def test_it_learns_the_rule_behind_the_clicks_better_than_popularity(fitted):
    _, report = fitted
    for split in ("validation (other half)", "test"):
        found = report["results"][split]
        assert found["pCTR"]["auc"] > 0.65 > found["popularity CTR"]["auc"] + 0.05
        assert found["pCTR"]["log_loss"] < found["popularity CTR"]["log_loss"]
        assert found["pCTR"]["calibration"] == pytest.approx(1, abs=0.3) and len(found["pCTR"]["deciles"]) == 10
        assert found["pCVR"]["auc"] > 0.6
    assert report["warnings"] == []
    assert "popularity CTR" in (text := format_report(report)) and "estimated" not in text and "column bid" in text
    assert json.loads(json.dumps(report)) is not None


def test_probabilities_add_up_to_the_clicks_they_were_calibrated_on(fitted, data):
    simulator, _ = fitted
    batch = batch_of(data, "validation", tokens=10**6)
    even_N = batch.row_ids_B[batch.request_row_R[batch.target_request_N]] % 2 == 0
    pctr_N, pcvr_N = simulator.predict(batch, batch.target_request_N[even_N], batch.target_item_N[even_N])
    action_N = batch.target_action_N[even_N]
    clicked_N = action_N >= Action.CLICK
    assert float(pctr_N.sum()) == pytest.approx(int(clicked_N.sum()), rel=1e-4)
    assert float(pcvr_N[clicked_N].sum()) == pytest.approx(int((action_N == Action.CONVERSION).sum()), rel=1e-4)
    assert simulator.final_value.mean_click == pytest.approx(float(clicked_N.float().mean()), rel=1e-4)


def test_rewards_follow_from_the_rates_and_bids(fitted, data):
    simulator, _ = fitted
    batch = batch_of(data)
    request_N, item_N = every_pair(batch)
    rewards = simulator.rewards(batch, request_N, item_N)
    assert ((rewards.pctr_N > 0) & (rewards.pctr_N < 1) & (rewards.pcvr_N > 0) & (rewards.pcvr_N < 1)).all()
    torch.testing.assert_close(rewards.ecpm_N, 1000 * rewards.pctr_N * (item_N.float() / 10 + 1))
    torch.testing.assert_close(rewards.final_value_N, simulator.final_value(rewards.ecpm_N, rewards.pctr_N, rewards.pcvr_N))
    late_half = item_N >= NUM_ADS // 2
    assert rewards.pcvr_N[~late_half].mean() > rewards.pcvr_N[late_half].mean() + 0.1 and conversion_rate(0) > conversion_rate(NUM_ADS - 1)


def test_pctr_is_close_to_the_true_rate_also_of_ads_that_were_not_shown(fitted, data):
    simulator, _ = fitted
    batch = batch_of(data)
    request_N, item_N = every_pair(batch)
    organic_T = (batch.item_T >= NUM_ADS).nonzero().squeeze(1)
    row_S = torch.searchsorted(batch.offsets_B1, organic_T, right=True) - 1
    topic_B = torch.stack([torch.bincount(batch.item_T[organic_T[row_S == row]] % NUM_TOPICS, minlength=NUM_TOPICS).argmax()
                           for row in range(batch.num_rows)])
    true_N = torch.tensor([click_rate(topic, ad) for topic, ad in
                           zip(topic_B[batch.request_row_R[request_N]].tolist(), item_N.tolist(), strict=True)])
    pctr_N, _ = simulator.predict(batch, request_N, item_N)
    assert pctr_N[true_N > 0.5].mean() > 1.6 * pctr_N[true_N < 0.5].mean()
    assert np.corrcoef(pctr_N, true_N)[0, 1] > 0.4


def test_neither_order_nor_packing_nor_a_chunk_changes_a_reward(fitted, data):
    simulator, _ = fitted
    batch = batch_of(data)
    request_N, item_N = every_pair(batch)
    together = simulator.rewards(batch, request_N, item_N)
    shuffled = torch.randperm(len(item_N))
    for mixed, straight in zip(simulator.rewards(batch, request_N[shuffled], item_N[shuffled]), together, strict=True):
        torch.testing.assert_close(mixed, straight[shuffled])
    alone = batch_of(data, tokens=1)
    assert alone.num_rows == 1 < batch.num_rows
    first, of_first = simulator.rewards(alone, *every_pair(alone)), slice(0, len(alone.request_token_R) * NUM_ADS)
    for single, whole in zip(first, together, strict=True):
        torch.testing.assert_close(single, whole[of_first])


def test_saved_and_loaded_it_gives_the_same_rewards(fitted, data, tmp_path):
    simulator, _ = fitted
    simulator.save(tmp_path)
    loaded = Simulator.load(tmp_path, "cpu", tokenizer())
    batch = batch_of(data)
    for before, after in zip(simulator.rewards(batch, *every_pair(batch)), loaded.rewards(batch, *every_pair(batch)), strict=True):
        assert torch.equal(before, after)
    assert loaded.facts.final_value == simulator.facts.final_value and loaded.num_items == NUM_ITEMS


def test_the_same_seed_gives_the_same_simulator(data):
    one, other = (fit(data, BRIEF)[0] for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(one.rankers.state_dict().values(), other.rankers.state_dict().values(), strict=True))
    assert one.facts == other.facts


def test_a_budget_bounds_what_an_impression_is_worth(fitted, data):
    simulator, _ = fitted
    batch = batch_of(data)
    request_N, item_N = every_pair(batch)
    free = simulator.rewards(batch, request_N, item_N)
    budget_N = torch.where(item_N % 2 == 0, 0.1, 1e9)
    capped = simulator.rewards(batch, request_N, item_N, budget_N)
    even = item_N % 2 == 0
    torch.testing.assert_close(capped.ecpm_N, torch.where(even, free.ecpm_N.clamp_max(100.0), free.ecpm_N))
    torch.testing.assert_close(capped.final_value_N / free.final_value_N, capped.ecpm_N / free.ecpm_N)
    spent = simulator.rewards(batch, request_N, item_N, torch.zeros_like(budget_N))
    assert not spent.ecpm_N.any() and not spent.final_value_N.any() and torch.equal(spent.pctr_N, free.pctr_N)


def test_final_value_is_equation_5():
    ecpm_N, pctr_N, pcvr_N = torch.tensor([50.0, 100.0]), torch.tensor([0.1, 0.2]), torch.tensor([0.5, 0.25])
    means = {"mean_ecpm": 50.0, "mean_click": 0.1, "mean_conversion": 0.05}
    added = FinalValue(config=FinalValueConfig(target_weight=0.5, click_alpha=1, conversion_alpha=3), **means)
    torch.testing.assert_close(added(ecpm_N, pctr_N, pcvr_N), torch.tensor([1 + 0.5 * 1.0, 2 + 0.5 * (2 + 3 * 1) / 4]))
    times = FinalValue(config=FinalValueConfig(combine="prod", click_alpha=1, conversion_alpha=3), **means)
    torch.testing.assert_close(times(ecpm_N, pctr_N, pcvr_N), torch.tensor([1.0, 2 * 5 / 4]))
    unknown = added.model_copy(update={"mean_conversion": 0.0})
    torch.testing.assert_close(unknown(ecpm_N, pctr_N, pcvr_N), torch.tensor([1.5, 3.0]))


def test_logs_of_taken_ads_only_give_the_probability_among_eligible_ads(tmp_path):
    semantic_ids = write_click_logs(tmp_path, action_of=lambda rng: Action.CLICK)
    with pytest.raises(DataError, match=r"labels\.kind=sampled_negatives"):
        fit(tmp_path, BRIEF, semantic_ids)
    config = SMALL.model_copy(update={"labels": LabelConfig(kind="sampled_negatives", negatives=5, conversions=False)})
    simulator, report = fit(tmp_path, config, semantic_ids)
    batch = batch_of(tmp_path)
    request_N, item_N = every_pair(batch)
    of_every = batch.request_eligibility_R[request_N] < 0
    pctr_N, pcvr_N = simulator.predict(batch, request_N, item_N)
    assert pctr_N[of_every].mean() == pytest.approx(1 / NUM_ADS, rel=0.3)  # one of 40 eligible ads is taken, of the even ones one of 20
    even = ~of_every & (item_N % 2 == 0)
    assert pctr_N[even].mean() == pytest.approx(2 / NUM_ADS, rel=0.3)
    assert not pcvr_N.any() and report["results"]["test"]["pCVR"] == {}
    assert simulator.final_value.mean_conversion == 0


def no_clicks(rng):
    return Action.IMPRESSION


def every_click_converts(rng):
    return rng.choice([Action.IMPRESSION, Action.CONVERSION])


@pytest.mark.parametrize(("action_of", "message"), [
    (no_clicks, r"0 of .* ads were clicked.*labels.kind=sampled_negatives"),
    (every_click_converts, r"([\d,]+) of \1 clicks were converted.*labels.conversions=false")])
def test_logs_of_one_class_are_refused(tmp_path, action_of, message):
    semantic_ids = write_click_logs(tmp_path, rows={"train": 20, "validation": 8, "test": 4}, action_of=action_of)
    with pytest.raises(DataError, match=message):
        fit(tmp_path, BRIEF, semantic_ids)


def test_logs_without_ads_or_values_are_refused(tmp_path):
    semantic_ids = write_click_logs(tmp_path / "empty", rows={"train": 20, "validation": 0, "test": 4})
    with pytest.raises(DataError, match="validation has no ads"):
        fit(tmp_path / "empty", BRIEF, semantic_ids)
    semantic_ids = write_click_logs(tmp_path / "untested", rows={"train": 60, "validation": 40, "test": 0})
    assert fit(tmp_path / "untested", BRIEF, semantic_ids)[1]["results"]["test"]["pCTR"] == {}  # validation's other half measures
    semantic_ids = write_click_logs(tmp_path / "worthless", values=False)
    catalogue = tmp_path / "worthless/catalogue/catalogue.arrow"
    table = pa.ipc.open_file(pa.py_buffer(catalogue.read_bytes())).read_all()
    write_table(table.drop_columns("bid"), catalogue)
    with pytest.raises(DataError, match="nothing tells what a click is worth"):
        fit(tmp_path / "worthless", BRIEF, semantic_ids)


def test_another_tokenizer_or_catalogue_is_refused(fitted, data, tmp_path):
    simulator, _ = fitted
    simulator.save(tmp_path)
    with pytest.raises(TokenizerError, match=f"fitted with tokenizer {simulator.facts.tokenizer}, but this job has tokenizer"):
        Simulator.load(tmp_path, "cpu", tokenizer(seed=1))
    grown = replace(tokenizer(), catalogues=(CATALOGUE, "grown"))
    with pytest.raises(TokenizerError, match="catalogue c0ffee, but this job has catalogue grown"):
        Simulator.load(tmp_path, "cpu", grown)
    with pytest.raises(TokenizerError, match="is of catalogue c0ffee"):
        fit(data, BRIEF, tokenizer(catalogue="other"))


def test_what_it_cannot_value_is_refused(fitted, data):
    simulator, _ = fitted
    batch = batch_of(data)
    with pytest.raises(DataError, match=rf"items -1..{NUM_ITEMS} are asked for, the simulator knows 0..{NUM_ITEMS - 1}"):
        simulator.rewards(batch, torch.tensor([0, 0]), torch.tensor([-1, NUM_ITEMS]))
    wider = replace(batch, env_features_EF=batch.env_features_EF.repeat(1, 2))
    with pytest.raises(DataError, match="1 user and 2 environment features, the simulator was fitted with 1 and 1"):
        simulator.rewards(wider, torch.tensor([0]), torch.tensor([0]))
    assert all(len(part) == 0 for part in simulator.rewards(batch, *(torch.empty(0, dtype=torch.int64),) * 2))


def test_a_damaged_or_missing_folder_is_refused(fitted, tmp_path):
    simulator, _ = fitted
    with pytest.raises(DataError, match="no simulator there"):
        Simulator.load(tmp_path)
    simulator.save(tmp_path)
    weights = tmp_path / "rankers.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"oops")
    with pytest.raises(DataError, match=r"rankers\.safetensors is missing or damaged"):
        Simulator.load(tmp_path)
    facts = tmp_path / "simulator.json"
    facts.write_text(facts.read_text().replace('"version": 1', '"version": 0'))
    with pytest.raises(DataError, match="version 0"):
        Simulator.load(tmp_path)
    facts.write_text("{")
    with pytest.raises(DataError, match="damaged"):
        Simulator.load(tmp_path)


def test_the_script_fits_what_the_library_loads(data, tmp_path, monkeypatch, capsys):
    script = launch_module("fit_simulator")
    arguments = ["fit_simulator.py", f"data={data}", f"out={tmp_path / 'simulator'}", "training.max_steps=3"]
    monkeypatch.setattr("sys.argv", [*arguments, "--dry-run"])
    assert script.main() == 0 and not (tmp_path / "simulator").exists()
    monkeypatch.setattr("sys.argv", arguments)
    assert script.main() == 0
    assert "popularity CTR" in capsys.readouterr().out
    Simulator.load(tmp_path / "simulator", "cpu", tokenizer())
    report = json.loads((tmp_path / "simulator/report.json").read_text())
    assert load_config(SimulatorConfig, None, []).seed == report["settings"]["seed"]
