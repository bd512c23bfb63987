"""Sampled targets: an unbiased loss, the same choice however a step is split, whole requests."""

import pytest
import torch
from random_batches import concat_batches, random_batch

from gpr_dist.objectives.mtp import mtp_loss, uniform_head_weights
from gpr_dist.training.loop import sample_targets


def rows():
    """Single rows with numbers of their own, as the loader gives them."""
    batches = [random_batch(seed, num_rows=1) for seed in range(6)]
    for number, batch in enumerate(batches):
        batch.row_ids_B += 10 * number
    return batches


def chosen(batch, share, seed):
    """(row, item, head) of the targets that stay."""
    kept = sample_targets(batch, share, seed)
    row_N = kept.row_ids_B[kept.request_row_R[kept.target_request_N]]
    return sorted(zip(row_N.tolist(), kept.target_item_N.tolist(), kept.target_head_N.tolist(), strict=True))


@pytest.mark.parametrize("share", [0.25, 0.5])
def test_the_loss_is_unbiased(share):
    batch = concat_batches(rows())
    nll_NL = torch.rand(len(batch.target_head_N), 3)
    weights = uniform_head_weights(4)
    whole = float(mtp_loss(nll_NL, batch.target_head_N, weights, batch.num_targets))
    batch.target_value_N = torch.arange(len(nll_NL)).float()  # which target is which
    losses = []
    for seed in range(4000):
        kept = sample_targets(batch, share, seed)
        losses.append(float(mtp_loss(nll_NL[kept.target_value_N.long()], kept.target_head_N, weights, share * batch.num_targets)))
    losses = torch.tensor(losses)
    assert losses.std() > 0.05 * whole  # it is a sample
    assert abs(losses.mean() - whole) < 4 * losses.std() / 4000**0.5


def test_the_choice_does_not_depend_on_the_split_and_changes_with_the_seed():
    parts = rows()
    whole = concat_batches(parts)
    for seed in (0, 7):
        alone = sorted(target for part in parts for target in chosen(part, 0.5, seed))
        assert chosen(whole, 0.5, seed) == alone
    assert chosen(whole, 0.5, 0) != chosen(whole, 0.5, 1)


def test_requests_stay_whole_and_a_share_of_one_keeps_the_batch():
    batch = concat_batches(rows())
    kept = sample_targets(batch, 0.4, 3)
    requests = set(kept.target_request_N.tolist())
    assert 0 < len(requests) < len(batch.request_token_R)
    assert len(kept.target_item_N) == sum(int(request) in requests for request in batch.target_request_N)
    assert torch.equal(kept.request_token_R, batch.request_token_R) and kept.target_codes_NL.shape[0] == len(kept.target_item_N)
    assert sample_targets(batch, 1.0, 3) is batch
