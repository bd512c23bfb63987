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


def start_from(source: str, model: dict[str, Any], fingerprints: dict[str, str], stages: list[int], save: str = "") -> list[Any]:
    """Starts a model from `source` at each ZeRO stage; this rank's ranges go to `save`, or the error comes back."""
    init_distributed(TIMEOUT_S)
    results = []
    config = build_config(GPRConfig, model, "the test")
    for stage in stages:
        torch.manual_seed(1)
        engine = Engine(GPR(config), EngineConfig(zero_stage=stage, timeout_seconds=TIMEOUT_S, persistence_elements=100))
        try:
            origin = init_from(engine, Path(source), config, fingerprints)
        except CheckpointError as error:
            results.append(str(error))
            continue
        shards = [(s.name, s.lo, s.hi, {key: t.clone() for key, t in s.tensors.items()}) for s in engine.state_shards()]
        torch.save(shards, f"{save}-{stage}-{engine.rank}.pt")
        results.append(origin["source"])
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    return results
