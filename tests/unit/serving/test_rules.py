"""Rules against the same rules asked ad by ad and request by request; what a table of ads may not say."""

import numpy as np
import pyarrow as pa
import pyarrow.csv as pv
import pyarrow.parquet as pq
import pytest
import torch

from gpr_dist.config import build_config
from gpr_dist.decoding.legality import unpack_slots
from gpr_dist.decoding.trie import Trie
from gpr_dist.errors import DataError, GPRError
from gpr_dist.hashing import hash_strings
from gpr_dist.serving.rules import Rules, RulesConfig, compile_rules

ITEMS, ADS = 50, np.arange(5, 50)
REGIONS, SLOTS = ["DE", "FR", "US"], ["feed", "story"]
KINDS = [{"kind": "targeting", "column": "regions", "field": "region"}, {"kind": "blocked", "column": "blocked", "field": "slot"},
         {"kind": "flag", "column": "audited"}, {"kind": "flag", "column": "funded"},
         {"kind": "cap", "column": "per_day"}, {"kind": "cap", "column": "per_hour", "within_hours": 1}]


def index_of(hashes):
    known = hash_strings(pa.array([f"ad-{n}" for n in range(ITEMS)]))
    return np.array([int(np.flatnonzero(known == each)[0]) if each in known else -1 for each in hashes], np.int32)


@pytest.fixture
def trie():
    return Trie.from_codes(np.random.default_rng(0).integers(0, 4, (len(ADS), 3)), 4, ADS)


@pytest.fixture
def table():
    rng = np.random.default_rng(1)
    rows = [{"item_id": f"ad-{n}", "regions": rng.choice(REGIONS, rng.integers(0, 3), replace=False).tolist(),
             "blocked": rng.choice(SLOTS, rng.integers(0, 2), replace=False).tolist(), "audited": bool(rng.random() < 0.8),
             "funded": bool(rng.random() < 0.9), "per_day": [None, 1, 2][rng.integers(3)], "per_hour": 0 if n % 17 == 0 else None}
            for n in rng.permutation(ADS)[:40]]
    return pa.Table.from_pylist([*rows, {**rows[0], "item_id": "ad of another shop"}])


def compiled(table, trie, folder, rules=KINDS, name="ads.parquet"):
    if name.endswith("parquet"):
        pq.write_table(table, folder / name)
    config = build_config(RulesConfig, {"ads": name, "rules": rules}, "test")
    return compile_rules(config, folder, trie, index_of, ITEMS)


def shown(rules, trie, requests, keys=None):
    """Items of each request."""
    audience = pa.array(requests, pa.struct([(name, pa.string()) for name in rules.fields])) if rules.fields else None
    packed, group = rules.audiences(audience, np.arange(len(requests)) if keys is None else keys)
    legal = unpack_slots(packed, trie.slot_item.numel())
    return [set(trie.slot_item[legal[g]].tolist()) for g in group.tolist()]


def test_an_ad_is_shown_where_all_rules_allow_it(table, trie, tmp_path):
    rules, unknown = compiled(table, trie, tmp_path)
    requests = [{"region": region, "slot": slot} for region in (*REGIONS, "BR", None) for slot in (*SLOTS, "search", None)]
    assert unknown == 1 and rules.fields == ("region", "slot")
    rows = {index_of(hash_strings(pa.array([row["item_id"]])))[0]: row for row in table.to_pylist()}
    for request, found in zip(requests, shown(rules, trie, requests), strict=True):
        assert found == {item for item, row in rows.items() if item >= 0 and (not row["regions"] or request["region"] in row["regions"])
                         and request["slot"] not in row["blocked"] and row["audited"] and row["funded"]}

    rules.save(tmp_path)
    again = Rules.load(tmp_path, trie)
    assert shown(again, trie, requests) == shown(rules, trie, requests) and again.fields == rules.fields
    some = torch.tensor(sorted(shown(rules, trie, requests)[0])[:2])
    off = again.switched("funded", some, False)
    assert all(after == before - set(some.tolist())
               for after, before in zip(shown(off, trie, requests), shown(rules, trie, requests), strict=True))
    assert shown(off.switched("funded", some, True), trie, requests) == shown(rules, trie, requests)
    with pytest.raises(DataError, match=r"no rule is a flag of column 'regions'; flags: \['audited', 'funded'\]"):
        again.switched("regions", some, True)
    assert Rules.load(tmp_path / "nowhere", trie) is None


def test_caps_count_what_the_history_has(table, trie, tmp_path):
    rules, _ = compiled(table, trie, tmp_path)
    rules.save(tmp_path)
    rng = np.random.default_rng(2)
    request, item, age = rng.integers(0, 6, 300), rng.choice(ADS, 300), rng.integers(1, 50 * 3600, 300)
    rows = {int(row["item_id"].split("-")[1]): row for row in table.to_pylist() if row["item_id"].startswith("ad-")}
    expected = set()
    for r in range(6):
        for n, row in rows.items():
            day, hour = (int(((request == r) & (item == n) & (age <= hours * 3600)).sum()) for hours in (24, 1))
            if (row["per_day"] is not None and day and day >= row["per_day"]) or (row["per_hour"] is not None and hour):
                expected.add((r, n))
    for each in (rules, Rules.load(tmp_path, trie)):
        found = each.capped(request, item, age)
        assert set(zip(*(part.tolist() for part in found), strict=True)) == expected and expected


def test_pacing_is_the_ads_share_and_the_same_for_the_same_request(trie, tmp_path):
    table = pa.table({"item_id": [f"ad-{n}" for n in ADS], "share": pa.array([0.0, 0.25, 1.0, None] * 11 + [0.5])})
    rules, _ = compiled(table, trie, tmp_path, [{"kind": "pacing", "column": "share"}])
    keys = np.random.default_rng(3).integers(0, 1 << 31, 800)
    rules.save(tmp_path)
    found = shown(rules, trie, [None] * 800, keys)
    assert found == shown(Rules.load(tmp_path, trie), trie, [None] * 800, keys)
    for n, share in zip(ADS, [0.0, 0.25, 1.0, 1.0] * 11 + [0.5], strict=True):
        times = np.mean([n in items for items in found])
        assert times == share if share in (0, 1) else abs(times - share) < 0.1


def test_csv_has_values_separated_by_bars(trie, tmp_path):
    pv.write_csv(pa.table({"item_id": ["ad-7", "ad-8", "ad-9"], "regions": ["DE|FR", "", "US"], "audited": ["true", "true", "false"]}),
                 tmp_path / "ads.csv")
    rules, _ = compiled(None, trie, tmp_path, [KINDS[0], KINDS[2]], "ads.csv")
    assert shown(rules, trie, [{"region": "FR"}, {"region": "US"}]) == [{7, 8}, {8}]


@pytest.mark.parametrize(("changes", "rules", "message"), [
    ({}, [{"kind": "flag", "column": "audit"}], "no column 'audit'; it has item_id, share"),
    ({"share": [2.0, 0.1]}, [{"kind": "pacing", "column": "share"}], "share has 2.0, expected 0 to 1"),
    ({"share": ["a", "b"]}, [{"kind": "pacing", "column": "share"}], "share is string, expected numbers"),
    ({"share": [{"a": 1}, {"a": 2}]}, [{"kind": "targeting", "column": "share"}], "expected lists of strings"),
    ({"item_id": ["ad-7", "ad-7"]}, [{"kind": "pacing", "column": "share"}], "lists an ad twice"),
    ({}, [{"kind": "weather", "column": "share"}], "kind"), ({}, [], "rules")])
def test_bad_tables_are_refused(changes, rules, message, trie, tmp_path):
    table = pa.table({"item_id": ["ad-7", "ad-8"], "share": [0.5, 1.0]} | changes)
    with pytest.raises(GPRError, match=message):
        compiled(table, trie, tmp_path, rules)
    (tmp_path / "no.parquet").write_text("no")
    with pytest.raises(DataError, match=r"no.arrow cannot be read"):
        compiled(table, trie, tmp_path, [{"kind": "pacing", "column": "share"}], "no.arrow")
