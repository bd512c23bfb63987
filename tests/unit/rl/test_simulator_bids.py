"""What a click is worth: a catalogue column, or the logs' values."""

import numpy as np
import pyarrow as pa
import pytest
import torch
from click_logs import write_table
from random_batches import random_batch

from gpr_dist.errors import DataError
from gpr_dist.rl.bids import BidConfig, ValueSums, check_column, find_bids
from gpr_dist.schema import Action


def catalogue(tmp_path, **columns):
    write_table(pa.table({"item_id": ["a", "b", "c"], **columns}), tmp_path / "catalogue.arrow")
    return tmp_path / "catalogue.arrow"


def logged(item, value, pctr, action):
    batch = random_batch(0)
    count = len(item)
    batch.target_head_N = torch.zeros(count, dtype=torch.int64)
    batch.target_item_N, batch.target_action_N = torch.tensor(item), torch.tensor([int(a) for a in action])
    batch.target_value_N, batch.target_pctr_N = torch.tensor(value), torch.tensor(pctr)
    sums = ValueSums(3)
    sums.add(batch)
    return sums


NAN = float("nan")
CLICK, SHOWN = Action.CLICK, Action.IMPRESSION


def test_the_column_bid_is_taken_where_there_is_one(tmp_path):
    bids = find_bids(catalogue(tmp_path, bid=[1.0, 2.0, 4.0]), ValueSums(3), BidConfig())
    assert bids.bid_M.tolist() == [1, 2, 4] and bids.origin == "column bid of the catalogue"


def test_a_named_column_with_gaps(tmp_path):
    bids = find_bids(catalogue(tmp_path, bid=[1.0, 2.0, 4.0], margin=pa.array([3, None, 5], pa.int64())), ValueSums(3),
                     BidConfig(column="margin"))
    assert bids.bid_M.tolist() == [3, 4, 5] and "1 items without" in bids.origin


def test_logged_ecpm_is_divided_by_logged_pctr(tmp_path):
    sums = logged([0, 0, 1, 2], [200.0, 400.0, 50.0, NAN], [0.1, 0.2, 0.1, 0.1], [SHOWN, CLICK, SHOWN, SHOWN])
    bids = find_bids(catalogue(tmp_path), sums, BidConfig(smoothing=1e-9))
    np.testing.assert_allclose(bids.bid_M, [2.0, 0.5, 0.65 / 0.4], rtol=1e-4)  # an ad without values: the mean ratio
    assert "eCPM" in bids.origin


def test_without_pctr_a_click_is_worth_the_mean_of_its_values(tmp_path):
    sums = logged([0, 0, 1, 2], [2.0, 4.0, 9.0, 100.0], [NAN] * 4, [CLICK, Action.CONVERSION, CLICK, SHOWN])
    np.testing.assert_allclose(find_bids(catalogue(tmp_path), sums, BidConfig(smoothing=1e-9)).bid_M, [3, 9, 5], rtol=1e-4)
    smooth = find_bids(catalogue(tmp_path), sums, BidConfig(smoothing=1e9)).bid_M
    np.testing.assert_allclose(smooth, [5, 5, 5], rtol=1e-4)


@pytest.mark.parametrize(("columns", "config", "message"), [
    ({}, BidConfig(), "nothing tells what a click is worth.*item_id"),
    ({"text": ["x", "y", "z"]}, BidConfig(column="text"), "column text holds string, but a bid is a number"),
    ({}, BidConfig(column="bidd"), "no column bidd.*item_id"),
    ({"bid": [1.0, -2.0, 0.0]}, BidConfig(), "a bid of -2"),
    ({"bid": [NAN, NAN, NAN]}, BidConfig(), "column bid is empty")])
def test_what_cannot_be_a_bid_is_refused_in_one_line(tmp_path, columns, config, message):
    path = catalogue(tmp_path, **columns)
    with pytest.raises(DataError, match=message):
        find_bids(path, ValueSums(3), config)
    if config.column:
        with pytest.raises(DataError, match=message):
            check_column(path, config)
