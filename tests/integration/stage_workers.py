"""Training scripts run one after another in one process group: starting a process costs more than a tiny run."""

import sys

import torch
from documents import launch_module

from gpr_dist.errors import GPRError
from gpr_dist.training.engine import Engine, init_distributed

TIMEOUT_S = 60


def run_stages(jobs: list[tuple[str, list[str]]]) -> list[str]:
    """Run `main` of launch/<stage>.py with the arguments of each job on this rank. Returns: the text of each GPRError, "" without one."""
    init_distributed(TIMEOUT_S)
    Engine.close = Engine.barrier  # the group is needed again
    results = []
    for stage, arguments in jobs:
        sys.argv = [f"{stage}.py", *arguments]
        try:
            launch_module(stage).main()
            results.append("")
        except GPRError as error:
            results.append(f"{type(error).__name__}: {error}")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    return results
