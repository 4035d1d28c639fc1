"""What fitting, labeling, monitors and the report share: counts next to pairs, labels as a column, reliability."""

from collections.abc import Sequence

import numpy as np
from pyspark.sql import Column, DataFrame, Row, Window
from pyspark.sql import functions as F

from gpl_core.errors import LineageError
from gpl_core.labels.calibration import (
    CALIBRATOR_FILE,
    Calibrator,
    ReliabilityBin,
    score_sql,
    sql_expression,
    user_rate_sql,
)
from gpl_core.lakehouse.artifacts import ArtifactStore, Manifest

LABEL_CELLS = 1000  # cells of the label axis in which Spark counts; the driver merges them into groups of equal size


def load_calibrator(store: ArtifactStore, manifest: Manifest) -> Calibrator:
    """The calibrator of a bundle, its hash checked."""
    return Calibrator.from_json((store.fetch(manifest) / CALIBRATOR_FILE).read_text(encoding="utf-8"))


def with_counts(pairs: DataFrame, user_stats: DataFrame, item_stats: DataFrame | None) -> DataFrame:
    """`pairs` (user_id, item_index, dt, …) with the pre-window counts of its own dt, null where nothing was seen.

    Adds user_impressions and user_clicks; with `item_stats` also item_impressions, item_clicks and item_positives.
    """
    if item_stats is not None:
        items = item_stats.select(
        "item_index", "dt", F.col("impressions").alias("item_impressions"), F.col("clicks").alias("item_clicks"),
        F.col("positives").alias("item_positives"),
    )  # fmt: skip
        pairs = pairs.join(items, ["item_index", "dt"], "left")
    users = user_stats.select(
        "user_id", "dt", F.col("impressions").alias("user_impressions"), F.col("clicks").alias("user_clicks")
    )
    return pairs.join(users, ["user_id", "dt"], "left")


def label_band() -> Column:
    """The band of `pseudo_label`, two per doubling: labels lie close to a small rate, where equal cells hide much."""
    return F.floor(2 * F.log2(F.greatest(F.col("pseudo_label"), F.lit(1e-6)))).cast("int")


def label_cells(labeled: DataFrame, *by: str) -> list[Row]:
    """Rows, labels and clicks (0/1) per `by`, cell and band of the label, in their order.

    At most LABEL_CELLS cells, a few of them cut by bands, reach the driver per `by`, however many pairs there are.
    """
    cell = F.least(F.floor(F.col("pseudo_label") * LABEL_CELLS), F.lit(LABEL_CELLS - 1)).alias("cell")
    cells = labeled.groupBy(*by, cell, label_band().alias("band")).agg(
        F.count(F.lit(1)).alias("rows"), F.sum("pseudo_label").alias("labels"), F.sum("clicked").alias("clicks")
    )
    return cells.orderBy(*by, "cell", "band").collect()


def reliability_bins(cells: Sequence[Row]) -> tuple[ReliabilityBin, ...]:
    """At most 10 bins of neighboring cells with about equal rows; empty ones are left out."""
    most = 10
    values = np.array([(c["rows"], c["labels"], c["clicks"]) for c in cells], dtype=np.float64).reshape(-1, 3)
    rows = values[:, 0]
    if not rows.sum():
        return ()
    group = np.minimum(((np.cumsum(rows) - rows / 2) * most / rows.sum()).astype(int), most - 1)
    sums = np.zeros((most, 3))
    np.add.at(sums, group, values)
    return tuple(ReliabilityBin(int(n), labels / n, clicks / n) for n, labels, clicks in sums.tolist() if n)


def band_error(cells: Sequence[Row]) -> float | None:
    """Expected calibration error over the bands of `cells`, sum of |labels - clicks| / rows; None without rows.

    The one definition: of monitors, report, calibrators and the view calibration_slices.
    """
    gaps: dict[int, float] = {}
    for cell in cells:
        gaps[cell["band"]] = gaps.get(cell["band"], 0.0) + float(cell["labels"]) - float(cell["clicks"])
    rows = sum(cell["rows"] for cell in cells)
    return sum(map(abs, gaps.values())) / rows if rows else None


def with_user_parts(pairs: DataFrame, calibrator: Calibrator) -> DataFrame:
    """`pairs` of one date (with `with_counts`) with the two parts of a quantile label, and the spread of the scores.

    user_rate: the user's click rate before the date, shrunken. user_rank, in (0, 1): where the pair's score stands
    among the user's *other* unexposed pairs: (below + ties / 2 + 1/2) / (others + 1); 1/2 without others. user_spread:
    standard deviation of the score over the user's unexposed pairs.
    """
    # By dt too: the users' counts were joined by both.
    of_user, unexposed = Window.partitionBy("user_id", "dt"), (F.col("source") == "unexposed").cast("int")
    by_score = of_user.orderBy("_score")
    up_to = F.sum(unexposed).over(by_score.rangeBetween(Window.unboundedPreceding, Window.currentRow))
    equal = F.sum(unexposed).over(by_score.rangeBetween(Window.currentRow, Window.currentRow))
    others, ties = F.sum(unexposed).over(of_user) - unexposed, equal - unexposed
    scored = pairs.withColumn("_score", F.expr(score_sql(calibrator)))
    spread = F.coalesce(F.stddev_pop(F.when(unexposed == 1, F.col("_score"))).over(of_user), F.lit(0.0))
    rank = ((up_to - equal) + ties / 2 + 0.5) / (others + 1)
    parts = {"user_rank": rank, "user_rate": F.expr(user_rate_sql(calibrator)), "user_spread": spread}
    return scored.withColumns(parts).drop("_score")


def with_label(pairs: DataFrame, calibrator: Calibrator) -> DataFrame:
    """`pairs` with `pseudo_label`, a double in [0, 1].

    Needs `with_counts` for features made of counts, `with_user_parts` when `calibrator.has_user_parts`.
    """
    return pairs.withColumn("pseudo_label", F.expr(sql_expression(calibrator)))


def require_one_version(found: Sequence[str | None], wanted: str, what: str, by: str, remedy: str) -> None:
    """LineageError, naming both versions and what to do, unless every version in `found` is `wanted`."""
    others = sorted({v for v in found if v is not None and v != wanted})
    if others:
        raise LineageError(f"{what} is of {', '.join(others)}, but {by} is {wanted}; {remedy}")
