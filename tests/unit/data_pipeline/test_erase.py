"""Erased users are in no file of the data folder; every other row is what it was, and is served exactly once."""

import itertools
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from documents import launch_module
from user_logs import SPLITS, USERS, build_users, files_with, manifests_of, write_user_logs

from data_pipeline import erase
from data_pipeline.erase import EraseConfig, erase_users
from data_pipeline.history import build_history, is_history_of
from data_pipeline.knowledge import BuildKnowledgeConfig, build_knowledge
from data_pipeline.shards import iter_record_batches, row_stats
from data_pipeline.user_texts import TemplateConfig
from data_pipeline.users import open_users
from gpr_dist.data.history import UserHistory
from gpr_dist.data.knowledge import KnowledgeVectors
from gpr_dist.data.loader import LoaderConfig, build_loader
from gpr_dist.data.reader import ShardReader
from gpr_dist.data.sampler import World
from gpr_dist.errors import CheckpointError, ConfigError, DataError
from gpr_dist.training import checkpoint

GONE = (USERS[3], USERS[17])
CONTAINERS = {"arrow": {}, "webdataset": {"container": "webdataset"}, "zstd": {"compression": "zstd"}}


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """One data set per container, with external knowledge and history inside the data folder."""
    folder = tmp_path_factory.mktemp("erase")
    logs, made = write_user_logs(folder / "logs"), {}
    for name, shards in CONTAINERS.items():
        data = made[name] = build_users(logs, folder / name, shards={"rows_per_batch": 4, "rows_per_shard": 8, **shards})
        if name == "arrow":
            build_history(data, data / "history")
            template = TemplateConfig(aspects=("habits",), every_days=15)
            build_knowledge(BuildKnowledgeConfig(data=data, out=data / "knowledge", template=template, max_missing_frac=1,
                                                 embedding={"dim": 4}, dtype="float32"))
    return made


@pytest.fixture
def data(originals, tmp_path, request):
    return shutil.copytree(originals[getattr(request, "param", "arrow")], tmp_path / "data")


def rows_of(data, split):
    """One row tables, so that a row's bytes can be compared."""
    batches = [batch.slice(at, 1) for batch in iter_record_batches(data / "shards" / split) for at in range(batch.num_rows)]
    return [(batch["user_id"][0].as_py(), batch.take(pa.array([0])).serialize().to_pybytes()) for batch in batches]


def erase_from(data, *users, dry_run=False):
    return erase_users(EraseConfig(data=data, users=users), dry_run)


@pytest.mark.parametrize("data", CONTAINERS, indirect=True)
def test_erased_users_are_in_no_file_and_the_others_are_as_before(data):
    stored = open_users(data).stored(pa.array(GONE)).to_pylist()
    before, old = {split: rows_of(data, split) for split in SPLITS}, manifests_of(data)
    names = {path.name for path in data.rglob("part-*")}
    compressed = old["train"].compression != "none"
    assert compressed or len(files_with(data, *stored)) >= 5
    report = erase_from(data, *GONE)
    assert files_with(data, *stored, *GONE) == []
    new = manifests_of(data)
    for split, part in zip(SPLITS, report, strict=True):
        expected = [(user, content) for user, content in before[split] if user not in stored]
        assert rows_of(data, split) == expected
        assert part.users == {user for user, _ in before[split]} & set(stored)
        assert len(part.rows) == len(before[split]) - len(expected) > 0
        assert new[split].num_rows == len(expected) and old[split].fingerprint != new[split].fingerprint
        stats = np.concatenate([row_stats(batch) for batch in iter_record_batches(data / "shards" / split)])
        assert np.array_equal(stats, np.load(data / "shards" / split / new[split].rows_file, allow_pickle=False))
        assert [new[split].num_tokens, new[split].num_targets] == stats.sum(0).tolist()
        assert part.num_tokens == old[split].num_tokens - new[split].num_tokens
        files = {path.name for path in (data / "shards" / split).iterdir()}
        assert files == {"manifest.json", new[split].index_file, new[split].rows_file, *(shard.name for shard in new[split].shards)}
        reader = ShardReader(data / "shards" / split)
        assert sum(reader.read_batch(number).num_rows for number in range(reader.num_batches)) == len(expected)
    assert len(names & {path.name for path in data.rglob("part-*")}) > len(names) / 4  # files without them are not touched


def test_the_loader_serves_the_rest_once(data):
    erase_from(data, *GONE)
    config = LoaderConfig(global_batch_size=8, micro_batch_tokens=512)
    loader = build_loader(str(data / "shards" / "train"), config, World(0, 1), np.zeros((120, 2), np.int64), 1)
    steps = itertools.islice(loader, loader.steps_per_epoch)
    served = sorted(row for step in steps for batch in step.micro_batches for row in batch.row_ids_B.tolist())
    assert served == list(range(manifests_of(data)["train"].num_rows))


def test_knowledge_and_history_follow_the_rows(data):
    def seen(split):
        manifest = manifests_of(data)[split]
        rows = np.arange(manifest.num_rows)
        users = [user for user, _ in rows_of(data, split)]
        offsets, columns = UserHistory(data / "history", manifest, 100).gather(rows)
        vectors = KnowledgeVectors(data / "knowledge", manifest).gather(rows).numpy()
        return [(user, vectors[at].tobytes(), *(column[offsets[at]:offsets[at + 1]].tobytes() for column in columns.values()))
                for at, user in enumerate(users)]

    before, stored = {split: seen(split) for split in SPLITS}, open_users(data).stored(pa.array(GONE)).to_pylist()
    assert any(len(row[2]) for row in before["test"]) and any(np.frombuffer(row[1], np.float32).any() for row in before["test"])
    erase_from(data, *GONE)
    assert {split: seen(split) for split in SPLITS} == {split: [row for row in rows if row[0] not in stored]
                                                        for split, rows in before.items()}
    assert is_history_of(data / "history", data) and len(list((data / "knowledge").glob("vectors-*"))) == 1


def test_dry_run_changes_nothing(data):
    before = {path: path.read_bytes() for path in data.rglob("*") if path.is_file()}
    assert sum(len(part.rows) for part in erase_from(data, *GONE, dry_run=True)) > 0
    assert {path: path.read_bytes() for path in data.rglob("*") if path.is_file()} == before


def test_unknown_users_change_nothing(data):
    before = {path: path.read_bytes() for path in data.rglob("*") if path.is_file()}
    assert not any(part.new or len(part.rows) for part in erase_from(data, "nobody"))
    assert {path: path.read_bytes() for path in data.rglob("*") if path.is_file()} == before


def test_again_and_everybody(data):
    erase_from(data, GONE[0])
    erase_from(data, GONE[1])
    once = {split: rows_of(data, split) for split in SPLITS}
    assert not any(part.new for part in erase_from(data, *GONE)) and once == {split: rows_of(data, split) for split in SPLITS}
    shutil.rmtree(data / "knowledge")
    erase_from(data, *USERS)
    assert all(manifest.num_rows == manifest.num_tokens == 0 and not manifest.shards for manifest in manifests_of(data).values())
    assert not list(data.rglob("part-*"))


@pytest.mark.parametrize("step", [0, 8, 14, 18, 21, 23])
def test_killed_anywhere_then_finished(originals, data, tmp_path, monkeypatch, step):
    """Stopped at the n-th file that appears: every split is the old or the new one, and another run ends as an uninterrupted one."""
    whole = shutil.copytree(originals["arrow"], tmp_path / "whole")
    erase_from(whole, *GONE)
    count = 0

    def stop(original):
        def call(*arguments, **options):
            nonlocal count
            count += 1
            if count == step + 1:
                raise KeyboardInterrupt
            return original(*arguments, **options)
        return call

    old, new = manifests_of(data), manifests_of(whole)
    with monkeypatch.context() as patch:
        for name in ("write_atomic", "new_shard", "save_array", "build_history"):
            patch.setattr(erase, name, stop(getattr(erase, name)))
        patch.setattr(erase.ShardManifest, "save", stop(erase.ShardManifest.save))
        patch.setattr(erase, "_remove_unused", stop(erase._remove_unused))
        try:
            erase_from(data, *GONE)
        except KeyboardInterrupt:
            for split, manifest in manifests_of(data).items():
                assert manifest in (old[split], new[split])
                ShardReader(data / "shards" / split)
    erase_from(data, *GONE)
    assert {str(path.relative_to(data)): path.read_bytes() for path in data.rglob("*") if path.is_file()} == \
        {str(path.relative_to(whole)): path.read_bytes() for path in whole.rglob("*") if path.is_file()}


def test_what_is_refused(data, tmp_path):
    with pytest.raises(ConfigError, match="nobody to erase"):
        erase_from(data)
    with pytest.raises(DataError, match="no shards in"):
        erase_from(tmp_path / "nothing", "u")
    (data / ".build").mkdir()
    with pytest.raises(DataError, match="unfinished build"):
        erase_from(data, *GONE)
    (data / ".build").rmdir()
    (data / "user_salt").write_text("some other salt, of another data set")
    with pytest.raises(ConfigError, match="give the salt it was built with"):
        erase_from(data, *GONE)
    with pytest.raises(ValueError, match="017 is not 17"):
        EraseConfig(data=data, users=(17,))


def test_the_script_says_what_went_and_how_to_go_on(data, monkeypatch, capsys):
    def run(*options):
        monkeypatch.setattr("sys.argv", ["erase_user.py", f"data={data}", f'users=["{GONE[0]}", "{GONE[1]}"]', *options])
        launch_module("erase_user").main()
        return capsys.readouterr().out

    old = manifests_of(data)["train"].fingerprint
    assert "2 user(s) found, nothing is changed (--dry-run)" in run("--dry-run") and manifests_of(data)["train"].fingerprint == old
    shown = run()
    assert "2 user(s) found and erased" in shown and f"data {old} is now {manifests_of(data)['train'].fingerprint}" in shown
    assert "init_from=<run folder>" in shown and "0 user(s) found" in run()
    assert not any(user in shown for user in GONE)


def test_a_run_on_the_old_rows_is_told_how_to_go_on():
    state, step = {"fingerprints": {"data": "before"}}, Path("runs/x/step-000001")
    with pytest.raises(CheckpointError, match=r"trained with data before, this run uses data after; .* init_from=runs/x/step-000001 and"):
        checkpoint._check(state, None, {"data": "after"}, step)


def test_users_from_a_file(data, tmp_path):
    (tmp_path / "ids.txt").write_text("\n".join([*GONE, "", GONE[0]]))
    report = erase_users(EraseConfig(data=data, users_file=tmp_path / "ids.txt"), dry_run=True)
    assert set().union(*(part.users for part in report)) == set(open_users(data).stored(pa.array(GONE)).to_pylist())
