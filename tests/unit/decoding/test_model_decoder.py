"""A model behind the beam search's interface: codes one after another give the probabilities the model was trained with."""

import itertools

import numpy as np
import pytest
import torch
from random_batches import empty_batch, random_batch
from tiny_model import L, P, reorder_targets, tiny_model

from gpr_dist.decoding.beam_search import beam_search
from gpr_dist.decoding.model_decoder import ModelDecoder
from gpr_dist.decoding.trie import Trie


@pytest.mark.parametrize("head", range(P))
def test_log_probabilities_equal_those_of_training(head):
    model, batch = tiny_model(), random_batch(1, num_rows=4)
    mine = (batch.target_head_N == head).nonzero().squeeze(1)
    decoder = ModelDecoder(model, "cpu", head)
    with torch.no_grad():
        expected = model(reorder_targets(batch, mine), task="logits").log_softmax(-1)
        state = decoder.start(batch)
        for order in (torch.arange(len(mine)), torch.randperm(len(mine)), torch.arange(len(mine)).repeat(2), torch.arange(3, 5)):
            for level in range(L):
                chosen = mine[order]
                found = decoder.step_log_probs(state, batch.target_request_N[chosen], batch.target_codes_NL[chosen, :level])
                torch.testing.assert_close(found, expected[order, level], rtol=0, atol=1e-5)
                assert (found.exp().sum(-1) - 1).abs().max() < 1e-5


def test_no_request_is_decoded_without_complaint():
    decoder = ModelDecoder(tiny_model(), "cpu")
    none = torch.zeros(0, dtype=torch.long)
    with torch.no_grad():
        for batch in (random_batch(1), empty_batch()):
            state = decoder.start(batch)
            for level in range(L):
                assert decoder.step_log_probs(state, none, none.view(0, 1).expand(0, level)).shape == (0, 16)


def test_beam_search_finds_the_most_probable_leaves_of_the_model():
    v = 4
    model, batch = tiny_model(codebook_size=v), random_batch(2, num_rows=2, codebook_size=v)
    codes = np.array(list(itertools.product(range(v), repeat=L)))[::3]
    trie = Trie.from_codes(codes, v)
    decoder = ModelDecoder(model, "cpu")
    with torch.no_grad():
        state = decoder.start(batch)
        num_requests = len(batch.request_token_R)
        result = beam_search(lambda r, c: decoder.step_log_probs(state, r, c), trie, trie.legal_nodes([None]),
                             torch.zeros(num_requests, dtype=torch.long), len(codes))
        leaves = torch.from_numpy(codes)
        for request in range(num_requests):
            all_requests = torch.full((len(leaves),), request)
            score = sum(decoder.step_log_probs(state, all_requests, leaves[:, :level]).gather(1, leaves[:, level : level + 1]).squeeze(1)
                        for level in range(L))
            best = score.argsort(descending=True)
            torch.testing.assert_close(result.score_BK[request], score[best], rtol=0, atol=1e-5)
            assert torch.equal(result.codes_BKL[request], leaves[best])
