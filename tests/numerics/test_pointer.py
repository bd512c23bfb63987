"""Laws of the pointer: a distribution over whole paths, equal to a slow second version, that sees only the past."""

import dataclasses
import itertools

import numpy as np
import pytest
import torch
from random_batches import concat_batches, empty_batch, random_batch
from tiny_model import L, P, assert_same, edit_tokens, loss_and_gradients, loss_share, row_of_token, tiny_model

from gpr_dist.data.eligibility import Eligibility
from gpr_dist.data.legal import LegalCodes
from gpr_dist.data.past import PastItems
from gpr_dist.decoding.model_decoder import ModelDecoder
from gpr_dist.model.pointer import Copying

ITEMS, V = 30, 3
CODES = np.random.default_rng(1).integers(0, V, (ITEMS, L))
EMPTY, SOME, ALL = 0, 1, 2
ELIGIBILITY = Eligibility([np.empty(0, np.int32), np.arange(0, ITEMS, 3, dtype=np.int32), np.arange(ITEMS, dtype=np.int32)],
                          np.arange(ITEMS, dtype=np.int32), ITEMS)
PAST, LEGAL = PastItems(CODES, V, ELIGIBILITY), LegalCodes(CODES, V, ELIGIBILITY, np.arange(ITEMS) + 1.0)


class Events:
    """Stands in for UserHistory: four older events of every row."""

    def gather(self, rows):
        item = (np.repeat(rows, 4) * 5 + np.tile(np.arange(4), len(rows))) % ITEMS
        return np.arange(len(rows) + 1) * 4, {"item": item, "time": 1_400_000_000 + item * 86_400, "action": item % 4 + 1}


def pointer_model(dtype=torch.float32, **settings):
    return tiny_model(dtype, codebook_size=V, pointer={"width": 6}, **settings)


def batch_of(seed, num_rows=3, group=None, history=None):
    batch = random_batch(seed, num_rows=num_rows, codebook_size=V)
    item, target, codes = batch.item_T % ITEMS, batch.target_item_N % ITEMS, torch.from_numpy(CODES)
    item[batch.item_T < 0] = -1
    groups = torch.from_numpy(np.random.default_rng(seed).integers(0, 3, len(batch.request_row_R)))
    return dataclasses.replace(batch, item_T=item, codes_TL=torch.where(item[:, None] < 0, -1, codes[item]), target_item_N=target,
                               target_codes_NL=codes[target], row_ids_B=torch.arange(num_rows) + 10 * seed,
                               request_eligibility_R=groups if group is None else torch.full_like(groups, group))


def every_path(batch, request, head):
    """The batch with every semantic ID as a target of one request and head."""
    paths = torch.tensor(list(itertools.product(range(V), repeat=L)))
    n = len(paths)
    like = {f.name: getattr(batch, f.name)[:1].expand(n) for f in dataclasses.fields(batch)
            if f.name.startswith("target_") and getattr(batch, f.name) is not None and f.name != "target_codes_NL"}
    like |= {"target_request_N": torch.full((n,), request), "target_head_N": torch.full((n,), head), "target_codes_NL": paths}
    return dataclasses.replace(batch, **like)


@pytest.mark.parametrize("history", [None, Events()])
@pytest.mark.parametrize("softmax", ["all", "legal"])
def test_probabilities_of_all_paths_sum_to_one(softmax, history):
    model, batch = pointer_model(), batch_of(2)
    copied = 0
    for request in range(len(batch.request_row_R)):
        asked = PAST.add_to(every_path(batch, request, request % P), history)
        legal = torch.ones(V**L, dtype=torch.bool)
        if softmax == "legal":
            group = int(batch.request_eligibility_R[request])
            if group == EMPTY:
                continue
            shown = {tuple(codes) for codes in CODES[ELIGIBILITY.items(group)].tolist()}
            legal = torch.tensor([tuple(path) in shown for path in asked.target_codes_NL.tolist()])
            # the offsets make a target's own codes legal in any case; the paths that are not are asked as if they were another one
            first = asked.target_codes_NL[legal][:1]
            asked = dataclasses.replace(asked, target_codes_NL=torch.where(legal[:, None], asked.target_codes_NL, first))
            asked = LEGAL.add_to(PAST.add_to(asked, history), counted=False)
        with torch.no_grad():
            probability = (-model(asked).nll_NL.double().sum(1)).exp()
        assert abs(float(probability[legal].sum()) - 1) < 1e-5
        copied += int((asked.target_copy_NL2.diff(dim=2) > 0).any())
    assert copied > 2


@pytest.mark.parametrize("history", [None, Events()])
def test_per_level_losses_add_up_to_the_mixture_of_a_slow_version(history):
    model, batch = pointer_model(torch.float64), PAST.add_to(batch_of(3, 4), history)
    pointer, generator = model.pointer, tiny_model(torch.float64, codebook_size=V)
    generator.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("pointer.")})
    with torch.no_grad():
        hidden = model(batch, task="encode").intents.hidden_TD
        nll, generated = model(batch).nll_NL, generator(batch).nll_NL
        mixed = 0
        for n, (request, head) in enumerate(zip(batch.target_request_N.tolist(), batch.target_head_N.tolist(), strict=True)):
            row, site = int(batch.request_row_R[request]), int(batch.request_token_R[request])
            shown = set(ELIGIBILITY.items(int(batch.request_eligibility_R[request])).tolist())
            events = [(hidden[t], pointer.key, int(batch.item_T[t]), int(batch.timestamp_T[t]), int(batch.action_T[t]), 0)
                      for t in range(int(batch.offsets_B1[row]), site + 1)]
            if history:
                events += [(model.codes(batch.past_codes_XL[x : x + 1]).sum(1)[0], pointer.past_key, int(batch.past_item_X[x]),
                            int(batch.past_time_X[x]), int(batch.past_action_X[x]), 1) for x in range(4 * row, 4 * row + 4)]
            events = [event for event in events if event[2] in shown]
            if not events:
                assert torch.equal(nll[n], generated[n])
                continue
            score = []
            for vector, key, _, time, action, kind in events:
                age = int(2 * np.log2(max(int(batch.request_time_R[request]) - time, 0) + 1))
                similar = pointer.query(hidden[site]) @ key(vector) / 6**0.5
                score.append(similar + pointer.age_G[min(age, 63)] + pointer.kind_2A[kind, action])
            score = torch.stack(score)
            gate = torch.sigmoid(pointer.gate(hidden[site])[head] + np.log(len(events)) * pointer.evidence_2P[0, head]
                                 + score.logsumexp(0) * pointer.evidence_2P[1, head])
            codes = batch.target_codes_NL[n].tolist()
            prefix = [1.0]
            for level in range(L):
                same = torch.tensor([CODES[item, : level + 1].tolist() == codes[: level + 1] for _, _, item, *_ in events])
                prefix.append(float((1 - gate) * (-generated[n, : level + 1].sum()).exp() + gate * score.softmax(0)[same].sum()))
                mixed += bool(same.any())
            np.testing.assert_allclose(nll[n].numpy(), -np.diff(np.log(prefix)), rtol=1e-9, atol=1e-9)
    assert mixed > 10


def test_without_an_eligible_past_item_the_generator_alone_speaks():
    model, batch = pointer_model(), PAST.add_to(batch_of(4, group=EMPTY))
    generator = tiny_model(codebook_size=V)
    generator.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("pointer.")})
    assert torch.equal(model(batch).nll_NL, generator(batch).nll_NL)
    _, gradients = loss_and_gradients(model, [batch], batch.num_targets)
    assert all(gradient.isfinite().all() for gradient in gradients.values())


@pytest.mark.parametrize("history", [None, Events()])
def test_packing_changes_nothing(history):
    model, parts = pointer_model(torch.float64), [batch_of(seed, 1) for seed in range(5)]
    alone = [PAST.add_to(part, history) for part in parts]
    together = PAST.add_to(concat_batches(parts), history)
    total = together.num_targets
    assert_same(loss_and_gradients(model, [together], total), loss_and_gradients(model, alone, total), 1e-7)  # values are float32


def test_later_tokens_change_nothing():
    model, batch = pointer_model(), batch_of(6, 2, ALL)
    before = model(PAST.add_to(batch)).nll_NL
    row_T = row_of_token(batch)
    for request, site in enumerate(batch.request_token_R.tolist()):
        later = (row_T == row_T[site]) & (batch.block_T >= batch.block_T[site]) & (torch.arange(batch.num_tokens) > site)
        edited = edit_tokens(batch, later, delay_s=5000)
        edited = dataclasses.replace(edited, item_T=torch.where(edited.item_T >= 0, edited.item_T % ITEMS, -1))
        edited = dataclasses.replace(edited, codes_TL=torch.where(edited.item_T[:, None] >= 0, edited.codes_TL % V, -1))
        after = model(PAST.add_to(edited)).nll_NL
        mine = batch.target_request_N == request
        assert torch.equal(before[mine], after[mine])


def test_gradients_equal_finite_differences():
    model, batch = pointer_model(torch.float64), PAST.add_to(batch_of(7), Events())
    loss_share(model, batch, batch.num_targets, value_weight=0.0).backward()  # values read stopped gradients
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if name.startswith("pointer."):
            direction = torch.randn_like(parameter)
            values = []
            for step in (1e-5, -1e-5):
                with torch.no_grad():
                    parameter.add_(step * direction)
                    values.append(float(loss_share(model, batch, batch.num_targets, value_weight=0.0)))
                    parameter.sub_(step * direction)
            slope = (values[0] - values[1]) / 2e-5
            assert slope == pytest.approx(float((parameter.grad * direction).sum()), rel=1e-5, abs=1e-8), name


def test_gradients_of_what_the_pointer_reads():
    pointer, batch = pointer_model(torch.float64).pointer, PAST.add_to(batch_of(7, 2), Events())

    def loss(hidden_TD, past_XD, nll_NL):
        return Copying(*pointer(hidden_TD, past_XD, batch)).mixed_nll(nll_NL, batch)

    inputs = (torch.randn(batch.num_tokens, 16), torch.randn(len(batch.past_item_X), 16), torch.rand(len(batch.target_head_N), L) + 0.5)
    assert torch.autograd.gradcheck(loss, [x.double().requires_grad_() for x in inputs])


def test_a_rank_without_rows_uses_every_parameter():
    model, full = pointer_model(), random_batch(0, codebook_size=V)
    for history in (None, Events()):
        batch = PAST.add_to(dataclasses.replace(empty_batch(), target_codes_NL=full.target_codes_NL[:0]), history)
        total, gradients = loss_and_gradients(model, [batch], 1)
        assert total == 0 and all((gradient == 0).all() for gradient in gradients.values())


def test_the_decoder_is_given_the_masses_of_training():
    model, batch = pointer_model(), PAST.add_to(batch_of(8), Events())
    decoder = ModelDecoder(model, "cpu", head=1)
    with torch.no_grad():
        copying, mass = model(batch, task="encode").copying, decoder.copy_mass(decoder.start(batch))
    total = torch.zeros(len(batch.request_row_R)).index_add(0, mass.request_M, mass.log_mass_M.exp())
    has = torch.bincount(batch.copy_request_M, minlength=len(total)) > 0
    torch.testing.assert_close(total, has.float())
    assert (mass.request_M.diff() >= 0).all() and torch.equal(mass.log_gate_B, copying.log_gate_RP[:, 1])
    assert torch.equal(mass.log_gate_B == -torch.inf, ~has)
    item_S = torch.cat((batch.item_T, batch.past_item_X))[batch.copy_source_M]
    pairs = list(zip(mass.request_M.tolist(), mass.item_M.tolist(), mass.log_mass_M.exp().tolist(), strict=True))
    assert len({pair[:2] for pair in pairs}) == len(pairs)
    for request, item, share in pairs:
        mine = (batch.copy_request_M == request) & (item_S == item)
        assert share == pytest.approx(float(copying.log_mass_M[mine].exp().sum()), rel=1e-4)
    assert ModelDecoder(tiny_model(codebook_size=V), "cpu").copy_mass(tiny_model(codebook_size=V)(batch, task="encode")) is None
