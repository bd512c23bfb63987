"""Laws of the network: what sees what, a slow second version of it, and nothing depends on how rows are packed, ordered or split."""

import dataclasses

import numpy as np
import pyarrow as pa
import pytest
import torch
import torch.nn.functional as F
from journeys_fixture import stored_rows
from random_batches import concat_batches, empty_batch, random_batch
from tiny_model import (
    L,
    P,
    V,
    assert_same,
    edit_tokens,
    loss_and_gradients,
    loss_share,
    reorder_targets,
    row_of_target,
    row_of_token,
    tiny_model,
)

from gpr_dist.data.collate import collate
from gpr_dist.schema import JOURNEY_SCHEMA, TokenType

BOTH = pytest.mark.parametrize("attention", ["torch", "reference"])
VARIANTS = pytest.mark.parametrize("attention", ["torch", "reference", "full", "hstu"])
FULL_HSD = {"num_layers": 3, "recursions": 2, "score": "silu", "position": "relative", "silu_length": 8}
FULL_PTD = {"num_thinking": 2, "refining": True}
PLAIN_HSTU = {"score": "silu", "silu_length": 8, "position": "relative", "mask": "causal", "ffn_multiple": 0, "token_aware_norm": False,
              "token_aware_ffn": False}


def attention_of(name, **ptd):
    """Settings of an attention implementation, of everything switched on, or of everything off."""
    if name == "full":
        return {"hsd": FULL_HSD, "ptd": {**FULL_PTD, **ptd}}
    if name == "hstu":
        return {"hsd": PLAIN_HSTU, "ptd": ptd}
    return {"hsd": {"attention": name}, "ptd": {"attention": name, **ptd}}


def unchanged(found, expected, attention):
    """Bit for bit; recursion computes the tokens that go on in products of other sizes, which round differently."""
    if attention != "full":
        return torch.equal(found, expected)
    return torch.allclose(found, expected, rtol=0, atol=1e-4 if found.dtype == torch.float32 else 0.15)


def outputs(model, batch):
    """Intents [T, D], logits [N, L, V], values [N, L+1]."""
    with torch.no_grad():
        out = model(batch)
        return model(batch, task="encode").intents.hidden_TD, model(batch, task="logits"), out.values_NL1


def single_rows(*seeds):
    return [random_batch(seed, num_rows=1) for seed in seeds]


# --- what sees what ---------------------------------------------------------------------------------------------------------------


@VARIANTS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_later_blocks_change_nothing_before_them(attention, dtype):
    model, batch = tiny_model(dtype, **attention_of(attention)), random_batch(3, num_rows=3)
    intents, logits, values = outputs(model, batch)
    row_T, block_N = row_of_token(batch), batch.block_T[batch.request_token_R][batch.target_request_N]
    checked = 0
    for row in range(batch.num_rows):
        for block in range(int(batch.block_T[row_T == row].max())):
            later = (row_T == row) & (batch.block_T > block)
            new_intents, new_logits, new_values = outputs(model, edit_tokens(batch, later, delay_s=12_345))
            same = ~((row_of_target(batch) == row) & (block_N > block))
            assert unchanged(new_intents[~later], intents[~later], attention)
            assert unchanged(new_logits[same], logits[same], attention) and unchanged(new_values[same], values[same], attention)
            assert (new_intents[later] != intents[later]).any(1).all() and (new_logits[~same] != logits[~same]).any(-1).all()
            checked += 1
    assert checked >= 5


@VARIANTS
def test_ads_of_a_request_do_not_see_each_other_where_they_are_predicted(attention):
    model, batch = tiny_model(**attention_of(attention)), random_batch(4, num_rows=2)
    _, logits, _ = outputs(model, batch)
    key_T = row_of_token(batch) * 100 + batch.block_T
    for request, site in enumerate(batch.request_token_R.tolist()):
        ads = (key_T == key_T[site]) & (batch.token_type_T == TokenType.I)
        assert ads.any()
        _, edited, _ = outputs(model, edit_tokens(batch, ads))
        mine = batch.target_request_N == request
        assert unchanged(edited[mine], logits[mine], attention)


def test_prompts_of_a_block_see_each_other_both_ways_and_ads_only_look_back():
    model, batch = tiny_model(hsd={"num_layers": 1}), random_batch(5, num_rows=2)
    intents, _, _ = outputs(model, batch)
    row, prompt = row_of_token(batch), batch.token_type_T != TokenType.I
    for token in range(batch.num_tokens):
        here = torch.arange(batch.num_tokens) == token
        edited, _, _ = outputs(model, edit_tokens(batch, here))
        sees = (torch.arange(batch.num_tokens) >= token) | (prompt & prompt[token] & (batch.block_T == batch.block_T[token]))
        assert (edited != intents).any(1).tolist() == (sees & (row == row[token])).tolist()


@VARIANTS
def test_nothing_crosses_rows(attention):
    model, batch = tiny_model(**attention_of(attention)), random_batch(6, num_rows=4)
    before = outputs(model, batch)
    for row in range(4):
        tokens, targets = row_of_token(batch) == row, row_of_target(batch) == row
        after = outputs(model, edit_tokens(batch, tokens, delay_s=-999_999))
        for new, old, mine in zip(after, before, (tokens, targets, targets), strict=True):
            assert unchanged(new[~mine], old[~mine], attention) and not unchanged(new[mine], old[mine], attention)


@VARIANTS
def test_teacher_forcing_leaks_neither_a_code_nor_another_target(attention):
    """Nor does the refining token: it comes from noise, never from the target."""
    model, batch = tiny_model(**attention_of(attention)), random_batch(7)
    _, logits, values = outputs(model, batch)
    target = torch.arange(len(batch.target_head_N)) == 5
    for level in range(L):
        codes = batch.target_codes_NL.clone()
        codes[target, level:] = (codes[target, level:] + 3) % V
        _, edited, new_values = outputs(model, dataclasses.replace(batch, target_codes_NL=codes))
        changed = (edited != logits).any(-1)
        assert not changed[~target].any() and changed[target].flatten().tolist() == [later > level for later in range(L)]
        value_changed = (new_values != values)[target].flatten().tolist()  # V_l is the value after choosing code l
        assert value_changed == [later > level for later in range(L + 1)] and torch.equal(new_values[~target], values[~target])


# --- a slow second version ----------------------------------------------------------------------------------------------------------


def slow_logits(model, batch):
    """The network of HSD and PTD one token, one head and one target at a time, from the paper's formulas and the same weights."""
    config, row = model.config, row_of_token(batch).tolist()
    x = model.tokens(batch, model.codes)
    kinds, block = batch.token_type_T.tolist(), batch.block_T.tolist()
    for layer in model.hsd.layers:
        q, k, v, u = slow_projections(layer, x, kinds, batch)
        mixed = torch.stack([softmax_average(q[i], [j for j in range(len(row)) if row[j] == row[i] and
                                                    (j <= i or (block[i] == block[j] and TokenType.I not in (kinds[i], kinds[j])))], k, v)
                             for i in range(len(row))]) * u
        fed = [F.silu(mixed[i] @ layer.ffn.up_CDF[c]) @ layer.ffn.down_CFD[c] for i, c in enumerate(kinds)]
        x = x + torch.stack([slow_norm(layer.norm_out, fed[i], c) for i, c in enumerate(kinds)])
    intents = model.hsd.norm(x)
    logits = []
    for request, head, codes in zip(batch.target_request_N.tolist(), batch.target_head_N.tolist(), batch.target_codes_NL.tolist(),
                                    strict=True):
        site = int(batch.request_token_R[request])
        first = int(batch.offsets_B1[batch.request_row_R[request]])
        if config.ptd.intent_window:
            first = max(first, site + 1 - config.ptd.intent_window)
        sequence = [intents[site] @ model.ptd.adapter_PDD[head] + model.ptd.query_PD[head]]
        sequence += [model.codes.table.weight[level * V + code] for level, code in enumerate(codes[:-1])]
        logits.append(slow_decoder(model, torch.stack(sequence), intents[first : site + 1]))
    return torch.stack(logits)


def slow_norm(norm, x, c):
    return F.layer_norm(x, x.shape) * norm.weight_CD[c] + norm.bias_CD[c]


def slow_projections(layer, x, kinds, batch):
    heads, width = layer.config.num_heads, x.shape[1]
    half = width // heads // 2
    normed = torch.stack([slow_norm(layer.norm_in, x[i], c) for i, c in enumerate(kinds)])
    q, k, v, u = F.silu(normed @ layer.qkvu.weight.T).split(width, dim=1)
    q, k, v = (part.view(-1, heads, width // heads) for part in (q, k, v))
    position = torch.cat([torch.arange(n) for n in batch.offsets_B1.diff().tolist()]).double()
    angle = position[:, None, None] * 10_000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
    turn = torch.polar(torch.ones_like(angle), angle)
    q, k = (torch.complex(part[..., :half], part[..., half:]) * turn for part in (q, k))
    q, k = (torch.cat((part.real, part.imag), dim=-1) for part in (q, k))
    return q, k, v, u


def softmax_average(q_HK, seen, k_THK, v_THK):
    k, v = k_THK[seen], v_THK[seen]
    weights = torch.stack([torch.softmax(k[:, h] @ q_HK[h] / q_HK.shape[1] ** 0.5, 0) for h in range(q_HK.shape[0])])
    return torch.cat([weights[h] @ v[:, h] for h in range(q_HK.shape[0])])


def slow_decoder(model, x, intents):
    ptd, table = model.ptd, model.codes.table.weight
    x = x + ptd.position_LD
    for block in ptd.blocks:
        heads = block.num_heads

        def split(part, heads=heads):
            return part.view(part.shape[0], heads, -1)

        k, v = (split(part) for part in block.key_value(intents).chunk(2, dim=1))
        q = split(block.query(block.norms[0](x)))
        x = x + block.cross_out(torch.stack([softmax_average(q[i], list(range(len(intents))), k, v) for i in range(L)]))
        q, k, v = (split(part) for part in block.qkv(block.norms[1](x)).chunk(3, dim=1))
        x = x + block.self_out(torch.stack([softmax_average(q[i], list(range(i + 1)), k, v) for i in range(L)]))
        x = x + block.ffn(block.norms[2](x))
    states = ptd.norm(x)
    size = model.codes.codebook_size
    scaled = states * states.shape[1] ** -0.5
    return torch.stack([table[level * size : (level + 1) * size] @ scaled[level] + model.codes.bias_LV[level] for level in range(L)])


@pytest.mark.parametrize(("attention", "window"), [("torch", 0), ("reference", 0), ("torch", 3)])
def test_logits_and_gradients_equal_the_slow_version(attention, window):
    model, batch = tiny_model(torch.float64, **attention_of(attention, intent_window=window)), random_batch(1, num_rows=2, max_blocks=4)
    batch = reorder_targets(batch, torch.randperm(len(batch.target_head_N), generator=torch.Generator().manual_seed(0)))
    trained = [p for name, p in model.named_parameters() if not name.startswith("hte.")]
    found, expected = model(batch, task="logits"), slow_logits(model, batch)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)  # the angles and the reference's softmax are float32
    direction = torch.randn(expected.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    slow = torch.autograd.grad(expected, trained, direction)
    for gradient, wanted in zip(torch.autograd.grad(found, trained, direction), slow, strict=True):
        torch.testing.assert_close(gradient, wanted, rtol=0, atol=1e-5 * max(1.0, float(wanted.abs().max())))


# --- packing, order, splitting ------------------------------------------------------------------------------------------------------


@VARIANTS
def test_a_packed_batch_is_the_sum_of_its_rows_and_of_any_split(attention):
    model, rows = tiny_model(torch.float64, **attention_of(attention)), single_rows(1, 2, 3, 4)
    whole = concat_batches(rows)
    head_major = reorder_targets(whole, whole.target_head_N.argsort(stable=True))
    n = whole.num_targets
    expected = loss_and_gradients(model, rows, n)
    assert expected[0] > 1
    assert_same(loss_and_gradients(model, [whole], n), expected)
    assert_same(loss_and_gradients(model, [head_major], n), expected)
    assert_same(loss_and_gradients(model, [concat_batches([rows[i] for i in (2, 0, 3, 1)])], n), expected)
    assert_same(loss_and_gradients(model, [concat_batches(rows[:1]), empty_batch(), concat_batches(rows[1:])], n), expected)


@VARIANTS
def test_outputs_of_a_row_do_not_depend_on_its_company(attention):
    model, rows = tiny_model(torch.float64, **attention_of(attention)), single_rows(5, 6, 7)
    whole = concat_batches(rows)
    intents, logits, values = outputs(model, whole)
    for number, row in enumerate(rows):
        alone = outputs(model, row)
        tokens, targets = row_of_token(whole) == number, row_of_target(whole) == number
        for found, expected in zip((intents[tokens], logits[targets], values[targets]), alone, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


@VARIANTS
def test_order_of_targets_only_orders_the_logits(attention):
    model, batch = tiny_model(torch.float64, **attention_of(attention)), random_batch(8, num_rows=4)
    assert (row_of_target(batch).diff() < 0).any()  # by head, as the loader brings them
    order = torch.randperm(len(batch.target_head_N), generator=torch.Generator().manual_seed(0))
    _, logits, values = outputs(model, batch)
    _, new_logits, new_values = outputs(model, reorder_targets(batch, order))
    torch.testing.assert_close(new_logits, logits[order], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(new_values, values[order])


def test_a_window_longer_than_every_row_is_no_window():
    batch = random_batch(9)
    everything = outputs(tiny_model(), batch)[1]
    assert torch.equal(outputs(tiny_model(ptd={"intent_window": 1000}), batch)[1], everything)
    assert not torch.equal(outputs(tiny_model(ptd={"intent_window": 2}), batch)[1], everything)


# --- every parameter, every batch ---------------------------------------------------------------------------------------------------


def without_targets(batch):
    return reorder_targets(batch, torch.zeros(0, dtype=torch.long))


@VARIANTS
@pytest.mark.parametrize("features", [0, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_empty_batch_gives_every_parameter_a_zero_gradient(attention, features, dtype):
    model = tiny_model(dtype, **attention_of(attention), num_user_features=features, num_env_features=features)
    none = stored_rows(pa.RecordBatch.from_pylist([], JOURNEY_SCHEMA)).take(np.zeros(0, np.int64))
    of_the_loader = collate(none, np.zeros(0, np.int64), np.zeros((100, L), np.int64), P, features, features)
    for batch in (empty_batch(num_fields=features), of_the_loader):
        loss, gradients = loss_and_gradients(model, [batch], 10)
        assert loss == 0 and all(not gradient.any() for gradient in gradients.values())


def test_a_batch_without_targets_or_of_ads_alone_reaches_every_parameter():
    model, batch = tiny_model(), random_batch(1)
    loss, gradients = loss_and_gradients(model, [without_targets(batch)], 10)
    assert loss == 0 and all(not gradient.any() for gradient in gradients.values())
    # Journeys of a data set with neither user nor environment nor organic tokens.
    no = torch.zeros(0, 2, dtype=torch.long)
    ads = dataclasses.replace(batch, token_type_T=torch.full_like(batch.token_type_T, TokenType.I), user_features_UF=no, env_features_EF=no,
                              item_T=batch.item_T.clamp_min(0), codes_TL=batch.codes_TL.clamp_min(0))
    loss, gradients = loss_and_gradients(model, [ads], 10)
    assert loss > 0 and not gradients["tokens.user.constant"].any() and not gradients["hsd.layers.0.ffn.up_CDF"][:3].any()
    assert gradients["hsd.layers.0.ffn.up_CDF"][3].any()


def test_an_ordinary_batch_gives_every_parameter_something_to_learn():
    _, gradients = loss_and_gradients(tiny_model(), [random_batch(1, num_rows=8)], 10)
    assert [name for name, gradient in gradients.items() if not gradient.any()] == []


def test_activation_checkpointing_changes_neither_loss_nor_gradients():
    batch = random_batch(2)
    plain = loss_and_gradients(tiny_model(), [batch], 10)
    recomputed = loss_and_gradients(tiny_model(hsd={"activation_checkpointing": True}), [batch], 10)
    assert torch.equal(plain[0], recomputed[0]) and all(torch.equal(plain[1][name], recomputed[1][name]) for name in plain[1])


def test_activation_checkpointing_repeats_the_same_dropout():
    results = []
    for on in (False, True):
        model = tiny_model(hsd={"activation_checkpointing": on, "dropout": 0.3})
        torch.manual_seed(5)
        results.append(loss_and_gradients(model, [random_batch(2)], 10))
    assert_same(results[1], results[0], 1e-7)


# --- values -------------------------------------------------------------------------------------------------------------------------


def test_values_teach_the_evaluator_and_nothing_else():
    model, batch = tiny_model(), random_batch(3)
    loss = loss_share(model, batch, 10, value_weight=1.0) - loss_share(model, batch, 10, value_weight=0.0)
    assert loss > 0
    model(batch).values_NL1.square().sum().backward()
    reached = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert reached == {name for name, _ in model.named_parameters() if name.startswith("hte.")}


# --- bf16, as DeepSpeed runs it -----------------------------------------------------------------------------------------------------


@VARIANTS
def test_in_bf16_everything_stays_bf16_and_close_to_float32(attention):
    batch = random_batch(4, num_rows=6)
    exact = loss_and_gradients(tiny_model(**attention_of(attention)), [batch], batch.num_targets)
    model = tiny_model(torch.bfloat16, **attention_of(attention))
    dtypes = set()
    for module in model.modules():
        module.register_forward_hook(lambda _, __, out: dtypes.add(out.dtype) if isinstance(out, torch.Tensor) else None)
    model.hte.register_forward_hook(lambda _, __, out: dtypes.discard(out.dtype))  # values come out in float32 on purpose
    found = loss_and_gradients(model, [batch], batch.num_targets)
    assert dtypes == {torch.bfloat16} and all(g.dtype == torch.bfloat16 for g in found[1].values())
    assert abs(found[0] - exact[0]) < 0.02 * exact[0]
    for name, gradient in exact[1].items():
        assert F.cosine_similarity(found[1][name].float().flatten(), gradient.flatten(), dim=0) > 0.97, name


@VARIANTS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_decoding_code_by_code_equals_teacher_forcing(dtype, attention):
    model, batch = tiny_model(dtype, **attention_of(attention)), random_batch(5)
    with torch.no_grad():
        expected = model(batch, task="logits").float().log_softmax(-1)
        opening = model(batch, task="encode")
        for level in range(L):
            found = model(batch, task="decode", opening=opening, request_N=batch.target_request_N, head_N=batch.target_head_N,
                          prefix_Nl=batch.target_codes_NL[:, :level])
            assert found.dtype == torch.float32 and batch.target_head_N.max() == P - 1
            torch.testing.assert_close(found, expected[:, level], rtol=0, atol=1e-5 if dtype == torch.float32 else 0.15)
