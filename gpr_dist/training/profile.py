"""A window of steps under torch.profiler: what the time and the memory of a step go into, by operator, and a trace to look at."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from pydantic import Field

from gpr_dist.config import Config

MAX_LINES = 40


class ProfileConfig(Config):
    """Which steps are recorded; off by default, and then free."""

    start_step: int | None = Field(None, ge=2)
    """first step recorded (the one before it only warms up); none = off"""
    num_steps: int = Field(3, ge=1)
    """steps recorded"""
    ranks: tuple[int, ...] = (0,)
    """ranks that record"""


@contextlib.contextmanager
def profiled(config: ProfileConfig, run: Path, rank: int, done: int) -> Iterator[Callable[[], None]]:
    """Yields what to call after every step. Writes runs/<name>/profile/: a Chrome trace (chrome://tracing, ui.perfetto.dev) and a table.

    Args: done: steps before the first call; a window that began earlier is not recorded.
    """
    if config.start_step is None or rank not in config.ranks or done + 1 >= config.start_step:
        yield lambda: None
        return

    activities = [torch.profiler.ProfilerActivity.CPU]
    activities += [torch.profiler.ProfilerActivity.CUDA] if torch.cuda.is_available() else []
    schedule = torch.profiler.schedule(skip_first=config.start_step - done - 2, wait=0, warmup=1, active=config.num_steps, repeat=1)

    def write(profile: torch.profiler.profile) -> None:
        name = f"steps-{config.start_step:06d}-{config.start_step + config.num_steps - 1:06d}-rank-{rank:05d}"
        folder = run / "profile"
        folder.mkdir(exist_ok=True)
        profile.export_chrome_trace(str(folder / f"{name}.json.gz"))
        (folder / f"{name}.txt").write_text(operator_tables(profile))

    with torch.profiler.profile(activities=activities, schedule=schedule, on_trace_ready=write, profile_memory=True) as profile:
        yield profile.step


def operator_tables(profile: torch.profiler.profile) -> str:
    """The operators that take most time and allocate most memory, as text."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    averages = profile.key_averages()
    return "\n".join(f"by {title}\n{averages.table(sort_by=key, row_limit=MAX_LINES, max_name_column_width=60)}"
                     for title, key in (("time of their own", f"self_{'device' if device == 'cuda' else 'cpu'}_time_total"),
                                        ("memory of their own", f"self_{'device' if device == 'cuda' else 'cpu'}_memory_usage")))
