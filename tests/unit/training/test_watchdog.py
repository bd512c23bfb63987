"""Ranks that hang or lose their launcher leave; real processes, but without torch: what the watchdog imports is Python's own."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from documents import ROOT

from gpr_dist.training.watchdog import EXIT_CODE

RANK = """
import os, sys, time
from pathlib import Path
from gpr_dist.training.watchdog import no_orphans
no_orphans()
Path(sys.argv[1]).write_text(str(os.getpid()))
time.sleep(60)
"""
HANGING = """
import ctypes, sys, time
from pathlib import Path
from gpr_dist.training.watchdog import watch_progress
last = [0.0]
def wait_for_a_rank_that_never_comes():
    if sys.argv[2] == "gil":
        ctypes.PyDLL(None).sleep(60)
    time.sleep(60)
with watch_progress(float(sys.argv[3]), Path(sys.argv[1]), lambda: last[0]):
    for _ in range(8):
        time.sleep(0.2)
        last[0] = time.monotonic()
    print("busy for longer than the limit", flush=True)
    if sys.argv[2] == "finishes":
        sys.exit(0)
    wait_for_a_rank_that_never_comes()
"""


def environment(tmp_path: Path, **more: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}", **more}


def hang(tmp_path: Path, how: str, limit: str = "1.2") -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", HANGING, str(tmp_path / "run" / "stacks" / "rank-00003.txt"), how, limit]
    return subprocess.run(command, capture_output=True, text=True, timeout=30, env=environment(tmp_path, RANK="3"))


def test_a_hang_leaves_stacks_a_line_and_an_exit_code(tmp_path):
    done = hang(tmp_path, "hangs")
    stacks = tmp_path / "run" / "stacks" / "rank-00003.txt"
    assert done.returncode == EXIT_CODE and "busy" in done.stdout
    [line] = done.stderr.strip().splitlines()
    assert line.startswith("TrainingError: rank 3: nothing has finished for") and str(stacks) in line
    assert "in wait_for_a_rank_that_never_comes" in stacks.read_text()


def test_a_hang_that_holds_the_interpreter_ends_too(tmp_path):
    done = hang(tmp_path, "gil")
    assert done.returncode == 1 and "Timeout" in done.stderr and "in wait_for_a_rank_that_never_comes" in done.stderr


def test_where_no_stacks_can_be_written_they_go_to_stderr(tmp_path):
    (tmp_path / "run").write_text("not a folder")
    done = hang(tmp_path, "hangs")
    assert done.returncode == EXIT_CODE and "in wait_for_a_rank_that_never_comes" in done.stderr and "Not a directory" in done.stderr


@pytest.mark.parametrize("limit", ["1.2", "0"])
def test_a_run_that_finishes_in_time_notices_nothing(tmp_path, limit):
    done = hang(tmp_path, "finishes", limit)
    assert done.returncode == 0 and not done.stderr and not (tmp_path / "run").exists()


@pytest.fixture
def start(tmp_path):
    """Starts a rank below processes of these names, outermost first, and returns (the outermost process, pid of the rank)."""
    started: list[subprocess.Popen] = []
    ranks: list[int] = []

    def run(*names: str, **more: str) -> tuple[subprocess.Popen, int]:
        command = [word for name in names for word in STARTED_AS[name](tmp_path)]
        note = tmp_path / f"pid-{len(ranks)}"
        started.append(subprocess.Popen([*command, sys.executable, "-c", RANK, str(note)], env=environment(tmp_path, **more),
                                        stderr=subprocess.DEVNULL))
        wait_until(lambda: note.exists() and note.read_text())
        ranks.append(int(note.read_text()))
        return started[-1], ranks[-1]

    yield run
    for process in started:
        process.kill()
        process.wait()
    for pid in filter(is_alive, ranks):
        os.kill(pid, signal.SIGKILL)


def script(name: str):
    """A process with this word in its command line that starts what follows and waits for it."""
    def words(folder: Path) -> list[str]:
        (folder / name).write_text("import subprocess, sys; subprocess.run(sys.argv[1:])")
        return [sys.executable, str(folder / name)]
    return words


STARTED_AS = {**{name: script(name) for name in ("torchrun", "deepspeed", "deepspeed.launcher.launch")},
              "shell": lambda _: ["bash", "-c", '"$@"; true', "shell"],
              "sshd": lambda _: ["bash", "-c", """exec -a "sshd: somebody@notty" bash -c '"$@"; true' "$@" """, "x", "x"]}


def wait_until(condition) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


CHAINS = [("torchrun",), ("torchrun", "shell"), ("deepspeed", "deepspeed.launcher.launch"), ("deepspeed.launcher.launch",),
          ("sshd", "shell", "deepspeed.launcher.launch"), ("sshd", "deepspeed.launcher.launch", "shell")]


@pytest.mark.parametrize("names", CHAINS, ids=" > ".join)
def test_a_rank_leaves_when_what_started_it_is_killed(start, names):
    outermost, rank = start(*names)
    assert is_alive(rank)
    outermost.kill()  # and not reaped: a zombie has ended too
    wait_until(lambda: not is_alive(rank))


def test_a_stopped_rank_goes_with_its_launcher(start):
    outermost, rank = start("torchrun")
    os.kill(rank, signal.SIGSTOP)
    outermost.kill()
    wait_until(lambda: not is_alive(rank))


@pytest.mark.parametrize("names", [("shell",), ("sshd", "shell"), ("sshd", "shell", "torchrun")], ids=" > ".join)
def test_a_rank_outlives_shells_and_the_connection_it_was_typed_into(start, names):
    outermost, rank = start(*names)
    outermost.kill()
    outermost.wait()
    time.sleep(0.5)
    assert is_alive(rank)


@pytest.mark.parametrize("mark", ["TORCHELASTIC_RUN_ID", "CROSS_SIZE"])
def test_a_rank_whose_launcher_ended_while_it_was_starting_leaves_at_once(tmp_path, mark):
    """Started by a shell that is no launcher, with what launchers leave in the environment."""
    done = subprocess.run([*STARTED_AS["shell"](tmp_path), sys.executable, "-c", RANK, str(tmp_path / "pid")], capture_output=True,
                          text=True, timeout=20, env=environment(tmp_path, **{mark: "1"}))
    assert "TrainingError: rank" in done.stderr and not (tmp_path / "pid").exists()
