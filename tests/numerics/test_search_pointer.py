"""The search over a model with a pointer finds each path with the probability that the model was trained with."""

import dataclasses

import pytest
import torch
from test_pointer import CODES, ELIGIBILITY, EMPTY, ITEMS, LEGAL, PAST, Events, V, batch_of, every_path, pointer_model
from tiny_model import P

from gpr_dist.decoding.legality import Eligible, LegalCache
from gpr_dist.decoding.model_decoder import ModelDecoder
from gpr_dist.decoding.ranking import rank_items
from gpr_dist.decoding.search import SearchConfig, search
from gpr_dist.decoding.trie import Trie

TRIE = Trie.from_codes(CODES, V)
WEIGHTS = TRIE.slot_weights(torch.arange(ITEMS) + 1.0)


@pytest.mark.parametrize("first", [0, 2])
@pytest.mark.parametrize("heads", [(0,), (1, 3)])
def test_scores_are_the_losses_of_training(heads, first):
    model, plain = pointer_model(), batch_of(3, 4)
    batch = PAST.add_to(plain, Events())
    decoder = ModelDecoder(model, "cpu", heads=range(P))
    config = SearchConfig(width=2 * V**3, softmax="prior", heads=heads)
    with torch.no_grad():
        opening = decoder.start(batch)
        legal, group_B = LegalCache(TRIE, ELIGIBILITY.items)(batch.request_eligibility_R[first:])
        eligible = Eligible.of(TRIE, legal, group_B)
        result = search(decoder.searcher(opening, first), eligible, config, WEIGHTS)
        ranked = rank_items(result, eligible, WEIGHTS, ITEMS, "prior")
        for number, request in enumerate(range(first, len(batch.request_row_R))):
            group = int(batch.request_eligibility_R[request])
            shown = {tuple(codes) for codes in CODES[ELIGIBILITY.items(group)].tolist()}
            alive = result.leaf_BK[number] >= 0
            leaves = map(tuple, result.codes_BKL[number][alive].tolist())
            found = dict(zip(leaves, result.score_BK[number][alive].exp().tolist(), strict=True))
            assert set(found) == shown
            if group == EMPTY:
                continue
            probability = 0
            for head in heads:
                asked = every_path(plain, request, head)
                kept = torch.tensor([tuple(path) in found for path in asked.target_codes_NL.tolist()])
                asked = dataclasses.replace(asked, target_codes_NL=torch.where(kept[:, None], asked.target_codes_NL,
                                                                               asked.target_codes_NL[kept][:1]))
                nll_NL = model(LEGAL.add_to(PAST.add_to(asked, Events()), counted=False)).nll_NL
                probability = probability + (-nll_NL.double().sum(1)).exp() / len(heads)
            paths = map(tuple, asked.target_codes_NL.tolist())
            for path, expected, is_kept in zip(paths, probability.tolist(), kept.tolist(), strict=True):
                assert not is_kept or found[path] == pytest.approx(expected, rel=2e-4)
            items = ranked.score_BK[number].exp()
            assert float(items.sum()) == pytest.approx(1, abs=1e-4)
    assert result.pointer is not None and (result.pointer.log_gate_Q > -torch.inf).sum() > 2
