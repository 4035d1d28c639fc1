"""Report: what changed since the run date before, by figures that the runs of both dates recorded."""

from collections.abc import Mapping
from datetime import date
from typing import Any

from markupsafe import Markup

from spark_jobs.reporting.coverage import FUNNEL
from spark_jobs.reporting.day_tables import Day
from spark_jobs.reporting.page import PageSection, Table, figure, link

ROWS_RATIO = 2.0  # warn if two dates' row counts differ by more than this factor: weekdays differ less than that
MEAN_RATIO = 1.25  # the same for the mean label and the mean weight
COVERAGE_FALL = 0.05
QUARANTINE_RISE = 0.01
LASTING = {
    "encoder_version": "embeddings, semantic IDs and models are all new",
    "sid_version": "the labels of the two dates belong to different semantic IDs",
    "model_version": "the anchors of all users are new",
}
"""Versions that stay for days, and what a new one means."""
FREE = ("anchor_requests", "calibrator_version", "preranker_version")
"""Never a reason to warn: the users missing from the cache fall from thousands to none on a good day, and these
artifacts are made daily: new ones are no news."""


def feed_figures(details: Mapping[str, Any]) -> dict[str, float | None]:
    """Coverage and means that the feed's commit recorded; None where there are no such rows."""
    exposed, labeled = details.get("exposed", 0), details.get("labeled", details.get("labelled", 0))  # as once spelled
    unexposed = labeled + sum(details.get("left_out", {}).values())
    return {
        "coverage": labeled / unexposed if unexposed else None,
        "mean pseudo_label": details["pseudo_label_sum"] / labeled if labeled else None,
        # The sum holds a weight of one for every exposed pair.
        "mean weight": (details["weight_sum"] - exposed) / labeled if labeled else None,
    }


def figures(day: Day, of: date) -> dict[str, Any]:
    """What the run of the date `of` recorded: name -> rows, share, mean or version; None where it did not."""
    details = day.feeds.get(of, {})
    versions = details.get("versions", {})
    watched = {r["monitor"]: r["value"] for r in day.records("monitors", of)}
    return {
        **{name: day.rows(name, of) for name, _ in FUNNEL},
        **feed_figures(details),
        "quarantine_share": watched.get("quarantine_share"),
        "encoder_version": day.encoder_version(versions.get("sid_version", "")),
        **{kind: versions.get(kind) for kind in ("sid_version", "model_version", "calibrator_version")},
        "preranker_version": day.preranker_version(of),
    }


def section(day: Day) -> PageSection:
    """The figures of the date next to those of the run date before it."""
    previous = max((d for d in day.feeds if d < day.date), default=None)
    return changes(figures(day, day.date), figures(day, previous) if previous else {}, day.date, previous)


def changes(now: Mapping[str, Any], before: Mapping[str, Any], day: date, previous: date | None) -> PageSection:
    """What `warnings` found, and the figures of both dates side by side.

    Args:
        now, before: name -> rows (int), mean or share (float), version (str) or None; in the order of the page.
        previous: the run date before `day`; None when there is none.
    """
    title = "What changed"
    if previous is None:
        return PageSection(title, ["No earlier run date has a feed, so there is nothing to compare with."])
    found = warnings(now, before)
    lineage = Markup("What was made of what: {}.").format(link("#versions-and-lineage", "versions and lineage"))
    text = [f"Compared with {previous}, the run date before.", *(found or ["Nothing moved beyond its bound."]), lineage]
    rows = [(name, value, before.get(name), _change(name, value, before.get(name))) for name, value in now.items()]
    columns = ("figure", day.isoformat(), previous.isoformat(), "change")
    tables = [Table(columns, [r for r in rows if ("version" in r[0]) == versions]) for versions in (False, True)]
    return PageSection(title, text, tables, warnings=found)


def warnings(now: Mapping[str, Any], before: Mapping[str, Any]) -> list[str]:
    """A sentence for each figure that moved beyond its bound; none for what either date lacks."""
    return [text for name, value in now.items() if (text := _warning(name, value, before.get(name)))]


def _warning(name: str, now: Any, before: Any) -> str:
    if now is None or before is None or now == before or name in FREE:
        return ""
    if name in LASTING:
        return f"{name} is {now}, was {before}: {LASTING[name]}."
    if name == "coverage":
        moved = now < before - COVERAGE_FALL
    elif name == "quarantine_share":
        moved = now > before + QUARANTINE_RISE
    else:
        low, high = sorted((now, before))
        moved = high > low * (ROWS_RATIO if isinstance(now, int) else MEAN_RATIO)
    return f"{name} is {figure(now)}, was {figure(before)}." if moved else ""


def _change(name: str, now: Any, before: Any) -> str | None:
    if now is None or before is None:
        return None
    if isinstance(now, str) or now == before:
        return "same" if now == before else "new, as most days" if name in FREE else "changed"
    return f"{now / before - 1:+.1%}" if before else "from none"
