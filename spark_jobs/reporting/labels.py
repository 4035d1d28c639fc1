"""Report: how labels, weights and confidence factors are distributed, by histograms that Spark counts in one pass."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F

from gpl_core.labels.calibration import Calibrator
from spark_jobs.common.calibrators import load_calibrator
from spark_jobs.reporting import plots
from spark_jobs.reporting.day_tables import Day
from spark_jobs.reporting.page import PageSection, Plot, Table

CELLS = 50
HEAT_CELLS = 20
AXES: Mapping[str, tuple[float, float]] = {
    "pseudo_label": (0.0, 1.0), "weight": (0.0, 4.0), "raw_weight": (0.0, 1.0), "similarity": (-1.0, 1.0),
    "coherence": (0.0, 1.0), "consistency": (0.0, 1.0), "llm_confidence": (0.0, 1.0),
}  # fmt: skip
"""Column of pseudo_labels -> ends of its histogram; values beyond them count in the outer cells."""
HEATS = (("coherence", "consistency"), ("llm_confidence", "similarity"))


@dataclass(frozen=True)
class Distributions:
    """Histograms of one date's labels."""

    histograms: Mapping[tuple[str, str], np.ndarray]  # (source, column) -> rows per cell [CELLS] over `AXES[column]`
    heats: Mapping[tuple[str, str], np.ndarray]  # (x, y) -> unexposed pairs per cell [HEAT_CELLS x HEAT_CELLS], y first
    rows: Mapping[str, int]  # source -> pairs
    means: Mapping[tuple[str, str], float]  # (source, column) -> mean


def _cell(column: str, cells: int) -> Column:
    low, high = AXES[column]
    place = F.floor((F.col(column) - F.lit(low)) * F.lit(cells / (high - low)))
    return F.least(F.greatest(place, F.lit(0)), F.lit(cells - 1)).cast("int")


def distributions(labels: DataFrame) -> Distributions:
    """Histograms, heat maps and means of one date's pseudo_labels, in one pass."""

    def mark(name: str, cell: Column, value: Column) -> Column:
        return F.struct(F.lit(name).alias("name"), cell.alias("cell"), value.alias("value"))

    marks = [mark(c, _cell(c, CELLS), F.col(c)) for c in AXES]
    marks += [mark(f"{x}|{y}", _cell(y, HEAT_CELLS) * HEAT_CELLS + _cell(x, HEAT_CELLS), F.lit(0.0)) for x, y in HEATS]
    found = (
        labels.select("source", F.explode(F.array(*marks)).alias("m"))
        .groupBy("source", "m.name", "m.cell")
        .agg(F.count(F.lit(1)).alias("rows"), F.sum("m.value").alias("total"))
        .collect()
    )
    histograms: dict[tuple[str, str], np.ndarray] = {}
    heats = {pair: np.zeros((HEAT_CELLS, HEAT_CELLS)) for pair in HEATS}
    totals: dict[tuple[str, str], float] = {}
    for row in found:
        if "|" in row["name"]:
            x, _, y = row["name"].partition("|")
            if row["source"] == "unexposed":
                heats[(x, y)][divmod(row["cell"], HEAT_CELLS)] += row["rows"]
            continue
        key = (row["source"], row["name"])
        histograms.setdefault(key, np.zeros(CELLS))[row["cell"]] += row["rows"]
        totals[key] = totals.get(key, 0.0) + row["total"]
    rows = {source: int(h.sum()) for (source, name), h in histograms.items() if name == "pseudo_label"}
    return Distributions(histograms, heats, rows, {k: v / rows[k[0]] for k, v in totals.items()})


def section(day: Day) -> PageSection:
    """The calibrator, the means by source, and the histograms of the unexposed pairs."""
    manifest = day.context.artifact("calibrator")
    calibrator = load_calibrator(day.context.artifacts, manifest)
    fitted = calibrator.fitted_on
    source = manifest.metrics.get("target_rate_from")  # of quantile labels alone: no other kind is given a mean
    mean = (
        f"the mean label over unexposed candidates is {fitted.base_rate:.4g} (from {source})" if source
        else f"{fitted.base_rate:.4g} of the pairs it was fitted on were clicked"
    )  # fmt: skip
    text = [
        f"The calibrator is of kind {calibrator.kind}; {mean}. It was fitted on {fitted.rows:,} {fitted.source} pairs "
        f"of {fitted.first_date} to {fitted.last_date}."
    ]
    if calibrator.has_user_parts:
        level = "the user's own click rate" if calibrator.across_users == "user_rate" else "one rate for all users"
        place = ranked_by(calibrator, manifest.metrics)
        text.append(f"A label's level comes from {level}, its place within the user from {place}.")
    if calibrator.uses_clicks:
        text.append("Clicks shape these labels: they do not rest on content and the language model alone.")
    warnings = [str(manifest.metrics[k]) for k in ("rate_warning", "warning") if k in manifest.metrics]
    found = distributions(day.step.read_slice("pseudo_labels"))
    rows = [
        (source, found.rows[source], *(found.means[(source, c)] for c in AXES))
        for source in ("unexposed", "exposed", "uniform")
        if source in found.rows
    ]
    drawn = _plots(found) if "unexposed" in found.rows else []
    if not drawn:
        text.append("No unexposed pair was labeled.")
    text.append(
        "Means are over distinct pairs here; the feed's own count a pair as often as it was requested, and the "
        "calibrator's also what each drawn row stands for."
    )
    tables = [Table(("source", "pairs", *AXES), rows)] if rows else []
    return PageSection("Labels and weights", text, tables, drawn, warnings=warnings, told_by="fit_calibrator")


def ranked_by(calibrator: Calibrator, metrics: Mapping[str, Any]) -> str:
    """What a quantile label ranks a user's pairs by. metrics: of the calibrator's manifest."""
    if len(calibrator.features) == 1:
        return calibrator.features[0]
    weights = ", ".join(f"{n} {w:+.3g}" for n, w in zip(calibrator.features, calibrator.weights, strict=True))
    added = metrics.get("prefix_weight")
    own = f"; of the weight of prefix_log_prob, {added:.3g} is its own share" if added else ""
    return f"a regression fitted on exposed clicks of earlier dates (weights: {weights}{own})"


def _plots(found: Distributions) -> list[Plot]:
    panels = [
        plots.histogram(f"{c} of unexposed pairs", c, found.histograms[("unexposed", c)].tolist(), ends)
        for c, ends in AXES.items()
    ]
    maps = [plots.heat_map(f"{x} and {y}", x, y, found.heats[(x, y)], (AXES[x], AXES[y])) for x, y in HEATS]
    weights = "Pseudo-label, scaled weight (the last cell holds those above 4) and raw weight of the unexposed pairs."
    return [
        Plot(panels[:3], weights),
        Plot(panels[3:], "Similarity to the nearest anchor, and the three confidence factors."),
        Plot(maps, "Unexposed pairs by two factors at once. Stronger cells hold more pairs (logarithmic)."),
    ]
