"""The report as a site: an index over dates, the data dictionary, and links between neighboring dates."""

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import date
from typing import Any

from markupsafe import Markup
from pyspark.sql import functions as F

from gpl_core.contracts.contract import all_contracts
from gpl_core.lakehouse.lake import Lake
from gpl_core.lakehouse.storage import filesystem, read_text, write_whole
from gpl_core.lakehouse.views import all_views
from gpl_core.prerank.comparison import ALL_SEEDS, BASELINE, OURS, difference_text, ordered_slices
from spark_jobs.reporting import plots
from spark_jobs.reporting.changes import feed_figures
from spark_jobs.reporting.day_tables import Day
from spark_jobs.reporting.page import DICTIONARY, INDEX, PageSection, Plot, Table, figure, link

_MOST_DATES = 400  # the newest ones, on the index
_PAGE = re.compile(r"(\d{4}-\d\d-\d\d)\.html")
_LINKS = re.compile(r'<nav class="dates".*?</nav>', re.S)


def pages(lake: Lake) -> set[date]:
    """The dates that have a page."""
    fs, folder = filesystem(lake.path("reports"))
    names = [path.rsplit("/", 1)[-1] for path in fs.ls(folder, detail=False)] if fs.exists(folder) else []
    return {date.fromisoformat(found[1]) for name in names if (found := _PAGE.fullmatch(name))}


def neighbors(day: date, known: Iterable[date]) -> tuple[date | None, date | None]:
    """The nearest date before `day` and the nearest one after it."""
    known = set(known)
    return max((d for d in known if d < day), default=None), min((d for d in known if d > day), default=None)


def links(day: date | None, known: Iterable[date]) -> Markup:
    """The site's links, on the page of `day` (None: the index or the dictionary) with its neighbors among `known`."""
    before, after = neighbors(day, known) if day else (None, None)
    found = [link(INDEX, "All dates")]
    found += [link(f"{before}.html", f"← {before}")] if before else []
    found += [link(f"{after}.html", f"{after} →")] if after else []
    found.append(link(DICTIONARY, "Data dictionary"))
    return Markup('<nav class="dates" aria-label="Pages">{}</nav>').format(Markup("\n").join(found))


def link_neighbors(lake: Lake, day: date) -> None:
    """Name `day` on the pages before and after it, which may be from when it had none."""
    known = pages(lake) | {day}
    for other in filter(None, neighbors(day, known)):
        path = lake.path("reports", f"{other}.html")
        text = read_text(path) or ""
        if (found := _LINKS.search(text)) and found[0] != (linked := str(links(other, known))):
            write_whole(path, (text[: found.start()] + linked + text[found.end() :]).encode())


@dataclass(frozen=True)
class Line:
    """One date on the index; None where there is no figure."""

    day: date
    rows: int | None
    figures: dict[str, float | None]
    difference: str
    alarms: str


FIGURES = {
    "mean label": "of the feed's unexposed rows",
    "coverage": "share of unexposed rows with a label",
    "label drift": "population stability index of the labels against the day before",
    "calibration error": "the expected one on uniformly exposed impressions, where there are 1,000",
    f"AUC {BASELINE}": "the pre-ranker trained on exposed rows alone, judged on the day after",
    f"AUC {OURS}": "the one trained with pseudo-labels too, judged on the same rows",
}


def lines(day: Day, warnings: Sequence[str]) -> tuple[list[Line], str]:
    """The newest dates with a feed, oldest first; and the slice on which the pre-rankers are compared.

    warnings: of the page of `day`; those of other dates are on record in job_runs.
    """
    dates = sorted(day.feeds)[-_MOST_DATES:] or [day.date]
    watched = {(r["dt"], r["monitor"]): r["value"] for r in day.records("monitors", dates[0], dates[-1])}
    judged = [r for r in day.records("evaluations", dates[0], dates[-1])
              if r["seed"] == ALL_SEEDS and r["metric"] == "auc"]  # fmt: skip
    part = ordered_slices(judged)[0] if judged else ""
    auc = {(r["dt"], r["model"], r["against"]): r for r in judged if r["slice"] == part}
    alarms = {**_recorded(day, dates[0]), day.date: warnings}
    found = []
    for d in dates:
        of = {model: auc.get((d, model, ""), {}).get("value") for model in (BASELINE, OURS)}
        means = feed_figures(day.feeds.get(d, {}))
        values = (means["mean pseudo_label"], means["coverage"], watched.get((d, "label_drift")),
                  watched.get((d, "calibration_error")), of[BASELINE], of[OURS])  # fmt: skip
        difference = difference_text(auc.get((d, OURS, BASELINE)))
        found.append(Line(d, day.rows("training_feed", d), dict(zip(FIGURES, values)), difference,
                          "; ".join(alarms.get(d, ()))))  # fmt: skip
    return found, part


def _recorded(day: Day, first: date) -> dict[date, list[str]]:
    """Banners of the newest page of each date from `first` on, by job_runs."""
    if not day.context.has("job_runs"):
        return {}
    done = day.step.read("job_runs").where("step = 'report' AND status = 'done'")
    rows = (
        done.where(F.col("run_date") >= F.lit(first))
        .groupBy("run_date")
        .agg(F.max_by("details", "started_at").alias("details"))
        .collect()
    )
    return {r["run_date"]: _banners(json.loads(r["details"])) for r in rows}


def _banners(details: dict[str, Any]) -> list[str]:
    """Of a report's details; earlier releases had them under `warnings`."""
    return list(details.get("banners", details.get("warnings", ())))


def overview(found: Sequence[Line], part: str, known: set[date]) -> list[PageSection]:
    """Sections of the index: figures over dates, then the dates, newest first."""
    measured = [name for name in FIGURES if any(n.figures[name] is not None for n in found)]
    trends = [plots.trend(name, [(n.day.isoformat(), n.figures[name]) for n in found], figure) for name in measured]
    words = [f"{name[0].upper()}{name[1:]}: {what}." for name, what in FIGURES.items()]
    words += [f"AUC is on the slice {part}, the largest."] if part else []
    lacking = [name for name in FIGURES if name not in measured]
    words += [f"Not measured on any date: {', '.join(lacking)}."] if lacking else []
    caption = f"Above each line its newest value. {' '.join(words)}"
    columns = ("date", "warnings", "feed rows", *measured, f"{OURS} - {BASELINE}")
    rows: list[tuple[Any, ...]] = [
        (link(f"{n.day}.html", n.day.isoformat()) if n.day in known else n.day.isoformat(), n.alarms or "none", n.rows,
         *(n.figures[name] for name in measured), n.difference)
        for n in reversed(found)
    ]  # fmt: skip
    text = "Warnings are at the top of each date's page. Brackets show 95% intervals."
    return [PageSection("Over the dates", plots=[Plot(trends, caption)]),
            PageSection("Dates", [text], [Table(columns, rows)])]  # fmt: skip


def dictionary() -> list[PageSection]:
    """Every column of every table and view, from contracts and views: a section per table."""
    columns = ("column", "type", "unit", "meaning")
    found = [
        PageSection(name, [f"{c.description}. Written by {c.owner}; {c.grain}."],
                    [Table(columns, [(x.name, x.type, x.unit, x.comment) for x in c.columns])])
        for name, c in all_contracts().items()
    ]  # fmt: skip
    found += [
        PageSection(view.name, [f"A view. {view.description}"], [Table(("column", "meaning"), view.columns)])
        for view in sorted(all_views().values(), key=lambda v: v.name)
    ]
    return found
