"""Report: labels of exposed pairs against the date's own clicks. Here they are judged, never fitted."""

from dataclasses import dataclass

from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from gpl_core.labels.calibration import ReliabilityBin
from spark_jobs.common.calibrators import band_error, label_cells, reliability_bins
from spark_jobs.reporting import plots
from spark_jobs.reporting.day_tables import Day
from spark_jobs.reporting.page import PageSection, Plot, Table

_MOST_SLICES = 40


@dataclass(frozen=True)
class LabelCalibration:
    """Labels of one source against that date's clicks."""

    source: str
    rows: int
    clicks: int
    bins: tuple[ReliabilityBin, ...]
    error: float | None


def calibrations(labels: DataFrame, impressions: DataFrame) -> list[LabelCalibration]:
    """Reliability of uniform and exposed labels, in one pass; sources without a labeled impression are left out."""
    shown = impressions.select(
        "user_id", "item_index", "clicked", F.when(F.col("is_random"), "uniform").otherwise("exposed").alias("source")
    )
    labeled = labels.where("source != 'unexposed'").join(shown, ["user_id", "item_index", "source"])
    found = label_cells(labeled, "source")
    out = []
    for source in ("uniform", "exposed"):
        if cells := [c for c in found if c["source"] == source]:
            rows, clicks = (sum(c[name] for c in cells) for name in ("rows", "clicks"))
            out.append(LabelCalibration(source, rows, clicks, reliability_bins(cells), band_error(cells)))
    return out


def section(day: Day) -> PageSection:
    """Reliability of the labels."""
    title = "Are the labels right?"
    found = calibrations(day.step.read_slice("pseudo_labels"), day.step.read_slice("impressions"))
    if not found:
        return PageSection(title, ["No labeled pair of this date was exposed, so there are no clicks to compare with."])
    text = [
        f"{c.source}: {c.rows:,} scored impressions, {c.clicks:,} clicks, expected calibration error {c.error:.4f}."
        for c in found
    ]
    if found[0].source != "uniform":
        caveat = "Exposed clicks are biased; read the curve with that in mind."
        text.append(f"There is no uniformly exposed traffic. {caveat}")
    rows = [(c.source, b.rows, b.mean_label, b.click_rate) for c in found for b in c.bins]
    curves = [(c.source, [b.mean_label for b in c.bins], [b.click_rate for b in c.bins]) for c in found]
    caption = "Groups of about equal size, by label. On the dotted line a label equals the click rate."
    drawn = [Plot([plots.reliability("Reliability of the labels", curves)], caption)]
    tables = [Table(("source", "rows", "mean label", "click rate"), rows), *_by_slice(day)]
    return PageSection(title, text, tables, drawn)


def _by_slice(day: Day) -> list[Table]:
    """View calibration_slices on this date; of many categories those with most impressions."""
    columns = ("source", "slice", "value", "impressions", "mean_label", "click_rate", "calibration_error")
    view = day.view("calibration_slices")
    if view is None:
        return []
    rows = view.select(*columns).orderBy(F.desc("impressions"), *columns[:3]).limit(_MOST_SLICES).collect()
    return [Table(columns, sorted(tuple(r) for r in rows))] if rows else []
