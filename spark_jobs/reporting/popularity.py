"""Report: positives by how popular the item is, before and after down-sampling."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from spark_jobs.reporting import plots
from spark_jobs.reporting.day import Day
from spark_jobs.reporting.page import PageSection, Plot, Table


@dataclass(frozen=True)
class PopularityBand:
    """Items with about equally many positives: the items, their positives, and how many down-sampling keeps."""

    low: int
    high: int
    items: int
    positives: int
    kept: float


def popularity_bands(item_stats: DataFrame, keep_share: float) -> tuple[PopularityBand, ...]:
    """Positives by popularity, bands doubling; `kept` by the word2vec rule at the tau that keeps `keep_share`.

    tau is found on the bands' means here, on the items themselves in training: the two agree within a band's width.
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
        return ()
    items, positives = (np.array([float(r[c]) for r in rows]) for c in ("items", "positives"))
    share = positives / items / positives.sum()
    low, high = 0.0, float(share.max())
    for _ in range(60):
        tau = (low + high) / 2
        kept = positives * np.minimum(1.0, np.sqrt(tau / share))
        low, high = (tau, high) if kept.sum() < keep_share * positives.sum() else (low, tau)
    kept = positives * np.minimum(1.0, np.sqrt(high / share))
    return tuple(
        PopularityBand(2 ** r["band"], 2 ** (r["band"] + 1) - 1, r["items"], r["positives"], float(k))
        for r, k in zip(rows, kept, strict=True)
    )


def section(day: Day) -> PageSection:
    """How much of the positives of popular items down-sampling removes."""
    share = day.step.config.interest.keep_target_share
    bands = popularity_bands(day.slice("item_stats"), share)
    title = "Popularity of positives"
    if not bands:
        return PageSection(title, ["There is no positive event in the window before this date."])
    total, kept = sum(b.positives for b in bands), sum(b.kept for b in bands)
    labels = [f"{b.low}" if b.low == b.high else f"{b.low}-{b.high}" for b in bands]
    drawn = plots.popularity(
        "popularity", title, labels, [b.positives / total for b in bands], [b.kept / kept for b in bands]
    )
    rows = [(n, b.items, b.positives, 1 - b.kept / b.positives) for n, b in zip(labels, bands, strict=True)]
    return PageSection(
        title, [f"Down-sampling keeps {share:.0%} of the positives as targets; the context keeps all of them."],
        [Table(("positives of the item", "items", "positives", "share removed"), rows)],
        [Plot(drawn, "Share of positives by how popular the item is, before and after down-sampling.")],
    )  # fmt: skip
