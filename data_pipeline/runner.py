"""One function over many arguments: in this process, in processes of this machine, or as tasks of a Ray cluster.

Owns where the work runs, how much of it at a time, and what becomes of a worker that dies. Leaves to the caller (build.py) what a piece
of work is; it must not matter in which order, where, or how often a piece is begun, only that it ends once.
"""

import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from itertools import islice
from typing import Any, Literal, TypeVar

from gpr_dist.errors import ConfigError, DataError, GPRError

T = TypeVar("T")
Run = Callable[[Callable[..., T], list[tuple]], Iterator[T]]
"""run(work, arguments): work(*a) of every a, in the order in which they end; the first exception stops the rest and is raised as it was"""
RunnerKind = Literal["local", "ray"]
_RETRIES = 5  # of a task whose Ray worker or node died
_PROGRAM_BYTES = 300 << 20  # memory of a worker beside its data
_RESUME = "start again, finished pieces are kept; if memory was short, lower memory_limit_bytes or num_workers"


@contextmanager
def open_runner(kind: RunnerKind, num_workers: int, memory_limit_bytes: int) -> Iterator[Run]:
    """Workers for several rounds of work. A failure or Ctrl-C drops what has not begun.

    Ray: the cluster of RAY_ADDRESS, else the one running on this machine, else one of `num_workers` CPUs started for the time being.
    Its nodes must have this package and see the same folders under the same paths; at most `num_workers` pieces run at a time, each
    with one CPU and its memory reserved; a piece whose worker or node dies is begun again elsewhere.
    Raises: ConfigError without Ray; DataError when workers die (local) or keep dying (Ray).
    """
    if kind == "ray":
        with _ray_tasks(num_workers, memory_limit_bytes + _PROGRAM_BYTES) as run:
            yield run
    elif num_workers == 1:
        yield lambda work, arguments: (work(*a) for a in arguments)
    else:
        with _processes(num_workers) as run:
            yield run


@contextmanager
def _processes(num_workers: int) -> Iterator[Run]:
    def run(work: Callable[..., T], arguments: list[tuple]) -> Iterator[T]:
        try:
            for done in as_completed([pool.submit(work, *a) for a in arguments]):
                yield done.result()
        except BrokenProcessPool:
            raise DataError(f"a worker process was killed, perhaps because memory was short; {_RESUME}") from None

    context = multiprocessing.get_context("spawn")  # fork would copy locks held by the threads of pyarrow and polars
    with ProcessPoolExecutor(num_workers, mp_context=context) as pool:
        try:
            yield run
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


@contextmanager
def _ray_tasks(num_workers: int, memory_bytes: int) -> Iterator[Run]:
    try:
        import ray
    except ImportError:
        raise ConfigError("runner=ray needs Ray: pip install 'gpr-dist[ray]', or set runner=local") from None
    ours = not ray.is_initialized()
    if ours:
        _connect(ray, num_workers)
    task = ray.remote(num_cpus=1, memory=memory_bytes, max_retries=_RETRIES)(_in_folder)
    running: list[Any] = []

    def run(work: Callable[..., T], arguments: list[tuple]) -> Iterator[T]:
        left, named = iter(arguments), task.options(name=work.__name__)
        while True:
            running.extend(named.remote(os.getcwd(), work, *a) for a in islice(left, num_workers - len(running)))
            if not running:
                return
            [done], running[:] = ray.wait(running)
            try:
                yield ray.get(done)
            except ray.exceptions.RayTaskError as error:
                raise (error.cause if isinstance(error.cause, GPRError) else error) from None
            except ray.exceptions.RayError as error:
                problem = " ".join(str(error).split())
                raise DataError(f"Ray gave a piece of work up after {_RETRIES + 1} attempts: {problem}; {_RESUME}") from None

    try:
        yield run
    finally:
        for piece in running:
            ray.cancel(piece, force=True)
        if ours:
            ray.shutdown()


def _connect(ray: Any, num_workers: int) -> None:
    address = os.environ.get("RAY_ADDRESS")
    try:
        ray.init(address=address or "auto")
        where = address or "the one on this machine"
    except (ConnectionError, RuntimeError, ValueError) as error:
        if address:
            problem = str(error).partition("\n")[0]
            raise ConfigError(f"no Ray cluster answers at RAY_ADDRESS={address} ({problem}); start it, or unset RAY_ADDRESS") from None
        if not isinstance(error, ConnectionError):
            raise
        ray.init(address="local", num_cpus=num_workers, include_dashboard=False, object_store_memory=100 << 20)  # data goes through files
        where = "none found, so one was started on this machine for this build"
    print(f"Ray cluster: {where}; {len(ray.nodes())} nodes, {ray.cluster_resources().get('CPU', 0):g} CPUs")


def _in_folder(folder: str, work: Callable[..., T], *arguments: Any) -> T:
    """In a Ray worker: paths of a config may be relative to the folder of the command."""
    try:
        os.chdir(folder)
    except OSError as error:
        raise DataError(f"{folder} is not there on Ray node {os.uname().nodename} ({error.strerror}); all nodes must share it") from None
    return work(*arguments)
