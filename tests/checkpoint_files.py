"""Checkpoints of any world size written without engine and training: the files that `training.saver.Saver` leaves."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from gpr_dist.training import checkpoint


def write_checkpoint(folder: Path, weights: Mapping[str, Tensor], world_size: int, config: Mapping[str, Any] | None = None,
                     fingerprints: Mapping[str, str] | None = None) -> Path:
    """Every rank gets an equal share of every weight, the last one less; the moments are zero. Returns the step folder."""
    folder.mkdir(parents=True)
    for rank in range(world_size):
        tensors, ranges = {checkpoint.RNG_KEY: torch.get_rng_state()}, []
        for name, weight in weights.items():
            share = -(-weight.numel() // world_size)
            lo, hi = min(rank * share, weight.numel()), min((rank + 1) * share, weight.numel())
            if lo < hi:
                ranges.append((name, lo, hi))
                piece = weight.detach().reshape(-1)[lo:hi].float().clone()
                for state in ("param", "exp_avg", "exp_avg_sq"):
                    key = checkpoint.tensor_name(name, state, lo, hi)
                    tensors[key] = piece if state == "param" else torch.zeros_like(piece)
        path = folder / checkpoint.rank_file(rank)
        save_file(tensors, path)
        checkpoint.write_note(path, ranges)
    state = {"format_version": checkpoint.FORMAT_VERSION, "step": int(folder.name.removeprefix("step-")), "world_size": world_size,
             "states": ["param", "exp_avg", "exp_avg_sq"], "optimizer_step": 1,
             "shapes": {name: list(weight.shape) for name, weight in weights.items()}, "fingerprints": dict(fingerprints or {}),
             "config": dict(config or {})}
    (folder / "state.json").write_text(json.dumps(state))
    checkpoint.commit(folder, world_size)
    return folder
