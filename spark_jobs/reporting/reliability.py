"""Report: labels of exposed pairs against the date's own clicks. Here they are judged, never fitted."""

from dataclasses import dataclass

import numpy as np
from pyspark.sql import DataFrame, Row
from pyspark.sql import functions as F

from gpl_core.labels.calibration import ReliabilityBin
from spark_jobs.common.calibrators import band_error, equal_groups, label_band, label_cell, reliability_bins
from spark_jobs.reporting import plots
from spark_jobs.reporting.day_tables import Day
from spark_jobs.reporting.page import PageSection, Plot, Table

_MOST_SLICES = 40
_LEAST_ROWS = 1000  # to say whether weight predicts error


@dataclass(frozen=True)
class WeightBin:
    """Pairs of about equal weight: mean weight, |mean label - click rate| and mean squared error of the label."""

    rows: int
    mean_weight: float
    calibration_error: float
    squared_error: float


@dataclass(frozen=True)
class LabelCalibration:
    """Labels of one source against that date's clicks."""

    source: str
    rows: int
    clicks: int
    bins: tuple[ReliabilityBin, ...]
    error: float | None
    by_weight: tuple[WeightBin, ...]


def calibrations(labels: DataFrame, impressions: DataFrame) -> list[LabelCalibration]:
    """Reliability of uniform and exposed labels, in one pass; sources without a labeled impression are left out.

    Only cells of the label and of the weight reach the driver.
    """
    shown = impressions.select(
        "user_id", "item_index", "clicked", F.when(F.col("is_random"), "uniform").otherwise("exposed").alias("source")
    )
    labeled = labels.where("source != 'unexposed'").join(shown, ["user_id", "item_index", "source"])
    bands = {"pseudo_label": label_band(), "raw_weight": F.lit(0)}
    marks = [
        F.struct(F.lit(name).alias("name"), label_cell(name).alias("cell"), band.alias("band"))
        for name, band in bands.items()
    ]
    gap = F.col("pseudo_label") - F.col("clicked")
    found = (
        labeled.withColumn("m", F.explode(F.array(*marks)))
        .groupBy("source", "m.name", "m.cell", "m.band")
        .agg(
            F.count(F.lit(1)).alias("rows"), F.sum("raw_weight").alias("weights"),
            F.sum("pseudo_label").alias("labels"), F.sum("clicked").alias("clicks"),
            F.sum(gap * gap).alias("squares"),
        )
        .orderBy("source", "name", "cell", "band")
        .collect()
    )  # fmt: skip
    out = []
    for source in ("uniform", "exposed"):
        by_label = [r for r in found if (r["source"], r["name"]) == (source, "pseudo_label")]
        by_weight = [r for r in found if (r["source"], r["name"]) == (source, "raw_weight")]
        if by_label:
            bins, error = reliability_bins(by_label), band_error(by_label)
            rows, clicks = (sum(r[c] for r in by_label) for c in ("rows", "clicks"))
            out.append(LabelCalibration(source, rows, clicks, bins, error, weight_bins(by_weight)))
    return out


def weight_bins(cells: list[Row]) -> tuple[WeightBin, ...]:
    """Cells in weight order merged into a few groups of about equal rows."""
    groups = equal_groups(cells, ("rows", "weights", "labels", "clicks", "squares"))
    return tuple(WeightBin(int(n), w / n, abs(labels - clicks) / n, s / n) for n, w, labels, clicks, s in groups)


def weight_sentence(found: LabelCalibration) -> str:
    """Whether a higher weight goes with a smaller error on `found`, in one sentence."""
    if found.rows < _LEAST_ROWS or len(found.by_weight) < 5:
        return (
            f"There is too little to tell whether weight predicts error: {found.rows:,} {found.source} pairs with "
            f"weights in {len(found.by_weight)} groups (at least {_LEAST_ROWS:,} and 5 are needed)."
        )
    ranks = np.argsort(np.argsort([b.squared_error for b in found.by_weight])).astype(float)
    rho = float(np.corrcoef(np.arange(len(ranks)), ranks)[0, 1])
    fact = f"rank correlation of weight group and squared error {rho:+.2f} over {found.rows:,} {found.source} pairs"
    if rho <= -0.6:
        return f"Higher weights go with smaller errors ({fact})."
    if rho >= 0.6:
        return f"Higher weights go with larger errors ({fact}): do not trust the weights on this date."
    return f"Weights do not predict the error ({fact})."


def section(day: Day) -> PageSection:
    """Reliability of the labels, and whether their weights predict the error."""
    title = "Are the labels right?"
    found = calibrations(day.step.read_slice("pseudo_labels"), day.step.read_slice("impressions"))
    if not found:
        return PageSection(title, ["No labeled pair of this date was exposed, so there are no clicks to compare with."])
    first = found[0]
    text = [
        f"{c.source}: {c.rows:,} scored impressions, {c.clicks:,} clicks, expected calibration error {c.error:.4f}."
        for c in found
    ]
    text.append(
        weight_sentence(first) if first.source == "uniform"
        else "There is no uniformly exposed traffic. Exposed clicks are biased; read the curve with that in mind."
    )  # fmt: skip
    rows = [(c.source, b.rows, b.mean_label, b.click_rate) for c in found for b in c.bins]
    curves = [(c.source, [b.mean_label for b in c.bins], [b.click_rate for b in c.bins]) for c in found]
    caption = "Groups of about equal size, by label. On the dotted line a label equals the click rate."
    drawn = [Plot([plots.reliability("Reliability of the labels", curves)], caption)]
    if len(first.by_weight) > 1:
        weights = [b.mean_weight for b in first.by_weight]
        errors = {"mean squared error": [b.squared_error for b in first.by_weight],
                  "|label - click rate|": [b.calibration_error for b in first.by_weight]}  # fmt: skip
        panels = [plots.curve("Error by weight", "mean weight of the group", name, weights, values)
                  for name, values in errors.items()]  # fmt: skip
        drawn.append(Plot(panels, f"Error of the label by raw weight, {first.source} pairs."))
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
