"""Report: the pre-ranker trained on the date's feed, judged on the day after."""

from collections.abc import Sequence
from typing import Any

from spark_jobs.reporting.day import Day
from spark_jobs.reporting.page import PageSection, Table


def section(day: Day) -> PageSection:
    """The evaluations of the date, models side by side."""
    title = "Pre-ranker, judged on the day after"
    found = day.records("evaluations", day.date)  # one row per variant, seed, slice and metric
    if not found:
        return PageSection(title, ["Nothing was judged: the day after has no impressions yet."])
    text = (
        "Brackets hold the 95 % interval, its mean over seeds where there are several. Read HR and NDCG together with "
        "the candidate-set size."
    )
    return PageSection(title, [text], [compare(found)])


def compare(evaluations: Sequence[dict[str, Any]]) -> Table:
    """One row per slice and metric, models side by side; an undefined figure shows its reason."""
    models = sorted({r["model"] for r in evaluations})
    groups: dict[tuple[str, str], dict[str, list[dict[str, Any]]]] = {}
    for row in evaluations:
        groups.setdefault((row["slice"], row["metric"]), {}).setdefault(row["model"], []).append(row)
    rows = []
    for (part, metric), by_model in sorted(groups.items()):
        one = next(iter(by_model.values()))[0]
        cells = [_figures(by_model.get(m, [])) for m in models]
        # An absent figure shows its own reason.
        note = next((r["note"] for each in by_model.values() for r in each if r["value"] is not None), "")
        rows.append((part, metric, *cells, one["candidate_set_size"], one["rows"], note))
    return Table(("slice", "metric", *models, "candidate-set size", "pairs", "note"), rows)


def _figures(rows: Sequence[dict[str, Any]]) -> str:
    known = [r for r in rows if r["value"] is not None]
    if not known:
        return f"absent: {rows[0]['note']}" if rows else "absent: not measured"

    def mean(name: str) -> float | None:
        values = [r[name] for r in known]
        return None if None in values else sum(values) / len(values)

    low, high = mean("low"), mean("high")
    interval = "" if low is None or high is None else f" [{low:.4f}, {high:.4f}]"
    return f"{mean('value'):.4f}{interval}" + (f", {len(known)} seeds" if len(known) > 1 else "")
