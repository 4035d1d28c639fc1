"""Report: positives by how popular the item is, before and after down-sampling."""

import numpy as np
from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from gpl_core.interest.down_sampling import keep_probability
from spark_jobs.reporting import plots
from spark_jobs.reporting.day_tables import Day
from spark_jobs.reporting.page import PageSection, Plot, Table


def popularity_bands(item_stats: DataFrame, keep_share: float) -> list[tuple[str, int, int, float]]:
    """(positives of an item, items, their positives, how many of these down-sampling keeps), bands doubling.

    By `keep_probability` of the bands' means here, of the items themselves in training: within a band's width the same.
    """
    band = F.floor(F.log2(F.col("positives").cast("double")) + F.lit(1e-9)).cast("int")
    rows = (
        item_stats.where("positives > 0")
        .groupBy(band.alias("band"))
        .agg(F.count(F.lit(1)).alias("items"), F.sum("positives").alias("positives"))
        .orderBy("band")
        .collect()
    )
    if not rows:
        return []
    items, positives = (np.array([float(r[c]) for r in rows]) for c in ("items", "positives"))
    kept = positives * keep_probability(positives / items, keep_share, items)
    names = [f"{2 ** r['band']}-{2 ** (r['band'] + 1) - 1}" if r["band"] else "1" for r in rows]
    return [(name, r["items"], r["positives"], float(k)) for name, r, k in zip(names, rows, kept, strict=True)]


def section(day: Day) -> PageSection:
    """How much of the positives of popular items down-sampling removes."""
    share = day.step.config.interest.keep_target_share
    bands = popularity_bands(day.step.read_slice("item_stats"), share)
    title = "Popularity of positives"
    if not bands:
        return PageSection(title, ["There is no positive event in the window before this date."])
    labels, _, positives, kept = zip(*bands, strict=True)
    shares = [[n / sum(counts) for n in counts] for counts in (positives, kept)]
    rows = [(name, items, before, 1 - after / before) for name, items, before, after in bands]
    caption = "Share of positives by how popular the item is, before and after down-sampling."
    return PageSection(
        title, [f"Down-sampling keeps {share:.0%} of the positives as targets; the context keeps all of them."],
        [Table(("positives of the item", "items", "positives", "share removed"), rows)],
        [Plot([plots.popularity(title, labels, *shares)], caption)],
    )  # fmt: skip
