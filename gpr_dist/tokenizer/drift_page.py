"""How a drift report is shown and written: a text table, `drift.json` and one HTML page, `drift.html`."""

from pathlib import Path

import numpy as np
import pyarrow as pa
from matplotlib.axes import Axes

from gpr_dist.html import SERIES, Details, Figure, Mark, Section, Table, Tile, draw, render
from gpr_dist.tokenizer.drift import DriftConfig, DriftReport, Measure, measure_drift, show
from gpr_dist.tokenizer.report_page import save_report
from gpr_dist.tokenizer.semantic_ids import SemanticIds

_SOURCES = {"embeddings": "measured on the training embeddings", "stored": "as stored with the tokenizer at its fit"}
_MEANING = {
    "collision": "1 - distinct semantic IDs / items",
    "on an old semantic ID": "share of the items whose semantic ID a training item outside the sample has",
    "CUR": "used codes / codebook size",
    "perplexity": "2 ** entropy of the codes",
    "usage shift": "share of the items that would have to change their code for the codes to be as frequent as in training",
    "error left": "squared error / variance of the training items",
    "far from its code": "share of the items farther from their code than 99 % of the training items",
    "PAS": "mean cosine similarity of the pairs on one semantic ID",
}


def write_drift(folder: Path, bundle: SemanticIds, embeddings_nD: np.ndarray, config: DriftConfig,
                training_embeddings_ND: np.ndarray | None = None, items: pa.Table | None = None) -> DriftReport:
    """Measure and write `drift.json` and `drift.html` into `folder`. Args, Raises: as for `measure_drift`."""
    report = measure_drift(bundle, embeddings_nD, config, training_embeddings_ND, items)
    save_report(folder, "drift", report, drift_page(report))
    return report


def format_drift(report: DriftReport) -> str:
    """Alarms, then the measures as a small text table."""
    lines = [f"ALARM {alarm.found}. {alarm.action}" for alarm in report.alarms]
    lines += [_subtitle(report), f"{'':26}{'today':>10}{'training':>10}{'z':>9}{'limit':>10}"]
    for m in report.measures:
        mark = "  ALARM" if m.alarm else ""
        lines.append(f"{_label(m):26}{show(m, m.new):>10}{show(m, m.training):>10}{_z(m):>9}{show(m, m.limit):>10}{mark}")
    return "\n".join(lines)


def drift_page(report: DriftReport) -> str:
    """The report as one HTML page."""
    rows = [(_label(m), show(m, m.new), show(m, m.training), _z(m), show(m, m.limit), Mark("alarm") if m.alarm else "",
             _MEANING[m.name] if m.level in (None, 1) else "") for m in report.measures]
    sections = [
        Section("Today's items beside training items", [
            f"Collision, shared IDs, CUR, perplexity and usage are compared with {report.thresholds.num_samples} random samples of "
            f"{report.sample_size:,} training items each, since they depend on the number of items; z counts the standard deviations of "
            f"these samples. Errors, distances and PAS of the training items: {_SOURCES[report.source]}. An alarm needs a value beyond its "
            f"limit and a z beyond {report.thresholds.max_z:g}.",
            Table(("", "today", "training", "z", "limit", "", "meaning"), rows, "lrrrrll")]),
        Section("Distance to the nearest code", [_distance_figure(report, level) for level in range(len(report.new_distance))]),
        Section("Codes of level 1", [_usage_figure(report), Details("Codes that gained most", [
            Table(("code", "today", "training"), [(code.code, f"{code.new:.2%}", f"{code.training:.2%}") for code in report.gained],
                  "l")])]),
        *([Section("Items farthest from their codes", [Table(
            ("row", "item", "distance", "text"),
            [(f"{item.row:,}", item.item_id or "-", f"{item.distance:.3f}", item.text or "-") for item in report.farthest], "rlrl")])]
          if report.farthest else []),
        Section("Settings", [Details("Alarm thresholds", [
            Table(("setting", "value", "meaning"), [(f"drift.{name}", getattr(report.thresholds, name), field.description)
                                                    for name, field in DriftConfig.model_fields.items()], "lrl")])]),
    ]
    return render(f"Drift of tokenizer {report.fingerprint}", _subtitle(report), report.alarms, _tiles(report), sections,
                  "No alarms: today's items are to the tokenizer as its training items.")


def _subtitle(report: DriftReport) -> str:
    return (f"{report.num_new:,} items of today beside {report.num_training:,} training items; codebooks {report.codebook_fingerprint}; "
            f"training statistics {_SOURCES[report.source]}.")


def _tiles(report: DriftReport) -> list[Tile]:
    last = len(report.new_distance)
    wanted = [("collision", None), ("on an old semantic ID", None), ("error left", last), ("far from its code", last), ("CUR", last),
              ("PAS", None)]
    found = {(m.name, m.level): m for m in report.measures}
    return [Tile(_label(m)[0].upper() + _label(m)[1:], show(m, m.new), f"training {show(m, m.training)}")
            for m in (found[key] for key in wanted)]


def _label(measure: Measure) -> str:
    return measure.name if measure.level is None else f"{measure.name}, level {measure.level}"


def _z(measure: Measure) -> str:
    return "-" if measure.z is None else f"{measure.z:+,.1f}"


def _distance_figure(report: DriftReport, level: int) -> Figure:
    percent = [100 * quantile for quantile in report.quantiles]

    def paint(axes: Axes) -> None:
        axes.plot(percent, report.training_distance[level], marker="o", markersize=3.5, label="training")
        axes.plot(percent, report.new_distance[level], marker="o", markersize=3.5, label="today")
        axes.set(xlabel="% of the items are nearer", ylabel="distance", ylim=(0, None))
        axes.legend()

    return draw(paint, f"Level {level + 1}: the lines lie on each other as long as the codes of this level fit today's items.")


def _usage_figure(report: DriftReport) -> Figure:
    training, new = 100 * np.array(report.usage).T

    def paint(axes: Axes) -> None:
        axes.scatter(training, new, s=9, color=SERIES[1], alpha=0.7, linewidths=0)
        top = max(training.max(), new.max()) * 1.05
        axes.plot([0, top], [0, top], color=SERIES[0], linewidth=1)
        axes.set(xlabel="% of the training items on the code", ylabel="% of today's items", xlim=(0, top), ylim=(0, top))

    return draw(paint, "A dot is a code. Dots far above the line are kinds of items that grew, dots at the bottom kinds that vanished.")
