"""When a person should look: thresholds over the last steps of a run, in a few numbers of memory. Saying it is the tracker's part.

The losses come back with a checkpoint; what speed is usual is learnt afresh by every process.
"""

from collections import deque
from statistics import median
from typing import NamedTuple

from pydantic import Field

from gpr_dist.config import Config

MAD_TO_SIGMA = 1.4826  # of a normal distribution
LEAST_SPREAD = 0.01  # of the median: a loss that hardly moves does not spike by a hair
RECENT = 5  # steps a change of speed must last


class AlertConfig(Config):
    """When to warn."""

    window_steps: int = Field(100, ge=10)
    """steps before this one that say what is usual"""
    first_after_steps: int = Field(30, ge=5)
    """steps before the first warning: a run starts with a falling loss, cold caches and compiled kernels"""
    loss_spike_sigmas: float = Field(6.0, gt=0)
    """a loss this far above the window's median is a spike; sigma = 1.4826 x the median distance from the median"""
    loader_wait_share: float = Field(0.2, gt=0)
    """share of the window's time spent waiting for data"""
    throughput_drop: float = Field(0.5, gt=0, lt=1)
    """lost share of the usual speed, over the last 5 steps"""
    repeat_after_steps: int = Field(100, ge=1)
    """steps before the same warning is given again"""


class Alert(NamedTuple):
    """Something to look at."""

    kind: str
    text: str


class Alerts:
    """Feed it every step. The loss is the same on every rank, so all ranks see the same spikes; the speed is this rank's."""

    def __init__(self, config: AlertConfig, losses: list[float] | None = None) -> None:
        """Args: losses: of the steps before, the last at the end; goes on being kept in this list."""
        self.config = config
        self.losses = [] if losses is None else losses
        self.rates, self.waits, self.seconds = (deque(maxlen=config.window_steps) for _ in range(3))
        self.last: dict[str, int] = {}

    def step(self, step: int, loss: float, rate: float, waited: float, seconds: float) -> list[Alert]:
        """What is wrong now and was not said lately.

        Args: loss: of the step, finite; rate: work per second; waited: for data, s, of `seconds`.
        """
        found = []
        if len(self.losses) >= self.config.first_after_steps:
            threshold = self.loss_threshold()
            if loss > threshold:
                found.append(Alert("loss_spike", f"loss {loss:.4g} at step {step}; usual is {median(self.losses):.4g}, a spike begins at "
                                   f"{threshold:.4g}"))
        for memory, value in ((self.losses, loss), (self.rates, rate), (self.waits, waited), (self.seconds, seconds)):
            memory.append(value)
        del self.losses[:-self.config.window_steps]
        if len(self.rates) >= self.config.first_after_steps:
            found += self._slow(step)
        new = [alert for alert in found if step - self.last.get(alert.kind, -self.config.repeat_after_steps) >=
               self.config.repeat_after_steps]
        self.last |= {alert.kind: step for alert in new}
        return new

    def loss_threshold(self) -> float:
        """The loss at which a spike begins, from the steps so far."""
        usual = median(self.losses)
        spread = max(MAD_TO_SIGMA * median(abs(loss - usual) for loss in self.losses), LEAST_SPREAD * abs(usual))
        return usual + self.config.loss_spike_sigmas * spread

    def _slow(self, step: int) -> list[Alert]:
        found = []
        share = sum(self.waits) / max(sum(self.seconds), 1e-9)
        if share > self.config.loader_wait_share:
            found.append(Alert("loader_wait", f"{share:.0%} of the last {len(self.waits)} steps' time went into waiting for data (step "
                               f"{step}); raise data.loader.pack_threads, read_threads or prefetch_steps, or look at the storage"))
        usual, now = median(self.rates), median(list(self.rates)[-RECENT:])
        if now < (1 - self.config.throughput_drop) * usual:
            found.append(Alert("throughput", f"{now / usual:.0%} of the usual speed at step {step}: {now:,.0f} of {usual:,.0f} per second; "
                               "look at straggler_rank, loader_wait_s and the load of the hosts"))
        return found
