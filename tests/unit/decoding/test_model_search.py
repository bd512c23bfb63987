"""A model behind the search: values of prefixes equal those of training, and every strategy asks equally often."""

import itertools

import numpy as np
import pytest
import torch
from random_batches import empty_batch, random_batch
from tiny_model import L, V, reorder_targets, tiny_model

from gpr_dist.decoding.legality import Eligible
from gpr_dist.decoding.model_decoder import ModelDecoder
from gpr_dist.decoding.search import SearchConfig, search
from gpr_dist.decoding.trie import Trie

TRIE = Trie.from_codes(np.array(list(itertools.product(range(0, V, 2), repeat=L)))[::5], V)
STRATEGIES = {
    "beam": SearchConfig(width=8),
    "heads": SearchConfig(width=8, heads=(0, 2)),
    "value": SearchConfig(strategy="value", width=8),
    "value heads": SearchConfig(strategy="value", width=(6, 4, 8), heads=(0, 1, 3), head_weights=(0.5, 0.2, 0.3)),
    "sample": SearchConfig(strategy="sample", width=8, softmax="legal"),
    "gumbel": SearchConfig(strategy="gumbel", width=8, softmax="legal"),
}


@pytest.mark.parametrize("head", [0, 2])
def test_values_of_a_search_equal_those_of_training(head):
    model, batch = tiny_model(), random_batch(1, num_rows=4)
    mine = (batch.target_head_N == head).nonzero().squeeze(1)
    decoder = ModelDecoder(model, "cpu", heads=(0, head) if head else None)
    with torch.no_grad():
        expected = model(reorder_targets(batch, mine)).values_NL1
        searcher = decoder.searcher(decoder.start(batch))
        for level in range(L):
            codes = batch.target_codes_NL[mine]
            log_probs, state = searcher.log_probs(batch.target_request_N[mine], batch.target_head_N[mine], codes[:, :level])
            rows = torch.randperm(len(mine))
            found = searcher.values(state, rows, codes[rows, level], level)
            torch.testing.assert_close(found, expected[rows, level + 1], rtol=0, atol=1e-5)
            old = ModelDecoder(model, "cpu", head)
            torch.testing.assert_close(log_probs, old.step_log_probs(old.start(batch), batch.target_request_N[mine], codes[:, :level]))


@pytest.mark.parametrize("name", STRATEGIES)
def test_every_rank_calls_the_model_equally_often_whatever_it_holds(name):
    config, batch = STRATEGIES[name], random_batch(2, num_rows=3)
    model, calls, counts = tiny_model(), [], []

    def counting(*args, **kwargs):
        calls.append(kwargs["task"])
        return model(*args, **kwargs)

    for held, wanted in ((batch, slice(None)), (batch, slice(0)), (empty_batch(), slice(0))):
        for legal in (TRIE.legal_nodes([None]), TRIE.legal_nodes([[]])):
            decoder = ModelDecoder(counting, "cpu", heads=config.heads)
            state = decoder.start(held)
            calls.clear()
            ids = torch.arange(len(held.request_token_R))[wanted]
            result = search(decoder.searcher(state), Eligible.of(TRIE, legal, torch.zeros_like(ids)), config, request_id_B=ids)
            counts.append(list(calls))
            assert result.leaf_BK.shape == (len(ids), 8) and result.codes_BKL.shape == (len(ids), 8, L)
            assert (result.leaf_BK == -1).all() == (not legal[0].any() or not len(ids))
    assert all(count == counts[0] for count in counts)
    assert counts[0] == (["decode", "values"] if config.strategy == "value" else ["decode"]) * L
