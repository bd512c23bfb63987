"""What one host of a cluster is like, and what it sees of the others: versions, devices, limits, shared folder, ports. No judgement.

doctor.py starts `meet` on every host at the same time; the shared folder itself is the place where they find each other.
"""

import contextlib
import hashlib
import importlib.metadata
import json
import os
import platform
import resource
import shutil
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from gpr_dist.network import interface_to

PACKAGES = ("torch", "deepspeed", "numpy", "pyarrow", "polars", "safetensors", "pydantic")
ROOT = Path(__file__).resolve().parents[1]


def meet(number: int, names: list[str], folder: str, inputs: list[str], port: int, seconds: float) -> dict[str, Any]:
    """Facts of this host, number `number` of `names`, collected while all others collect theirs.

    Leaves a file in `folder`, waits for the others' files, then connects to the first host's `port` and to a free port of the next host.
    Args: folder: shared and empty; inputs: what every host must see too; port: of the rendezvous, listened on by the first host;
    seconds: patience with the others.
    """
    facts = describe(names[0], inputs)
    problems: dict[str, str] = {}
    with contextlib.ExitStack() as stack:
        ports = {"any": stack.enter_context(_listen(0)).getsockname()[1]}
        if number == 0:
            try:
                ports["rendezvous"] = stack.enter_context(_listen(port)).getsockname()[1]
            except OSError as error:
                problems["port"] = f"port {port} is taken: {error.strerror}"
        facts["time"] = time.time()
        try:
            _leave(Path(folder) / f"{number}.here", ports)
        except OSError as error:
            problems["write"] = f"{error.strerror}: {folder}"
        seen = _wait_for(folder, "here", len(names), seconds)
        missing = [name for other, name in enumerate(names) if other not in seen]
        if missing:
            problems["shared"] = f"nothing from {', '.join(missing)} within {seconds:g} s"
        target = (number + 1) % len(names)
        for other, kind in ((0, "rendezvous"), (target, "any")):
            if other != number and kind in seen.get(other, {}) and (problem := _cannot_reach(names[other], seen[other][kind])):
                problems[f"reach_{kind}"] = problem
        with contextlib.suppress(OSError):
            _leave(Path(folder) / f"{number}.done", {})
        _wait_for(folder, "done", len(names) - len(missing), seconds)  # keep the ports open until nobody needs them
    return facts | {"problems": problems}


def describe(first: str, inputs: list[str]) -> dict[str, Any]:
    """Versions, devices, limits and free memory of this host. Args: first: a name or address the ranks will meet at."""
    cuda = torch.cuda.is_available()
    return {
        "hostname": socket.gethostname(),
        "versions": {"python": platform.python_version(), "this code": code_fingerprint(),
                     **{name: _version(name) for name in PACKAGES}, "CUDA": torch.version.cuda or "none",
                     "NCCL": ".".join(map(str, torch.cuda.nccl.version())) if cuda else "none"},
        "devices": [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())] if cuda else [],
        "cores": len(os.sched_getaffinity(0)),
        "interface": interface_to(first),
        "open_files": resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        "shm_bytes": shutil.disk_usage("/dev/shm").free if Path("/dev/shm").is_dir() else 0,
        "missing_inputs": [path for path in inputs if not Path(path).exists()]}


def code_fingerprint() -> str:
    """Of this package's source, 12 hexadecimal digits: hosts that run other code than the first disagree in the middle of a step."""
    digest = hashlib.sha256()
    for path in sorted((ROOT / "gpr_dist").rglob("*.py")):
        digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "missing"


@contextlib.contextmanager
def _listen(port: int) -> Iterator[socket.socket]:
    with socket.create_server(("", port), backlog=1024) as server:
        yield server


def _leave(path: Path, content: Any) -> None:
    """As a checkpoint is committed: written aside, flushed to the disk, renamed; then the folder is."""
    temporary = path.with_suffix(".tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        json.dump(content, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _wait_for(folder: str, kind: str, count: int, seconds: float) -> dict[int, Any]:
    """Files of a kind that show within the time, by host number; listing the folder makes NFS look again."""
    deadline, seen = time.monotonic() + seconds, {}
    while True:
        with contextlib.suppress(OSError):
            seen = {int(path.stem): json.loads(path.read_text()) for path in Path(folder).glob(f"*.{kind}")}
        if len(seen) >= count or time.monotonic() > deadline:
            return seen
        time.sleep(0.05)


def _cannot_reach(name: str, port: int) -> str | None:
    try:
        socket.create_connection((name, port), timeout=5).close()
    except OSError as error:
        return f"{name}:{port}: {error.strerror or error}"
    return None
