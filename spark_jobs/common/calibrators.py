"""What fitting, labelling and the report share: pre-window counts beside pairs, labels as a column, reliability."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from gpl_core.errors import LineageError
from gpl_core.labels.calibration import CALIBRATOR_FILE, Calibrator, ReliabilityBin, sql_expression
from gpl_core.lakehouse.artifacts import ArtifactStore, Manifest

LABEL_CELLS = 1000
"""Cells of the label axis that reliability is counted in before equal groups are formed."""


def load_calibrator(store: ArtifactStore, manifest: Manifest) -> Calibrator:
    """The calibrator of a bundle, its hash checked."""
    path = store.fetch(manifest) / CALIBRATOR_FILE
    return Calibrator.from_json(path.read_text(encoding="utf-8"))


def with_counts(pairs: DataFrame, item_stats: DataFrame, user_stats: DataFrame) -> DataFrame:
    """`pairs` (user_id, item_index, dt, …) with the pre-window counts of its own dt, null where nothing was seen.

    Adds item_impressions, item_clicks, item_positives, user_impressions and user_clicks.
    """
    items = item_stats.select(
        "item_index", "dt", F.col("impressions").alias("item_impressions"), F.col("clicks").alias("item_clicks"),
        F.col("positives").alias("item_positives"),
    )  # fmt: skip
    users = user_stats.select(
        "user_id", "dt", F.col("impressions").alias("user_impressions"), F.col("clicks").alias("user_clicks")
    )
    return pairs.join(items, ["item_index", "dt"], "left").join(users, ["user_id", "dt"], "left")


def label_reliability(
    labelled: DataFrame, label: str, clicked: str = "clicked", bins: int = 10
) -> tuple[tuple[ReliabilityBin, ...], float | None]:
    """(bins of about equal rows, expected calibration error) of a label column against clicks (0/1).

    Spark counts rows, labels and clicks in LABEL_CELLS cells of the label; only those reach the driver. The error is
    None without rows.
    """
    cell = F.least(F.floor(F.col(label) * LABEL_CELLS), F.lit(LABEL_CELLS - 1)).alias("cell")
    rows = (
        labelled.groupBy(cell)
        .agg(
            F.count(F.lit(1)).alias("rows"),
            F.sum(label).alias("labels"),
            F.sum(F.col(clicked).cast("double")).alias("clicks"),
        )
        .orderBy("cell")
        .collect()
    )
    return group_reliability(
        [r["rows"] for r in rows], [r["labels"] for r in rows], [r["clicks"] for r in rows], bins
    )  # fmt: skip


def group_reliability(
    rows: Sequence[float], label_sums: Sequence[float], click_sums: Sequence[float], bins: int
) -> tuple[tuple[ReliabilityBin, ...], float | None]:
    """Merge cells, in label order, into `bins` groups of about equal rows; see `label_reliability`."""
    counts = np.asarray(rows, dtype=np.float64)
    if counts.sum() == 0:
        return (), None
    group = np.minimum(((np.cumsum(counts) - counts / 2) * bins / counts.sum()).astype(int), bins - 1)
    sums = [
        np.bincount(group, weights=np.asarray(values, dtype=np.float64), minlength=bins).tolist()
        for values in (counts, label_sums, click_sums)
    ]
    found = tuple(
        ReliabilityBin(int(n), labels / n, clicks / n) for n, labels, clicks in zip(*sums, strict=True) if n > 0
    )
    return found, sum(b.rows * abs(b.mean_label - b.click_rate) for b in found) / counts.sum()


def with_label(pairs: DataFrame, calibrator: Calibrator, name: str = "pseudo_label") -> DataFrame:
    """`pairs` with the calibrated label, a double in [0, 1]; needs `with_counts` when `calibrator.needs_counts`."""
    return pairs.withColumn(name, F.expr(sql_expression(calibrator)))


def require_one_version(found: Sequence[str], wanted: str, what: str, by: str, remedy: str) -> None:
    """LineageError unless every version in `found` is `wanted`; names both and what to do."""
    others = sorted({v for v in found if v is not None and v != wanted})
    if others:
        raise LineageError(f"{what} is of {', '.join(others)}, but {by} is {wanted}; {remedy}")
