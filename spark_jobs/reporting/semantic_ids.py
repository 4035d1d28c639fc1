"""Report: health of the semantic IDs in force, what their codes mean, and the versions that exist."""

import math
from dataclasses import dataclass
from typing import Any

from pyspark.sql import DataFrame, Row, Window
from pyspark.sql import functions as F

from spark_jobs.common.columns import only_row, sids_in_force
from spark_jobs.reporting import plots
from spark_jobs.reporting.day_tables import Day
from spark_jobs.reporting.page import PageSection, Plot, Table

_GROUPS = 50  # of codes, in the plot of code usage
_MOST_SHARED = 10
_TITLES = 4
_TITLE_CHARS = 80
_MOST_VERSIONS = 50
_MOST_RUNS = 20


def code_usage(sids: DataFrame, items: int) -> list[list[Row]]:
    """Per level, at most _GROUPS groups of codes, most used first: codes, mean items per code `n`, summed entropy."""
    codes = sids.select(F.posexplode("sid").alias("level", "code")).groupBy("level", "code")
    share = F.col("n") / F.lit(float(items))
    # A window over the codes of a level: at most C rows, however many items there are.
    place = F.ntile(_GROUPS).over(Window.partitionBy("level").orderBy(F.desc("n"), "code"))
    groups = (
        codes.agg(F.count(F.lit(1)).alias("n"))
        .withColumn("place", place)
        .groupBy("level", "place")
        .agg(F.count(F.lit(1)).alias("codes"), F.avg("n").alias("n"), (-F.sum(share * F.log(share))).alias("entropy"))
        .orderBy("level", "place")
        .collect()
    )
    levels: dict[int, list[Row]] = {}
    for row in groups:
        levels.setdefault(row["level"], []).append(row)
    return list(levels.values())


@dataclass(frozen=True)
class Bucket:
    """Items that share a prefix of their SID: how many, and the titles of a few."""

    prefix: tuple[int, ...]
    items: int
    titles: tuple[str, ...]


def buckets(sids: DataFrame, items: DataFrame, few: int = 6) -> tuple[list[Bucket], list[Bucket]]:
    """The SIDs that most items share, largest first; and a few prefixes of one code and of two.

    The prefixes are the same at every run; those of three items and more are preferred.
    """
    cut = {length: F.slice("sid", 1, length) for length in (1, 2)}
    chosen = sids.groupBy(F.col("sid").alias("prefix")).agg(F.count(F.lit(1)).alias("n")).where("n > 1")
    chosen = chosen.orderBy(F.desc("n"), "prefix").limit(_MOST_SHARED).withColumn("kind", F.lit(0))
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


def sections(day: Day) -> list[PageSection]:
    """Health of the SIDs of the feed's version, examples of what they group, and all versions."""
    version = day.manifest.get("versions", {}).get("sid_version", "")
    table = day.step.read("item_sids")
    live = sids_in_force(table, version)
    sizes = live.groupBy("sid").agg(F.count(F.lit(1)).alias("n"))
    shared = F.coalesce(F.sum(F.when(F.col("n") > 1, F.col("n"))), F.lit(0))
    items, distinct, sharing = only_row(sizes.agg(F.sum("n"), F.count(F.lit(1)), shared))
    if not items:
        return [PageSection("Semantic IDs", ["No item has a semantic ID."])]
    tokenizer = day.context.artifacts.find("tokenizer", version)
    size = tokenizer.metrics.get("codes") if tokenizer else None
    levels = code_usage(live, items)
    rows = [
        (level, sum(r["codes"] for r in groups), size, math.exp(sum(r["entropy"] for r in groups)))
        for level, groups in enumerate(levels, start=1)
    ]
    text = (
        f"{items:,} items have one under {version}, {distinct:,} distinct; {sharing / items:.1%} of the items share "
        "theirs."
    )
    usage = Plot(
        [plots.code_usage("Code usage per level", n, [r["n"] for r in groups]) for n, groups in enumerate(levels, 1)],
        "Items per code, most used codes first. The dotted line is where all codes are used equally.",
    )
    table_of_levels = Table(("level", "codes in use", "codes", "perplexity"), rows)
    health = PageSection("Semantic IDs", [text], [table_of_levels], [usage])
    return [health, *_meaning(day, live), _versions(day, table)]


def _meaning(day: Day, live: DataFrame) -> list[PageSection]:
    if not day.context.has("items"):
        return []
    shared, prefixes = buckets(live, day.step.read("items"))
    on_purpose = "Items with the same content share one on purpose." if shared else "No two items share one."
    together = "Titles in one row should belong together; rows with two codes should be more specific."
    titles = [_titles("semantic ID", shared)] if shared else []
    return [
        PageSection("Semantic IDs that most items share", [on_purpose], titles),
        PageSection("What codes mean", [together], [_titles("first codes", prefixes)]),
    ]


def _titles(what: str, found: list[Bucket]) -> Table:
    rows = [("-".join(map(str, b.prefix)), b.items, " | ".join(b.titles)) for b in found]
    return Table((what, "items", "titles of some"), rows)


def _versions(day: Day, table: DataFrame) -> PageSection:
    """Versions with their items, and the newest runs that issued SIDs with what they measured of drift."""
    known = {m.version: m for m in day.context.artifacts.manifests("tokenizer")}
    retired = F.col("retired_at") > 0
    counts = table.groupBy("sid_version").agg(F.count_if(~retired), F.count_if(retired), F.count_if(F.col("issue") > 0))
    versions: list[tuple[Any, ...]] = []
    for version, *items in counts.orderBy(F.desc("sid_version")).limit(_MOST_VERSIONS).collect():
        made = known.get(version)
        trained = made.trained_through.isoformat() if made else None
        measured = [made.metrics.get(m) if made else None for m in ("codes", "reconstruction", "collision_share")]
        versions.append((version, trained, *measured, *items))
    marks = [(v, m.details) for v, m in day.context.snapshot("item_sids").marks() if m.step == "assign_sids"]
    runs = []
    for version, details in marks[:_MOST_RUNS]:
        drift = details.get("drift") or {}
        runs.append(
            (version, details.get("sid_version"), details.get("issued"), details.get("reissued"),
             drift.get("residual"), drift.get("perplexity"), details.get("warning", ""))
        )  # fmt: skip
    warning = marks[0][1].get("warning") if marks else None
    columns = ("version", "trained through", "codes", "reconstruction cosine", "collisions before repair",
               "items", "retired", "issued again")  # fmt: skip
    drifts = ("table version", "semantic-ID version", "issued", "issued again", "residual ratio",
              "perplexity ratio", "warning")  # fmt: skip
    text = (
        "Versions exist side by side until all consumers have moved to the new one. Ratios compare new items with "
        "those published before."
    )
    return PageSection(
        "Versions of semantic IDs", [text], [Table(columns, versions), *([Table(drifts, runs)] if runs else [])],
        warnings=[warning] if warning else [], told_by="assign_sids",
    )  # fmt: skip
