"""The local JSONL is the truth: always parsable, consistent after a resume, and W&B's failures do not stop it."""

import json
import socket
import time

import pytest
import wandb

from gpr_dist.training.tracker import Tracker, TrackerConfig, read_events, read_metrics

OFF = TrackerConfig(wandb="disabled", progress=False)


def refuse(name):
    raise AssertionError(f"{name} is not JSON")


def strict_lines(folder):
    return [json.loads(line, parse_constant=refuse) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def tracker(folder, start_step=0, config=OFF, rank=0):
    return Tracker(config, folder, {"lr": 1}, rank, 100, start_step)


def test_numbers_that_are_not_finite_are_written_as_names(tmp_path):
    t = tracker(tmp_path)
    t.log(1, {"loss": float("nan"), "norm": float("inf"), "low": -float("inf"), "list": [1.0, float("nan")], "ranks": [0, 3], "ok": 2.5})
    t.close()
    line = {"step": 1, "loss": "nan", "norm": "inf", "low": "-inf", "list": [1.0, "nan"], "ranks": [0, 3], "ok": 2.5}
    assert strict_lines(tmp_path) == [line] == read_metrics(tmp_path / "metrics.jsonl")


def test_every_line_is_on_disk_at_once(tmp_path):
    t = tracker(tmp_path)
    for step in range(1, 4):
        t.log(step, {"loss": 1.0 / step})
        assert len(strict_lines(tmp_path)) == step
    t.close()


def test_a_resume_drops_the_lines_after_its_checkpoint_and_goes_on(tmp_path):
    t = tracker(tmp_path)
    for step in range(1, 8):
        t.log(step, {"loss": float(step)})
    t.log(5, {"checkpoint/seconds": 0.1})
    t.close()
    t = tracker(tmp_path, start_step=5)
    t.log(6, {"loss": 66.0})
    t.close()
    assert [(line["step"], line.get("loss")) for line in strict_lines(tmp_path)] == [*((s, float(s)) for s in range(1, 6)), (5, None),
                                                                                    (6, 66.0)]


def test_a_last_line_cut_by_a_crash_is_left_out_and_does_not_spoil_the_next(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 1.0}\n{"step": 2, "lo')
    assert read_metrics(path) == [{"step": 1, "loss": 1.0}]
    t = tracker(tmp_path, start_step=2)
    t.log(3, {"loss": 3.0})
    t.close()
    assert [line["step"] for line in strict_lines(tmp_path)] == [1, 3]


def test_a_fresh_start_forgets_an_abandoned_run(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n')
    tracker(tmp_path).close()
    assert strict_lines(tmp_path) == []


def test_other_ranks_leave_no_trace(tmp_path, capsys):
    t = tracker(tmp_path / "run", rank=1)
    t.log(1, {"loss": 1.0})
    t.advance(1, loss="1")
    t.say("hello")
    t.close()
    assert not (tmp_path / "run").exists() and capsys.readouterr().err == ""


@pytest.mark.parametrize("progress", [True, False])
def test_the_person_watching_sees_lines_and_a_bar_on_stderr(tmp_path, capsys, progress):
    t = tracker(tmp_path, start_step=10, config=TrackerConfig(wandb="disabled", progress=progress))
    t.say("validation 0.5")
    t.advance(100, loss="0.123")
    t.close()
    shown = capsys.readouterr()
    assert "validation 0.5" in shown.err and shown.out == "" and ("100/100" in shown.err) == progress


class Broken:
    """A W&B run that fails from its second line on."""

    def __init__(self):
        self.lines, self.finished = [], False

    def log(self, metrics, step):
        if self.lines:
            raise ConnectionError("network is down")
        self.lines.append((step, metrics))

    def finish(self, exit_code=0):
        self.finished = True


def test_a_wandb_outage_is_said_once_and_stops_nothing(tmp_path, monkeypatch, capsys):
    run = Broken()
    monkeypatch.setattr(wandb, "init", lambda **_: run)
    t = tracker(tmp_path, config=TrackerConfig(wandb="offline", progress=False))
    for step in (1, 2, 3):
        t.log(step, {"loss": 1.0, "note": "text", "ranks": [1]})
    t.close()
    assert run.lines == [(1, {"loss/total": 1.0})] and not run.finished
    assert [line["step"] for line in strict_lines(tmp_path)] == [1, 2, 3]
    assert capsys.readouterr().err.count("network is down") == 1


def test_wandb_that_cannot_start_stops_nothing(tmp_path, monkeypatch, capsys):
    def fail(**_):
        raise RuntimeError("no such entity")

    monkeypatch.setattr(wandb, "init", fail)
    t = tracker(tmp_path, config=TrackerConfig(wandb="online", progress=False))
    t.log(1, {"loss": 1.0})
    t.close()
    assert len(strict_lines(tmp_path)) == 1 and "no such entity" in capsys.readouterr().err


def test_a_wandb_server_that_never_answers_stops_nothing(tmp_path, monkeypatch, capsys):
    """It accepts the connection and is silent. The wait is the tracker's own, shortened here, and said in one line."""
    asked, settings = [], wandb.Settings
    with socket.create_server(("127.0.0.1", 0)) as silent:  # the kernel accepts; nobody reads
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setenv("WANDB_API_KEY", "0123456789" * 4)
        monkeypatch.setattr(wandb, "Settings", lambda **given: asked.append(given) or settings(**given | {"init_timeout": 3}))
        began = time.monotonic()
        t = tracker(tmp_path, config=TrackerConfig(wandb="online", progress=False))
        t.log(1, {"loss": 1.0})
        t.close()
        assert time.monotonic() - began < 20 and asked[0]["init_timeout"] <= 30
        silent.settimeout(1)
        silent.accept()[0].close()  # it was asked
        wandb.teardown()
    assert [line["step"] for line in strict_lines(tmp_path)] == [1]
    assert capsys.readouterr().err.count("W&B could not be started") == 1


@pytest.mark.parametrize(("environment", "key", "mode"), [({}, None, "offline"), ({}, "secret", "online"),
                                                          ({"WANDB_API_KEY": "secret"}, None, "online"),
                                                          ({"WANDB_MODE": "offline", "WANDB_API_KEY": "secret"}, None, "offline"),
                                                          ({"WANDB_MODE": "disabled"}, "secret", None)])
def test_auto_is_online_with_a_key_else_offline_and_the_environment_decides(tmp_path, monkeypatch, environment, key, mode):
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    started = []
    (tmp_path / ".netrc").write_text(f"machine api.wandb.ai login user password {key}\n" if key else "")
    (tmp_path / ".netrc").chmod(0o600)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(wandb, "init", lambda **options: started.append(options["mode"]) or Broken())
    tracker(tmp_path, config=TrackerConfig(progress=False)).close()
    assert started == ([mode] if mode else [])


def test_events_stay_when_a_resume_takes_steps_back_and_after_a_cut_line(tmp_path):
    t = tracker(tmp_path)
    t.event(0, "start", world_size=2)
    t.log(7, {"loss": 1.0})
    t.alert(7, "loss_spike", "loss 9 at step 7")
    t.close()
    with open(tmp_path / "events.jsonl", "a") as file:
        file.write('{"time": 1, "ste')
    t = tracker(tmp_path, start_step=5)
    t.event(5, "resume", rate=float("nan"))
    t.close()
    assert [(line["step"], line["event"]) for line in read_events(tmp_path)] == [(0, "start"), (7, "alert"), (5, "resume")]
    assert read_events(tmp_path)[1]["kind"] == "loss_spike" and read_events(tmp_path)[2]["rate"] == "nan"
    assert strict_lines(tmp_path) == [] and read_events(tmp_path / "none") == []


def test_an_alert_is_seen_by_the_person_watching_and_by_wandb(tmp_path, monkeypatch, capsys):
    run = Broken()
    run.alert = lambda **said: run.lines.append(said)
    monkeypatch.setattr(wandb, "init", lambda **_: run)
    t = tracker(tmp_path, config=TrackerConfig(wandb="offline", progress=False))
    t.alert(3, "loader_wait", "40 % of the time")
    t.close()
    assert run.lines == [{"title": "loader wait", "text": "40 % of the time", "level": "WARN", "wait_duration": 600}] and run.finished
    assert "WARNING: 40 % of the time" in capsys.readouterr().err


def test_a_full_disk_does_not_hide_why_a_run_ends(tmp_path, capsys):
    t = tracker(tmp_path)
    t._events = open("/dev/full", "a+b", buffering=0)  # noqa: SIM115
    t.event(3, "end", status="failed", error="CheckpointError: no space")
    t.close(exit_code=1)
    assert "No space left" in (said := capsys.readouterr().err) and "CheckpointError: no space" in said
