"""What an input token's vector is made of, one cause at a time."""

import dataclasses

import pytest
import torch
from random_batches import concat_batches, random_batch
from tiny_model import L, V, tiny_model

from gpr_dist.model.embedding import CodeEmbedding, EmbeddingConfig, FieldEmbedding
from gpr_dist.schema import TokenType


def embed(batch, model=None):
    model = model or tiny_model()
    with torch.no_grad():
        return model.tokens(batch, model.codes)


def changed(batch, **fields):
    return (embed(dataclasses.replace(batch, **fields)) != embed(batch)).any(1)


def test_codes_of_every_level_have_their_own_rows():
    codes = CodeEmbedding(L, V, 4)
    same_code = codes(torch.full((1, L), 3))[0]
    assert torch.equal(same_code, codes.table.weight[[3, V + 3, 2 * V + 3]]) and len(same_code.unique(dim=0)) == L
    assert torch.equal(codes(torch.tensor([[1, 2, 5]]))[0, 2], codes.table.weight[2 * V + 5])
    assert codes(torch.zeros(0, 2, dtype=torch.long)).shape == (0, 2, 4) and codes(torch.zeros(4, 0, dtype=torch.long)).shape == (4, 0, 4)


@pytest.mark.parametrize("level", range(L))
def test_codes_reach_their_token_only(level):
    batch = random_batch(1)
    token = int((batch.item_T >= 0).nonzero()[2])
    codes = batch.codes_TL.clone()
    codes[token, level] = (codes[token, level] + 1) % V
    assert changed(batch, codes_TL=codes).nonzero().tolist() == [[token]]


def test_prompts_without_an_item_ignore_code_scene_and_value():
    batch = random_batch(1)
    prompt = batch.item_T < 0
    edits = {"codes_TL": torch.where(prompt[:, None], 3, batch.codes_TL), "scene_T": torch.where(prompt, 9, batch.scene_T),
             "value_T": torch.where(prompt, 1e6, batch.value_T)}
    assert not changed(batch, **edits).any()


def test_a_value_that_was_not_logged_differs_from_zero_and_large_values_stay_small():
    batch = random_batch(1)
    is_item = batch.item_T >= 0
    unknown, zero, huge = (embed(dataclasses.replace(batch, value_T=torch.full_like(batch.value_T, x))) for x in (float("nan"), 0.0, 1e9))
    assert unknown.isfinite().all() and ((unknown != zero).any(1) == is_item).all() and huge.abs().max() < 50


def test_features_reach_the_tokens_of_their_type_in_order():
    batch = random_batch(2, num_rows=4)
    for kind, name in ((TokenType.U, "user_features_UF"), (TokenType.E, "env_features_EF")):
        features, tokens = getattr(batch, name), (batch.token_type_T == kind).nonzero().squeeze(1)
        for number, token in enumerate(tokens.tolist()):
            edited = features.clone()
            edited[number, 1] += 7
            assert changed(batch, **{name: edited}).nonzero().tolist() == [[token]]


def test_the_same_number_in_two_fields_means_two_things():
    torch.manual_seed(0)
    fields = FieldEmbedding(2, EmbeddingConfig(), 8)
    a, b = fields(torch.tensor([[3, 5], [5, 3]]))
    assert not torch.allclose(a, b)
    fields(torch.tensor([[3, 3]])).sum().backward()
    assert int(fields.table.weight.grad.any(1).sum()) == 2
    assert fields(torch.tensor([[2**31 - 1, 0]])).isfinite().all()  # hashed categories have 31 bits


def test_time_is_the_gap_to_the_token_before_and_the_calendar():
    batch = random_batch(3)
    first = batch.offsets_B1[:-1]
    week = 7 * 86_400
    assert not changed(batch, timestamp_T=batch.timestamp_T + 5 * week).any()  # same hour, weekday and gaps
    assert changed(batch, timestamp_T=batch.timestamp_T + 3600).all() and changed(batch, timestamp_T=batch.timestamp_T + 86_400).all()
    late = batch.timestamp_T.clone()
    late[first[1] - 1] += 2 * week  # the last token of row 0: only its own gap changes, not that of the next row's first token
    assert changed(batch, timestamp_T=late).nonzero().tolist() == [[int(first[1]) - 1]]
    earlier = torch.where(torch.arange(batch.num_tokens) < first[1], batch.timestamp_T - week, batch.timestamp_T)
    assert not changed(batch, timestamp_T=earlier).any()  # a week lies between the rows: it is no gap of anybody
    far_future = embed(dataclasses.replace(batch, timestamp_T=batch.timestamp_T * torch.arange(1, batch.num_tokens + 1) * 10))
    assert far_future.isfinite().all()


def test_rows_are_embedded_alike_alone_and_packed():
    rows = [random_batch(seed, num_rows=1) for seed in (4, 5, 6)]
    torch.testing.assert_close(embed(concat_batches(rows)), torch.cat([embed(row) for row in rows]))


def test_the_decoder_reads_the_table_of_the_input():
    model, batch = tiny_model(), random_batch(1)
    before = model(batch, task="encode")
    with torch.no_grad():
        logits = model(batch, task="logits")
        model.codes.table.weight[: 2 * V] += torch.randn(2 * V, 16)  # the decoder embeds the codes of levels 1 and 2
        embedded = model(batch, task="decode", opening=before, request_N=batch.target_request_N, head_N=batch.target_head_N,
                         prefix_Nl=batch.target_codes_NL[:, :1])
    assert not torch.allclose(embedded, logits[:, 1].log_softmax(-1), atol=1e-3)
