"""Policies and the market's truth: the evaluated requests are found again, true values are the truth's, serving what the log showed earns
what the log's ads earn, and bad input is named."""

from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
from documents import ROOT, launch_module

from data_pipeline.synthetic import MarketConfig, Truth, make_market
from gpr_dist.config import load_config
from gpr_dist.errors import DataError
from gpr_dist.evaluation.measures import UserSums
from gpr_dist.evaluation.policy_value import Ranked

evaluate_policy = launch_module("evaluate_policy")
CONFIG = evaluate_policy.EvaluatePolicyConfig()


@pytest.fixture(scope="module")
def market(tmp_path_factory):
    """A tiny market's truth, its last requests in another order as a log would have them, and a catalogue of its ads."""
    folder = tmp_path_factory.mktemp("market")
    make_market(load_config(MarketConfig, ROOT / "configs/market/test.yaml", [f"out={folder / 'raw'}"]))
    truth = Truth.load(folder / "raw")
    logged = truth.requests(truth.config.end_s - 86_400, truth.config.end_s)
    order = np.random.default_rng(0).permutation(len(logged))
    part = logged.take(order)
    users, user_R = np.unique(part.user_id.to_numpy(zero_copy_only=False).astype(str), return_inverse=True)
    log = SimpleNamespace(request_time_R=part.time, request_user_R=user_R, user_ids=users)
    ads = np.unique(part.ad_id.to_numpy(zero_copy_only=False).astype(str))
    (folder / "catalogue").mkdir()
    table = pa.table({"item_id": ads})
    with pa.ipc.new_file(folder / "catalogue/catalogue.arrow", table.schema) as writer:
        writer.write_table(table)
    return truth, part, SimpleNamespace(log=log), folder


def ranked_as_logged(part, ids: np.ndarray) -> Ranked:
    shown = np.searchsorted(ids, part.ad_id.to_numpy(zero_copy_only=False).astype(str))
    return Ranked(np.arange(len(part)), shown, np.zeros(len(part)))


def test_requests_are_found_again_and_valued_by_the_truth(market):
    truth, part, requests, folder = market
    opened = evaluate_policy.open_market(truth, requests, folder)
    assert np.array_equal(opened.requests.request_id, part.request_id) and opened.share == 1
    ranked = ranked_as_logged(part, opened.item_ids)
    found = opened.outcomes(ranked)
    expected = truth.outcomes(part.user_id, part.time, part.ad_id, part.slot)
    assert np.array_equal(found.ecpm, expected.ecpm) and found.ecpm.min() > 0


def test_serving_the_log_again_gets_its_clicks(market):
    """The same ads at the same requests; another order of the requests in the log changes nothing. Budgets are lifted out of the way."""
    truth, part, requests, folder = market
    opened = evaluate_policy.open_market(truth, requests, folder)
    opened.share = 1e3
    sums = UserSums(requests.log.request_user_R, len(requests.log.user_ids))
    served = opened.serve(sums, "served_", ranked_as_logged(part, opened.item_ids), CONFIG)
    production = truth.serve_logged(part, seed=CONFIG.seed)
    assert served["served_total_num_filled"] == len(part) and served["served_total_num_ineligible"] == 0
    assert served["served_total_clicks"] == production.clicks > 0
    assert served["served_total_expected_conversions"] == pytest.approx(production.expected_conversions)
    means = sums.result().means()
    assert means["served_value"] == pytest.approx(1000 * production.expected_value / len(part))


def test_another_markets_requests_are_refused(market):
    truth, _, requests, folder = market
    other = SimpleNamespace(log=SimpleNamespace(**{**vars(requests.log), "request_time_R": requests.log.request_time_R + np.r_[1, np.zeros(
        len(requests.log.request_time_R) - 1, np.int64)]}))
    with pytest.raises(DataError, match=r"has no request of user .* was not built from its logs"):
        evaluate_policy.open_market(truth, other, folder)
