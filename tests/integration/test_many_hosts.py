"""Training on several hosts for real: `deepspeed --hostfile` over ssh and pdsh, torchrun's rendezvous, ZeRO-3 over the network.

The law: where the ranks are makes no difference. Losses equal those of the same number of ranks on one host, digit by digit.
"""

import json
import shutil
import subprocess
import time
from pathlib import Path

import pytest
from host_runs import CLEAN, EVERYWHERE, PATIENCE_S, SCRIPT, describe_processes, processes_with, torchrun_command
from hosts import Host, hosts, write_hostfile
from pretrain_runs import NUM_STEPS, TINY, logged_losses, run_pretraining

from gpr_dist.training.checkpoint import list_steps, read_manifest, verify


def run_deepspeed(used: list[Host], folder: Path, overrides: list[str], *options: str) -> str:
    """`deepspeed --hostfile hosts launch/pretrain.py` from the first host, to its end. Returns: what it printed."""
    folder.mkdir()
    (folder / ".deepspeed_env").write_text("".join(f"{name}={value}\n" for name, value in EVERYWHERE.items()))
    command = ["deepspeed", "--hostfile", str(write_hostfile(folder / "hosts", used)), *options, SCRIPT]
    done = used[0].run([*command, *TINY, *overrides], timeout=PATIENCE_S, cwd=folder, env=CLEAN)
    return done.stdout + done.stderr


def run_on_each(used: list[Host], folder: Path, commands: list[list[str]]) -> str:
    """A command per host, at the same time, to their end. Returns: what all of them printed."""
    folder.mkdir()
    started = [host.start(command, cwd=folder, env=CLEAN | EVERYWHERE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
               for host, command in zip(used, commands, strict=True)]
    said = [process.communicate(timeout=PATIENCE_S)[0] for process in started]
    assert [process.returncode for process in started] == [0] * len(used), "\n".join(text[-4000:] for text in said)
    return "".join(said)


def run_torchrun(used: list[Host], folder: Path, overrides: list[str]) -> str:
    """The same `torchrun` command on every host."""
    return run_on_each(used, folder, [torchrun_command(used[0], overrides, str(len(used)))] * len(used))


def run_deepspeed_by_hand(used: list[Host], folder: Path, overrides: list[str]) -> str:
    """`deepspeed --no_ssh` on every host, for clusters without ssh between hosts."""
    hostfile = str(write_hostfile(folder.with_suffix(".hosts"), used))
    return run_on_each(used, folder, [
        ["deepspeed", "--hostfile", hostfile, "--no_ssh", "--node_rank", str(number), "--master_addr", used[0].address, SCRIPT, *TINY,
         *overrides] for number in range(len(used))])


def received_bytes(host: Host) -> int:
    """Over its cable, since it was switched on."""
    return json.loads(host.run(["ip", "-statistics", "-json", "link", "show", "eth0"]).stdout)[0]["stats64"]["rx"]["bytes"]


def go_back_to(run: Path, step: int) -> None:
    """The run as if it had ended right after the checkpoint of `step`."""
    for folder in run.glob("step-*"):
        if int(folder.name.removeprefix("step-")) > step:
            shutil.rmtree(folder)


def test_two_hosts_train_as_one(tiny, torchrun_run, tmp_path):
    """deepspeed over ssh and pdsh from the beginning, torchrun's rendezvous from the middle, without a setting for the network."""
    run, expected = tmp_path / "runs" / "two", logged_losses(torchrun_run[1])
    overrides = [f"data.folder={tiny}/data", f"run.folder={tmp_path}/runs", "run.name=two",
                 f"train.checkpoint.every_steps={NUM_STEPS // 2}"]
    with hosts(2, tmp_path / "hosts") as both:
        run_deepspeed(both, tmp_path / "deepspeed", overrides)
        assert logged_losses(run) == expected
        assert {"rank-00000.safetensors", "rank-00001.safetensors"} <= set(read_manifest(run / f"step-{NUM_STEPS:06d}")["files"])
        crossed = [received_bytes(host) for host in both]
        assert min(crossed) > NUM_STEPS * 22_810 * 4, f"{crossed} bytes: the parameters cannot have gone over the link in every step"
        go_back_to(run, NUM_STEPS // 2)
        assert f"resuming {run}/step-{NUM_STEPS // 2:06d}" in run_torchrun(both, tmp_path / "torchrun", overrides)
    assert logged_losses(run) == expected


@pytest.mark.soak
def test_three_hosts_train_as_one_and_two_go_on(tiny, tmp_path):
    """By every way to start; after the middle on two of them, which sum in another order: equal to seven digits then."""
    overrides = [f"data.folder={tiny}/data", f"run.folder={tmp_path}/runs", "data.loader.global_batch_size=12",
                 f"train.checkpoint.every_steps={NUM_STEPS // 2}"]
    run_pretraining(tmp_path / "one", [*overrides, "run.name=one"], ranks=3, timeout=PATIENCE_S)
    expected = logged_losses(tmp_path / "runs" / "one")
    with hosts(3, tmp_path / "hosts") as three:
        for name, start in {"pdsh": run_deepspeed, "torchrun": run_torchrun, "hand": run_deepspeed_by_hand}.items():
            start(three, tmp_path / name, [*overrides, f"run.name={name}"])
            assert logged_losses(tmp_path / "runs" / name) == expected
        go_back_to(tmp_path / "runs" / "pdsh", NUM_STEPS // 2)
        said = run_deepspeed(three, tmp_path / "left", [*overrides, "run.name=pdsh"], "--include", "host0@host2")
        assert "resuming" in said and "2 rank(s)" in said
        go_back_to(tmp_path / "runs" / "torchrun", NUM_STEPS // 2)
        assert "resuming" in run_torchrun(three[1:], tmp_path / "left-torchrun", [*overrides, "run.name=torchrun"])
    for name in ("pdsh", "torchrun"):
        assert logged_losses(tmp_path / "runs" / name) == pytest.approx(expected, rel=1e-6)


@pytest.mark.soak
@pytest.mark.parametrize(("launcher", "stop"), [("torchrun", ["-TERM", "-f", "bin/torchrun "]),
                                                ("deepspeed", ["-USR1", "-f", "[p]retrain.py --local_rank"])])
def test_a_signal_on_one_host_saves_and_ends_all(tiny, tmp_path, launcher, stop):
    """To torchrun as a scheduler sends it; to a rank under deepspeed, whose launcher passes nothing on. The run saves the step it
    reached, nothing is left running, and it does not look finished."""
    run, folder, many = tmp_path / "runs" / "stopped", tmp_path / "job", 100_000
    folder.mkdir()
    settings = [*TINY, f"data.folder={tiny}/data", f"run.folder={tmp_path}/runs", "run.name=stopped", "run.stopped_exit_code=75",
                f"train.schedule.num_steps={many}", f"train.checkpoint.every_steps={many}"]
    (folder / ".deepspeed_env").write_text("".join(f"{name}={value}\n" for name, value in (EVERYWHERE | {"JOB": str(folder)}).items()))
    with hosts(2, tmp_path / "hosts") as both:
        commands = {"torchrun": ["torchrun", "--nnodes", "2", "--rdzv-backend", "c10d", "--rdzv-endpoint", "host0:29500", "--rdzv-id", "t"],
                    "deepspeed": ["deepspeed", "--hostfile", str(write_hostfile(folder / "hosts", both))]}
        with open(folder / "log", "w") as log:
            started = [host.start([*commands[launcher], SCRIPT, *settings], cwd=folder, env=CLEAN | EVERYWHERE | {"JOB": str(folder)},
                                  stdout=log, stderr=log) for host in both[: 2 if launcher == "torchrun" else 1]]
            deadline = time.monotonic() + PATIENCE_S
            while not (run / "metrics.jsonl").exists() or len((run / "metrics.jsonl").read_text().splitlines()) < 3:
                assert time.monotonic() < deadline and all(p.poll() is None for p in started), (folder / "log").read_text()[-5000:]
                time.sleep(0.1)
            both[1].run(["pkill", *stop])
            codes = [process.wait(PATIENCE_S) for process in started]
        text = (folder / "log").read_text()[-8000:]
        left = processes_with(f"'JOB': '{folder}'")
        assert left == [], f"left running: {describe_processes(left)}\n{text}"
    assert all(codes), f"{codes}: a stopped run looks finished\n{text}"
    assert [verify(step) for step in list_steps(run)] == [None], text
    assert int(list_steps(run)[0].name.removeprefix("step-")) == max(logged_losses(run)), text
