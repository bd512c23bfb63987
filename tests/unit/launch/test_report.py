"""launch/report.py as a user calls it: files, exit codes, one-line errors."""

import importlib
import json
import re
import sys

import numpy as np
import pyarrow as pa
import pytest
from documents import ROOT

from gpr_dist.errors import run_cli
from gpr_dist.tokenizer.config import TokenizerConfig
from gpr_dist.tokenizer.fit import fit_tokenizer

N, GROWN, D = 300, 340, 4


@pytest.fixture(scope="module")
def report():
    sys.path.insert(0, str(ROOT / "launch"))
    yield importlib.import_module("report")
    sys.path.remove(str(ROOT / "launch"))


@pytest.fixture
def folders(tmp_path):
    """A data folder with its tokenizer, and one whose catalogue has grown, with the tokenizer appended to."""
    embeddings = np.random.default_rng(0).normal(size=(GROWN, D)).astype(np.float32)
    old, new = tmp_path / "old", tmp_path / "new"
    bundle = fit_tokenizer(embeddings[:N], TokenizerConfig(num_levels=2, codebook_size=4, device="cpu"), "f" * 16)
    for folder, count, fingerprint, name in ((old, N, "f" * 16, "embeddings.npy"), (new, GROWN, "e" * 16, "appended_embeddings.npy")):
        (folder / "catalogue").mkdir(parents=True)
        table = pa.table({"item_id": [f"item-{i}" for i in range(count)], "kind": (np.arange(count) % 2).astype(np.uint8),
                          "text": [f"text {i}" for i in range(count)]})
        with pa.OSFile(str(folder / "catalogue/catalogue.arrow"), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table)
        content = {"schema_version": 1, "num_items": count, "fingerprint": fingerprint}
        np.save(folder / "catalogue/hashes.npy", np.arange(count, dtype=np.uint64))
        np.save(folder / "catalogue/indices.npy", np.arange(count, dtype=np.int32))
        (folder / "catalogue/catalogue.json").write_text(json.dumps(content))
        np.save(folder / name, embeddings[:count])
    bundle.save(old / "tokenizer")
    bundle.append(embeddings[N:], "e" * 16).save(new / "tokenizer")
    return old, new


def call(report, monkeypatch, capsys, *arguments):
    """Exit code, standard output and error of the script."""
    monkeypatch.setattr(sys, "argv", ["report.py", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        run_cli(report.main)
    return stopped.value.code, *capsys.readouterr()


QUIET = ["report.max_collision=1", "report.min_error_drop=0", "report.max_code_share=1"]


def test_tokenizer_report_is_written_beside_the_bundle(report, folders, monkeypatch, capsys):
    old, _ = folders
    listed = set((old / "tokenizer").iterdir())
    code, out, _ = call(report, monkeypatch, capsys, "tokenizer", f"data={old}", f"out={old}/tokenizer", *QUIET)
    assert code == 0 and f"{old}/tokenizer/report.html" in out and "collision" in out
    assert set((old / "tokenizer").iterdir()) - listed == {old / "tokenizer/report.html", old / "tokenizer/report.json"}
    report.SemanticIds.load(old / "tokenizer")  # the bundle is as it was


def test_strict_makes_an_alarm_an_exit_code(report, folders, monkeypatch, capsys):
    old, _ = folders
    where = ["tokenizer", f"data={old}", f"out={old}/tokenizer"]
    assert call(report, monkeypatch, capsys, *where, "--strict", *QUIET)[0] == 0
    code, out, _ = call(report, monkeypatch, capsys, *where, "report.max_collision=0")
    assert code == 0 and out.startswith("ALARM") and "ALARM Collision is" in out
    assert call(report, monkeypatch, capsys, *where, "--strict", "report.max_collision=0")[0] == 1


def test_a_data_folder_without_embeddings_is_said(report, folders, monkeypatch, capsys):
    _, new = folders
    code, out, _ = call(report, monkeypatch, capsys, "tokenizer", f"data={new}", f"out={new}/tokenizer", *QUIET)
    assert code == 0 and f"no {new}/embeddings.npy" in out and "\nPAS" not in out


def test_drift_of_a_grown_catalogue_and_of_a_file(report, folders, monkeypatch, capsys, tmp_path):
    old, new = folders
    code, out, _ = call(report, monkeypatch, capsys, "drift", "--strict", f"tokenizer={new}/tokenizer", f"data={new}")
    assert code == 0 and "40 items of today beside 300 training items" in out and "stored" in out
    assert json.loads((new / "tokenizer/drift.json").read_text())["farthest"][0]["item_id"].startswith("item-3")
    np.save(tmp_path / "far.npy", np.random.default_rng(1).normal(9, 1, size=(100, D)))
    arguments = ["drift", f"tokenizer={old}/tokenizer", f"embeddings={tmp_path}/far.npy", f"report_folder={tmp_path}/here"]
    code, out, _ = call(report, monkeypatch, capsys, *arguments, "--strict")
    assert code == 1 and "ALARM Far from its code" in out and "measured on the training embeddings" in out
    assert (tmp_path / "here/drift.html").exists() and not (old / "tokenizer/drift.html").exists()


@pytest.mark.parametrize(("arguments", "message"), [
    (["other"], "unknown report 'other'; there is: tokenizer, drift"),
    (["tokenizer", "data={old}", "out={old}"], "is no complete tokenizer bundle"),
    (["tokenizer", "data={new}", "out={old}/tokenizer"], "use the tokenizer of this data"),
    (["tokenizer", "data={old}", "out={old}/tokenizer", "embeddings={old}/none.npy"], "none.npy cannot be read"),
    (["tokenizer", "data={old}", "out={old}/tokenizer", "report.max_colision=1"], "did you mean report.max_collision?"),
    (["drift", "tokenizer={old}/tokenizer"], "give data=FOLDER with a grown catalogue or embeddings=FILE.npy"),
    (["drift", "tokenizer={old}/tokenizer", "data={old}"], "has no items that tokenizer"),
    (["drift", "tokenizer={new}/tokenizer", "data={new}", "embeddings={old}/embeddings.npy"], "300 embeddings, .* 340 items"),
])
def test_a_user_error_is_one_line(report, folders, monkeypatch, capsys, arguments, message):
    old, new = folders
    code, _, err = call(report, monkeypatch, capsys, *(argument.format(old=old, new=new) for argument in arguments))
    last = err.replace("\r", "\n").strip().splitlines()[-1]
    assert code == 2 and "Traceback" not in err
    assert re.search(message, last), last


def test_help_and_dry_run_write_nothing(report, folders, monkeypatch, capsys):
    old, _ = folders
    code, out, _ = call(report, monkeypatch, capsys)
    assert code == 0 and "tokenizer" in out and "drift" in out
    code, out, _ = call(report, monkeypatch, capsys, "tokenizer", "--dry-run", f"data={old}", f"out={old}/tokenizer")
    assert code == 0 and "max_collision" in out and not (old / "tokenizer/report.html").exists()


def test_training_runs_are_named_one_after_another(report, tmp_path, monkeypatch, capsys):
    for name, events in (("a", ""), ("b", '{"time": 1, "step": 1, "event": "end", "status": "failed", "error": "DataError: gone"}\n')):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
        (tmp_path / name / "events.jsonl").write_text(events)
    code, out, _ = call(report, monkeypatch, capsys, "run", tmp_path / "a", tmp_path / "b", "--strict")
    assert code == 1 and "ALARM b failed at step 1: DataError: gone" in out and out.endswith(f"{tmp_path}/a/run.html\n")
    assert "Runs a, b" in (tmp_path / "a" / "run.html").read_text()
    assert [run["status"] for run in json.loads((tmp_path / "a" / "run.json").read_text())] == ["finished", "failed"]
    code, out, _ = call(report, monkeypatch, capsys, "run", f"runs=[{tmp_path}/a]", f"report_folder={tmp_path}/out", "--strict")
    assert code == 0 and (tmp_path / "out" / "run.html").exists()
    for arguments, problem in (([], "runs: 0 folders"), ([tmp_path], "is no run folder"), ([tmp_path / "a"] * 7, "7 folders; give 1 to 6")):
        code, _, err = call(report, monkeypatch, capsys, "run", *arguments)
        assert code == 2 and problem in err and len(err.splitlines()) == 1
