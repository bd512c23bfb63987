"""`bench.py checkpoint`: how long training stands still for a checkpoint, written while it waits and written in the background, in turn.

A stack of linear layers is trained under ZeRO-3 with AdamW by processes of their own. "Stall" is the time of the call to save, on the
slowest rank; "steps meanwhile" compares the training steps during the background write with steps without one, on the same cores.
MB/s counts a checkpoint's bytes over all ranks from the copy to the commit (flushed, checksums taken, older checkpoint removed) and is
set against a plain write and fsync of as many bytes by as many processes on the same disk, in the same rounds. "Read" is a load on
another number of ranks with nothing in the page cache: bytes this rank's process fetched from storage, by the kernel's count.
"""

import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from pydantic import Field
from tqdm import tqdm

from gpr_dist.config import Config
from gpr_dist.errors import GPRError

BYTES_PER_PARAMETER = 12


class CheckpointBenchConfig(Config):
    """What is measured."""

    layers: int = Field(default=12, ge=1)
    """linear layers of width x width parameters; 12 of width 2048 are 50 M parameters, a checkpoint of 604 MB"""
    width: int = Field(default=2048, ge=8)
    """of a layer"""
    batch: int = Field(default=32, ge=1)
    """rows of a rank's step, which is to take about as long as a step of training"""
    world_sizes: tuple[int, ...] = (1, 2)
    """processes, one measurement each"""
    read_by: tuple[int, ...] = (1, 2, 4)
    """processes that load each of these checkpoints; empty = none"""
    repetitions: int = Field(default=5, ge=1)
    """rounds; medians count"""
    quiet_steps: int = Field(default=3, ge=1)
    """training steps without a write, before each save"""
    threads: int = Field(default=1, ge=1)
    """of a process"""
    folder: Path | None = None
    """where checkpoints are written, on the disk to be measured; none = the folder for temporary files. Room for 3 of them"""
    out: str | None = None
    """JSON file for the results"""


def run_bench(config: CheckpointBenchConfig) -> None:
    """Measure each world size in processes of its own, print a table."""
    results: dict[str, Any] = {"config": config.model_dump(mode="json"), "save": {}, "read": {}}
    with tempfile.TemporaryDirectory(dir=config.folder) as folder:
        jobs = [(world, reader) for world in config.world_sizes for reader in (0, *config.read_by)]
        for world, reader in tqdm(jobs, desc="jobs", file=sys.stderr, mininterval=0.5):
            run = Path(folder) / str(world)
            if reader:
                results["read"][f"{world} -> {reader}"] = run_processes("read", config, run, reader)
            else:
                results["save"][str(world)] = run_processes("save", config, run, world)[0]
    report(results)
    if config.out:
        Path(config.out).write_text(json.dumps(results, indent=1))


def run_processes(what: str, config: CheckpointBenchConfig, run: Path, world_size: int) -> list[Any]:
    """This file as so many ranks. Returns: what each printed last. Raises: GPRError when one failed."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    settings = {"what": what, "run": str(run), **config.model_dump(mode="json")}
    environment = {**os.environ, "WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
                   "OMP_NUM_THREADS": str(config.threads)}
    processes = [subprocess.Popen([sys.executable, __file__, json.dumps(settings)], stdout=subprocess.PIPE, text=True,
                                  env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in range(world_size)]
    outputs = [process.communicate()[0] for process in processes]
    if any(process.returncode for process in processes):
        raise GPRError(f"a process of the benchmark ended with {[p.returncode for p in processes]}; its message is above")
    return [json.loads(output.splitlines()[-1]) for output in outputs]


def report(results: dict[str, Any]) -> None:
    """The tables."""
    heads = (("stall s", 8), ("of sync", 8), ("write s", 8), ("MB/s", 6), ("of plain", 8), ("steps meanwhile", 16))
    print(f"{'ranks':>5} {'MB':>6} {'written':>13}", *(f"{name:>{width}}" for name, width in heads))
    for world, found in results["save"].items():
        plain = found["plain_mb_s"]
        for mode in ("sync", "background"):
            m = found[mode]
            share = f"{100 * m['stall_s'] / found['sync']['stall_s']:.1f} %"
            steps = f"x {m['step_ratio']:.2f} of {m['step_s']:.2f} s" if mode == "background" else ""
            print(f"{world:>5} {found['mb']:6.0f} {mode:>13} {m['stall_s']:8.3f} {share:>8} {m['write_s']:8.2f} {m['mb_s']:6.0f} "
                  f"{m['mb_s'] / plain:8.2f} {steps:>16}")
        print(f"{world:>5} {found['mb']:6.0f} {'plain + fsync':>13} {'':8} {'':8} {found['mb'] / plain:8.2f} {plain:6.0f}")
    for change, ranks in results["read"].items():
        shares = ", ".join(f"{rank['read_mb']:.0f}" for rank in ranks)
        print(f"read {change:>7} ranks: {shares} MB of {ranks[0]['mb']:.0f}; elements owned {ranks[0]['owned_mb']:.0f} MB a rank; "
              f"{max(rank['seconds'] for rank in ranks):.2f} s")


# ------------------------------------------------------------------------------------------------ a rank's process

def run_rank(what: str, run: str, settings: dict[str, Any]) -> None:
    """Print one line of JSON."""
    import torch

    from gpr_dist.training.engine import Engine, EngineConfig, init_distributed

    config = CheckpointBenchConfig(**settings)
    init_distributed()
    torch.set_num_threads(config.threads)
    torch.manual_seed(0)
    model = torch.nn.Sequential(*[torch.nn.Linear(config.width, config.width, bias=False) for _ in range(config.layers)])
    engine = Engine(model, EngineConfig())
    result = {"save": measure_saves, "read": measure_read}[what](engine, Path(run), config)
    print(json.dumps(result), flush=True)
    engine.barrier()
    os._exit(0)  # gloo's threads may abort during interpreter shutdown after all work is done


def measure_saves(engine: Any, run: Path, config: CheckpointBenchConfig) -> dict[str, Any]:
    """Rounds of: plain write; synchronous save; background save with training going on. The last checkpoint stays."""
    import torch

    from gpr_dist.training.checkpoint import CheckpointConfig
    from gpr_dist.training.saver import Saver

    def slowest(seconds: float) -> float:
        return engine.all_reduce(torch.tensor([seconds], dtype=torch.float64), "max").item()

    def timed(action: Any) -> float:
        engine.barrier()
        started = time.perf_counter()
        action()
        return slowest(time.perf_counter() - started)

    def train() -> None:
        engine.backward(engine(torch.randn(config.batch, config.width)).square().mean() / engine.world_size)
        engine.step(1e-4)

    saver_of = {mode: Saver(engine, run, CheckpointConfig(background=mode == "background", keep_last=1)) for mode in ("sync", "background")}
    mb = BYTES_PER_PARAMETER * config.layers * config.width**2 / 1e6
    names = ("plain", "sync", "sync write", "background", "background write", "quiet", "busy")
    seconds: dict[str, list[float]] = {name: [] for name in names}
    share = os.urandom(1 << 20) * int(mb * 1e6 / engine.world_size / (1 << 20))
    train()
    for round_ in range(config.repetitions):
        seconds["plain"].append(timed(lambda: write_plain(run.with_name(f"plain-{engine.rank}"), share)))
        for number, mode in enumerate(("sync", "background") if round_ % 2 else ("background", "sync")):
            seconds["quiet"] += [timed(train) for _ in range(config.quiet_steps)]
            saver, step = saver_of[mode], 2 * round_ + number + 1
            seconds[mode].append(timed(lambda saver=saver, step=step: saver.save(step, {"fingerprints": {}, "progress": {}})))
            busy = []
            while saver.poll():
                busy.append(timed(train))
            saver.wait()
            seconds["busy"] += busy[:-1] or busy  # the last one ran partly without
            seconds[f"{mode} write"].append(slowest(saver.write_seconds))
            engine.barrier()
    median = {name: statistics.median(values) if values else 0.0 for name, values in seconds.items()}
    return {"mb": mb, "plain_mb_s": mb / median["plain"], "seconds": seconds} | {
        mode: {"stall_s": median[mode], "write_s": median[f"{mode} write"], "mb_s": mb / median[f"{mode} write"], "step_s": median["quiet"],
               "step_ratio": median["busy"] / median["quiet"]} for mode in saver_of}


def write_plain(path: Path, content: bytes) -> None:
    """Write, flush, remove."""
    with open(path, "wb", buffering=0) as file:
        for start in range(0, len(content), 1 << 24):
            file.write(memoryview(content)[start : start + (1 << 24)])
        os.fsync(file.fileno())
    path.unlink()


def measure_read(engine: Any, run: Path, config: CheckpointBenchConfig) -> dict[str, Any]:
    """Load the newest checkpoint as a resumed run does, its files dropped from the page cache before."""
    from gpr_dist.training import checkpoint

    owned = sum(4 * values.numel() for shard in engine.state_shards() for values in shard.tensors.values())
    files = [path for folder in checkpoint.list_steps(run) for path in folder.iterdir()]
    if engine.rank == 0:
        for path in files:
            with open(path, "rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    engine.barrier()
    before, started = storage_bytes(), time.perf_counter()
    assert checkpoint.load_latest(engine, run, {})
    return {"read_mb": (storage_bytes() - before) / 1e6, "owned_mb": owned / 1e6, "mb": sum(path.stat().st_size for path in files) / 1e6,
            "seconds": time.perf_counter() - started}


def storage_bytes() -> int:
    """What this process had fetched from storage so far, read-ahead included."""
    lines = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(lines["read_bytes"])


if __name__ == "__main__":
    arguments = json.loads(sys.argv[1])
    run_rank(arguments.pop("what"), arguments.pop("run"), arguments)
