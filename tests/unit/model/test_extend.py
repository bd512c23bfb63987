"""Decoding level by level: the state after a prefix is the one of decoding it whole, whether its parents are remembered or not."""

import dataclasses
import sys

import pytest
import torch
from documents import ROOT

from gpr_dist.model.gpr import GPR, GPRConfig
from gpr_dist.model.ptd import PTDBlock

LEVELS, CODES = 4, 5
CONFIGS = {
    "plain": {"ptd": {"num_layers": 2}},
    "thinking": {"ptd": {"num_thinking": 2, "refining": True}, "knowledge": {"num_vectors": 2, "width": 4}},
    "window": {"ptd": {"intent_window": 3}}}


@pytest.fixture(scope="module")
def generate_batch():
    sys.path.insert(0, str(ROOT / "launch"))
    from bench_step_ours import generate_batch

    yield generate_batch
    sys.path.remove(str(ROOT / "launch"))


@pytest.fixture(params=CONFIGS)
def setup(request, generate_batch):
    torch.manual_seed(0)
    config = GPRConfig(width=8, num_mtp_heads=2, num_levels=LEVELS, codebook_size=CODES, **CONFIGS[request.param],
                       hsd={"num_heads": 2}, num_user_features=1, num_env_features=1)
    batch = generate_batch(config, rows=3, tokens=20, organic=1, ads=2, spread=0.2, seed=1)
    model = GPR(config).eval()
    with torch.inference_mode():
        opening = model(batch, task="encode")
    requests = torch.randint(len(batch.request_row_R), (30,))
    return model, batch, opening, requests, torch.randint(2, (30,)), torch.randint(CODES, (30, LEVELS - 1))


@torch.inference_mode()
def expected(model, opening, request_N, head_N, prefix_Nl):
    return model.ptd(opening, task="generate", request_N=request_N, head_N=head_N, prefix_NlD=model.codes(prefix_Nl))[:, -1]


@torch.inference_mode()
def extended(model, opening, request_N, head_N, prefix_Nl):
    return model.ptd(opening, task="extend", request_N=request_N, head_N=head_N, prefix_Nl=prefix_Nl, prefix_NlD=model.codes(prefix_Nl))


def positions_decoded(monkeypatch):
    found, forward = [], PTDBlock.forward
    monkeypatch.setattr(PTDBlock, "forward", lambda self, x, **more: (found.append(x.shape[1]), forward(self, x, **more))[1])
    return found


def test_a_prefix_decoded_at_once_is_the_same_to_the_bit(setup):
    model, _, opening, request_N, head_N, codes_Nl = setup
    for length in range(LEVELS):
        found = extended(model, dataclasses.replace(opening, decoded=None), request_N, head_N, codes_Nl[:, :length])
        assert torch.equal(found, expected(model, opening, request_N, head_N, codes_Nl[:, :length]))


def test_level_by_level_adds_one_position_and_gives_the_same_states(setup, monkeypatch):
    model, _, opening, request_N, head_N, codes_Nl = setup
    decoded = positions_decoded(monkeypatch)
    for length in range(LEVELS):
        order = torch.randperm(40) % 30  # children in any order, and some twice
        prefix = (request_N[order], head_N[order], codes_Nl[order, :length])
        decoded.clear()
        found = extended(model, opening, *prefix)
        assert set(decoded) == ({1} if length else set())
        assert torch.allclose(found, expected(model, opening, *prefix), atol=1e-5)
    assert opening.decoded is None  # nothing follows the last level


def test_unknown_parents_are_decoded_anew(setup, monkeypatch):
    model, _, opening, request_N, head_N, codes_Nl = setup
    extended(model, opening, request_N[:20], head_N[:20], codes_Nl[:20, :1])
    decoded = positions_decoded(monkeypatch)
    other = codes_Nl[:, :2].clone()
    other[3, 0] = (other[3, 0] + 1) % CODES
    assert torch.equal(extended(model, opening, request_N, head_N, other), expected(model, opening, request_N, head_N, other))
    assert set(decoded) == {2}
    none = torch.zeros(0, dtype=torch.int64)
    assert extended(model, opening, none, none, none[:, None]).shape == (0, 8)  # a rank without requests
    prefix = request_N[:5], head_N[:5], codes_Nl[:5, :2]
    assert torch.equal(extended(model, opening, *prefix), expected(model, opening, *prefix))


def test_keys_that_collide_do_not_mix_prefixes(setup, monkeypatch):
    model, _, opening, request_N, head_N, codes_Nl = setup
    monkeypatch.setattr("gpr_dist.model.ptd._mixed", lambda place_N, prefix_Nl: torch.zeros_like(place_N))
    extended(model, opening, request_N, head_N, codes_Nl[:, :1])
    found = extended(model, opening, request_N, head_N, codes_Nl[:, :2])
    assert torch.equal(found, expected(model, opening, request_N, head_N, codes_Nl[:, :2]))


def test_the_model_decodes_what_it_was_trained_on(setup):
    model, batch, opening, *_ = setup
    target = batch.target_request_N, batch.target_head_N
    with torch.inference_mode():
        logits_NLV = model(batch, task="logits")
        for level in range(LEVELS):
            found = model(batch, task="decode", opening=opening, request_N=target[0], head_N=target[1],
                          prefix_Nl=batch.target_codes_NL[:, :level])
            assert torch.allclose(found, logits_NLV[:, level].log_softmax(-1), atol=1e-5)
