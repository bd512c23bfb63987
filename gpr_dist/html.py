"""One self-contained HTML page from tiles, alarms, tables and figures: what every report of this project looks like.

Owns the looks (light and dark, no script, nothing fetched from a network) and escapes every text; what a page says belongs to its
report. Figures are drawn with matplotlib in stand-in colours, which become CSS variables, so that one SVG serves both schemes.
"""

import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jinja2
from markupsafe import Markup

SERIES = tuple(f"#0000a{digit}" for digit in range(1, 7))
"""Colours of up to six series; give them to matplotlib, the page shows its own."""
INK, FAINT, ALARM = "#0000b1", "#0000b2", "#0000b3"
_STAND_INS = {**{colour: f"var(--series-{number})" for number, colour in enumerate(SERIES, 1)}, INK: "var(--ink)",
              FAINT: "var(--faint)", ALARM: "var(--alarm)"}
_STYLE = {
    "svg.fonttype": "none", "svg.hashsalt": "", "font.size": 9, "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": FAINT,
    "xtick.color": FAINT, "ytick.color": FAINT, "xtick.labelcolor": INK, "ytick.labelcolor": INK, "grid.color": FAINT, "grid.alpha": 0.35,
    "grid.linewidth": 0.6, "axes.grid": True, "axes.axisbelow": True, "axes.spines.top": False, "axes.spines.right": False,
    "lines.linewidth": 1.8, "legend.frameon": False,
}


@dataclass(frozen=True)
class Alarm:
    """Something a person must look at: what was found, and what to do."""

    found: str
    action: str


class Tile(NamedTuple):
    """A headline number."""

    label: str
    value: str
    note: str = ""


class Mark(str):
    """A cell in the colour of alarms."""

    marked = True


@dataclass(frozen=True)
class Table:
    """Rows of texts, formatted by the caller."""

    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]
    align: str = ""
    """a letter per column, l or r; missing ones are r"""
    caption: str = ""
    kind: str = field(default="table", init=False)

    def __post_init__(self) -> None:
        assert all(len(row) == len(self.columns) for row in self.rows), (self.columns, self.rows[:1])


@dataclass(frozen=True)
class Figure:
    """A drawing; see `draw`."""

    svg: str
    caption: str
    kind: str = field(default="figure", init=False)


@dataclass(frozen=True)
class Details:
    """Parts behind a line that opens them."""

    title: str
    parts: Sequence["Part"]
    kind: str = field(default="details", init=False)


Part = str | Table | Figure | Details
"""A string is a paragraph."""


class Section(NamedTuple):
    """A heading and what is under it; neighbouring figures share a row."""

    title: str
    parts: Sequence[Part]


def draw(paint: Callable[[Any], None], caption: str, width: float = 5.4, height: float = 3.1) -> Figure:
    """A plot as inline SVG; the same input gives the same bytes.

    Args:
        paint: draws on the matplotlib axes it is given, in matplotlib's default colours or `SERIES`, `INK`, `FAINT` and `ALARM`.
        caption: what is seen and how to read it.
        width, height: inches; the page scales the drawing down where it is narrower.
    """
    import matplotlib  # here: jobs that draw nothing need not wait for it
    from matplotlib.figure import Figure as Canvas

    style = {**_STYLE, "axes.prop_cycle": matplotlib.cycler(color=SERIES), "svg.hashsalt": caption}  # ids differ between a page's drawings
    with matplotlib.rc_context(style):
        canvas = Canvas(figsize=(width, height), layout="constrained")
        paint(canvas.subplots())
        buffer = io.StringIO()
        canvas.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg"):], flags=re.DOTALL)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)  # names nothing refers to, the same in every drawing
    svg = re.sub("|".join(_STAND_INS), lambda match: _STAND_INS[match[0]], svg)
    return Figure(svg, caption)


def render(title: str, subtitle: str, alarms: Sequence[Alarm], tiles: Sequence[Tile], sections: Sequence[Section],
           all_clear: str = "No alarms.") -> str:
    """The page as text, alarms first. Every string is escaped; only figures made by `draw` are markup."""
    return _PAGE.render(title=title, subtitle=subtitle, alarms=alarms, tiles=tiles, sections=sections, all_clear=all_clear, Markup=Markup)


_PAGE = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined).from_string("""\
{% macro show(parts) %}
{% for part in parts %}
{% if part is string %}
<p>{{ part }}</p>
{% elif part.kind == "figure" %}
{% if loop.first or loop.previtem is string or loop.previtem.kind != "figure" %}<div class="figures">{% endif %}
<figure>{{ Markup(part.svg) }}<figcaption>{{ part.caption }}</figcaption></figure>
{% if loop.last or loop.nextitem is string or loop.nextitem.kind != "figure" %}</div>{% endif %}
{% elif part.kind == "table" %}
<div class="scroll"><table>{% if part.caption %}<caption>{{ part.caption }}</caption>{% endif %}
<thead><tr>
{% for name in part.columns %}<th class="{{ part.align[loop.index0:loop.index] or 'r' }}">{{ name }}</th>{% endfor %}</tr></thead>
<tbody>
{% for row in part.rows %}
<tr>
{% for cell in row %}
<td class="{{ part.align[loop.index0:loop.index] or 'r' }}{{ ' marked' if cell.marked is defined }}">{{ cell }}</td>
{% endfor %}
</tr>
{% endfor %}
</tbody></table></div>
{% else %}
<details><summary>{{ part.title }}</summary>
{{ show(part.parts) }}
</details>
{% endif %}
{% endfor %}
{% endmacro %}
<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark"><title>{{ title }}</title>
<style>
:root { --page: #f6f7f9; --card: #fff; --ink: #1d2530; --soft: #5b6675; --faint: #aab2bd; --line: #e2e6eb; --alarm: #b3261e;
  --alarm-card: #fdecea; --good: #1b6e3c; --good-card: #e8f5ec; --series-1: #2563c9; --series-2: #d2691e; --series-3: #1a8f74;
  --series-4: #8a4fbf; --series-5: #b8436d; --series-6: #7a7f1c; }
@media (prefers-color-scheme: dark) { :root { --page: #12161c; --card: #1b2129; --ink: #e6eaf0; --soft: #a0abb9; --faint: #66717f;
  --line: #2d3641; --alarm: #ff9a91; --alarm-card: #3a1d1b; --good: #7fd8a0; --good-card: #172d20; --series-1: #6ea8ff;
  --series-2: #f5a15b; --series-3: #4fd1b0; --series-4: #c39bf0; --series-5: #f08fb1; --series-6: #c9ce5a; } }
* { box-sizing: border-box }
body { margin: 0; background: var(--page); color: var(--ink); font: 15px/1.5 system-ui, "Segoe UI", "Helvetica Neue", sans-serif }
main { max-width: 1160px; margin: 0 auto; padding: 2rem 1.25rem 4rem }
h1 { margin: 0; font-size: 1.7rem; line-height: 1.25 } h2 { margin: 2.4rem 0 .6rem; font-size: 1.2rem }
.subtitle, figcaption, caption, .note { color: var(--soft) } .subtitle { margin: .2rem 0 1.4rem; overflow-wrap: anywhere }
.message { border-left: 4px solid; border-radius: 6px; padding: .65rem 1rem; margin: .5rem 0 }
.alarm { border-color: var(--alarm); background: var(--alarm-card) } .alarm b { color: var(--alarm) }
.good { border-color: var(--good); background: var(--good-card); color: var(--good) }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(165px, 1fr)); gap: .75rem; margin: 1.25rem 0 }
.tile, figure, details, .scroll { background: var(--card); border: 1px solid var(--line); border-radius: 8px }
.tile { padding: .75rem 1rem } .tile div:first-child { color: var(--soft); font-size: .86rem }
.value { font-size: 1.65rem; font-weight: 600; line-height: 1.3; font-variant-numeric: tabular-nums } .note { font-size: .82rem }
.figures { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 420px), 1fr)); gap: .75rem; margin: .75rem 0 }
figure { margin: 0; padding: .75rem } figure svg { display: block; width: 100%; height: auto }
svg text { font-family: system-ui, "Segoe UI", "Helvetica Neue", sans-serif !important }
figcaption { font-size: .86rem; padding: .3rem .3rem 0 }
.scroll { overflow-x: auto; margin: .75rem 0 } table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums }
caption { text-align: left; padding: .6rem .8rem .2rem; font-size: .86rem } th, td { padding: .38rem .8rem; vertical-align: top }
th { font-weight: 600; color: var(--soft); border-bottom: 1px solid var(--line); vertical-align: bottom }
tbody tr + tr td { border-top: 1px solid var(--line) }
.l { text-align: left } td.l { overflow-wrap: break-word } .marked { color: var(--alarm); font-weight: 600 }
.r { text-align: right } td.r { white-space: nowrap }
details { margin: .5rem 0; padding: 0 .9rem } summary { cursor: pointer; padding: .5rem 0; overflow-wrap: anywhere }
details[open] { padding-bottom: .4rem }
details .scroll { border: 0; margin: 0 } details th, details td { padding: .25rem .5rem } p { max-width: 75ch }
</style></head><body><main>
<h1>{{ title }}</h1>
<p class="subtitle">{{ subtitle }}</p>
{% for alarm in alarms %}
<div class="message alarm" role="alert"><b>{{ alarm.found }}</b><br>{{ alarm.action }}</div>
{% else %}
<div class="message good">{{ all_clear }}</div>
{% endfor %}
<div class="tiles">
{% for tile in tiles %}
<div class="tile"><div>{{ tile.label }}</div><div class="value">{{ tile.value }}</div><div class="note">{{ tile.note }}</div></div>
{% endfor %}
</div>
{% for section in sections %}
<section><h2>{{ section.title }}</h2>
{{ show(section.parts) }}
</section>
{% endfor %}
</main></body></html>
""")
