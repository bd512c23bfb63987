"""One or several training runs as a self-contained HTML page: the groups of W&B's panels, drawn from the run folders alone."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes

from gpr_dist.html import ALARM, FAINT, SERIES, Alarm, Details, Figure, Mark, Part, Section, Table, Tile, draw, render
from gpr_dist.training.panels import panel_of
from gpr_dist.training.run_log import Curve, RunLog, differences

GROUPS = {
    "loss": "Loss", "validation": "Validation", "objective": "Objective", "guard": "Guards", "vaft": "Value weights",
    "optimizer": "Optimizer", "speed": "Speed", "time": "Time, seconds", "memory": "Memory, GiB of the largest rank",
    "straggler": "Balance of the ranks, slowest over mean"}
HIDDEN = ("progress", "nonfinite")
EXACT = ("optimizer/lr", "optimizer/skipped_steps", "memory/rank_max")  # to be seen as they are
DOTS = ("straggler/rank",)
FAMILY = re.compile(r"(head_|level_|after_|action_|.*@|.*/)(.+)")
FIRST = ("total", "head", "level", "loss")  # families that lead their section
MAX_POINTS, MAX_EVENTS, MAX_TRACES, MAX_ROWS = 300, 60, 12, 10
ACTIONS = {"loss_spike": "Look at its rows under Loss spikes.", "not_finite": "Look at its rows under Loss spikes; the update was dropped.",
           "checkpoint_failed": "Make room or mend the storage, then start again: the run resumes.",
           "loader_wait": "Raise data.loader.pack_threads or read_threads, or look at the storage.",
           "throughput": "Look at the balance of the ranks, the time waiting for data, and the load of the hosts."}


def run_page(runs: Sequence[RunLog]) -> str:
    """Args: runs: at most as many as there are colours (`len(SERIES)`)."""
    title = f"Run {runs[0].name}" if len(runs) == 1 else "Runs " + ", ".join(run.name for run in runs)
    first = runs[0].began
    subtitle = (f"commit {first.get('commit') or 'unknown'}, {first['world_size']} rank(s) on {first['device']}, "
                f"{first['parameters']:,} parameters; last started {_time(first['time'])} UTC." if first and len(runs) == 1 else
                "Thick: median over 5 % of the steps. Thin: single steps, or their range where a run is long. Dashed: resumed there.")
    sections = [
        Section("Overview", [_overview(runs), *_differences(runs)]),
        *_panels(runs), *_traces(runs), *_events(runs),
        Section("Settings", [Details(run.name, [Table(("setting", "value"), list(run.config.items()), "ll")]) for run in runs])]
    return render(title, subtitle, run_alarms(runs), _tiles(runs[0]) if len(runs) == 1 else [], sections, "No alerts, no failure.")


def run_alarms(runs: Sequence[RunLog]) -> tuple[Alarm, ...]:
    """What a person must look at, a line per run and kind."""
    found = []
    for run in runs:
        if run.status == "failed":
            found.append(Alarm(f"{run.name} failed at step {run.step}: {run.error}", "Started anew, it resumes from its last checkpoint."))
        for kind, count in Counter(alert["kind"] for alert in run.alerts).items():
            last = next(alert for alert in reversed(run.alerts) if alert["kind"] == kind)
            found.append(Alarm(f"{run.name}: {kind.replace('_', ' ')}, {count} time(s); last: {last['text']}", ACTIONS.get(kind, "")))
    return tuple(found)


def summary(run: RunLog) -> dict[str, Any]:
    """The numbers of a run's line in the overview."""
    best = _best_validation(run)
    return {"run": run.name, "status": run.status, "commit": run.began.get("commit"), "ranks": run.began.get("world_size"),
            "step": run.step, "num_steps": run.num_steps, "hours": run.total("seconds") / 3600, "tokens": int(run.total("tokens")),
            "loss": run.last("loss"), "best": best[1] if best else None, "best_metric": best[0] if best else None,
            "tokens_per_s": run.last("tokens_per_s", 1.0), "mfu": run.last("mfu", 1.0),
            "skipped_steps": int(run.last("skipped_steps", 0) or 0), "restarts": len(run.restarts), "alerts": len(run.alerts),
            "traced_steps": [trace["step"] for trace in run.traces]}


def format_runs(runs: Sequence[RunLog]) -> str:
    """Alarms, then a line per run."""
    columns, rows = _overview_rows(runs)
    widths = [max(len(str(row[place])) for row in (columns, *rows)) for place in range(len(columns))]
    lines = [f"ALARM {alarm.found}. {alarm.action}" for alarm in run_alarms(runs)]
    return "\n".join(lines + ["  ".join(str(cell).ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
                              for row in (columns, *rows)])


def _overview_rows(runs: Sequence[RunLog]) -> tuple[tuple[str, ...], list[tuple[Any, ...]]]:
    rows = []
    for run in runs:
        found = summary(run)
        bad = Mark if found["status"] in ("failed", "unfinished", "running or killed") else str
        best = f"{_number(found['best'])} ({found['best_metric']})" if found["best"] is not None else "-"
        rows.append((run.name, bad(found["status"]), found["commit"] or "-", found["ranks"] or "-", f"{run.step:,} / {run.num_steps:,}",
                     f"{found['hours']:.2f}", f"{found['tokens']:,}", _number(found["loss"]), best, found["restarts"],
                     found["skipped_steps"], found["alerts"]))
    return ("run", "status", "commit", "ranks", "steps", "hours", "tokens", "loss", "best validation", "restarts", "skipped",
            "alerts"), rows


def _overview(runs: Sequence[RunLog]) -> Table:
    columns, rows = _overview_rows(runs)
    return Table(columns, rows, "lll", caption="loss: mean of the last 5 % of the steps; hours: of training steps, without validation and "
                 "checkpoints; commit+: files differed from it")


def _differences(runs: Sequence[RunLog]) -> list[Part]:
    if len(runs) == 1:
        return []
    changed = differences(runs)
    table = Table(("setting", *(run.name for run in runs)), changed, "l" * (1 + len(runs)), caption="settings that differ")
    return [table] if len(changed) <= MAX_ROWS else [Details(f"Settings that differ ({len(changed)})", [table])]


def _tiles(run: RunLog) -> list[Tile]:
    waited, spent = run.total("loader_wait_s"), run.total("seconds")
    gap, best, saved = run.last("straggler_gap", 1.0), _best_validation(run), run.total("checkpoint/seconds")
    tiles = [Tile("Loss", _number(run.last("loss")), f"last 5 % of {run.step:,} steps")]
    tiles += [Tile(f"Best {best[0]}", _number(best[1]), f"at step {best[2]:,}")] if best else []
    for metric, label in (("tokens_per_s", "Tokens per second"), ("candidates_per_s", "Candidates per second")):
        if metric in run.curves:
            tiles.append(Tile(label, f"{np.median(run.curves[metric].values):,.0f}", "median step, all ranks"))
    tiles += [Tile("MFU", f"{np.median(run.curves['mfu'].values):.1%}", "median step")] if "mfu" in run.curves else []
    saving = f"; saving took {saved / (spent + saved):.1%} on top" if saved else ""
    tiles += [Tile("Waiting for data", f"{waited / spent:.1%}", f"of the steps' time{saving}")] if spent else []
    return tiles + ([Tile("Slowest rank", f"{gap:.3f} ×", "its own work over the mean")] if gap is not None else [])


def _best_validation(run: RunLog) -> tuple[str, float, int] | None:
    """Name, value and step of what the run calls best."""
    metric = run.config.get("train.best_metric", "validation/loss")
    if metric not in run.curves:
        return None
    steps, values = run.curves[metric]
    at = int(values.argmin() if metric.endswith("loss") else values.argmax())
    return metric.removeprefix("validation/"), float(values[at]), int(steps[at])


class _Line(NamedTuple):
    label: str
    curve: Curve
    colour: str
    run: RunLog


def _panels(runs: Sequence[RunLog]) -> list[Section]:
    """A section per group: one run's families of curves share an axis; of several runs every metric has one, with the run's colour."""
    groups: dict[str, dict[str, list[str]]] = {}
    moving = {name for run in runs for name, curve in run.curves.items() if curve.values.any()}
    for metric in sorted(moving, key=lambda name: (name != "loss", name)):
        group, name = panel_of(metric)
        family = FAMILY.fullmatch(name)
        groups.setdefault(group, {}).setdefault(family[1].rstrip("_@/") if family else name, []).append(metric)
    sections = []
    for group in [*(name for name in GROUPS if name in groups), *sorted(groups.keys() - GROUPS.keys() - set(HIDDEN))]:
        shown: list[Part] = []
        folded: list[Part] = []
        for family, metrics in sorted(groups[group].items(), key=lambda item: FIRST.index(item[0]) if item[0] in FIRST else len(FIRST)):
            if len(runs) == 1:
                lines = [_Line(panel_of(metric).name, runs[0].curves[metric], SERIES[place % len(SERIES)], runs[0])
                         for place, metric in enumerate(metrics)]
                shown.append(_figure("/".join(panel_of(metrics[0])) if len(metrics) == 1 else f"{group}/{family}", lines))
                continue
            for metric in metrics:
                lines = [_Line(run.name, run.curves[metric], SERIES[place], run) for place, run in enumerate(runs) if metric in run.curves]
                (folded if len(metrics) > 1 and group != "validation" else shown).append(_figure("/".join(panel_of(metric)), lines))
        sections.append(Section(GROUPS.get(group, group), shown + ([Details("By head, level and kind of ad", folded)] if folded else [])))
    return sections


def _figure(title: str, lines: Sequence[_Line]) -> Figure:
    values = np.concatenate([line.curve.values for line in lines])
    low, high = _limits(values)
    outside = int(((values < low) | (values > high)).sum())

    def paint(axes: Axes) -> None:
        for line in lines:
            if title in DOTS:
                shown = _spread(len(line.curve.values))
                axes.plot(line.curve.steps[shown], line.curve.values[shown], linestyle="", marker=".", markersize=4, color=line.colour,
                          label=line.label)
            else:
                _paint_curve(axes, line, 1 if title in EXACT else max(1, len(line.curve.values) // 20))
        for run in {id(line.run): line.run for line in lines}.values():
            colour = next(line.colour for line in lines if line.run is run) if len({id(line.run) for line in lines}) > 1 else FAINT
            for step in run.restarts:
                axes.axvline(step, color=colour, linestyle="--", linewidth=1)
            if title == "loss/total":
                _paint_marks(axes, run, high, colour)
        last = max(line.run.step for line in lines)
        axes.set(xlabel="step", xlim=(-0.01 * last, 1.01 * last), ylim=(low, high))
        if len(lines) > 1 or title == "loss/total":
            axes.legend(fontsize=7, loc="best")

    caption = title + (f"; outside the picture: {outside} of {len(values):,} values" if outside else "")
    return draw(paint, caption, height=2.7)


def _paint_curve(axes: Axes, line: _Line, window: int) -> None:
    """Thick: medians over `window` values. Behind it single values or, of many, the range of neighbours."""
    (steps, values), colour = line.curve, line.colour
    if len(values) <= 30:
        axes.plot(steps, values, color=colour, label=line.label, marker="o", markersize=3)
        return
    begins = np.linspace(0, len(values), MAX_POINTS, endpoint=False).astype(int)
    if len(values) > 2 * MAX_POINTS:
        axes.fill_between(steps[begins], np.minimum.reduceat(values, begins), np.maximum.reduceat(values, begins), color=colour, alpha=0.22,
                          linewidth=0)
    else:
        axes.plot(steps, values, color=colour, linewidth=0.6, alpha=0.45)
    ends = window + _spread(len(values) - window + 1)
    axes.plot(steps[ends - 1], [np.median(values[end - window:end]) for end in ends], color=colour, label=line.label)


def _spread(count: int) -> np.ndarray:
    """At most MAX_POINTS of the numbers 0 … count - 1, the first and the last among them."""
    return np.unique(np.linspace(0, count - 1, MAX_POINTS).astype(int))


def _paint_marks(axes: Axes, run: RunLog, high: float, colour: str) -> None:
    """Checkpoints at the foot of the picture; spikes where they are, or at its upper edge."""
    saved = run.curves["checkpoint/seconds"].steps if "checkpoint/seconds" in run.curves else np.zeros(0)
    if len(saved):
        saved = saved[_spread(len(saved))]
        axes.plot(saved, np.zeros(len(saved)), transform=axes.get_xaxis_transform(), linestyle="", marker="^", markersize=5, color=colour,
                  label=None if "checkpoint" in axes.get_legend_handles_labels()[1] else "checkpoint", clip_on=False)
    loss = dict(zip(*run.curves["loss"], strict=True)) if "loss" in run.curves else {}
    spikes = [trace["step"] for trace in run.traces if trace["step"] in loss]
    if spikes:
        axes.plot(spikes, [min(loss[step], high) for step in spikes], linestyle="", marker="o", markersize=8, markerfacecolor="none",
                  markeredgecolor=ALARM, label=None if "traced" in axes.get_legend_handles_labels()[1] else "traced", clip_on=False)


def _limits(values: np.ndarray) -> tuple[float, float]:
    """Of the axis: all values, but not the few far from the rest."""
    low, high = np.quantile(values, (0.01, 0.99))
    room = 0.3 * (high - low) or 0.05 * abs(high) or 1.0
    ends = max(low - room, values.min()), min(high + room, values.max())
    margin = 0.05 * (ends[1] - ends[0]) or room
    return float(ends[0] - margin), float(ends[1] + margin)


def _traces(runs: Sequence[RunLog]) -> list[Section]:
    parts: list[Part] = []
    for run in runs:
        for trace in run.traces[-MAX_TRACES:]:
            rows = trace["rows"][:MAX_ROWS]
            table = Table(("rank", "row", "where", "user", "targets", "mean nll", "excess", "its worst ads"),
                          [(row["rank"], row["row"], row["where"], row["user"], row["targets"], _number(row["mean_nll"]),
                            _number(row["excess"]), ", ".join(_ad(ad) for ad in row["ads"])) for row in rows], "rrllrrrl",
                          caption="excess: what the row's targets added to the sum of losses above the step's mean, nats. user: a digest.")
            parts.append(Details(f"{run.name}, step {trace['step']}, {trace['reason']}: {len(trace['rows'])} rows of "
                                 f"{len({row['rank'] for row in trace['rows']})} rank(s){_most_common(trace['rows'])}", [table]))
    return [Section("Loss spikes", parts)] if parts else []


def _most_common(rows: Sequence[Mapping[str, Any]]) -> str:
    found = Counter(ad["advertiser"] for row in rows for ad in row["ads"] if "advertiser" in ad).most_common(3)
    return "; most of the worst ads are of " + ", ".join(f"{name} ({count})" for name, count in found) if found else ""


def _ad(ad: Mapping[str, Any]) -> str:
    of = f" of {ad['advertiser']}" if "advertiser" in ad else ""
    return f"{ad['item_id']}{of} ({_number(ad['nll'])})"


def _events(runs: Sequence[RunLog]) -> list[Section]:
    rows = sorted(((event["time"], run.name, event) for run in runs for event in run.events), key=lambda row: row[0])
    if not rows:
        return []
    table = Table(("UTC", "run", "step", "event", ""), [(_time(time), name, f"{event['step']:,}", event["event"], _facts(event))
                                                       for time, name, event in rows[-MAX_EVENTS:]], "llrll",
                  caption=f"the last {min(len(rows), MAX_EVENTS)} of {len(rows)}")
    return [Section("What happened", [table])]


def _facts(event: Mapping[str, Any]) -> str:
    if event["event"] == "alert":
        return event["text"]
    return ", ".join(f"{name} {value}" for name, value in event.items() if name not in ("time", "step", "event") and value is not None)


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S")


def _number(value: Any) -> str:
    return "-" if value is None else f"{value:.4g}" if isinstance(value, int | float) else str(value)
