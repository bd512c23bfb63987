"""Where a build runs changes no byte: one process, several, or tasks of a Ray cluster, also when Ray's workers are killed at work."""

import os
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from test_build_data import config, digest, make_logs

import data_pipeline.build as build_module
import data_pipeline.runner as runner_module
from data_pipeline.build import build_data
from data_pipeline.runner import open_runner
from data_pipeline.sources.base import require_file
from gpr_dist.errors import ConfigError, DataError

REPO = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def logs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("logs")
    make_logs(folder)
    return folder


@pytest.fixture(scope="module")
def built(logs, tmp_path_factory):
    return build_data(config(logs, tmp_path_factory.mktemp("built") / "data"))


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    ray = pytest.importorskip("ray", reason="needs the extra [ray]")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(REPO), str(REPO / "tests" / "integration"), str(REPO / "tests")]))
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        ray.init(address="local", num_cpus=2, include_dashboard=False, object_store_memory=100 << 20, log_to_driver=False)
        yield ray
        ray.shutdown()


def killed_once(function, name, marker, *arguments):
    """Run a piece of a build in a worker; the first one that comes to where it calls `name` is killed there, in the middle of it."""
    called = getattr(build_module, name)

    def die_first(*args, **kwargs):
        if marker.exists():
            return called(*args, **kwargs)
        marker.touch()
        os.kill(os.getpid(), signal.SIGKILL)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build_module, name, die_first)
        return getattr(build_module, function)(*arguments)


def test_a_ray_cluster_writes_the_same_bytes(logs, built, tmp_path, cluster, monkeypatch):
    monkeypatch.chdir(tmp_path)  # workers run elsewhere: a path of the config is relative to the folder of the command
    build_data(config(logs, Path("data"), runner="ray", num_workers=2))
    assert digest(tmp_path / "data") == digest(built)


@pytest.mark.parametrize("function,name", [("_read_task", "write_atomic"), ("_write_bucket", "build_journeys")])
def test_a_killed_ray_worker_changes_nothing(logs, built, tmp_path, cluster, monkeypatch, function, name):
    marker = tmp_path / "killed"
    monkeypatch.setattr(build_module, function, lambda *arguments: killed_once(function, name, marker, *arguments))
    assert digest(build_data(config(logs, tmp_path / "data", runner="ray", num_workers=2))) == digest(built)
    assert marker.exists()


@pytest.mark.parametrize("kind", ["local", "ray"])
def test_what_workers_say_and_how_they_die(tmp_path, kind, request, monkeypatch):
    if kind == "ray":
        request.getfixturevalue("cluster")
        monkeypatch.setattr(runner_module, "_RETRIES", 1)
    with open_runner(kind, 2, 1 << 20) as run:
        assert sorted(run(divmod, [(number, 2) for number in range(7)])) == [divmod(number, 2) for number in range(7)]
        assert list(run(divmod, [])) == []
        with pytest.raises(ZeroDivisionError):
            list(run(divmod, [(1, 1), (1, 0)]))
        with pytest.raises(DataError, match=r"^none does not exist; look elsewhere$"):
            list(run(require_file, [(Path("none"), "look elsewhere")]))
    with pytest.raises(DataError, match=r"start again, finished pieces are kept") as error, open_runner(kind, 2, 1 << 20) as run:
        list(run(os._exit, [(9,)]))
    assert "\n" not in str(error.value)


def test_without_ray_or_its_cluster(monkeypatch):
    def init(address):
        raise ConnectionError(f"{address} is silent\nfor minutes")

    monkeypatch.setenv("RAY_ADDRESS", "head:6379")
    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(is_initialized=lambda: False, init=init))
    with pytest.raises(ConfigError, match=r"^no Ray cluster answers at RAY_ADDRESS=head:6379 \(head:6379 is silent\); start it"):
        open_runner("ray", 2, 1 << 20).__enter__()
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match=r"pip install 'gpr-dist\[ray\]'"):
        open_runner("ray", 2, 1 << 20).__enter__()
