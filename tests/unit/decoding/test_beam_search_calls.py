"""What the model sees of a beam search: always one call per level, prefixes ordered by request, impossible input refused."""

import numpy as np
import pytest
import torch

from gpr_dist.decoding.beam_search import beam_search, expand_items
from gpr_dist.decoding.trie import Trie
from gpr_dist.errors import TrainingError

V, L = 6, 3
TRIE = Trie.from_codes(np.random.default_rng(0).integers(0, V, (80, L)), V)


class Recorder:
    def __init__(self, fill=0.0):
        self.calls, self.fill = [], fill

    def __call__(self, request_N, prefix_codes_Nl):
        self.calls.append((request_N, prefix_codes_Nl))
        return torch.full((request_N.numel(), V), self.fill).log_softmax(-1)


@pytest.mark.parametrize("groups", [[], [0], [1, 1], [0, 1, 0]])
def test_one_call_per_level_whatever_the_batch_holds(groups):
    legal = TRIE.legal_nodes([None, []])  # group 1 has nothing to show
    model = Recorder()
    request_group = torch.tensor(groups, dtype=torch.long)
    result = beam_search(model, TRIE, legal, request_group, beam_width=4)
    assert len(model.calls) == L
    for level, (requests, prefixes) in enumerate(model.calls):
        assert prefixes.shape == (requests.numel(), level)
        assert requests.tolist() == sorted(requests.tolist()) and (prefixes >= 0).all()
    assert result.leaf_BK.shape == (len(groups), 4)
    assert result.leaf_BK.eq(-1).all(dim=1).tolist() == [group == 1 for group in groups]
    assert result.codes_BKL[request_group == 1].eq(-1).all() and result.score_BK[request_group == 1].eq(-torch.inf).all()
    items, scores = expand_items(result, TRIE, legal[-1], request_group, TRIE.slot_weights(torch.zeros(80)), 10)
    assert items.shape == scores.shape == (len(groups), 10)


def test_a_code_the_model_rules_out_is_not_reached():
    code = int(TRIE.code[0][0])

    def step(request_N, prefix_codes_Nl):
        log_probs = torch.zeros(request_N.numel(), V)
        if prefix_codes_Nl.shape[1] == 0:
            log_probs[:, code] = -torch.inf
        return log_probs.log_softmax(-1)

    for normalise in ("all", "legal"):
        result = beam_search(step, TRIE, TRIE.legal_nodes([None]), torch.zeros(1, dtype=torch.long), 200, normalise)
        alive = result.leaf_BK[0] >= 0
        assert 0 < alive.sum() < TRIE.num_leaves and not result.codes_BKL[0, alive, 0].eq(code).any()


def test_nan_is_refused():
    with pytest.raises(TrainingError, match="NaN log-probabilities at level 0"):
        beam_search(Recorder(float("nan")), TRIE, TRIE.legal_nodes([None]), torch.zeros(2, dtype=torch.long))
