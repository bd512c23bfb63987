"""A rank that cannot go on leaves, so that whoever started the job can start it again: `no_orphans` ends it with its launcher,
`watch_progress` when nothing has finished for too long.

Both act from threads of their own, because the main thread may sit in a collective for ever. What restarts a job is not here: torchrun
(--max-restarts), the scheduler, or a shell loop.
"""

import contextlib
import ctypes
import faulthandler
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

EXIT_CODE = 75
"""of a rank that leaves by itself: EX_TEMPFAIL of sysexits.h, "try again"; bad input ends with 2, and trying again is useless"""
PATIENCE_S = 10.0
"""longest time between a rank's stacks and its leaving: the others' clocks run out up to a micro-batch later, and their stacks count too"""
COLLECTIVE_MARGIN_S = 60.0
"""collectives give up this much later than the watchdog, who has more to say"""
RUNNERS = ("torchrun", "torch.distributed.run", "torch.distributed.launch", "deepspeed", "deepspeed.launcher.runner")
BETWEEN = "deepspeed.launcher.launch"
"""what deepspeed puts between itself, or another host's ssh server, and the ranks"""
MARKS = ("TORCHELASTIC_RUN_ID", "CROSS_SIZE")
"""what torchrun and deepspeed leave in the environment of ranks"""
_PR_SET_PDEATHSIG = 1


@contextlib.contextmanager
def watch_progress(limit_s: float, stacks: Path, last_progress: Callable[[], float]) -> Iterator[None]:
    """While open: when nothing has finished for `limit_s`, write every thread's Python stack to `stacks` and end this process.

    Args: limit_s: seconds; 0 = never; last_progress: when something last finished, by time.monotonic.
    """
    if not limit_s:
        yield
        return
    closed, opened, patience = threading.Event(), time.monotonic(), min(PATIENCE_S, limit_s / 2)

    def watch() -> None:
        dumped = False
        while not closed.wait(min(1.0, limit_s / 10)):
            # Python's own timer needs no GIL: it ends us when this thread cannot, because of an extension or a dead disk.
            faulthandler.dump_traceback_later(limit_s + 2 * patience, exit=True, file=sys.__stderr__)
            idle = time.monotonic() - max(opened, last_progress())
            if idle < limit_s:
                dumped = False
            elif not dumped:
                dumped = True
                _write_stacks(stacks, idle)
            elif idle > limit_s + patience:
                os._exit(EXIT_CODE)
        faulthandler.cancel_dump_traceback_later()

    thread = threading.Thread(target=watch, name="watchdog", daemon=True)
    thread.start()
    try:
        yield
    finally:
        closed.set()
        thread.join()


def _write_stacks(path: Path, idle: float) -> None:
    rank = os.environ.get("RANK", "0")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "w") as file:
            faulthandler.dump_traceback(file, all_threads=True)
        where = f"stacks in {path}"
    except OSError as error:
        faulthandler.dump_traceback(sys.__stderr__, all_threads=True)
        where = f"stacks above ({path}: {error.strerror})"
    print(f"\nTrainingError: rank {rank}: nothing has finished for {idle:.0f} s (engine.timeout_seconds); {where}; leaving with exit code "
          f"{EXIT_CODE}, start again to resume", file=sys.stderr, flush=True)


def no_orphans() -> None:
    """From now on this process ends when the launcher that started it does, or any process between them; at once if it is gone already.

    A launcher is torchrun or deepspeed, on another host deepspeed's part of it and the ssh connection it came by. Without one, as under
    srun, mpirun or in a shell, nothing happens. Linux only: elsewhere nothing happens either.
    """
    if not sys.platform.startswith("linux"):
        return
    launchers = find_launchers()
    if not launchers:
        if any(name in os.environ for name in MARKS):
            _leave("the launcher")
        return
    # The kernel's signal reaches this process even stopped or stuck; it tells of the parent's end only.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    watched = select.poll()
    names = {}
    for pid, name in launchers:
        try:
            descriptor = os.pidfd_open(pid)
        except ProcessLookupError:
            _leave(name)
        names[descriptor] = name
        watched.register(descriptor, select.POLLIN)
    if os.getppid() != launchers[0][0]:  # it ended before the signal was ordered
        _leave(launchers[0][1])
    threading.Thread(target=lambda: _leave(names[watched.poll()[0][0]]), name="launcher", daemon=True).start()


def find_launchers() -> list[tuple[int, str]]:
    """(process id, name) of the ancestors up to the launcher, nearest first; empty without one."""
    chain: list[tuple[int, str]] = []
    num_watched, pid = 0, os.getppid()
    while pid > 0:
        try:
            words = Path(f"/proc/{pid}/cmdline").read_text(errors="replace").split("\0")[:4]
            parent = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        except OSError:  # it has just ended, or belongs to a part of the machine that we may not see
            break
        names = [os.path.basename(word) for word in words]
        runner = next((name for name in names if name in RUNNERS), None)
        connection = words[0].startswith("sshd") and any(name == BETWEEN for _, name in chain)
        chain.append((pid, runner or (BETWEEN if BETWEEN in names else names[0])))
        if runner or connection or BETWEEN in names:
            num_watched = len(chain)
        if runner or connection:
            break
        pid = parent
    if not num_watched and chain and chain[0][1].startswith("python") and any(name in os.environ for name in MARKS):
        num_watched = 1  # a launcher of the user's own, built on torchrun's parts
    return chain[:num_watched]


def _leave(name: str) -> None:
    with contextlib.suppress(OSError):  # the terminal may have gone with it
        print(f"\nTrainingError: rank {os.environ.get('RANK', '0')}: {name} has ended, and this rank with it", file=sys.stderr, flush=True)
    os._exit(EXIT_CODE)
