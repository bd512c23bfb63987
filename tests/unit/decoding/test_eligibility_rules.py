"""Rules against the same rules asked ad by ad and request by request."""

import numpy as np
import pytest
import torch
from search_market import SearchMarket

from gpr_dist.decoding.eligibility_rules import capped, flag, listed, pacing, targeting
from gpr_dist.decoding.legality import Legal, unpack_slots
from gpr_dist.errors import DataError

N, REGIONS, PLACEMENTS = 70, 6, 3


class Campaigns:
    """Half of the ads target regions, some block placements, some are not audited or out of budget."""

    def __init__(self, seed):
        rng = np.random.default_rng(seed)
        self.regions = [set(rng.choice(REGIONS, rng.integers(1, 4), replace=False).tolist()) if rng.random() < 0.5 else set()
                        for _ in range(N)]
        self.blocked = [set(rng.choice(PLACEMENTS, 1).tolist()) if rng.random() < 0.3 else set() for _ in range(N)]
        self.audited, self.funded = rng.random(N) < 0.8, rng.random(N) < 0.9
        self.fields = {"region": torch.from_numpy(rng.integers(-1, REGIONS + 2, 40)),
                       "place": torch.from_numpy(rng.integers(0, PLACEMENTS, 40))}

    def rule(self, trie):
        return (targeting(trie, "region", REGIONS, *pairs(self.regions)) & ~listed(trie, "place", PLACEMENTS, *pairs(self.blocked))
                & flag(trie, torch.from_numpy(self.audited)) & flag(trie, torch.from_numpy(self.funded)))

    def allowed(self, item, request):
        region, place = int(self.fields["region"][request]), int(self.fields["place"][request])
        return ((not self.regions[item] or region in self.regions[item]) and place not in self.blocked[item]
                and bool(self.audited[item]) and bool(self.funded[item]))


def pairs(sets):
    found = [(item, value) for item, values in enumerate(sets) for value in values]
    return torch.tensor(found, dtype=torch.long).reshape(-1, 2).unbind(1)


def items_of(trie, packed, group_B):
    return [set(trie.slot_item[row].tolist()) for row in unpack_slots(packed, trie.slot_item.numel())[group_B]]


@pytest.mark.parametrize("seed", range(4))
def test_a_rule_allows_what_it_says(seed):
    market, campaigns = SearchMarket(seed, changed=seed > 1), Campaigns(seed)
    packed, group_B = campaigns.rule(market.trie).audiences(campaigns.fields)
    assert len(packed) == len({(min(region, REGIONS) if region >= 0 else REGIONS, place) for region, place in
                               zip(*(values.tolist() for values in campaigns.fields.values()), strict=True)})
    for request, items in enumerate(items_of(market.trie, packed, group_B)):
        assert items & set(market.alive.tolist()) == {item for item in market.alive.tolist() if campaigns.allowed(item, request)}
    legal = Legal.from_slots(market.trie, packed, dense_nodes=0)
    for request, group in enumerate(group_B.tolist()):
        allowed = [item for item in market.alive.tolist() if campaigns.allowed(item, request)]
        slots = market.trie.slots(torch.tensor(allowed, dtype=torch.long))
        for level, nodes in enumerate(market.trie.ancestors(slots)):
            assert legal[level][group].nonzero().squeeze(1).tolist() == sorted(set(nodes.tolist()))


def test_or_and_not_are_those_of_sets():
    trie, campaigns = SearchMarket(0).trie, Campaigns(0)
    a, b = flag(trie, torch.from_numpy(campaigns.audited)), listed(trie, "place", PLACEMENTS, *pairs(campaigns.blocked))
    for rule, expected in ((a | b, lambda i, p: campaigns.audited[i] or p in campaigns.blocked[i]),
                           (~(a & ~b), lambda i, p: not (campaigns.audited[i] and p not in campaigns.blocked[i]))):
        packed, group_B = rule.audiences(campaigns.fields)
        for place, items in zip(campaigns.fields["place"].tolist(), items_of(trie, packed, group_B), strict=True):
            assert items == {item for item in range(N) if expected(item, place)}


def test_a_budget_that_runs_out_gives_a_new_table():
    trie = SearchMarket(0).trie
    table = flag(trie, torch.ones(N, dtype=torch.bool))
    out = table.with_items(torch.tensor([3, 8, 999]), allowed=False)
    fields = {"place": torch.zeros(1, dtype=torch.long)}
    assert items_of(trie, *out.audiences(fields)) == [set(range(N)) - {3, 8}]
    assert items_of(trie, *table.audiences(fields)) == [set(range(N))]
    assert items_of(trie, *out.with_items(torch.tensor([8]), allowed=True).audiences(fields)) == [set(range(N)) - {3}]


@pytest.mark.parametrize("compact", [False, True])
def test_tables_follow_a_trie_that_changes(compact):
    old, campaigns = SearchMarket(1).trie, Campaigns(1)
    table = listed(old, "region", REGIONS, *pairs(campaigns.regions))
    trie = old.delete(np.arange(5)).insert(np.array([[0, 0, 0], [4, 4, 4]]), [100, 101])
    trie = trie.compact() if compact else trie
    packed, group_B = table.moved(trie).with_items(torch.tensor([101]), True, torch.tensor([2])).audiences(campaigns.fields)
    for region, items in zip(campaigns.fields["region"].tolist(), items_of(trie, packed, group_B), strict=True):
        expected = {item for item in range(5, N) if region in campaigns.regions[item]} | ({101} if region == 2 else set())
        assert items & set(trie.slot_item[trie.slots(trie.slot_item) >= 0].tolist()) - set(range(5)) == expected


def test_pacing_keeps_each_ads_share_and_a_request_keeps_its_answer():
    trie = SearchMarket(0).trie
    rate = torch.linspace(0, 1, N)
    table = pacing(trie, rate, num_buckets=32)
    fields = {"request_id": torch.arange(6000)}
    packed, group_B = table.audiences(fields)
    share = unpack_slots(packed, trie.slot_item.numel())[group_B].double().mean(0)
    assert (share - rate[trie.slot_item.long()]).abs().max() < 1 / 32 + 0.03
    assert share[trie.slots(torch.tensor([0, N - 1]))].tolist() == [0, 1]
    again, again_B = table.audiences({"request_id": torch.arange(6000).flip(0)})
    assert torch.equal(again[again_B].flip(0), packed[group_B])


def test_frequency_caps_become_exclusions():
    request, item = capped(torch.tensor([0, 0, 1]), torch.tensor([5, 6, 5]), torch.tensor([2, 2, 3]), torch.full((N,), 3))
    assert request.tolist() == [1] and item.tolist() == [5]


def test_a_missing_field_is_named():
    market, campaigns = SearchMarket(0), Campaigns(0)
    with pytest.raises(DataError, match=r"the eligibility rules need \['place'\]"):
        campaigns.rule(market.trie).audiences({"region": torch.zeros(2, dtype=torch.long)})
