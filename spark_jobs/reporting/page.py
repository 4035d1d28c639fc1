"""The report's page: one HTML file without any request, every value escaped."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

ALARMS = ("warn", "fail", "failed", "changed")
# Fingerprint and origin come first: the planner looks for them in the first 2,000 bytes.
_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="gpl-fingerprint" content="{{ fingerprint }}">
<meta name="gpl-origin" content="{{ origin }}">
<meta name="viewport" content="width=device-width, initial-scale=1"><meta name="color-scheme" content="light dark">
<title>{{ title }}</title>
<link rel="icon" href="data:,">
<style>
:root { --ink: #1c2024; --soft: #5c6670; --line: #d5dae0; --ground: #fff; --warn: #8a4b00;
  --warn-ground: #fff3df; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e8ec; --soft: #9aa5b0; --line: #3a424a; --ground: #15181b; --warn: #ffc97a;
    --warn-ground: #3a2a10; }
}
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--ground); max-width: 62rem;
  margin: 0 auto; padding: 1rem 1rem 4rem; }
h1 { font-size: 1.5rem; margin: .5rem 0; } h2 { font-size: 1.15rem; margin: 2.2rem 0 .4rem; }
summary { font-size: 1.15rem; font-weight: bold; margin: 2.2rem 0 .4rem; cursor: pointer; }
p, figcaption { max-width: 46rem; } .soft, figcaption, th { color: var(--soft); }
.banner { background: var(--warn-ground); color: var(--warn); padding: .5rem .8rem; border-radius: .3rem;
  margin: .5rem 0; }
.scroll { overflow-x: auto; } figure { margin: .5rem 0; } svg { max-width: 100%; height: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; margin: .5rem 0; }
th, td { text-align: left; padding: .2rem .8rem .2rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
th { font-weight: 500; } td.n, th.n { text-align: right; }
th, td.n, td.word, td:first-child { white-space: nowrap; } td { overflow-wrap: break-word; max-width: 32rem; }
td.long { min-width: 11rem; overflow-wrap: anywhere; } td.alarm { color: var(--warn); font-weight: 600; }
figcaption { position: sticky; left: 0; }
@media (max-width: 40rem) { svg { max-width: none; } }
</style></head><body>
<h1>{{ title }}</h1>
{% for text in banners %}<div class="banner">{{ text }}</div>
{% endfor -%}
{% for section in sections %}
{% if section.folded %}<details><summary>{{ section.title }}</summary>{% else %}<h2>{{ section.title }}</h2>{% endif %}

{% for text in section.text %}<p>{{ text }}</p>
{% endfor -%}
{% for table in section.tables %}<div class="scroll"><table>
{% set numeric = table.numeric %}
<thead><tr>
{%- for c in table.columns %}<th{% if loop.index0 in numeric %} class="n"{% endif %}>{{ c }}</th>{% endfor -%}
</tr></thead>
<tbody>
{% for row in table.rows %}<tr>
{%- for value in row %}<td{{ value|style(loop.index0 in numeric) }}>{{ value|figure }}</td>{% endfor -%}
</tr>
{% endfor %}</tbody></table></div>
{% endfor -%}
{% for plot in section.plots %}<figure class="scroll">{{ plot.svg }}<figcaption>{{ plot.caption }}</figcaption></figure>
{% endfor -%}
{% if section.folded %}</details>{% endif %}

{% endfor %}
<p class="soft">Made by run {{ run_id }}. Only aggregates were read.</p>
</body></html>
"""


@dataclass(frozen=True)
class Table:
    """A table of the page; columns of numbers are right-aligned."""

    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]

    @property
    def numeric(self) -> set[int]:
        """Columns that hold numbers only."""
        return {
            i for i in range(len(self.columns))
            if any(isinstance(r[i], int | float) for r in self.rows)
            and all(r[i] is None or isinstance(r[i], int | float) for r in self.rows)
        }  # fmt: skip


@dataclass(frozen=True)
class Plot:
    """An SVG made by `plots`, and its caption."""

    svg: Markup
    caption: str


@dataclass(frozen=True)
class PageSection:
    """One part of the page: sentences, then tables, then plots. A folded one shows only its title until it is opened.

    `warnings` stand at the top of the page.
    """

    title: str
    text: Sequence[str] = ()
    tables: Sequence[Table] = ()
    plots: Sequence[Plot] = ()
    folded: bool = False
    warnings: Sequence[str] = ()


def figure(value: Any) -> str:
    """A number as people read it: with thousands separators, or four significant digits; an absent one as a dash."""
    if value is None:
        return "–"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}"


def style(value: Any, numeric: bool) -> Markup:
    """The class of a cell: numbers are right-aligned, long text wraps, versions do not break, alarms stand out."""
    if numeric:
        return Markup(' class="n"')
    if value in ALARMS:
        return Markup(' class="alarm"')
    text = str(value)
    if len(text) > (24 if " " in text else 40):
        return Markup(' class="long"')
    return Markup(' class="word"' if "-" in text and " " not in text else "")


def render(
    *, title: str, fingerprint: str, origin: str, run_id: str, banners: Sequence[str], sections: Sequence[PageSection]
) -> str:  # fmt: skip
    """The whole page."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    environment.filters |= {"figure": figure, "style": style}
    return environment.from_string(_PAGE).render(
        title=title, fingerprint=fingerprint, origin=origin, run_id=run_id, banners=banners, sections=sections
    )
