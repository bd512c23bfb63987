"""Names of hashed categories: what was counted is what the shards hold, the rare ones are forgotten, however the log is cut."""

import json
from collections import Counter

import numpy as np
import pyarrow as pa

from data_pipeline import value_names
from data_pipeline.value_names import add_names, count_names, write_names
from gpr_dist.hashing import feature_id

COLUMNS = {"scene": "scene", "user.age": "age", "env.slot": "slot"}


def counted(table, cuts):
    names = {}
    for first, last in zip([0, *cuts], [*cuts, len(table)], strict=True):
        part = {}
        count_names(table.slice(first, last - first), COLUMNS, part)
        add_names(json.loads(json.dumps(part)), names)
    return names


def test_names_are_those_of_the_categories_however_the_log_is_cut(tmp_path):
    rng = np.random.default_rng(0)
    scene, age = rng.choice(["feed", "story", None], 500).tolist(), rng.choice(["18-24", "25-34"], 500).tolist()
    table = pa.table({"scene": scene, "user.age": pa.array(age).dictionary_encode(), "value": [1.0] * 500})
    whole = counted(table, [])
    assert whole == counted(table, [3, 40, 41, 300]) and whole.keys() == {"scene", "age"}
    assert whole["scene"] == Counter(name for name in scene if name is not None) and whole["age"] == Counter(age)
    write_names(whole, tmp_path)
    found = json.loads((tmp_path / value_names.NAMES_FILE).read_text())
    for feature, values in (("scene", scene), ("age", age)):
        ids = feature_id(pa.array(values), feature).tolist()
        assert found[feature] == {str(category): value for category, value in zip(ids, values, strict=True) if category}


def test_only_the_frequent_ones_are_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(value_names, "MOST_KEPT", 5)
    values = [f"v{n}" for n in range(200) for _ in range(1 + 40 * (n < 5))]
    names = counted(pa.table({"scene": np.random.default_rng(1).permutation(values)}), list(range(50, 400, 50)))
    assert len(names["scene"]) <= 4 * 5 + 5
    write_names(names, tmp_path)
    assert set(json.loads((tmp_path / value_names.NAMES_FILE).read_text())["scene"].values()) == {f"v{n}" for n in range(5)}
