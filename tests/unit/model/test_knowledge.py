"""External knowledge in the model: read by its own rows alone, "absent" where there is none, and every parameter learns or gets zero."""

import dataclasses

import pytest
import torch
from random_batches import concat_batches, empty_batch, random_batch
from tiny_model import L, assert_same, loss_and_gradients, row_of_target, tiny_model

M, E = 3, 5
FULL = {"hsd": {"num_layers": 3, "recursions": 2}, "ptd": {"num_thinking": 2, "refining": True}}
BOTH = pytest.mark.parametrize("settings", [{}, FULL], ids=["plain", "full"])


def model_of(dtype=torch.float32, **settings):
    return tiny_model(dtype, knowledge={"num_vectors": M, "width": E}, **settings)


def with_knowledge(batch, seed=0, absent=()):
    """Vectors for every row but the absent ones."""
    vectors_BmE = torch.randn(batch.num_rows, M, E, generator=torch.Generator().manual_seed(seed))
    vectors_BmE[list(absent)] = 0
    return dataclasses.replace(batch, knowledge_BmE=vectors_BmE)


def logits(model, batch):
    with torch.no_grad():
        return model(batch, task="logits")


@BOTH
def test_every_prediction_of_a_row_reads_its_own_vectors_and_no_others(settings):
    model, batch = model_of(torch.float64, **settings), with_knowledge(random_batch(1, num_rows=4))
    before = logits(model, batch)
    for row in range(4):
        for place in range(M):
            vectors = batch.knowledge_BmE.clone()
            vectors[row, place] += 1
            changed = (logits(model, dataclasses.replace(batch, knowledge_BmE=vectors)) != before).any(-1)
            mine = row_of_target(batch) == row
            assert mine.any() and changed[mine].all() and not changed[~mine].any()


def test_a_user_without_text_has_the_learned_vector_and_not_the_projection():
    model, batch = model_of(), with_knowledge(random_batch(2, num_rows=3), absent=[1])
    before, absent = logits(model, batch), row_of_target(batch) == 1
    for parameter, reaches_absent, reaches_known in (("project.weight", False, True), ("project.bias", False, True),
                                                     ("absent_mD", True, False), ("place_mD", True, True)):
        changed = model_of()
        with torch.no_grad():
            changed.ptd.knowledge.get_parameter(parameter).add_(0.5)
        found = (logits(changed, batch) != before).any(-1)
        assert found[absent].all() == found[absent].any() == reaches_absent
        assert found[~absent].all() == found[~absent].any() == reaches_known


def test_one_vector_of_several_is_enough_to_be_known():
    model, batch = model_of(), with_knowledge(random_batch(3, num_rows=2))
    vectors = batch.knowledge_BmE.clone()
    vectors[0, 1:] = 0
    known = model.ptd.knowledge(dataclasses.replace(batch, knowledge_BmE=vectors))
    bias = model.ptd.knowledge.project.bias + model.ptd.knowledge.place_mD
    torch.testing.assert_close(known[0, 1:], bias[1:])


@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_parameter_gets_a_gradient_whatever_the_batch_holds(settings, dtype):
    """ZeRO-3 waits for ever for a parameter that has none; zero where nothing was learnt."""
    model = model_of(dtype, **settings)
    empty = dataclasses.replace(empty_batch(), knowledge_BmE=torch.zeros(0, M, E))
    loss, gradients = loss_and_gradients(model, [empty], 10)
    assert loss == 0 and all(not gradient.any() for gradient in gradients.values())
    for absent, learns, rests in (((), "project.weight", "absent_mD"), ((0, 1, 2), "absent_mD", "project.weight")):
        _, gradients = loss_and_gradients(model, [with_knowledge(random_batch(4), absent=absent)], 10)
        assert gradients[f"ptd.knowledge.{learns}"].any() and not gradients[f"ptd.knowledge.{rests}"].any()
    _, gradients = loss_and_gradients(model, [with_knowledge(random_batch(5, num_rows=8), absent=[2])], 10)
    assert [name for name, gradient in gradients.items() if not gradient.any() and name.startswith("ptd.knowledge")] == []


@BOTH
def test_a_packed_batch_is_the_sum_of_its_rows(settings):
    model = model_of(torch.float64, **settings)
    rows = [with_knowledge(random_batch(seed, num_rows=1), seed, absent=[0] if seed == 2 else []) for seed in range(4)]
    whole = concat_batches(rows)
    expected = loss_and_gradients(model, rows, whole.num_targets)
    assert expected[0] > 1
    assert_same(loss_and_gradients(model, [whole], whole.num_targets), expected)
    empty = dataclasses.replace(empty_batch(), knowledge_BmE=torch.zeros(0, M, E))
    assert_same(loss_and_gradients(model, [concat_batches(rows[2:]), empty, concat_batches(rows[:2])], whole.num_targets), expected)


@BOTH
def test_decoding_code_by_code_reads_what_training_reads(settings):
    model, batch = model_of(**settings), with_knowledge(random_batch(6, num_rows=3), absent=[0])
    expected = logits(model, batch).float().log_softmax(-1)
    with torch.no_grad():
        opening = model(batch, task="encode")
        for level in range(L):
            found = model(batch, task="decode", opening=opening, request_N=batch.target_request_N, head_N=batch.target_head_N,
                          prefix_Nl=batch.target_codes_NL[:, :level])
            torch.testing.assert_close(found, expected[:, level], rtol=0, atol=1e-5)
