"""Report: the pre-ranker trained on the date's feed, judged on the day after."""

from collections.abc import Sequence
from typing import Any

from gpl_core.prerank.comparison import ALL_SEEDS, difference_text, figure_text, ordered_slices, too_small
from spark_jobs.reporting.day_tables import Day
from spark_jobs.reporting.page import PageSection, Table


def section(day: Day) -> PageSection:
    """The evaluations of the date, models side by side."""
    title = "Pre-ranker, judged on the day after"
    found = day.records("evaluations", day.date)  # one row per variant, seed, slice and metric
    if not found:
        return PageSection(title, ["Nothing was judged: the day after has no impressions yet."])
    text = (
        "Brackets show 95% intervals over users and training seeds; a difference is called better or worse only where "
        "its interval does not hold 0. Slices with fewer than 200 clicks stand last: they are too small to judge by."
    )
    return PageSection(title, [text], [compare(found)])


def compare(evaluations: Sequence[dict[str, Any]]) -> Table:
    """One row per slice and metric, models and their differences side by side; the note says why a figure is absent."""
    found = [row for row in evaluations if row["seed"] == ALL_SEEDS]
    models = sorted({r["model"] for r in found})
    pairs = sorted({(r["model"], r["against"]) for r in found if r["against"]})
    of = {(r["slice"], r["metric"], r["model"], r["against"]): r for r in found}
    rows = []
    for part in ordered_slices(found):
        mine = [r for r in found if r["slice"] == part]
        name = f"{part} ({small})" if (small := too_small(mine)) else part
        for metric in sorted({r["metric"] for r in mine}):
            first = next(r for r in mine if r["metric"] == metric)
            figures = [_cell(of.get((part, metric, m, ""))) for m in models]
            differences = [difference_text(of.get((part, metric, *pair))) or "-" for pair in pairs]
            note = next((r["note"] for r in mine if r["metric"] == metric and r["note"]), "")
            rows.append((name, metric, *figures, *differences, first["candidate_set_size"], first["rows"], note))
    compared = (f"{model} - {against}" for model, against in pairs)
    return Table(("slice", "metric", *models, *compared, "candidate-set size", "pairs", "note"), rows)


def _cell(row: dict[str, Any] | None) -> str:
    return "absent" if row is None or row["value"] is None else figure_text(row)
