"""The evaluation report as one self-contained HTML page; the numbers are report.py's, the looks gpr_dist/html.py's."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from gpr_dist.evaluation.report import half_width, label
from gpr_dist.html import FAINT, SERIES, Alarm, Details, Figure, Part, Section, Table, Tile, draw, render

Report = Mapping[str, Any]
_LEAST_TARGETS = 30


def report_page(report: Report) -> str:
    """Args: report: what launch/evaluate.py writes: `build_report`'s, and checkpoint, data, split, models, ks, level, values, mix ..."""
    models, ks = report["models"], report["ks"]
    result = next(iter(report["results"].values()))
    title = f"Evaluation of {report['checkpoint']}"
    left_out = " Items that the user had met before are no candidates." if report["exclude_seen"] else ""
    subtitle = (f"{report['split']} split of {report['data']}: {result['num_requests']:,} requests of {report['users']:,} users, "
                f"{result['num_targets']:,} ads. All rankers choose among the ads eligible at each request and see only what came strictly "
                f"before it.{left_out} ± and brackets: {report['level']:.0%} intervals, bootstrap over users.")
    sections = [
        Section("Rankers", [_ranking_table(report, [f"hitr@{k}" for k in ks] + [f"ndcg@{k}" for k in ks] + ["mrr"], "Per ad shown: "
                            "HitR@K is the share of ads among the first K items of their request; NDCG@K and MRR also count where."),
                            _bars_figure(report, f"hitr@{ks[-1]}"), _bars_figure(report, f"ndcg@{ks[0]}"), _curve_figure(report),
                            *_difference_parts(report), *_mix_parts(report)]),
        Section("Other readings of the same lists", _reading_tables(report)),
        *([Section("Value", _value_parts(report))] if report["values"] or report["value_order"] else []),
        Section("Segments", _segment_parts(report)),
        Section("Catalogue", _exposure_parts(report)),
        Section("Settings", [Details("Of this evaluation", [Table(("setting", "value"), list(_flatten(report["settings"])), "ll")])]),
    ]
    return render(title, subtitle, _alarms(report), _tiles(report), sections, f"{models[0]} is ahead of every baseline."
                  if report["differences"][models[0]] else "No illegal item.")


def _alarms(report: Report) -> list[Alarm]:
    alarms = [Alarm(f"{name} ranked {result['illegal_items']:,} items that were no candidates", "The ranker is broken: its other numbers "
                    "mean nothing.") for name, result in report["results"].items() if result["illegal_items"]]
    best, metric = report["models"][-1], f"hitr@{report['ks'][-1]}"
    for other, found in report["differences"][best].items():
        difference, low, high = found[metric]
        if high < 0:
            alarms.append(Alarm(f"{other} beats {best}: {label(metric)} differs by {difference:+.4f} [{low:+.4f}, {high:+.4f}]",
                                "What the baseline knows, the model has not learnt; see the segments for where."))
        elif low <= 0:
            alarms.append(Alarm(f"{best} is not surely better than {other}: {label(metric)} differs by {difference:+.4f} [{low:+.4f}, "
                                f"{high:+.4f}]", "Evaluate more users, or count it as level."))
    return alarms


def _tiles(report: Report) -> list[Tile]:
    model, ks = report["models"][-1], report["ks"]
    result, ends = report["results"][model], report["intervals"][model]
    wanted = [f"hitr@{k}" for k in ks] + [f"ndcg@{ks[0]}", "mrr", f"value@{ks[-1]}"]
    tiles = [Tile(label(metric), f"{result[metric]:.4f}", f"± {half_width(ends[metric]):.4f}, {model}") for metric in wanted
             if np.isfinite(result[metric])]
    return [*tiles, Tile("Could be ranked", f"{result['eligible_target_frac']:.1%}", "of the ads shown were candidates")]


def _ranking_table(report: Report, metrics: Sequence[str], caption: str) -> Table:
    rows = [(name, *(_spread(result[metric], report["intervals"][name][metric]) for metric in metrics))
            for name, result in report["results"].items()]
    return Table(("ranker", *map(label, metrics)), rows, "l", caption=caption)


def _spread(value: float, ends: Sequence[float]) -> str:
    return f"{value:.4f} ± {half_width(ends):.4f}" if np.isfinite(value) else "-"


def _bars_figure(report: Report, metric: str) -> Figure:
    names = list(report["results"])[::-1]
    values = np.array([report["results"][name][metric] for name in names])
    ends = np.array([report["intervals"][name][metric] for name in names])

    def paint(axes: Axes) -> None:
        colours = [SERIES[0] if name in report["models"] else FAINT for name in names]
        axes.barh(names, values, color=colours, height=0.62)
        axes.hlines(range(len(names)), ends[:, 0], ends[:, 1], color=SERIES[1], linewidth=2)
        axes.set(xlabel=label(metric), xlim=(0, None))
        axes.grid(axis="y", visible=False)

    return draw(paint, f"{label(metric)} per ad shown, with {report['level']:.0%} intervals. Coloured: the model's; grey: baselines.",
                height=0.9 + 0.36 * len(names))


def _curve_figure(report: Report) -> Figure:
    def paint(axes: Axes) -> None:
        for number, (name, curve) in enumerate(report["curves"].items()):
            axes.plot(range(1, len(curve) + 1), curve, label=name, color=SERIES[number % len(SERIES)],
                      linestyle="-" if name in report["models"] else "--")
        axes.set(xlabel="K", ylabel="HitR@K", xscale="log", ylim=(0, None))
        ticks = [k for k in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000) if k <= len(curve)]
        axes.set_xticks(ticks, ticks)
        axes.minorticks_off()
        axes.legend(fontsize=8)

    return draw(paint, "HitR@K for every K. A ranker whose line is above another's is better whatever the number of places.")


def _difference_parts(report: Report) -> list[Part]:
    parts: list[Part] = []
    metrics = [f"hitr@{k}" for k in report["ks"]] + [f"ndcg@{k}" for k in report["ks"]]
    for model in report["models"]:
        rows = [(other, *(f"{found[metric][0]:+.4f} [{found[metric][1]:+.4f}, {found[metric][2]:+.4f}]" for metric in metrics))
                for other, found in report["differences"][model].items()]
        if rows:
            parts.append(Table((f"{model} minus", *map(label, metrics)), rows, "l", caption="Differences, paired: both rankers over the "
                               "same draws of users. An interval that holds 0 says that the two may be level."))
    return parts


def _mix_parts(report: Report) -> list[Part]:
    if not report["mix"]:
        return []
    mix = report["mix"]
    rows = [(name, f"{weight:.2f}") for name, weight in mix["weights"].items()]
    return [Table(("part of the mix", "weight"), rows, "l", caption=f"Weights of the probabilities, chosen on {mix['num_requests']:,} "
                  f"requests of the validation split for {label(mix['metric'])} ({mix['reached']:.4f} there).")]


def _reading_tables(report: Report) -> list[Part]:
    k, last = report["ks"][0], report["ks"][-1]
    per_request = [f"{name}@{k}" for name in ("request_hitr", "request_recall", "request_ndcg")] + [f"request_recall@{last}", "request_mrr"]
    tables = [_ranking_table(report, per_request, "Per request, each counting once however many ads it showed: any hit, share of its "
                             "distinct ads, NDCG over the ideal order, reciprocal rank of the first hit.")]
    leaf = [f"leaf_hitr@{k}", f"leaf_hitr@{last}", f"leaf_ndcg@{k}", "leaf_mrr", f"leaf_request_ndcg@{k}"]
    tables.append(_ranking_table(report, leaf, "By semantic ID: an item counts as found when one of the same ID is. What is lost against "
                                 "the first table is lost among the items of one ID."))
    if any(np.isfinite(result[f"value@{k}"]) for result in report["results"].values()):
        tables.append(_ranking_table(report, [f"value@{each}" for each in report["ks"]],
                                     "Share of the logged value of all ads shown that the first K items capture."))
    return tables


def _value_parts(report: Report) -> list[Part]:
    parts: list[Part] = []
    if report["value_order"]:
        rows = [(name, *(_spread(found[metric][0], found[metric][1:]) for metric in ("ndcg", "opr"))) for name, found in
                report["value_order"].items()]
        requests = next(iter(report["value_order"].values()))["requests"]
        parts.append(Table(("order by", "nDCG", "OPR"), rows, "l", caption="Ads shown together, ordered by a ranker and compared with "
                           f"their logged values, {requests:,} requests with different values. OPR: share of pairs ordered alike, .5 = "
                           "chance; ads outside a ranker's list are tied."))
    values = report["values"]
    if values:
        rows = [(f"V_{level}", f"{bias:.3f}", f"{skill:.3f}", f"{rank:.3f}") for level, (bias, skill, rank) in
                enumerate(zip(values["bias"], values["skill"], values["rank_correlation"], strict=True))]
        parts += [Table(("value head", "bias", "skill", "rank correlation"), rows, "l", caption="Calibrated on validation. Bias: mean "
                        "prediction over mean logged value. Skill: share of the constant's squared error explained."),
                  _decile_figure(values["deciles"])]
    return parts


def _decile_figure(deciles: Sequence[Sequence[float]]) -> Figure:
    predicted, logged = ([each[column] for each in deciles] for column in (0, 1))

    def paint(axes: Axes) -> None:
        largest = max(*predicted, *logged)
        axes.plot([0, largest], [0, largest], color=FAINT, linestyle="--", linewidth=1)
        axes.plot(predicted, logged, marker="o", linestyle="-")
        axes.set(xlabel="predicted value", ylabel="logged value", xlim=(0, None), ylim=(0, None))

    return draw(paint, "Calibration of the value head by decile of its prediction. On the dashed line predictions are right.")


def _segment_parts(report: Report) -> list[Part]:
    k, names = report["ks"][0], list(report["results"])
    intro = {"history": "By length of the history", "item": "By how often the item was trained", "repeat": "Met before, or discovered",
             "scene": "By scene"}
    parts: list[Part] = [f"HitR@{k} of the ads of each segment. Figures leave out segments of fewer than {_LEAST_TARGETS} ads."]
    large = {kind: {name: found for name, found in report["segments"].get(kind, {}).items() if found["targets"] >= _LEAST_TARGETS}
             for kind in ("history", "item", "repeat")}
    parts += [_segment_figure(report, intro[kind], segments) for kind, segments in large.items() if segments]
    for kind, segments in report["segments"].items():
        rows = []
        for segment, found in segments.items():
            values = [found[name][f"hitr@{k}"] for name in names]
            rows.append((segment, f"{found['targets']:,}", *(_spread(value[0], value[1:]) for value in values)))
        parts.append(Details(intro.get(kind, f"By {kind}"), [Table((kind, "ads", *names), rows, "l")]))
    return parts


def _segment_figure(report: Report, title: str, segments: Mapping[str, Any]) -> Figure:
    k, names = report["ks"][0], list(report["results"])
    width = 0.8 / len(names)

    def paint(axes: Axes) -> None:
        for number, name in enumerate(names):
            found = np.array([segment[name][f"hitr@{k}"] for segment in segments.values()])
            places = np.arange(len(segments)) + (number - (len(names) - 1) / 2) * width
            axes.bar(places, found[:, 0], width, label=name, color=SERIES[number % len(SERIES)],
                     alpha=1.0 if name in report["models"] else 0.55)
            axes.vlines(places, found[:, 1], found[:, 2], color=FAINT, linewidth=1)
        short = [f"{re.split(' events| training|:', name)[0]}\n{found['targets']:,} ads" for name, found in segments.items()]
        axes.set_xticks(range(len(segments)), short, fontsize=8)
        axes.set(ylabel=f"HitR@{k}", ylim=(0, None))
        axes.grid(axis="x", visible=False)
        axes.legend(fontsize=7)

    return draw(paint, f"{title}, with intervals.")


def _exposure_parts(report: Report) -> list[Part]:
    k, exposure = report["ks"][0], report["exposure"]
    known = any(found["advertisers"] is not None for found in exposure.values())
    columns = ["ranker", "distinct items", "coverage", "Gini", "top 1 % has", "new items have"]
    columns += ["advertisers", "largest has"] if known else []
    rows = [(name, f"{found['items']:,}", f"{found['coverage']:.1%}", f"{found['gini']:.3f}", f"{found['top_share']:.1%}",
             f"{found['new_share']:.2%}", *([f"{found['advertisers']:,}", f"{found['top_advertiser_share']:.1%}"] if known else []))
            for name, found in exposure.items()]

    def paint(axes: Axes) -> None:
        for number, (name, found) in enumerate(exposure.items()):
            axes.plot(np.linspace(0, 100, len(found["lorenz"])), 100 * np.array(found["lorenz"]), label=name,
                      color=SERIES[number % len(SERIES)], linestyle="-" if name in report["models"] else "--")
        axes.set(xlabel="% of the candidates, least shown first", ylabel="% of the exposures")
        axes.legend(fontsize=8)

    return [Table(columns, rows, "l", caption=f"What the first {k} items of all requests would show. Coverage: share of the candidates "
                  "shown at all. Gini: 0 = all alike, 1 = one item has everything. New items: never trained."),
            draw(paint, "Concentration: the further a line bends to the corner, the fewer items share the exposures.")]


def _flatten(settings: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    rows = []
    for name, value in settings.items():
        rows += _flatten(value, f"{prefix}{name}.") if isinstance(value, Mapping) else [(f"{prefix}{name}", str(value))]
    return rows
