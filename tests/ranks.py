"""Run a function on several real gloo processes and collect what each returns; a rank that fails fails the test with its output."""

import importlib
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def rank_environment(rank: int, world_size: int, port: int) -> dict[str, str]:
    paths = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "integration"), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths), "WANDB_MODE": "disabled"}


def run_ranks(target: str, world_size: int, folder: Path, timeout: float = 180, **arguments: Any) -> list[Any]:
    """Call `module:function(**arguments)` on every rank; returns the JSON-able results in rank order."""
    folder.mkdir(parents=True, exist_ok=True)
    port = free_port()
    processes, logs = [], []
    for rank in range(world_size):
        log = open(folder / f"rank-{rank}.log", "w")  # noqa: SIM115  closed with its process
        logs.append(log)
        command = [sys.executable, __file__, target, str(folder / f"result-{rank}.json"), json.dumps(arguments)]
        processes.append(subprocess.Popen(command, env=rank_environment(rank, world_size, port), stdout=log, stderr=subprocess.STDOUT))
    try:
        codes = [process.wait(timeout) for process in processes]
    finally:
        for process in processes:
            process.kill()
        for log in logs:
            log.close()
    if any(codes):
        tails = "\n".join(f"--- rank {r} exit {c}\n" + (folder / f"rank-{r}.log").read_text()[-3000:] for r, c in enumerate(codes))
        raise AssertionError(f"{target} failed on {world_size} ranks\n{tails}")
    return [json.loads((folder / f"result-{rank}.json").read_text()) for rank in range(world_size)]


def _main() -> None:
    target, result_path, arguments = sys.argv[1:4]
    module, function = target.split(":")
    result = getattr(importlib.import_module(module), function)(**json.loads(arguments))
    Path(result_path).write_text(json.dumps(result))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # gloo's threads may abort during interpreter shutdown after all work is done


if __name__ == "__main__":
    _main()
