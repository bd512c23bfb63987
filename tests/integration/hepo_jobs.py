"""What the rank processes of test_hepo.py run: launch/hepo.py with a table of values in place of the simulator."""

import os
import signal
import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from documents import launch_module

from gpr_dist.errors import GPRError
from gpr_dist.schema import Batch
from gpr_dist.training.engine import Engine, init_distributed

TIMEOUT_S = 60


class Table:
    """A value for every item, in place of the simulator."""

    def __init__(self, constant: bool = False, stop_at_call: int = -1) -> None:
        self.value_M = torch.from_numpy(np.random.default_rng(3).random(1000)).float()
        self.constant, self.stop_at_call, self.calls = constant, stop_at_call, 0

    def rewards(self, batch: Batch, request_N: torch.Tensor, item_N: torch.Tensor) -> SimpleNamespace:
        if self.calls == self.stop_at_call:
            os.kill(os.getpid(), signal.SIGTERM)
        self.calls += 1
        value_N = torch.ones(len(item_N)) if self.constant else self.value_M[item_N]
        return SimpleNamespace(pctr_N=value_N, pcvr_N=value_N, ecpm_N=value_N, final_value_N=value_N)


def run_jobs(jobs: list[tuple[dict[str, Any], list[str]]]) -> list[str]:
    """(settings of the table, arguments) of each job. Returns: the text of each GPRError, "" without one."""
    init_distributed(TIMEOUT_S)
    Engine.close = Engine.barrier  # the group is needed again
    script, results = launch_module("hepo"), []
    for table, arguments in jobs:
        script.Simulator = SimpleNamespace(load=lambda *_, table=table: Table(**table))
        sys.argv = ["hepo.py", *arguments]
        try:
            script.main()
            results.append("")
        except GPRError as error:
            results.append(f"{type(error).__name__}: {error}")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    return results
