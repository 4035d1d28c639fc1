"""A page of the report: one HTML file without any request, every value escaped."""

import base64
import csv
import hashlib
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup, escape

INDEX, DICTIONARY = "index.html", "dictionary.html"
ALARMS = ("warn", "fail", "failed", "changed")
# A spreadsheet takes a cell that begins so for a formula.
_FORMULA = re.compile(r"[=+\-@\t\r]")
_DATED = re.compile(r"\b\d{4}-\d\d-\d\d(-[0-9a-f]{10})?\b")
_SHORT, _SENTENCE = 24, 32  # characters of a text that stays on one line, and from which on it is a sentence
_FEW = 7  # columns


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

    @property
    def wordy(self) -> bool:
        """Whether a narrow screen shows a row's cells below each other: there are many, or one holds a sentence."""
        texts = (text for row in self.rows for text in map(_plain, row))
        return len(self.columns) > _FEW or any(len(text) > _SENTENCE and " " in text for text in texts)


@dataclass(frozen=True)
class Plot:
    """Panels made by `plots`, and their caption."""

    panels: Sequence[Markup]
    caption: str


@dataclass(frozen=True)
class PageSection:
    """One part of the page: sentences, then tables, then plots. `warnings` stand at the top of the page."""

    title: str
    text: Sequence[str] = ()
    tables: Sequence[Table] = ()
    plots: Sequence[Plot] = ()
    warnings: Sequence[str] = ()
    told_by: str = ""  # the step that has already issued these warnings, so the report does not repeat them

    @property
    def anchor(self) -> str:
        """What a link names: the title in lower case, words joined by hyphens."""
        return re.sub(r"[^a-z0-9_]+", "-", self.title.lower()).strip("-")


def link(target: str, text: str) -> Markup:
    """A link to another page of the site, or within this one."""
    return Markup('<a href="{}">{}</a>').format(target, text)


def whole(text: str) -> Markup:
    """Text in which dates, and versions that begin with one, are not broken at the end of a line."""
    if isinstance(text, Markup):
        return text
    return Markup(_DATED.sub(r'<span class="word">\g<0></span>', str(escape(text))))


def figure(value: Any) -> str:
    """A number formatted for reading: with thousands separators or four significant digits; a dash if absent."""
    if value is None:
        return "–"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return value if isinstance(value, Markup) else str(value)
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}"


def style(value: Any, numeric: bool) -> Markup:
    """The class of a cell: numbers stand right, long text wraps, versions and intervals do not, alarms are bold."""
    if numeric:
        return Markup(' class="n"')
    if value in ALARMS:
        return Markup(' class="alarm"')
    text = _plain(value)
    if len(text) > (_SHORT if " " in text else 40):
        return Markup(' class="long"')
    return Markup(' class="word"' if ("-" in text and " " not in text) or text.endswith("]") else "")


def csv_link(table: Table) -> str:
    """The table as CSV in a `data:` link, numbers with all their digits; no cell is a formula to a spreadsheet."""
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows([table.columns, *([_cell(v) for v in row] for row in table.rows)])
    # Only what a link cannot hold is encoded: `gpl forget` looks for ids in the page's text.
    return "data:text/csv;charset=utf-8," + re.sub(r"[%#\x00-\x1f]", lambda m: f"%{ord(m[0]):02X}", out.getvalue())


def _plain(value: Any) -> str:
    return value.striptags() if isinstance(value, Markup) else str(value)


def _cell(value: Any) -> Any:
    if value is None or isinstance(value, int | float):
        return value
    text = _plain(value)
    return f"'{text}" if _FORMULA.match(text) and not re.fullmatch(r"[+-][\d.,]+%?", text) else text


def render(
    *, title: str, marks: Mapping[str, str], dates: Markup, banners: Sequence[str], sections: Sequence[PageSection],
    note: str,
) -> str:  # fmt: skip
    """The whole page.

    Args:
        marks: what the planner looks for in the first 2,000 bytes, as meta name -> content.
        dates: the links to other pages of the site.
    """
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    environment.filters |= {"figure": figure, "style": style, "csv": csv_link, "whole": whole}
    folder = resources.files("spark_jobs.reporting")
    page, script = ((folder / name).read_text(encoding="utf-8") for name in ("page.html", "page.js"))
    return environment.from_string(page).render(
        title=title, marks=marks, dates=dates, banners=banners, sections=sections, note=note,
        # The page's policy lets this script run, and nothing else.
        script=Markup(script), script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )  # fmt: skip
