"""Bounded aggregates for the report: every function here returns a few hundred rows however large the tables are."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from typing import Any

import numpy as np
from pyspark.sql import Column, DataFrame, Window
from pyspark.sql import functions as F

from gpl_core.labels.calibration import ReliabilityBin
from spark_jobs.common.calibrators import LABEL_CELLS, group_reliability

CELLS = 50
HEAT_CELLS = 20
_MANY = 50
_TITLES = 4
_TITLE_CHARS = 80
AXES: Mapping[str, tuple[float, float]] = {
    "pseudo_label": (0.0, 1.0), "weight": (0.0, 4.0), "raw_weight": (0.0, 1.0), "similarity": (-1.0, 1.0),
    "coherence": (0.0, 1.0), "consistency": (0.0, 1.0), "llm_confidence": (0.0, 1.0),
}  # fmt: skip
"""Column of pseudo_labels -> ends of its histogram; values beyond them count in the outer cells."""
HEATS = (("coherence", "consistency"), ("llm_confidence", "similarity"))


@dataclass(frozen=True)
class Distributions:
    """Histograms of one date's labels.

    Attributes:
        histograms: (source, column) -> rows per cell [CELLS] over `AXES[column]`.
        heats: (x, y) -> unexposed pairs per cell [HEAT_CELLS x HEAT_CELLS], y first.
        rows, means: source -> pairs; (source, column) -> mean.
    """

    histograms: Mapping[tuple[str, str], np.ndarray]
    heats: Mapping[tuple[str, str], np.ndarray]
    rows: Mapping[str, int]
    means: Mapping[tuple[str, str], float]


def _cell(column: str, cells: int) -> Column:
    low, high = AXES[column]
    place = F.floor((F.col(column) - F.lit(low)) * F.lit(cells / (high - low)))
    return F.least(F.greatest(place, F.lit(0)), F.lit(cells - 1)).cast("int")


def distributions(labels: DataFrame) -> Distributions:
    """Histograms, heat maps and means of one date's pseudo_labels, in one pass."""
    marks = [F.struct(F.lit(c).alias("name"), _cell(c, CELLS).alias("cell"), F.col(c).alias("value")) for c in AXES]
    marks += [
        F.struct(
            F.lit(f"{x}|{y}").alias("name"),
            (_cell(y, HEAT_CELLS) * HEAT_CELLS + _cell(x, HEAT_CELLS)).alias("cell"),
            F.lit(0.0).alias("value"),
        )
        for x, y in HEATS
    ]
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


@dataclass(frozen=True)
class WeightBin:
    """Pairs of about equal weight: mean weight, |mean label - click rate| and mean squared error of the label."""

    rows: int
    mean_weight: float
    calibration_error: float
    squared_error: float


@dataclass(frozen=True)
class Calibration:
    """Labels of one source against that date's clicks."""

    source: str
    rows: int
    clicks: int
    bins: tuple[ReliabilityBin, ...]
    error: float | None
    by_weight: tuple[WeightBin, ...]


def calibrations(labels: DataFrame, impressions: DataFrame) -> list[Calibration]:
    """Reliability of uniform and exposed labels against the date's own clicks, in one pass: judged, never fitted.

    Sources without a labelled impression are left out. Only cells of the label and of the weight reach the driver.
    """
    shown = impressions.select(
        "user_id", "item_index", "clicked", F.when(F.col("is_random"), "uniform").otherwise("exposed").alias("source")
    )
    labelled = labels.where("source != 'unexposed'").join(shown, ["user_id", "item_index", "source"])
    marks = [
        F.struct(
            F.lit(name).alias("name"), F.least(F.floor(F.col(name) * LABEL_CELLS), F.lit(LABEL_CELLS - 1)).alias("cell")
        )
        for name in ("pseudo_label", "raw_weight")
    ]
    gap = F.col("pseudo_label") - F.col("clicked")
    found = (
        labelled.withColumn("m", F.explode(F.array(*marks)))
        .groupBy("source", "m.name", "m.cell")
        .agg(
            F.count(F.lit(1)).alias("rows"), F.sum("raw_weight").alias("weights"),
            F.sum("pseudo_label").alias("labels"), F.sum("clicked").alias("clicks"),
            F.sum(gap * gap).alias("squares"),
        )
        .orderBy("source", "name", "cell")
        .collect()
    )  # fmt: skip
    out = []
    for source in ("uniform", "exposed"):
        by_label = _sums(r for r in found if (r["source"], r["name"]) == (source, "pseudo_label"))
        by_weight = _sums(r for r in found if (r["source"], r["name"]) == (source, "raw_weight"))
        rows = int(by_label["rows"].sum())
        if rows:
            bins, error = group_reliability(by_label["rows"], by_label["labels"], by_label["clicks"], 10)
            out.append(Calibration(source, rows, int(by_label["clicks"].sum()), bins, error, weight_bins(by_weight)))
    return out


def _sums(rows: Iterable[Any]) -> dict[str, np.ndarray]:
    kept = list(rows)
    names = ("rows", "weights", "labels", "clicks", "squares")
    return {name: np.array([float(r[name]) for r in kept]) for name in names}


def weight_bins(cells: Mapping[str, np.ndarray], bins: int = 10) -> tuple[WeightBin, ...]:
    """Cells in weight order merged into at most `bins` groups of about equal rows."""
    counts = cells["rows"]
    if counts.sum() == 0:
        return ()
    group = np.minimum(((np.cumsum(counts) - counts / 2) * bins / counts.sum()).astype(int), bins - 1)
    sums = {name: np.bincount(group, weights=values, minlength=bins) for name, values in cells.items()}
    return tuple(
        WeightBin(
            int(n), float(sums["weights"][i] / n), float(abs(sums["labels"][i] - sums["clicks"][i]) / n),
            float(sums["squares"][i] / n),
        )
        for i, n in enumerate(sums["rows"]) if n > 0
    )  # fmt: skip


def weight_sentence(found: Calibration, least_rows: int = 1000) -> str:
    """Whether a higher weight goes with a smaller error on `found`, in one sentence."""
    if found.rows < least_rows or len(found.by_weight) < 5:
        return (
            f"Whether weight predicts error cannot be said: {found.rows:,} {found.source} pairs with weights in "
            f"{len(found.by_weight)} groups are too few (at least {least_rows:,} and 5)."
        )
    ranks = np.argsort(np.argsort([b.squared_error for b in found.by_weight])).astype(float)
    rho = float(np.corrcoef(np.arange(len(ranks)), ranks)[0, 1])
    fact = f"rank correlation of weight group and squared error {rho:+.2f} over {found.rows:,} {found.source} pairs"
    if rho <= -0.6:
        return f"Higher weights go with smaller errors ({fact})."
    if rho >= 0.6:
        return f"Higher weights go with larger errors ({fact}): do not trust the weights on this date."
    return f"Weights do not predict the error ({fact})."


def quarantine_reasons(quarantine: DataFrame) -> list[dict[str, Any]]:
    """Rows refused by source table and failed check, most frequent first, with one example message each."""
    checks = quarantine.select("source_table", "occurrences", F.explode("failed_checks").alias("check"))
    rows = (
        checks.groupBy("source_table", F.col("check.name").alias("name"))
        .agg(
            F.count(F.lit(1)).alias("distinct_rows"), F.sum("occurrences").alias("rows"),
            F.min("check.message").alias("example"),
        )
        .orderBy(F.desc("rows"), "source_table", "name")
        .limit(_MANY)
        .collect()
    )  # fmt: skip
    return [row.asDict() for row in rows]


def channels(feed: DataFrame) -> list[dict[str, Any]]:
    """Labelled unexposed rows of the feed by recall channel, largest first."""
    rows = (
        feed.where(~F.col("is_exposed"))
        .groupBy("channel")
        .agg(
            F.count(F.lit(1)).alias("rows"), F.avg("pseudo_label").alias("mean_label"),
            F.avg("sample_weight").alias("mean_weight"), F.avg("sampling_probability").alias("mean_probability"),
        )
        .orderBy(F.desc("rows"), "channel")
        .limit(_MANY)
        .collect()
    )  # fmt: skip
    return [row.asDict() for row in rows]


@dataclass(frozen=True)
class SidHealth:
    """Semantic IDs in force: items, distinct SIDs, items that share one; used codes and perplexity per level.

    Attributes:
        usage: per level, mean items per code of at most `CELLS` groups of codes, the most used ones first.
    """

    items: int
    distinct: int
    sharing: int
    used: tuple[int, ...]
    perplexity: tuple[float, ...]
    usage: tuple[tuple[float, ...], ...]


def sid_health(sids: DataFrame) -> SidHealth | None:
    """Health of the SIDs in force (item_index, sid); None when there are none."""
    buckets = sids.groupBy("sid").agg(F.count(F.lit(1)).alias("n"))
    row = buckets.agg(
        F.sum("n").alias("items"), F.count(F.lit(1)).alias("distinct"),
        F.sum(F.when(F.col("n") > 1, F.col("n"))).alias("sharing"),
    ).first()  # fmt: skip
    if not row["items"]:
        return None
    codes = (
        sids.select(F.posexplode("sid").alias("level", "code"))
        .groupBy("level", "code")
        .agg(F.count(F.lit(1)).alias("n"))
    )
    share = F.col("n") / F.lit(float(row["items"]))
    # A window over the codes of a level: at most C rows, however many items there are.
    place = F.ntile(CELLS).over(Window.partitionBy("level").orderBy(F.desc("n"), "code"))
    groups = (
        codes.withColumn("place", place)
        .groupBy("level", "place")
        .agg(F.count(F.lit(1)).alias("codes"), F.avg("n").alias("n"), (-F.sum(share * F.log(share))).alias("entropy"))
        .orderBy("level", "place")
        .collect()
    )
    levels = [[r for r in groups if r["level"] == level] for level in sorted({r["level"] for r in groups})]
    return SidHealth(
        row["items"], row["distinct"], row["sharing"] or 0, tuple(sum(r["codes"] for r in g) for g in levels),
        tuple(float(np.exp(sum(r["entropy"] for r in g))) for g in levels),
        tuple(tuple(float(r["n"]) for r in g) for g in levels),
    )  # fmt: skip


@dataclass(frozen=True)
class Bucket:
    """Items that share a prefix of their SID: how many, and the titles of a few."""

    prefix: tuple[int, ...]
    items: int
    titles: tuple[str, ...]


def buckets(sids: DataFrame, items: DataFrame, largest: int = 10, few: int = 6) -> tuple[list[Bucket], list[Bucket]]:
    """The SIDs that most items share, largest first; and a few prefixes of one code and of two.

    The prefixes are the same at every run; those of three items and more are preferred.
    """
    cut = {length: F.slice("sid", 1, length) for length in (1, 2)}
    chosen = sids.groupBy(F.col("sid").alias("prefix")).agg(F.count(F.lit(1)).alias("n")).where("n > 1")
    chosen = chosen.orderBy(F.desc("n"), "prefix").limit(largest).withColumn("kind", F.lit(0))
    for length, prefix in cut.items():
        sizes = sids.groupBy(prefix.alias("prefix")).agg(F.count(F.lit(1)).alias("n"))
        some = sizes.orderBy(F.desc(F.least("n", F.lit(3))), F.xxhash64("prefix"), "prefix").limit(few)
        chosen = chosen.unionByName(some.withColumn("kind", F.lit(length)))
    prefixes = {0: F.col("sid"), **cut}
    kinds = [F.struct(F.lit(kind).alias("kind"), prefix.alias("prefix")) for kind, prefix in prefixes.items()]
    place = F.row_number().over(Window.partitionBy("kind", "prefix").orderBy(F.xxhash64("item_index"), "item_index"))
    rows = (
        sids.select("item_index", F.inline(F.array(*kinds)))
        .join(F.broadcast(chosen), ["kind", "prefix"])
        .withColumn("place", place)
        .where(F.col("place") <= _TITLES)
        .join(items.select("item_index", F.substring("title", 1, _TITLE_CHARS).alias("title")), "item_index", "left")
        .orderBy("kind", F.when(F.col("kind") == 0, -F.col("n")), "prefix", "place")
        .collect()
    )
    found: dict[tuple[int, tuple[int, ...]], Bucket] = {}
    for row in rows:
        key = (row["kind"], tuple(row["prefix"]))
        before = found[key].titles if key in found else ()
        found[key] = Bucket(key[1], row["n"], (*before, row["title"] or "(no title)"))
    shared = [b for (kind, _), b in found.items() if kind == 0]
    return shared, [b for (kind, _), b in found.items() if kind > 0]


@dataclass(frozen=True)
class SidVersion:
    """One sid_version: items with a SID in force, rows retired, and SIDs that were issued again."""

    version: str
    in_force: int
    retired: int
    reissued: int


def sid_versions(item_sids: DataFrame) -> list[SidVersion]:
    """The versions that have rows, newest first, at most _MANY."""
    rows = (
        item_sids.groupBy("sid_version")
        .agg(
            F.sum((F.col("retired_at") == 0).cast("long")).alias("in_force"),
            F.sum((F.col("retired_at") > 0).cast("long")).alias("retired"),
            F.sum((F.col("issue") > 0).cast("long")).alias("reissued"),
        )
        .orderBy(F.desc("sid_version"))
        .limit(_MANY)
        .collect()
    )
    return [SidVersion(r["sid_version"], r["in_force"], r["retired"], r["reissued"]) for r in rows]


@dataclass(frozen=True)
class PopularityBand:
    """Items with about equally many positives: the items, their positives, and how many down-sampling keeps."""

    low: int
    high: int
    items: int
    positives: int
    kept: float


def popularity(item_stats: DataFrame, keep_share: float) -> tuple[PopularityBand, ...]:
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


def step_runs(job_runs: DataFrame, run_date: date, steps: Sequence[str]) -> list[dict[str, Any]]:
    """One run of each step for the date, in the graph's order: the last that was done; else the last that found the
    work done already; else the last failed one. `attempts` do not count those that found it done.
    """
    columns = (
        "status", "seconds", "rows_in", "rows_out", "rows_quarantined", "rows_dropped", "bytes_out", "inputs",
        "outputs",
    )  # fmt: skip
    rank = F.when(F.col("status") == "done", 2).when(F.col("status") == "noop", 1).otherwise(0)
    last = F.max_by(F.struct(*columns), F.struct(rank, "started_at"))
    rows = (
        job_runs.where((F.col("run_date") == F.lit(run_date)) & F.col("status").isin("done", "noop", "failed"))
        .withColumn("rows_in", F.nullif("rows_in", F.lit(-1)))
        .groupBy("step")
        .agg(last.alias("run"), F.count_if(F.col("status") != "noop").alias("attempts"))
        .limit(_MANY)
        .collect()
    )
    found = {r["step"]: {"step": r["step"], "attempts": r["attempts"], **r["run"].asDict()} for r in rows}
    return [found[s] for s in steps if s in found]
