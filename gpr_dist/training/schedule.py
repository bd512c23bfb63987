"""Learning rate as a pure function of the step: warm-up, then cosine, warm-up-stable-decay or constant."""

import math
from typing import Literal

from pydantic import Field, model_validator

from gpr_dist.config import Config


class ScheduleConfig(Config):
    """Length of training and the learning rate along it."""

    num_steps: int = Field(default=1000, ge=1)
    """optimizer steps of the whole run"""
    lr: float = Field(default=1e-3, gt=0)
    """peak learning rate"""
    shape: Literal["cosine", "wsd", "constant"] = "wsd"
    """after the warm-up: cosine to the floor, or stable and then a linear decay to the floor (warm-up, stable, decay), or constant"""
    warmup_steps: int = Field(default=50, ge=0)
    """steps of linear warm-up"""
    decay_frac: float = Field(default=0.4, ge=0, le=1)
    """wsd: share of the steps, at the end, in which the rate decays"""
    floor_frac: float = Field(default=0.02, ge=0, le=1)
    """final rate over the peak rate"""

    @model_validator(mode="after")
    def _check(self) -> "ScheduleConfig":
        if self.warmup_steps > self.num_steps:
            raise ValueError(f"warmup_steps={self.warmup_steps} is longer than num_steps={self.num_steps}")
        return self


def learning_rate(config: ScheduleConfig, step: int) -> float:
    """Rate of the update that turns `step` into `step + 1`, step from 0 to num_steps - 1."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    floor = config.lr * config.floor_frac
    if config.shape == "constant":
        return config.lr
    if config.shape == "cosine":
        progress = (step - config.warmup_steps) / max(1, config.num_steps - config.warmup_steps)
        return floor + (config.lr - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    decay_steps = min(max(1, round(config.decay_frac * config.num_steps)), config.num_steps - config.warmup_steps)  # never into the warm-up
    progress = (step - (config.num_steps - decay_steps)) / decay_steps
    return config.lr - (config.lr - floor) * min(1.0, max(0.0, progress))
