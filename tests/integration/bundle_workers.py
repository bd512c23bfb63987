"""What the rank processes of test_hand_off.py run."""

from pathlib import Path
from typing import Any

import torch

from gpr_dist.config import build_config
from gpr_dist.errors import CheckpointError
from gpr_dist.model.gpr import GPR, GPRConfig
from gpr_dist.training.engine import Engine, EngineConfig, init_distributed
from gpr_dist.training.init_from import init_from

TIMEOUT_S = 60


def start_from(cases: list[dict[str, Any]]) -> list[str]:
    """For each case a model of `model` starts from `source` at `stage`; this rank's ranges go to the file `save`-<rank>.pt.

    Returns: of each case the source that was chosen, or the error.
    """
    init_distributed(TIMEOUT_S)
    results = []
    for case in cases:
        torch.manual_seed(1)
        config = build_config(GPRConfig, case["model"], "the test")
        engine = Engine(GPR(config), EngineConfig(zero_stage=case["stage"], timeout_seconds=TIMEOUT_S, persistence_elements=100))
        try:
            origin = init_from(engine, Path(case["source"]), config, case["fingerprints"])
        except CheckpointError as error:
            results.append(str(error))
            continue
        shards = [(s.name, s.lo, s.hi, {key: t.clone() for key, t in s.tensors.items()}) for s in engine.state_shards()]
        torch.save(shards, f"{case['save']}-{engine.rank}.pt")
        results.append(origin["source"])
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    return results
