"""One training run that is disturbed again and again: `python tests/soak/soak.py FOLDER --faults 100 --seconds 1500 --seed 1`.

FOLDER/data is the tiny data set. The run is started, hurt by a random fault, and started again until it has had its faults; then it may
finish. The first third of the lives have two ranks, then one, two or three. An uninterrupted run on two ranks says what should have come
out. Writes FOLDER/soak.json and prints its table.
"""

import argparse
import collections
import contextlib
import json
import os
import random
import resource
import shutil
import signal
import statistics
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "integration")]

import recorded_rank  # noqa: E402
from life import Life  # noqa: E402
from pretrain_runs import TINY, logged_losses  # noqa: E402

from gpr_dist.training import checkpoint  # noqa: E402
from gpr_dist.training.watchdog import EXIT_CODE  # noqa: E402

HANG_S = 20
EARLY, HANGS, STOPPED = "killed before its first step", "one rank hangs", "one rank stopped for a second"
TRUNCATED, ALTERED = "newest checkpoint truncated", "newest checkpoint altered"
KINDS = {  # how often, of a hundred; what should happen
    "one rank killed": (21, "the others lose the connection and leave, not with 0"),
    "all ranks killed at once": (12, "the newest complete checkpoint goes on"),
    "one rank killed while saving": (14, "an unfinished checkpoint is passed over"),
    EARLY: (6, "as if it had not been started"),
    "SIGTERM to all ranks": (6, "saved at the next step, exit code 0"),
    "SIGUSR1 to one rank": (4, "all saved at the next step, exit code 0"),
    "disk full for one rank": (8, "one line, exit code 2; the checkpoints before are intact"),
    HANGS: (3, f"the others write their stacks after {HANG_S} s and leave with {EXIT_CODE}"),
    TRUNCATED: (6, "named and passed over; the one before it goes on"),
    ALTERED: (4, "its checksum tells; the one before it goes on"),
    STOPPED: (10, "the others wait for it"),
    "torchrun killed": (4, "its ranks leave with it"),
    "deepspeed killed": (2, "its launch.py and ranks leave with it")}
SHORT = [["one rank killed"], [STOPPED, "all ranks killed at once"], ["one rank killed while saving"], ["disk full for one rank"], [EARLY],
         [TRUNCATED], [HANGS], ["SIGTERM to all ranks"]]
"""faults of the form that is part of every test run; killed launchers are in tests/integration/test_faults.py"""
LAUNCHERS = {"torchrun killed": "torchrun", "deepspeed killed": "deepspeed"}


@dataclass
class Fault:
    """One disturbance, and what it cost."""

    kind: str
    life: int
    ranks: int
    ranks_after: int = 0
    end_s: float = 0.0  # until the last process of the life had gone; 0 where it lives on
    recover_s: float = 0.0  # until a step was finished again
    steps_again: int = 0  # finished before the fault, and trained again from the checkpoint
    rows_lost: int = 0
    rows_repeated: int = 0


def draw_faults(number: int, chance: random.Random) -> list[list[str]]:
    """The faults of each life: `number` kinds in all, in random order and about as often as KINDS says; a life has one that ends it."""
    shares = {kind: number * often / 100 for kind, (often, _) in KINDS.items()}
    drawn = [kind for kind, share in shares.items() for _ in range(int(share))]
    drawn += sorted(shares, key=lambda kind: int(shares[kind]) - shares[kind])[: number - len(drawn)]
    lives = [[kind] for kind in drawn if kind != STOPPED]
    chance.shuffle(lives)
    for life in chance.sample([life for life in lives if life[0] not in LAUNCHERS and life[0] != EARLY], drawn.count(STOPPED)):
        life.insert(0, STOPPED)
    return lives


class Soak:
    """The run, its lives so far, and its faults."""

    def __init__(self, folder: Path, num_steps: int, seed: int) -> None:
        self.folder, self.chance, self.run = folder, random.Random(seed), folder / "runs" / "soak"
        self.overrides = [*TINY, "data.loader.global_batch_size=12", f"engine.timeout_seconds={HANG_S}", f"data.folder={folder}/data",
                          f"run.folder={folder}/runs", f"train.schedule.num_steps={num_steps}", "train.checkpoint.keep_last=3"]
        self.lives: list[Life] = []
        self.faults: list[Fault] = []
        self.start_s = 2.0  # of the latest life, until its first step

    def begin(self, launcher: str, ranks: int) -> Life:
        number = len(self.lives)
        life = Life(number, ranks, launcher, self.folder / "lives" / f"{number:04d}")
        self.lives.append(life)
        return life.start([*self.overrides, "run.name=soak", "train.checkpoint.every_steps=2"])

    def uninterrupted(self) -> Life:
        """The same run on two ranks, left alone."""
        life = Life(-1, 2, "fork", self.folder / "lives" / "whole")
        life.start([*self.overrides, "run.name=whole", "train.checkpoint.every_steps=1000000"])
        self.wait_for_success(life)
        return life

    def wait_for_success(self, life: Life) -> None:
        life.wait_for(lambda: not life.living(), "end", alive=False)
        assert set(life.codes.values()) == {0}, life.describe()

    def endure(self, lives: list[list[str]], seconds: float) -> None:
        """Live through the faults, in order and as far as the time allows, then to the end."""
        deadline, recovering = time.monotonic() + seconds, []
        for number, kinds in enumerate(lives):
            if time.monotonic() > deadline:
                break
            changing = number >= len(lives) // 3
            sizes = [2] if not changing else [2, 3] if HANGS in kinds else [1, 2, 3]
            life = self.begin(LAUNCHERS.get(kinds[-1], "fork"), self.chance.choice(sizes))
            if kinds == [EARLY]:
                time.sleep(self.chance.uniform(0, self.start_s))
            else:
                self.see_first_step(life, recovering)
                recovering = []
            for kind in kinds:
                before, at = len(life.finished()), time.monotonic()
                fault = Fault(kind, life.number, life.ranks)
                self.faults.append(fault)
                if kind == STOPPED:
                    self.stop_for_a_second(life, fault)
                else:
                    self.hurt(life, fault)
                    recovering.append((fault, at))
                print(f"{len(self.faults)} faults, step {self.newest_step()}: {kind}, {life.launcher} {life.ranks}, {before} steps, "
                      f"all gone in {fault.end_s:.1f} s", flush=True)
        life = self.begin("fork", 2)
        self.see_first_step(life, recovering)
        self.wait_for_success(life)

    def see_first_step(self, life: Life, recovering: list[tuple[Fault, float]]) -> None:
        """Wait for it, and note what it means for the faults before."""
        self.start_s = life.wait_for(life.finished, "first step")
        now, done = time.monotonic(), [step for earlier in self.lives[: life.number] for step in earlier.finished()]
        first, reached = life.finished()[0], max((place(step) for step in done), default=(0, -1))
        again = sum(place(first) <= at <= reached for at in {place(step) for step in done})
        for fault, at in recovering:
            fault.recover_s, fault.ranks_after, fault.steps_again = now - at, life.ranks, again

    def stop_for_a_second(self, life: Life, fault: Fault) -> None:
        before, at, pid = len(life.finished()), time.monotonic(), self.chance.choice(life.living())
        os.kill(pid, signal.SIGSTOP)
        time.sleep(1)
        os.kill(pid, signal.SIGCONT)
        life.wait_for(lambda: len(life.finished()) > before + 1, "step after a stop")
        fault.recover_s, fault.ranks_after = time.monotonic() - at, life.ranks

    def hurt(self, life: Life, fault: Fault) -> None:
        """Do it, and wait until nothing of the life is left."""
        if fault.kind != EARLY:
            wanted = self.chance.randint(1, 4)
            life.wait_for(lambda: len(life.finished()) >= wanted, f"{wanted} steps")
        time.sleep(self.chance.uniform(0, 0.3))
        kind, pids = fault.kind, life.living()
        victim = self.chance.choice(pids)
        at = time.monotonic()
        expected: set[int] | None = None  # exit codes of the ranks that were left alone
        if kind == "one rank killed while saving":
            life.wait_for(self.saving, "save", pause=0.001)
            os.kill(victim, signal.SIGKILL)
        elif kind == "one rank killed":
            os.kill(victim, signal.SIGKILL)
        elif kind in ("all ranks killed at once", EARLY, TRUNCATED, ALTERED):
            for pid in pids:
                os.kill(pid, signal.SIGKILL)
        elif kind in LAUNCHERS:
            life.process.kill()
        elif kind == "SIGTERM to all ranks":
            expected = {0}
            for pid in pids:
                os.kill(pid, signal.SIGTERM)
        elif kind == "SIGUSR1 to one rank":
            expected = {0}
            os.kill(victim, signal.SIGUSR1)
        elif kind == "disk full for one rank":
            resource.prlimit(victim, resource.RLIMIT_FSIZE, (50_000, resource.RLIM_INFINITY))
        elif kind == HANGS:
            os.kill(victim, signal.SIGSTOP)
            life.wait_for(lambda: life.living() == [victim], "ranks that leave", alive=False)
            os.kill(victim, signal.SIGKILL)  # as their launcher would
            self.check_stacks(life, life.pids.index(victim))
        else:
            raise AssertionError(kind)
        life.wait_for(lambda: not life.living(), "end", alive=False)
        fault.end_s = time.monotonic() - at
        if expected:
            assert set(life.codes.values()) == expected, life.describe()
        elif life.launcher == "fork":
            assert 0 not in life.codes.values(), f"exit codes {life.codes}\n{life.describe()}"
        if kind in (TRUNCATED, ALTERED) and not self.damage(kind):
            fault.kind = "all ranks killed at once"  # there was none yet

    def check_stacks(self, life: Life, hung: int) -> None:
        written = {int(path.stem.removeprefix("rank-")): path.read_text() for path in (self.run / "stacks").glob("*.txt")}
        assert set(written) == set(range(life.ranks)) - {hung}, f"stacks of ranks {sorted(written)}\n{life.describe()}"
        assert all("train_step" in text or "fit" in text for text in written.values()), written
        shutil.rmtree(self.run / "stacks")

    def saving(self) -> bool:
        return any(not (folder / "manifest.json").exists() for folder in checkpoint.list_steps(self.run)[-1:])

    def damage(self, kind: str) -> bool:
        """A random file of the newest complete checkpoint; whether there is one."""
        complete = [folder for folder in checkpoint.list_steps(self.run) if checkpoint.verify(folder) is None]
        if not complete:
            return False
        victim = self.chance.choice(sorted(path for path in complete[-1].iterdir() if path.is_file()))
        content = bytearray(victim.read_bytes())
        place = self.chance.randrange(len(content))
        if kind == TRUNCATED:
            del content[place:]
        else:
            content[place] ^= 1
        victim.write_bytes(content)
        return True

    def newest_step(self) -> int:
        steps = checkpoint.list_steps(self.run)
        return int(steps[-1].name.removeprefix("step-")) if steps else 0


def place(step: dict) -> tuple[int, int]:
    return step["epoch"], step["step"]


def compare(soak: Soak, whole: Life) -> dict:
    """What came out beside what should have: rows of every step, losses. Fills the faults' rows; returns the differences."""
    wanted = {place(step): collections.Counter(step["rows"]) for step in whole.finished()}
    trained = {}  # by step: the life whose result stayed, the last one that finished it, and its rows
    for life in soak.lives:
        for step in life.finished():
            trained[place(step)] = life, collections.Counter(step["rows"])
    assert trained.keys() == wanted.keys(), f"steps {sorted(trained.keys() ^ wanted.keys())} were finished by one of the runs only"
    for at, (life, rows) in trained.items():
        lost, repeated = wanted[at] - rows, rows - wanted[at]
        guilty = [fault for fault in soak.faults if fault.life < life.number] or soak.faults
        guilty[-1].rows_lost += lost.total()
        guilty[-1].rows_repeated += repeated.total()
    epochs = collections.defaultdict(collections.Counter)
    for (epoch, _), (_, rows) in trained.items():
        epochs[epoch] += rows
    num_rows = len(epochs[0])
    full = [epoch for epoch in epochs if epoch + 1 in epochs]
    reference, losses = logged_losses(soak.folder / "runs" / "whole"), logged_losses(soak.run)
    order = sorted(wanted)
    steady = next((number for number, at in enumerate(order) if trained[at][0].ranks != 2), len(order))
    assert losses.keys() == reference.keys() == set(range(1, len(order) + 1))
    return {"steps": len(order), "steps_before_the_ranks_changed": steady, "rows_per_epoch": num_rows, "full_epochs": len(full),
            "rows_lost": sum(fault.rows_lost for fault in soak.faults), "rows_repeated": sum(fault.rows_repeated for fault in soak.faults),
            "epochs_with_each_row_once": sum(set(epochs[epoch].values()) == {1} and len(epochs[epoch]) == num_rows for epoch in full),
            "steps_with_another_loss_before_the_ranks_changed": sum(losses[n] != reference[n] for n in range(1, steady + 1)),
            "largest_difference_of_a_loss": max(abs(losses[n] - reference[n]) for n in losses)}


def table(faults: list[Fault]) -> str:
    """Markdown: kind of fault, what happened, rows, and seconds as median (largest)."""
    lines = ["| fault | times | what happened | rows lost / repeated | steps trained again | all gone after, s | next step after, s |",
             "|---|---|---|---|---|---|---|"]

    def spread(values: list[float]) -> str:
        return f"{statistics.median(values):.1f} ({max(values):.1f})"

    for kind, (_, happened) in KINDS.items():
        if of_kind := [fault for fault in faults if fault.kind == kind]:
            rows = f"{sum(f.rows_lost for f in of_kind)} / {sum(f.rows_repeated for f in of_kind)}"
            lines.append(f"| {kind} | {len(of_kind)} | {happened} | {rows} | {spread([f.steps_again for f in of_kind])} | "
                         f"{spread([f.end_s for f in of_kind])} | {spread([f.recover_s for f in of_kind])} |")
    return "\n".join(lines)


def soak(folder: Path, num_faults: int, seconds: float, seed: int) -> dict:
    """The whole of it; no faults = the short form. Returns: the report, also written to soak.json."""
    started = time.monotonic()
    recorded_rank.import_everything()
    this = Soak(folder, num_steps=3 * num_faults or 30, seed=seed)
    try:
        whole = this.uninterrupted()
        this.endure(draw_faults(num_faults, this.chance) if num_faults else SHORT, seconds)
        report = compare(this, whole)
    finally:
        for life in this.lives:
            with contextlib.suppress(ProcessLookupError):
                life.kill()
    report |= {"seed": seed, "seconds": time.monotonic() - started, "faults": [asdict(fault) for fault in this.faults]}
    (folder / "soak.json").write_text(json.dumps(report, indent=1))
    print(table(this.faults), flush=True)
    return report


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--faults", type=int, default=100, help="0 = the short form")
    parser.add_argument("--seconds", type=float, default=1500)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    soak(arguments.folder.resolve(), arguments.faults, arguments.seconds, arguments.seed)
