"""SASRec as a baseline: its losses, what it sees, that it learns, and that it is trained once."""

import numpy as np
import pytest
import torch
from journey_logs import ADS, NUM_ITEMS, eligibility, random_users, to_batches

from gpr_dist.errors import DataError
from gpr_dist.evaluation import sasrec
from gpr_dist.evaluation.baselines import DAY_S, BaselineConfig, popularity, rank_requests
from gpr_dist.evaluation.journey_log import read_log
from gpr_dist.evaluation.rankings import Requests
from gpr_dist.evaluation.sasrec import SASRec, SASRecConfig, encode_requests, load_or_train, sasrec_scorer

TINY = SASRecConfig(width=8, max_events=4, epochs=2, batch_events=32, dropout=0.0)


def opened(users, split="validation"):
    batches = to_batches(users)
    log = read_log({name: batches[name] for name in ("train", "validation", "test")[: 2 if split == "validation" else 3]}, split)
    return Requests(log, popularity(log, NUM_ITEMS, BaselineConfig()))


def test_every_training_ad_is_given_from_what_came_strictly_before_it_and_no_more():
    log = opened(random_users(0)).log
    site_n, target_n = sasrec._sites(log)
    seen = []
    random = np.random.default_rng(0)
    for item_bt, row_n, place_n, target in sasrec._batches(log, site_n, target_n, TINY, random, NUM_ITEMS):
        assert item_bt.shape[1] <= TINY.max_events
        for row, place, item in zip(row_n.tolist(), place_n.tolist(), target.tolist(), strict=True):
            seen.append((item_bt[row, place].item(), item))
            assert (item_bt[row, : place + 1] < NUM_ITEMS).all()
    expected = []
    for ad in np.flatnonzero(log.is_ad_X & (log.split_X == 0)):
        before = np.flatnonzero((log.user_X == log.user_X[ad]) & (log.time_X < log.time_X[ad]))
        if len(before):
            expected.append((log.item_X[before[-1]], log.item_X[ad]))
    assert sorted(seen) == sorted(expected) and len(seen) > 50


def test_the_state_before_a_request_is_that_of_its_last_events_alone():
    log = opened(random_users(1), "test").log
    torch.manual_seed(0)
    model = SASRec(NUM_ITEMS, TINY, np.ones(NUM_ITEMS)).eval()
    states = encode_requests(model, log)
    for request in range(log.num_requests):
        before = (log.user_X == log.request_user_R[request]) & (log.time_X < log.request_time_R[request])
        items = torch.from_numpy(log.item_X[before][-TINY.max_events :].astype(np.int64))
        expected = model(items[None])[0, -1] if len(items) else torch.zeros(TINY.width)
        torch.testing.assert_close(states[request], expected, atol=1e-5, rtol=1e-4)


def test_sampled_softmax_is_right_on_average():
    """With many samples the loss and its gradient approach those of the full softmax."""
    torch.manual_seed(0)
    count_I = np.arange(1.0, NUM_ITEMS + 1)
    model = SASRec(NUM_ITEMS, TINY, count_I)
    with torch.no_grad():
        model.items.weight.normal_()
    state, target = torch.randn(40, TINY.width), torch.randint(NUM_ITEMS, (40,))
    losses, gradients = [], []
    draw = sasrec._sampler(count_I, NUM_ITEMS, SASRecConfig(full_softmax_items=0, num_sampled=60_000), np.random.default_rng(0))
    for sampled in (None, draw()):
        loss = sasrec._loss(model, state, target, sampled)
        [gradient] = torch.autograd.grad(loss, [model.bias])
        losses.append(loss.item())
        gradients.append(gradient)
    assert losses[0] == pytest.approx(losses[1], rel=0.02)
    torch.testing.assert_close(gradients[0], gradients[1], atol=0.01, rtol=0)


def test_it_learns_a_succession_that_popularity_cannot_know(tmp_path):
    """Every user walks in a circle through the ads; the successor of the last ad is the next one."""
    users = {}
    for user in range(60):
        start = 7 * user
        users[f"u{user}"] = [(day * DAY_S, -1, [], [ADS[(start + step) % 20]]) for step, day in enumerate(range(user % 3, 100, 9))]
    validation, test = opened(users), opened(users, "test")
    config = SASRecConfig(width=16, max_events=8, epochs=30, patience=30, batch_events=256, dropout=0.0, lr=1e-2)
    model = load_or_train(tmp_path, "d", validation, eligibility(), NUM_ITEMS, config, progress=False)
    ranked = rank_requests(test.log, eligibility(), test.popularity_I, sasrec_scorer(model, test.log), 1)
    assert (ranked.item_RK[test.log.target_request_N, 0] == test.log.target_item_N).mean() > 0.9


def test_trained_once_for_the_same_data_and_settings(tmp_path, monkeypatch):
    validation = opened(random_users(2))
    arguments = (validation, eligibility(), NUM_ITEMS)
    model = load_or_train(tmp_path, "data", *arguments, TINY, progress=False)
    [path] = tmp_path.iterdir()
    monkeypatch.setattr(sasrec, "train", lambda *_: pytest.fail("trained again"))
    again = load_or_train(tmp_path, "data", *arguments, TINY, progress=False)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))
    monkeypatch.undo()
    load_or_train(tmp_path, "other data", *arguments, TINY, progress=False)
    load_or_train(tmp_path, "data", *arguments, TINY.model_copy(update={"seed": 1}), progress=False)
    assert len(list(tmp_path.iterdir())) == 3
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(DataError, match=r"is damaged .* delete it"):
        load_or_train(tmp_path, "data", *arguments, TINY, progress=False)


def test_nothing_to_learn_from_is_said():
    users = {"a": [(1 * DAY_S, -1, [], [3]), (65 * DAY_S, -1, [], [5])]}
    with pytest.raises(DataError, match="nothing to learn"):
        sasrec.train(opened(users), eligibility(), NUM_ITEMS, TINY, progress=False)
