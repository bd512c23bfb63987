"""Under which panel a metric stands: W&B makes a group of what is before the slash, the run page (run_page.py) draws the same groups.

The names in metrics.jsonl are older than the groups and stay as they are: scripts and tests of many teams read them.
"""

from typing import NamedTuple

_PANELS = {
    "loss": "loss/total", "value_loss": "loss/value", "item_loss": "loss/item", "loss_head/": "loss/head_", "loss_level/": "loss/level_",
    "loss_after/": "loss/after_", "loss_action/": "loss/action_", "policy_loss": "loss/policy", "critic_loss": "loss/critic",
    "stabiliser_loss": "loss/stabiliser",
    "lr": "optimizer/lr", "grad_norm": "optimizer/grad_norm", "skipped_steps": "optimizer/skipped_steps",
    "tokens_per_s": "speed/tokens_per_s", "targets_per_s": "speed/targets_per_s", "candidates_per_s": "speed/candidates_per_s",
    "mfu": "speed/mfu",
    "seconds": "time/step", "loader_wait_s": "time/loader_wait", "rollout_s": "time/rollout", "update_s": "time/update",
    "checkpoint/seconds": "time/checkpoint", "checkpoint/": "time/checkpoint_",
    "memory_gib": "memory/rank_max",
    "straggler_gap": "straggler/gap", "straggler_rank": "straggler/rank", "work_gap": "straggler/work_gap",
    "rows": "progress/rows", "tokens": "progress/tokens", "targets": "progress/targets", "total_targets": "progress/total_targets",
}


class Panel(NamedTuple):
    """Where a metric is shown."""

    group: str
    name: str


def panel_of(metric: str) -> Panel:
    """Args: metric: its name in metrics.jsonl. What has no group of its own is of the stage's objective (`objective/reward`)."""
    found = _PANELS.get(metric)
    if found is None:
        prefix, slash, rest = metric.partition("/")
        found = _PANELS[prefix + slash] + rest if slash and prefix + slash in _PANELS else metric if slash else f"objective/{metric}"
    return Panel(*found.split("/", 1))
