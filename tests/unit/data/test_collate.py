"""collate against a slow, obvious version that walks one row after another."""

import dataclasses
import math

import numpy as np
import pyarrow as pa
import pytest
import torch
from journeys_fixture import ENV_FEATURES, NUM_ITEMS, USER_FEATURES, random_journeys, stored_rows

from gpr_dist.data.collate import collate
from gpr_dist.errors import DataError
from gpr_dist.schema import JOURNEY_SCHEMA, Batch, TokenType

CODES = np.random.default_rng(0).integers(0, 32, (NUM_ITEMS, 3)).astype(np.int32)
WIDTHS = {"num_user_features": len(USER_FEATURES), "num_env_features": len(ENV_FEATURES)}

PLAIN_FIELDS = [field for field in dataclasses.fields(Batch) if field.default is dataclasses.MISSING]  # others are added after collate


def pack(batch, rows, num_heads=4):
    rows = np.asarray(rows, dtype=np.int64)
    return collate(stored_rows(batch).take(rows), rows + 1000, CODES, num_heads, **WIDTHS)


def obvious(rows: list[dict], row_ids: list[int], num_heads: int) -> dict[str, list]:
    """The semantics, read off the schema's comments, one token at a time."""
    out = {field.name: [] for field in PLAIN_FIELDS} | {"offsets_B1": [0]}
    targets = []
    for b, row in enumerate(rows):
        start, length = out["offsets_B1"][-1], len(row["token_type"]) - row["num_lookahead"]
        out["row_ids_B"].append(row_ids[b])
        out["offsets_B1"].append(start + length)
        for name in ("token_type", "block", "item", "action", "scene", "timestamp", "value"):
            out[f"{name}_T"] += row[name][:length]
        out["codes_TL"] += [CODES[item].tolist() if item >= 0 else [-1, -1, -1] for item in row["item"][:length]]
        user, env = len(USER_FEATURES), len(ENV_FEATURES)
        out["user_features_UF"] += [row["user_features"][i:i + user] for i in range(0, len(row["user_features"]), user)]
        out["env_features_EF"] += [row["env_features"][i:i + env] for i in range(0, len(row["env_features"]), env)]
        ads = [position for position, kind in enumerate(row["token_type"]) if kind == TokenType.I]
        for block in sorted(set(row["block"])):
            shown = [position for position in ads if row["block"][position] == block]
            if not shown or not row["num_context"] <= shown[0] < length or shown[0] == 0:
                continue
            request = len(out["request_token_R"])
            out["request_token_R"].append(start + shown[0] - 1)
            out["request_row_R"].append(b)
            out["request_eligibility_R"].append(row["eligibility"][block])
            out["request_time_R"].append(row["timestamp"][shown[0]])
            targets += [(0, request, position, row) for position in shown]
            for head in range(1, num_heads):
                ordinal = ads.index(shown[0]) + head
                if ordinal < len(ads):
                    targets.append((head, request, ads[ordinal], row))
    targets.sort(key=lambda target: target[:3])
    out["target_head_N"], out["target_request_N"] = [t[0] for t in targets], [t[1] for t in targets]
    for name in ("item", "action", "value", "pctr", "pcvr"):
        out[f"target_{name}_N"] = [row[name][position] for _, _, position, row in targets]
    out["target_codes_NL"] = [CODES[item].tolist() for item in out["target_item_N"]]
    return out


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("num_heads", [1, 4])
def test_equals_the_obvious_version(seed, num_heads):
    journeys = random_journeys(40, seed)
    rows = np.random.default_rng(seed).permutation(40)[:25]
    batch = pack(journeys, rows, num_heads)
    python_rows = journeys.to_pylist()
    expected = obvious([python_rows[row] for row in rows], (rows + 1000).tolist(), num_heads)
    for field in PLAIN_FIELDS:
        actual, wanted = getattr(batch, field.name), expected[field.name]
        assert actual.dtype == (torch.float32 if "value" in field.name or "pct" in field.name or "pcv" in field.name else torch.int64)
        wanted = torch.tensor(wanted, dtype=actual.dtype).reshape(actual.shape)
        assert torch.equal(torch.nan_to_num(actual, -7.0), torch.nan_to_num(wanted, -7.0)), field.name
    assert batch.num_targets > 0


def test_lookahead_is_label_only():
    journeys = random_journeys(60, 3)
    changed = journeys.to_pylist()
    for row in changed:
        for ahead in range(row["num_lookahead"]):
            row["item"][-1 - ahead] = (row["item"][-1 - ahead] + 1) % NUM_ITEMS
    before, after = pack(journeys, range(60)), pack(pa.RecordBatch.from_pylist(changed, JOURNEY_SCHEMA), range(60))
    different = {f.name for f in PLAIN_FIELDS
                 if not torch.equal(torch.nan_to_num(getattr(before, f.name)), torch.nan_to_num(getattr(after, f.name)))}
    assert different == {"target_item_N", "target_codes_NL"}


def test_slices_and_views_give_the_same_batch():
    journeys = random_journeys(50, 1)
    whole = pack(journeys, np.arange(10, 40))
    of_a_slice = stored_rows(journeys.slice(5, 40)).take(np.arange(5, 35))
    of_views = stored_rows(journeys).take(np.arange(3, 45)).slice(7, 37)
    for columns in (of_a_slice, of_views):
        other = collate(columns, np.arange(10, 40) + 1000, CODES, 4, **WIDTHS)
        for field in PLAIN_FIELDS:
            assert torch.equal(torch.nan_to_num(getattr(whole, field.name)), torch.nan_to_num(getattr(other, field.name))), field.name


def test_columns_may_be_left_out():
    journeys = random_journeys(30, 2)
    rows = np.random.default_rng(0).permutation(30)
    some = stored_rows(journeys.select(["num_context", "num_lookahead", "token_type", "item", "value"])).take(rows).slice(4, 20)
    every = stored_rows(journeys).take(rows).slice(4, 20)
    assert some.tokens.keys() == {"token_type", "item", "value"} and not some.sides
    assert all(np.array_equal(values, every.tokens[name], equal_nan=True) for name, values in some.tokens.items())
    assert np.array_equal(some.token_offsets, every.token_offsets)


def test_permuting_rows_changes_nothing_but_the_order():
    journeys = random_journeys(30, 5)
    order = np.random.default_rng(0).permutation(30)
    straight, permuted = pack(journeys, np.arange(30)), pack(journeys, order)

    def targets(batch):
        row = batch.row_ids_B[batch.request_row_R[batch.target_request_N]]
        site = (batch.request_token_R - batch.offsets_B1[batch.request_row_R])[batch.target_request_N]
        columns = (row, site, batch.target_head_N, batch.target_item_N, batch.target_action_N)
        return sorted(zip(*(column.tolist() for column in columns), strict=True))

    assert targets(straight) == targets(permuted)
    for new, old in enumerate(order):
        a, b = straight.offsets_B1, permuted.offsets_B1
        assert torch.equal(straight.item_T[a[old]:a[old + 1]], permuted.item_T[b[new]:b[new + 1]])


def test_empty_batch_has_every_shape():
    batch = pack(random_journeys(5), [])
    assert (batch.num_rows, batch.num_tokens, batch.num_targets) == (0, 0, 0)
    assert batch.user_features_UF.shape == (0, 2) and batch.env_features_EF.shape == (0, 3)
    assert batch.codes_TL.shape == (0, 3) and batch.target_codes_NL.shape == (0, 3)
    full = pack(random_journeys(5), range(5))
    assert all(getattr(batch, f.name).dtype == getattr(full, f.name).dtype for f in PLAIN_FIELDS)


@pytest.mark.parametrize("where", ["input", "lookahead"])
def test_item_outside_the_catalogue_is_named(where):
    rows = random_journeys(20, 2).to_pylist()
    bad = next(i for i, row in enumerate(rows) if row["num_lookahead"] and row["token_type"][0] != TokenType.I)
    position = -1 if where == "lookahead" else rows[bad]["token_type"].index(TokenType.I)
    rows[bad]["item"][position] = NUM_ITEMS + 5
    batch = pa.RecordBatch.from_pylist(rows, JOURNEY_SCHEMA)
    with pytest.raises(DataError, match=rf"part-00000.arrow row {bad}: item 55 .* catalogue has {NUM_ITEMS} items"):
        collate(stored_rows(batch).take(np.arange(20)), np.arange(20), CODES, 4, **WIDTHS,
                locate=lambda row: f"part-00000.arrow row {row}")


def test_feature_lists_that_do_not_fit_are_named():
    rows = random_journeys(20, 2).to_pylist()
    bad = next(i for i, row in enumerate(rows) if TokenType.E in row["token_type"])
    rows[bad]["env_features"].pop()
    with pytest.raises(DataError, match=rf"row {1000 + bad}: \d+ features at \d+ E tokens"):
        pack(pa.RecordBatch.from_pylist(rows, JOURNEY_SCHEMA), range(20))


def test_nan_stays_nan():
    journeys = random_journeys(10, 4)
    batch = pack(journeys, range(10))
    assert any(math.isnan(v) for v in batch.value_T.tolist())
