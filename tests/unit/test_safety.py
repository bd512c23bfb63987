"""Laws: nothing that is read is unpickled or run, no file name leads out of its folder, no message shows a credential."""

import ast
import io
import json
import pickle
import re
import shutil
import sys
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
import xxhash
from checkpoint_files import write_checkpoint
from journeys_fixture import random_journeys, write_split
from pydantic import Field

from data_pipeline.catalogue import _load_npy
from data_pipeline.embeddings import _npy_rows, read_catalogue
from data_pipeline.market.world import World
from data_pipeline.shards import iter_record_batches
from data_pipeline.sources.tables import TableFiles, read_table
from gpr_dist import bundle
from gpr_dist.config import Config, load_config, public, to_yaml
from gpr_dist.data.arrays import open_array
from gpr_dist.data.reader import ShardReader, iter_batches
from gpr_dist.errors import CheckpointError, DataError, GPRError, TokenizerError, run_cli
from gpr_dist.safety import MASK, inside, load_tensors, redact, redacted
from gpr_dist.schema import HistoryManifest, KnowledgeManifest
from gpr_dist.tokenizer.points import open_embeddings
from gpr_dist.training import checkpoint

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted(path for folder in ("gpr_dist", "data_pipeline", "launch") for path in (ROOT / folder).rglob("*.py"))

# ------------------------------------------------------------------------------------------------------------ unpickling

UNSAFE_MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
UNSAFE_CALLS = {"eval", "exec", "torch.load", "torch.hub.load", "yaml.load", "yaml.unsafe_load", "yaml.full_load", "os.system", "os.popen",
                "shutil.unpack_archive", "pd.read_pickle", "pandas.read_pickle"}
UNSAFE_METHODS = {"extractall", "load_checkpoint", "load_universal_checkpoint", "read_pickle"}


def unsafe(source: str) -> list[str]:
    """Calls and imports by which a file could make code run, from the syntax tree."""
    out = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            out += [f"import {name}" for name in names if name.split(".")[0] in UNSAFE_MODULES]
        if not isinstance(node, ast.Call):
            continue
        name, options = ast.unparse(node.func), {word.arg: ast.unparse(word.value) for word in node.keywords}
        if name in UNSAFE_CALLS or (isinstance(node.func, ast.Attribute) and node.func.attr in UNSAFE_METHODS):
            out.append(name)
        if name in ("np.load", "numpy.load") and options.get("allow_pickle") != "False":
            out.append(f"{name} without allow_pickle=False")
        out += [f"{name}({word}=True)" for word in ("shell", "trust_remote_code", "allow_pickle") if options.get(word) == "True"]
    return out


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_nothing_that_is_read_can_run(path):
    assert unsafe(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("source", [
    "import pickle", "from joblib import load", "torch.load('x', weights_only=True)", "np.load(p)", "np.load(p, allow_pickle=True)",
    "eval(text)", "yaml.load(t, Loader=l)", "tarfile.open(p).extractall()", "subprocess.run(c, shell=True)", "engine.load_checkpoint(p)"])
def test_the_rule_finds_offenders(source):
    assert len(unsafe(source)) >= 1


class Evil:
    """Unpickled, it makes the folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.mkdir, (self.path,)


def npy(evil: Evil) -> bytes:
    file = io.BytesIO()
    np.save(file, np.array([evil], object), allow_pickle=True)
    return file.getvalue()


def arrow(evil: Evil) -> bytes:
    """A column of the extension type whose metadata old versions of pyarrow unpickled (CVE-2023-47248)."""
    kind = pa.field("item_id", pa.string(), metadata={"ARROW:extension:name": "arrow.py_extension_type",
                                                      "ARROW:extension:metadata": pickle.dumps(evil, protocol=0)})
    schema, file = pa.schema([kind, ("text", pa.string())]), io.BytesIO()
    with pa.ipc.new_file(file, schema) as writer:
        writer.write_batch(pa.record_batch([pa.array(["a"]), pa.array(["b"])], schema=schema))
    return file.getvalue()


def torch_file(evil: Evil) -> bytes:
    file = io.BytesIO()
    torch.save(evil, file)
    return file.getvalue()


def tar(evil: Evil) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for name in ("000000.arrow", "000000.pyd", "000000.pickle"):
            content = pickle.dumps(evil)
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return file.getvalue()


OPENERS = {
    "embeddings.npy, to fit a tokenizer": (npy, lambda path: open_embeddings(path)),
    "embeddings.npy, given": (npy, lambda path: _npy_rows(path, 1)),
    "array of a catalogue": (npy, lambda path: _load_npy(path, 1)),
    "empty array of a catalogue": (npy, lambda path: _load_npy(path, 0)),
    "array of knowledge or history": (npy, lambda path: open_array(path, (1,), ("i",), "again")),
    "empty array": (npy, lambda path: open_array(path, (0,), ("i",), "again")),
    "safetensors": (torch_file, lambda path: load_tensors(path, TokenizerError)),
    "safetensors in numpy": (pickle.dumps, lambda path: load_tensors(path, DataError, "np")),
    "tar of shards": (tar, lambda path: list(iter_batches(str(path)))),
    "log in Arrow": (pickle.dumps, lambda path: list(read_table(TableFiles(path=str(path), file_format="arrow"), ["a"]))),
    "log in Parquet": (pickle.dumps, lambda path: list(read_table(TableFiles(path=str(path), file_format="parquet"), ["a"]))),
    "catalogue": (pickle.dumps, lambda path: read_catalogue(path)),
    "YAML": (lambda evil: f"a: !!python/object/apply:os.mkdir ['{evil.path}']".encode(), lambda path: load_config(Config, path)),
}


@pytest.mark.parametrize("kind", OPENERS)
def test_a_pickle_in_the_place_of_a_file_is_refused_and_does_not_run(tmp_path, kind):
    make, read = OPENERS[kind]
    (tmp_path / "file").write_bytes(make(Evil(tmp_path / "it ran")))
    with pytest.raises(GPRError):
        read(tmp_path / "file")
    assert not (tmp_path / "it ran").exists()


def test_an_extension_type_is_a_column_and_nothing_more(tmp_path):
    (tmp_path / "catalogue.arrow").write_bytes(arrow(Evil(tmp_path / "it ran")))
    assert read_catalogue(tmp_path / "catalogue.arrow")["item_id"].to_pylist() == ["a"]
    assert not (tmp_path / "it ran").exists()


def test_row_statistics_and_a_markets_truth_are_not_unpickled(tmp_path):
    write_split(tmp_path / "train", random_journeys(20))
    (tmp_path / "train" / "rows.npy").write_bytes(npy(Evil(tmp_path / "it ran")))
    with pytest.raises(DataError, match=r"rows\.npy cannot be read"):
        ShardReader(tmp_path / "train", verify="never")
    with pytest.raises(DataError):
        World.load(tmp_path)
    assert not (tmp_path / "it ran").exists()


def test_the_evil_file_would_run(tmp_path):
    """Otherwise the tests above would prove nothing."""
    np.load(io.BytesIO(npy(Evil(tmp_path / "it ran"))), allow_pickle=True)
    assert (tmp_path / "it ran").exists()


# ----------------------------------------------------------------------------------------------------------------- paths

OUTSIDE = ["../secret", "a/../../secret", "/etc/passwd", "..\\secret", "C:secret", "", "a\0b", ".."]


@pytest.mark.parametrize("name", OUTSIDE)
def test_a_name_that_leads_out_is_refused(tmp_path, name):
    with pytest.raises(TokenizerError, match=r"the index names .*, which is not a path inside its folder"):
        inside(tmp_path, name, "the index", TokenizerError)


def test_a_link_that_leads_out_is_refused_and_one_that_stays_is_not(tmp_path):
    folder = tmp_path / "folder"
    (folder / "sub").mkdir(parents=True)
    (folder / "file").touch()
    (tmp_path / "secret").touch()
    (folder / "in").symlink_to(folder / "file")
    (folder / "out").symlink_to(tmp_path / "secret")
    (folder / "sub" / "up").symlink_to(tmp_path)
    (tmp_path / "elsewhere").symlink_to(folder)
    assert inside(folder, "in", "x", DataError) and inside(tmp_path / "elsewhere", "file", "x", DataError)
    for name in ("out", "sub/up/secret"):
        with pytest.raises(DataError, match="a link that leads out of"):
            inside(folder, name, "x", DataError)


def edited(path: Path, old: str, new: str, checksum: str | None = None) -> None:
    """Change a JSON file's text; its own checksum, if it has one, is made right again."""
    values = json.loads(path.read_text().replace(json.dumps(old), json.dumps(new)))
    if checksum:
        del values[checksum]
        values[checksum] = xxhash.xxh3_128_hexdigest(json.dumps(values).encode())
    path.write_text(json.dumps(values))


@pytest.mark.parametrize("file", ["part-00000-0000.arrow", "index.arrow", "rows.npy"])
@pytest.mark.parametrize("by", ["name", "link"])
def test_shards_do_not_lead_out(tmp_path, file, by):
    folder = tmp_path / "train"
    write_split(folder, random_journeys(20))
    shutil.copy(folder / file, tmp_path / "secret")
    if by == "name":
        edited(folder / "manifest.json", file, "../secret")
    else:
        (folder / file).unlink()
        (folder / file).symlink_to(tmp_path / "secret")
    with pytest.raises(DataError, match="is not a path inside" if by == "name" else "a link that leads out"):
        reader = ShardReader(folder)
        reader.read_batch(0)
    if file != "rows.npy" or by == "name":
        with pytest.raises(DataError, match="is not a path inside" if by == "name" else "a link that leads out"):
            list(iter_record_batches(folder))


def test_a_tar_with_such_members_is_refused_and_writes_nothing(tmp_path):
    folder = tmp_path / "tars"
    folder.mkdir()
    with tarfile.open(folder / "evil.tar", "w") as archive:
        info = tarfile.TarInfo("../escaped.arrow")
        info.size = 3
        archive.addfile(info, io.BytesIO(b"abc"))
    with pytest.raises(DataError, match=r"evil\.tar names '\.\./escaped', which is not a path inside"):
        list(iter_batches(str(folder / "evil.tar")))
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["evil.tar", "tars"]


def test_checkpoints_do_not_lead_out(tmp_path):
    folder = write_checkpoint(tmp_path / "step-000001", {"w": torch.arange(6.0)}, world_size=1)
    shutil.copy(folder / "rank-00000.safetensors", tmp_path / "secret")
    edited(folder / "manifest.json", "rank-00000.safetensors", "../secret", checksum="xxh3_128")
    with pytest.raises(CheckpointError, match=r"names '\.\./secret', which is not a path inside"):
        checkpoint.find_checkpoint(folder)
    with pytest.raises(ValueError, match="is not a path inside"):
        checkpoint.open_weights(folder)


def test_knowledge_and_history_do_not_lead_out(tmp_path):
    split = {"split": "train", "file": "r", "num_rows": 1}
    knowledge = {"schema_version": 1, "num_texts": 1, "num_vectors": 1, "width": 1, "columns": ["text"], "encoder": {"file": "e"},
                 "vectors": "v", "blocks": "b", "block_rows": 1, "blocks_checksum": "",
                 "splits": {"f": {**split, "checksum": "", "num_missing": 0}}}
    history = {"schema_version": 1, "num_events": 1, "files": {"item": "i"}, "splits": {"f": split}}
    for kind, values, names in ((KnowledgeManifest, knowledge, "evbr"), (HistoryManifest, history, "ir")):
        path = tmp_path / ("knowledge.json" if kind is KnowledgeManifest else "history.json")
        path.write_text(json.dumps(values))
        kind.load(tmp_path)
        for name in names:
            path.write_text(json.dumps(values).replace(f'"{name}"', '"../../secret"'))
            with pytest.raises(DataError, match="is not a path inside"):
                kind.load(tmp_path)


def test_one_function_decides(tmp_path):
    """Bundles and tokenizers, whose own tests try every name, ask it too."""
    users = {path.relative_to(ROOT).as_posix() for path in FILES
             if re.search(r"from gpr_dist.safety import .*\b(inside|check_name)\b", path.read_text())}
    assert users == {"gpr_dist/schema.py", "gpr_dist/bundle.py", "gpr_dist/data/reader.py", "gpr_dist/rl/simulator.py",
                     "gpr_dist/tokenizer/semantic_ids.py", "gpr_dist/training/checkpoint.py", "gpr_dist/serving/export.py",
                     "data_pipeline/shards.py"}
    assert not [path for path in FILES if "PurePosixPath" in path.read_text() and path.name != "safety.py"] and bundle.inside is inside


# ----------------------------------------------------------------------------------------------------------- credentials

URIS = [
    ("s3://KEYID:SeCrEt@bucket/a/b?region=eu&secret_key=SeCrEt", "s3://bucket/a/b?region=eu"),
    ("s3://KEYID:SeC/rEt@bucket/date=*/*.parquet", "s3://bucket/date=*/*.parquet"),
    ("s3:/KEYID:SeCrEt@bucket/x", "s3:/bucket/x"),  # as a Path shows it
    ("gs://bucket/x?access_token=SeCrEt", "gs://bucket/x"),
    ("https://me:SeCrEt@host:8080/x?X-Amz-Signature=SeCrEt&v=1&X-Amz-Credential=KEYID%2F", "https://host:8080/x?v=1"),
    ("hdfs://host:9000/logs/a@b", "hdfs://host:9000/logs/a@b"),
    ("s3://bucket/mail@example.org/x?endpoint_override=localhost:5000", "s3://bucket/mail@example.org/x?endpoint_override=localhost:5000"),
    ("/data/a?b=c", "/data/a?b=c"), ("C:/a@b", "C:/a@b"),
]


@pytest.mark.parametrize(("uri", "shown"), URIS)
def test_a_uri_without_its_credentials_still_opens_the_same_place(uri, shown):
    assert redact(uri) == shown and redact(f"no file matches {uri} try") == f"no file matches {shown} try"
    assert redact(shown) == shown


@pytest.mark.parametrize("text", [
    "override 'hub_token=SeCrEt12345' is", '{"api_key": "SeCrEt12345", "x": 1}', "AWS_SECRET_ACCESS_KEY='SeCrEt 12345'",
    "tracker.password: SeCrEt12345", "Authorization: Bearer SeCrEt12345", "hf_SeCrEt12345aaaaaaaa", "AKIASECRET12345AAAA",
    "ghp_SeCrEt12345aaaaaa"])
def test_named_secrets_are_masked(text):
    assert MASK in redact(text) and "secret12345" not in redact(text).lower().replace(" ", "")


@pytest.mark.parametrize("text", [
    "max_tokens=512 user_tokens: row, 5 tokens", "key=value overrides, unknown key model.widht", "tokenizer 4f2c, model a91e",
    "the secret is out", "password=None", "https://docs.python.org/3/library/re.html#module-re", "mail me@example.org"])
def test_other_text_stays_as_it_is(text):
    assert redact(text) == text


def test_values_of_the_environment_are_masked(monkeypatch, tmp_path):
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef")
    monkeypatch.setenv("GPR_USER_SALT", "a salt with spaces")
    monkeypatch.setenv("SSH_KEY", str(tmp_path))  # a path is no secret
    monkeypatch.setenv("SHORT_TOKEN", "row")
    text = f"HTTP 401 for 0123456789abcdef, a salt with spaces, {tmp_path}, row"
    assert redact(text) == f"HTTP 401 for ***, ***, {tmp_path}, row"


class Inner(Config):
    """Of the config below."""

    paths: tuple[str, ...] = ("s3://KEYID:SeCrEt@bucket/a",)
    """places"""
    api_key: str = "SeCrEt"
    """secret"""
    max_tokens: int = 5
    """a number"""


class Outer(Config):
    """Something with credentials."""

    inner: Inner = Inner()
    """part"""
    by_name: dict[str, Path] = Field(default={"x": Path("s3://KEYID:SeCrEt@bucket/b")})
    """places"""


def test_dumps_of_a_config_have_none_and_the_program_has_them(tmp_path):
    config = Outer()
    assert "SeCrEt" not in to_yaml(config) + json.dumps(public(config)) and config.inner.paths == ("s3://KEYID:SeCrEt@bucket/a",)
    (tmp_path / "c.yaml").write_text(to_yaml(config))
    again = load_config(Outer, tmp_path / "c.yaml")
    assert again.inner.paths == ("s3://bucket/a",) and again.inner.max_tokens == 5 and public(again) == public(config)
    assert redacted({"a": [1, None, "x"], "token_types": 3, "password": ""}) == {"a": [1, None, "x"], "token_types": 3, "password": ""}


def test_no_setting_of_ours_is_mistaken_for_a_secret():
    from gpr_dist.config import describe
    from gpr_dist.job import FinetuneConfig
    from gpr_dist.safety import _SECRET_NAME

    names = [part for line in describe(FinetuneConfig) for part in line.split("=")[0].strip().split(".")]
    assert len(names) > 100 and not [name for name in names if _SECRET_NAME.fullmatch(name)]


def test_errors_show_none(capsys, monkeypatch):
    def fail(error):
        def main():
            raise error
        return main

    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    with pytest.raises(SystemExit):
        run_cli(fail(DataError("cannot open s3://KEYID:SeCrEt@bucket/x")))
    assert capsys.readouterr().err == "DataError: cannot open s3://bucket/x\n"
    with pytest.raises(OSError, match="SeCrEt") as caught:
        run_cli(fail(OSError("s3://KEYID:SeCrEt@bucket/x")))
    sys.excepthook(caught.type, caught.value, caught.tb)  # what the interpreter calls at the end
    shown = capsys.readouterr().err
    assert "SeCrEt" not in shown and "Traceback" in shown and "s3://bucket/x" in shown
