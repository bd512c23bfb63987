"""Every strategy of the search against a brute force over all paths, with random eligibility, exclusions, inserts and deletes."""

import math
from collections import Counter

import numpy as np
import pytest
import torch
from scipy.stats import chisquare
from search_market import SEARCHABLE, B, L, N, P, SearchMarket, V, as_dict, log, prefix_number

from gpr_dist.config import build_config
from gpr_dist.decoding.legality import Eligible
from gpr_dist.decoding.ranking import rank_items
from gpr_dist.decoding.search import SearchConfig, ValueGuide, search
from gpr_dist.decoding.trie import Trie
from gpr_dist.errors import ConfigError, TrainingError

VARIANTS = [(0, False, False), (1, True, False), (2, False, True), (3, True, True), (4, True, True)]
PLAIN_GUIDE = ValueGuide(temperature=None, eta=0)


class Rows:
    """The market's model for some of its requests."""

    def __init__(self, market, rows):
        self.market, self.rows = market, torch.tensor(rows)

    def log_probs(self, request_N, head_N, prefix_Nl):
        return self.market.log_probs_BPLXV[self.rows[request_N], head_N, prefix_Nl.shape[1], prefix_number(prefix_Nl)], None

    def copies(self, num_requests, heads):
        return self.market.copy


def assert_close(found, expected):
    assert found.keys() == expected.keys()
    for leaf, score in expected.items():
        assert found[leaf] == pytest.approx(score, abs=2e-5)


def run(market, copy=None, **settings):
    config = SearchConfig(**({"width": N} | settings))
    market.copy = copy
    return search(market, market.eligible, config, market.item_weight, torch.arange(B) + 1000)


@pytest.mark.parametrize("softmax", SEARCHABLE)
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_beam_as_wide_as_the_catalogue_is_exact(variant, softmax):
    market = SearchMarket(*variant)
    result = run(market, softmax=softmax)
    for request in range(B):
        found = as_dict(result, request)
        assert_close(found, market.paths(request, softmax))
        assert list(found.values()) == sorted(found.values(), reverse=True)


@pytest.mark.parametrize("settings", [
    {"strategy": "value"}, {"strategy": "value", "guide": ValueGuide(temperature=None, eta=2)},
    {"strategy": "gumbel", "softmax": "legal"}, {"strategy": "gumbel", "softmax": "prior", "temperature": 0.7}], ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_wide_enough_every_strategy_without_repeats_finds_every_path(variant, settings):
    market = SearchMarket(*variant)
    result = run(market, **settings)
    for request in range(B):
        assert_close(as_dict(result, request), market.paths(request, settings.get("softmax", "all"),
                                                            temperature=settings.get("temperature", 1.0)))


@pytest.mark.parametrize("settings", [
    {}, {"heads": (0, 2)}, {"strategy": "value"}, {"strategy": "value", "heads": (0, 1, 2)},
    {"strategy": "sample", "softmax": "legal"}, {"strategy": "gumbel", "softmax": "prior"}], ids=str)
@pytest.mark.parametrize("width", [3, 6])
@pytest.mark.parametrize("seed", range(12))
def test_nothing_illegal_comes_out_and_the_model_is_called_equally_often(seed, width, settings):
    market = SearchMarket(seed, changed=seed % 2 == 0, lazy=seed % 3 == 0)
    copy = market.copy_mass(len(settings.get("heads", (0,))[:2])) if seed % 4 and len(settings.get("heads", ())) < 3 else None
    result = run(market, copy, width=width, **settings)
    per_level = ["log_probs", "values"] if settings.get("strategy") == "value" else ["log_probs"]
    assert market.calls == [(call, level) for level in range(L) for call in per_level]
    ranked = rank_items(result, market.eligible, market.item_weight, 20, settings.get("softmax", "all"))
    for request in range(B):
        leaves = [tuple(codes) for codes in result.codes_BKL[request][result.leaf_BK[request] >= 0].tolist()]
        assert set(leaves) <= set(market.leaves(request))
        assert settings.get("strategy") == "sample" or len(set(leaves)) == len(leaves)
        assert bool(leaves) == bool(market.leaves(request))
        items = ranked.item_BK[request]
        items = items[items >= 0].tolist()
        assert set(items) <= set(market.items[request]) and len(set(items)) == len(items)


@pytest.mark.parametrize("settings", [{}, {"heads": (0, 1)}, {"strategy": "value"}, {"strategy": "sample", "softmax": "legal"},
                                      {"strategy": "gumbel", "softmax": "legal"}], ids=str)
def test_the_pointer_mixes_whole_paths_and_items(settings):
    market = SearchMarket(5, changed=True)
    heads, softmax = settings.get("heads", (0,)), settings.get("softmax", "all")
    copy = market.copy_mass(len(heads))
    result = run(market, copy, width=300, **settings)
    ranked = rank_items(result, market.eligible, market.item_weight, N, softmax)
    for request in range(B):
        gates, mass = market.copied(copy, request)
        by_head = [market.paths(request, softmax, head) for head in heads]
        generated = {leaf: sum((1 - gate) * math.exp(paths[leaf]) for gate, paths in zip(gates, by_head, strict=True)) / len(heads)
                     for leaf in market.leaves(request)}
        gate = sum(gates) / len(heads)
        mixed = {leaf: log(p + gate * sum(mass.get(item, 0) for item in market.leaves(request)[leaf]))
                 for leaf, p in generated.items()}
        mixed = {leaf: score for leaf, score in mixed.items() if score > -math.inf}
        found = as_dict(result, request)
        if settings.get("strategy") == "sample":
            mixed = {leaf: mixed[leaf] for leaf in found}
        assert_close(found, mixed)
        sharing = {leaf: [item for item in market.alive if tuple(market.codes[item]) == leaf] if softmax == "all" else items
                   for leaf, items in market.leaves(request).items()}
        expected = {}
        for leaf in found:
            total = sum(float(market.weight[item]) + 0.1 for item in sharing[leaf])
            for item in market.leaves(request)[leaf]:
                share = (float(market.weight[item]) + 0.1) / total
                expected[item] = log(generated[leaf] * share + gate * mass.get(item, 0))
        alive = ranked.item_BK[request] >= 0
        scores = dict(zip(ranked.item_BK[request][alive].tolist(), ranked.score_BK[request][alive].tolist(), strict=True))
        if settings.get("strategy") != "sample":
            assert_close(scores, expected)
            assert list(scores.values()) == sorted(scores.values(), reverse=True)


def test_without_past_items_the_pointer_changes_nothing_and_a_closed_gate_next_to_nothing():
    market = SearchMarket(6)
    plain, none = run(market, width=8), torch.empty(0, dtype=torch.long)
    copy = market.copy_mass()
    empty = run(market, type(copy)(none, none, torch.empty(0), copy.log_gate_B), width=8)
    closed = run(market, type(copy)(copy.request_M, copy.item_M, copy.log_mass_M, torch.full((B,), -torch.inf)), width=8)
    for other in (empty, closed):
        assert torch.equal(other.score_BK, plain.score_BK) and torch.equal(other.leaf_BK, plain.leaf_BK)
    assert plain.log_p_gen_BK is None and plain.value_BK is None and plain.perturbed_BK is None


@pytest.mark.parametrize("width", [3, (2, 7, 4)])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_guide_that_ignores_values_is_the_plain_beam(variant, width):
    market = SearchMarket(*variant)
    plain = run(market, width=width)
    guided = run(market, width=width, strategy="value", guide=PLAIN_GUIDE)
    even = run(market, width=width, strategy="value", guide=ValueGuide(temperature=1e9, proposals=V * N, eta=0))
    for other in (guided, even):
        assert torch.equal(other.leaf_BK, plain.leaf_BK) and torch.equal(other.score_BK, plain.score_BK)


def slow_guided(market, request, width, guide):
    """The value-guided beam (GPR §4) with Python lists: [(leaf, log p, value)]."""
    beams = [((), 0.0, 0.0)]
    for level in range(L):
        steps = [market.steps(request, prefix, "all") for prefix, _, _ in beams]
        room = [min(len(step), guide.max_children) for step in steps]
        total = min(int(width * guide.proposals), sum(room))
        weights = np.exp(z(np.array([value for _, _, value in beams])) / guide.temperature)
        wanted = [min(max(1, round(total * float(weight))), most) for weight, most in zip(weights / weights.sum(), room, strict=True)]
        best_first = sorted(range(len(beams)), key=lambda number: -weights[number])
        while sum(wanted) < total:
            wanted[next(number for number in best_first if wanted[number] < room[number])] += 1
        while sum(wanted) > total and any(number > 1 for number in wanted):
            wanted[next(number for number in reversed(best_first) if wanted[number] > 1)] -= 1
        proposed = []
        for (prefix, score, _), step, number in zip(beams, steps, wanted, strict=True):
            for code in sorted(step, key=lambda code: -step[code])[:number]:
                place = sum(c * V**position for position, c in enumerate(prefix))
                proposed.append(((*prefix, code), score + step[code], float(market.value_BPLXV[request, 0, level, place, code])))
        guided = [score for _, score, _ in proposed] + guide.eta * z(np.array([value for _, _, value in proposed]))
        beams = [proposed[number] for number in np.argsort(-guided)[:width]]
    return beams


def z(values):
    return (values - values.mean()) / values.std() if len(values) and values.std() > 1e-6 else np.zeros(len(values))


@pytest.mark.parametrize("guide", [ValueGuide(), ValueGuide(temperature=0.3, proposals=1, eta=0), ValueGuide(max_children=2, eta=1.5),
                                   ValueGuide(temperature=0.1, proposals=1.5, max_children=3)], ids=str)
@pytest.mark.parametrize("width", [2, 5, 9])
def test_the_guided_beam_equals_one_with_lists(width, guide):
    for seed in range(3):
        market = SearchMarket(seed, changed=seed == 1)
        result = run(market, width=width, strategy="value", guide=guide)
        for request in range(B):
            expected = slow_guided(market, request, width, guide) if market.items[request] else []
            assert list(as_dict(result, request)) == [leaf for leaf, _, _ in expected]
            assert_close(as_dict(result, request), {leaf: score for leaf, score, _ in expected})
            assert_close(as_dict(result, request, "value_BK"), {leaf: value for leaf, _, value in expected})


@pytest.mark.parametrize("weights", [(), (0.6, 0.3, 0.1)])
@pytest.mark.parametrize("softmax", SEARCHABLE)
def test_heads_are_mixed_by_weight_and_each_leaf_comes_once(softmax, weights):
    market = SearchMarket(7, changed=True)
    result = run(market, width=10 * N, softmax=softmax, heads=(0, 1, 2), head_weights=weights)
    shares = np.array(weights or (1, 1, 1)) / sum(weights or (1, 1, 1))
    for request in range(B):
        by_head = [market.paths(request, softmax, head) for head in range(P)]
        expected = {leaf: math.log(sum(share * math.exp(paths[leaf]) for share, paths in zip(shares, by_head, strict=True)))
                    for leaf in by_head[0]}
        found = as_dict(result, request)
        assert_close(found, expected)
        assert list(found.values()) == sorted(found.values(), reverse=True)


@pytest.mark.parametrize("settings", [{}, {"strategy": "value"}, {"strategy": "sample"}, {"strategy": "gumbel"}], ids=str)
@pytest.mark.parametrize("with_pointer", [False, True])
def test_steps_are_those_of_the_distribution_and_sum_to_the_score(settings, with_pointer):
    market = SearchMarket(13)
    copy = market.copy_mass() if with_pointer else None
    result = run(market, copy, width=7, softmax="legal", **settings)
    alive = result.leaf_BK >= 0
    torch.testing.assert_close(result.steps_BKL[alive].sum(1), result.score_BK[alive])
    assert result.steps_BKL[~alive].eq(-torch.inf).all()
    for request in range(B):
        for codes, steps in zip(result.codes_BKL[request].tolist(), result.steps_BKL[request].tolist(), strict=True):
            if codes[0] < 0:
                continue
            paths, prefixes = market.paths(request, "legal"), [1.0]
            (gate,), mass = market.copied(copy, request) if with_pointer else ((0.0,), {})
            for level in range(L):
                below = [leaf for leaf in paths if list(leaf[: level + 1]) == codes[: level + 1]]
                copied = sum(mass.get(item, 0) for leaf in below for item in market.leaves(request)[leaf])
                prefixes.append((1 - gate) * sum(math.exp(paths[leaf]) for leaf in below) + gate * copied)
            assert steps == pytest.approx(np.diff(np.log(prefixes)).tolist(), abs=2e-5)


def test_the_width_is_split_over_the_heads_by_weight():
    config = SearchConfig(width=(10, 3, 128), heads=(0, 1, 2), head_weights=(0.7, 0.2, 0.1))
    assert config.widths(3) == [[7, 2, 1], [1, 1, 1], [90, 25, 13]]
    with pytest.raises(ConfigError, match="lists 3 levels, the trie has 4"):
        config.widths(4)


@pytest.mark.parametrize("settings, message", [
    ({"width": 0}, "at least 1"), ({"heads": (0, 0)}, "distinct"), ({"heads": (0, 1), "head_weights": (1.0,)}, "one for each"),
    ({"heads": (0, 1), "width": 1}, "number of heads"), ({"strategy": "gumbel"}, "legal codes"), ({"temperature": 0.5}, "legal codes"),
    ({"strategy": "sample", "softmax": "legal", "heads": (0, 1)}, "one MTP head"),
    ({"strategy": "sample", "softmax": "legal", "width": (1, 2, 3)}, "one width"), ({"widht": 3}, "did you mean width")])
def test_settings_that_contradict_each_other_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        build_config(SearchConfig, settings, "search")


@pytest.mark.parametrize("strategy", ["sample", "gumbel"])
@pytest.mark.parametrize("with_pointer", [False, True])
def test_draws_follow_the_exact_distribution(strategy, with_pointer):
    """Inclusion counts of 4000 requests against the exact chances of drawing each path first, or among the first two."""
    market, copies, request = SearchMarket(8), 4000, 0
    market.items[request] = market.items[request][:9]
    others = torch.tensor([item for item in range(N) if item not in market.items[request]])
    copy = market.copy_mass() if with_pointer else None
    target = market.paths(request, "legal")
    probability = {leaf: math.exp(score) for leaf, score in target.items()}
    if copy is not None:
        (gate,), mass = market.copied(copy, request)
        probability = {leaf: (1 - gate) * p + gate * sum(mass.get(item, 0) for item in market.leaves(request)[leaf])
                       for leaf, p in probability.items()}

    legal = market.trie.legal_nodes([None])
    exclude = torch.arange(copies).repeat_interleave(len(others)), others.repeat(copies)
    eligible = Eligible.of(market.trie, legal, torch.zeros(copies, dtype=torch.long), exclude)
    if copy is not None:
        mine = copy.request_M == request
        count = int(mine.sum())
        copy = type(copy)(torch.arange(copies).repeat_interleave(count), copy.item_M[mine].repeat(copies),
                          copy.log_mass_M[mine].repeat(copies), copy.log_gate_B[request].repeat(copies))
    market.copy = copy
    config = SearchConfig(strategy=strategy, width=2, softmax="legal", seed=3)
    result = search(Rows(market, [request] * copies), eligible, config, request_id_B=torch.arange(copies))
    drawn = [[tuple(codes) for codes in paths] for paths in result.codes_BKL.tolist()]
    leaves = sorted(probability)
    first = Counter(paths[0] for paths in drawn)
    assert chisquare([first[leaf] for leaf in leaves], [copies * probability[leaf] for leaf in leaves]).pvalue > 1e-3
    pairs = Counter(tuple(paths) for paths in drawn)
    if strategy == "gumbel":  # the second is drawn from what is left
        expected = {(a, b): copies * probability[a] * probability[b] / (1 - probability[a]) for a in leaves for b in leaves if a != b}
    else:
        expected = {(a, b): copies * probability[a] * probability[b] for a in leaves for b in leaves}
    assert set(pairs) <= set(expected)
    common = [pair for pair in expected if expected[pair] >= 5]
    rest = copies - sum(pairs[pair] for pair in common), copies - sum(expected[pair] for pair in common)
    assert chisquare([*(pairs[pair] for pair in common), rest[0]], [*(expected[pair] for pair in common), rest[1]]).pvalue > 1e-3
    for paths, scores in zip(drawn[:50], result.score_BK.tolist(), strict=False):
        assert scores == pytest.approx([math.log(probability[path]) for path in paths], abs=1e-5)


@pytest.mark.parametrize("strategy", ["sample", "gumbel"])
def test_a_request_draws_the_same_in_any_batch_and_with_another_seed_something_else(strategy):
    market = SearchMarket(9)
    config = SearchConfig(strategy=strategy, width=6, softmax="legal", seed=1)
    ids = torch.tensor([5, 70_000_000_000, 3, 8, 1, 2, 9])
    together = search(market, market.eligible, config, request_id_B=ids)
    again = search(market, market.eligible, config, request_id_B=ids)
    assert torch.equal(together.leaf_BK, again.leaf_BK) and torch.equal(together.score_BK, again.score_BK)
    out = market.eligible.excluded
    for rows in ([2], [6, 0, 1]):
        numbers = torch.full((B,), -1).index_put_((torch.tensor(rows),), torch.arange(len(rows)))
        mine = numbers[out.request_X] >= 0
        exclude = numbers[out.request_X[mine]], market.trie.slot_item[out.slot_X[mine]].long()
        eligible = Eligible.of(market.trie, market.eligible.legal, market.group[rows], exclude)
        part = search(Rows(market, rows), eligible, config, request_id_B=ids[rows])
        assert torch.equal(part.leaf_BK, together.leaf_BK[rows]) and torch.equal(part.score_BK, together.score_BK[rows])
    other = search(market, market.eligible, config.model_copy(update={"seed": 2}), request_id_B=ids)
    assert not torch.equal(other.leaf_BK, together.leaf_BK)


def test_perturbed_scores_fall_and_only_gumbel_has_them():
    result = run(SearchMarket(9), strategy="gumbel", softmax="legal", width=6)
    assert (result.perturbed_BK[:, 1:] <= result.perturbed_BK[:, :-1]).all()


@pytest.mark.parametrize("settings", [{}, {"strategy": "value"}, {"strategy": "gumbel", "softmax": "legal"},
                                      {"strategy": "sample", "softmax": "legal"}, {"heads": (0, 1)}], ids=str)
def test_nan_is_refused(settings):
    market = SearchMarket(0)
    market.log_probs_BPLXV[:, :, 1] = torch.nan
    with pytest.raises(TrainingError, match="NaN log-probabilities at level 1"):
        run(market, **settings)


def test_a_value_that_is_nan_is_refused():
    market = SearchMarket(0)
    market.value_BPLXV[:, :, 2] = torch.nan
    with pytest.raises(TrainingError, match="value head returned NaN at level 2"):
        run(market, strategy="value")


@pytest.mark.parametrize("order", ["value", "leaf_value"])
@pytest.mark.parametrize("own_values", [True, False])
def test_items_can_be_ranked_by_value(order, own_values):
    market = SearchMarket(10, changed=True)
    result = run(market, width=6, strategy="value")
    value_of = torch.from_numpy(market.rng.permutation(N)).float()
    value_M = value_of[market.trie.slot_item.long()] if own_values else None
    ranked = rank_items(result, market.eligible, market.item_weight, 30, value_M=value_M, order=order)
    for request in range(B):
        place = {leaf: number for number, leaf in enumerate(as_dict(result, request))}
        leaf_value = as_dict(result, request, "value_BK")
        rows = [(place[leaf], float(value_of[item]) if own_values else leaf_value[leaf], -(float(market.weight[item])), item)
                for leaf, items in market.leaves(request).items() if leaf in place for item in items]
        rows.sort(key=lambda row: (row[0] if order == "leaf_value" else 0, -row[1], *row[2:]))
        assert ranked.item_BK[request][: len(rows)].tolist() == [row[3] for row in rows][:30]
        assert ranked.item_BK[request][len(rows):].eq(-1).all() and ranked.value_BK[request][len(rows):].isnan().all()
        assert ranked.value_BK[request][: len(rows)].tolist() == pytest.approx([row[1] for row in rows][:30])


@pytest.mark.parametrize("settings", [{}, {"strategy": "value"}, {"heads": (0, 1)}], ids=str)
def test_a_trie_after_inserts_and_deletes_searches_like_a_rebuilt_one(settings):
    market = SearchMarket(12, changed=True)
    rebuilt = Trie.from_codes(market.codes[market.alive], V, market.alive)
    for trie in (rebuilt, market.trie.compact()):
        legal = trie.legal_nodes([np.array(items) for items in market.items])
        eligible = Eligible.of(trie, legal, torch.arange(B))
        weights = trie.slot_weights(market.weight)
        for softmax in SEARCHABLE:
            config = SearchConfig(width=9, softmax=softmax, **settings)
            found, expected = (search(market, which, config, weight) for which, weight in
                               ((market.eligible, market.item_weight), (eligible, weights)))
            assert torch.equal(found.codes_BKL, expected.codes_BKL)
            torch.testing.assert_close(found.score_BK, expected.score_BK)
            items = [rank_items(result, which, weight, 30, softmax).item_BK for result, which, weight in
                     ((found, market.eligible, market.item_weight), (expected, eligible, weights))]
            assert torch.equal(*items)
