"""How the report of a tokenizer is shown and written: a text table, `report.json` and one HTML page, `report.html`.

The files lie beside the bundle's and are not part of it. What is measured is report.py's, the looks of the page are gpr_dist/html.py's.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from matplotlib.axes import Axes

from gpr_dist.config import Config
from gpr_dist.errors import TokenizerError
from gpr_dist.html import FAINT, SERIES, Details, Figure, Part, Section, Table, Tile, draw, render
from gpr_dist.schema import write_atomic
from gpr_dist.tokenizer.report import CollisionGroup, ItemSet, Report, ReportConfig, measure_bundle
from gpr_dist.tokenizer.semantic_ids import SemanticIds

_CURVE_POINTS = 300  # of a plotted curve, so that the page stays small with any codebook
_DEFAULTS = ReportConfig()


def write_report(folder: Path, bundle: SemanticIds, embeddings_ND: np.ndarray | None, items: pa.Table,
                 config: ReportConfig = _DEFAULTS, shown_N: np.ndarray | None = None) -> Report:
    """Measure the bundle and write `report.json` and `report.html` into `folder`, each replaced in one step.

    Args: as for `measure_bundle`.
    Raises: TokenizerError as there, and when the folder cannot be written.
    """
    report = measure_bundle(bundle, embeddings_ND, items, config, shown_N)
    save_report(folder, "report", report, report_page(report))
    return report


def save_report(folder: Path, name: str, report: Config, page: str) -> None:
    """Write `<name>.json` and `<name>.html`. Raises: TokenizerError when the folder cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(folder / f"{name}.json", report.model_dump_json(indent=1).encode())
        write_atomic(folder / f"{name}.html", page.encode())
    except OSError as error:
        raise TokenizerError(f"cannot write the report into {folder}: {error.strerror} ({error.filename})") from error


def format_text(report: Report) -> str:
    """Alarms, then the numbers as a small text table."""
    lines = [f"ALARM {alarm.found}. {alarm.action}" for alarm in report.alarms]
    lines += ["".join([f"{'':24}", *(f"{each.name:>16}" for each in report.sets)])]
    lines += ["".join([f"{label:24}", *(f"{value:>16}" for value in values)]) for label, values in _set_rows(report)]
    columns, rows = _level_rows(report.sets[0])
    widths = [max(len(str(row[column])) for row in [columns, *rows]) for column in range(len(columns))]
    lines += ["   ".join(f"{cell:>{width}}" for cell, width in zip(row, widths, strict=True)) for row in [columns, *rows]]
    return "\n".join(lines)


def _set_rows(report: Report) -> list[tuple[str, list[str]]]:
    rows = [("items", [f"{each.num_items:,}" for each in report.sets]),
            ("distinct semantic IDs", [f"{each.num_distinct:,}" for each in report.sets]),
            ("collision", [f"{each.collision:.2%}" for each in report.sets]),
            ("items not alone", [f"{each.not_alone_frac:.2%}" for each in report.sets])]
    if report.sets[0].shown_not_alone_frac is not None:
        rows.append(("not alone, by times shown", [_percent(each.shown_not_alone_frac) for each in report.sets]))
    rows.append(("largest group", [f"{each.largest_group:,}" for each in report.sets]))
    if report.num_embedded:
        rows.append(("PAS", ["none" if each.pas is None else f"{each.pas:.4f}" for each in report.sets]))
        rows.append(("identical embeddings", [_percent(each.duplicate_frac) for each in report.sets]))
    return rows


def _level_rows(each: ItemSet) -> tuple[list[str], list[list[str]]]:
    columns = ["level", "CUR", "dead codes", "entropy, bits", "perplexity", "largest code", "error left", "prefixes", "codes per prefix",
               "fewest - most"]
    rows = []
    for number, level in enumerate(each.levels, 1):
        fewest, _, mean, most = level.children
        rows.append([str(number), f"{level.cur:.2%}", f"{level.dead_codes:,}", f"{level.entropy_bits:.3f}", f"{level.perplexity:,.1f}",
                     f"{level.largest_share:.2%}", "-" if level.error_left is None else f"{level.error_left:.4f}", f"{level.prefixes:,}",
                     f"{mean:,.1f}", f"{fewest:,} - {most:,}"])
    return columns, rows


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.2%}"


def report_page(report: Report) -> str:
    """The report as one HTML page."""
    every = report.sets[0]
    settings = report.settings
    title = f"Tokenizer {report.fingerprint}"
    subtitle = (f"{settings['method']}, {settings['num_levels']} levels of {settings['codebook_size']:,} codes, {every.num_items:,} items. "
                f"Codebooks {report.codebook_fingerprint}, catalogue {report.catalogues[-1]}.")
    sections = [
        Section("Collisions", [_sets_table(report), *_collision_figures(report)]),
        Section("Codebooks", [*_level_tables(report), *_level_figures(report)]),
        *([Section("The fit", [_history_figure(name, values) for name, values in report.history.items()])] if report.history else []),
        *(Section(name, _group_parts(groups)) for name, groups in (
            ("Largest groups", report.largest_groups), ("Other groups, those shown most", report.most_shown_groups),
            ("Other groups, drawn at random", report.random_groups)) if groups),
        Section("Settings", [Details("Of the fit", [_key_values(report.settings)]), Details("Alarm thresholds", [
            Table(("setting", "value", "meaning"), [(f"report.{name}", getattr(report.thresholds, name), field.description)
                                                    for name, field in ReportConfig.model_fields.items()], "lrl")]),
            Details("What was measured", [_key_values({"bundle": report.fingerprint, "codebooks": report.codebook_fingerprint,
                                             "catalogues": " → ".join(report.catalogues), "items at the fit": report.num_fitted,
                                             "items with embeddings": report.num_embedded})])]),
    ]
    return render(title, subtitle, report.alarms, _tiles(report), sections, "No alarms: every number is within its threshold.")


def _tiles(report: Report) -> list[Tile]:
    every, last = report.sets[0], report.sets[0].levels[-1]
    ads = f"; ads {report.sets[1].collision:.1%}" if len(report.sets) > 1 else ""
    floor = "" if every.duplicate_frac is None else f"; by identical embeddings alone {every.duplicate_frac:.1%}"
    return [
        Tile("Collision", f"{every.collision:.1%}", (ads + floor).removeprefix("; ")),
        Tile("Items not alone", f"{every.not_alone_frac:.1%}", f"at most {every.largest_group:,} on one ID"),
        Tile("Codes used (CUR)", f"{min(level.cur for level in every.levels):.1%}", "on the least used level"),
        Tile("Perplexity", f"{min(level.perplexity for level in every.levels):,.0f}",
             f"lowest of the levels, of {report.settings['codebook_size']:,}"),
        Tile("PAS", "none" if every.pas is None else f"{every.pas:.3f}", "cosine of colliding pairs"),
        Tile("Error left", "-" if last.error_left is None else f"{last.error_left:.3f}", "share of the variance"),
    ]


def _sets_table(report: Report) -> Table:
    meaning = {"collision": "1 - distinct semantic IDs / items", "items not alone": "share their ID with another one of the column",
               "not alone, by times shown": "the same, an item counted as often as it was shown", "largest group": "items on one ID",
               "PAS": "mean cosine similarity of the pairs on one ID",
               "identical embeddings": "1 - distinct embeddings / items: no codebook collides less"}
    rows = [(label, *values, meaning.get(label, "")) for label, values in _set_rows(report)]
    return Table(("", *(each.name for each in report.sets), "meaning"), rows, "l" + "r" * len(report.sets) + "l")


def _collision_figures(report: Report) -> list[Figure]:
    sizes = {each.name: {name: 100 * items / each.num_items for name, (_, items) in each.group_sizes.items()} for each in report.sets}
    below = {f"level {number}": {name: 100 * count / sum(level.children_sizes.values()) for name, count in level.children_sizes.items()}
             for number, level in enumerate(report.sets[0].levels, 1) if number > 1}
    figures = [_bars(sizes, "items on the semantic ID", "% of the items",
                     "Where the items are. The bar at 1 is the items that have their semantic ID alone.")]
    if below:
        figures.append(_bars(below, "distinct codes below one prefix", "% of the prefixes",
                             "Conditional usage: how many codes of a level follow one choice of the levels before it."))
    return figures


def _bars(series: dict[str, dict[str, float]], xlabel: str, ylabel: str, caption: str) -> Figure:
    """Bars side by side. Args: series: name → range → height; a shorter one has the first ranges of a longer one."""
    names = max((list(heights) for heights in series.values()), key=len)
    width = 0.8 / len(series)

    def paint(axes: Axes) -> None:
        for number, (label, heights) in enumerate(series.items()):
            places = np.arange(len(names)) + (number - (len(series) - 1) / 2) * width
            axes.bar(places, [heights.get(name, 0) for name in names], width, label=label, color=SERIES[number % len(SERIES)])
        axes.set_xticks(range(len(names)), names, rotation=45 if len(names) > 6 else 0)
        axes.set(xlabel=xlabel, ylabel=ylabel)
        axes.grid(axis="x", visible=False)
        axes.legend()

    return draw(paint, caption)


def _level_tables(report: Report) -> list[Table]:
    return [Table(*_level_rows(each), "l", caption=each.name[0].upper() + each.name[1:]) for each in report.sets]


def _level_figures(report: Report) -> list[Figure]:
    every = report.sets[0]

    def usage(axes: Axes) -> None:
        for number, level in enumerate(every.levels, 1):
            rank, share = _thin(100 * np.array(level.usage) / every.num_items)
            axes.plot(rank, np.where(share > 0, share, np.nan), label=f"level {number}")
        axes.axhline(100 / len(every.levels[0].usage), color=FAINT, linestyle="--", linewidth=1, label="all codes alike")
        axes.set(xlabel="codes, most frequent first", ylabel="% of the items", yscale="log")
        axes.legend()

    def error(axes: Axes) -> None:
        for each in report.sets:
            axes.plot(range(len(each.levels) + 1), [1.0, *(level.error_left for level in each.levels)], marker="o", label=each.name)
        axes.set(xlabel="after level", ylabel="share of the variance left", ylim=(0, None), xticks=range(len(every.levels) + 1))
        axes.legend()

    figures = [draw(usage, "Usage of the codes. Flat is good; a line that ends early has dead codes, a steep one is used unevenly.")]
    if report.num_embedded:
        figures.append(draw(error, "Reconstruction error. Every level should lower it; 1 is no better than the mean of all items."))
    return figures


def _history_figure(name: str, values: tuple[float, ...]) -> Figure:
    def paint(axes: Axes) -> None:
        axes.plot(range(1, len(values) + 1), values)
        axes.set(xlabel="epoch or iteration", ylabel=name)

    return draw(paint, name)


def _thin(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """At most _CURVE_POINTS places of a curve, evenly spaced, and the values there."""
    places = np.unique(np.linspace(0, len(values) - 1, min(len(values), _CURVE_POINTS)).round().astype(np.int64))
    return places + 1, values[places]


def _group_parts(groups: tuple[CollisionGroup, ...]) -> list[Part]:
    parts: list[Part] = []
    for group in groups:
        facts = [f"{group.num_items:,} items ({group.num_ads:,} ads)"]
        if group.similarity is not None:
            facts.append(f"similarity {group.similarity:.3f}")
        if group.distinct_embeddings is not None:
            facts.append(f"{group.distinct_embeddings:,} different embeddings")
        if group.shown is not None:
            facts.append(f"shown {group.shown:,} times")
        rows = [(item.item_id, "ad" if item.ad else "organic", "-" if item.shown is None else f"{item.shown:,}", item.text or "(no text)")
                for item in group.examples]
        more = group.num_items - len(group.examples)
        parts.append(Details(f"({', '.join(map(str, group.semantic_id))}): {', '.join(facts)}", [
            Table(("item", "kind", "times shown", "text"), rows, "llrl"), *([f"and {more:,} more"] if more else [])]))
    return parts


def _key_values(values: Mapping[str, Any]) -> Table:
    return Table(("setting", "value"), [(name, _plain(value)) for name, value in values.items()], "ll")


def _plain(value: Any) -> str:
    return ", ".join(f"{name}={_plain(inner)}" for name, inner in value.items()) if isinstance(value, dict) else str(value)
