"""Job: positives before the run date -> user_sequences, item_stats, user_stats.

    spark-submit … spark_jobs/sequences.py --config CONFIG --run-date D

A slice of user_sequences holds the users whose sequence may differ from their row of the base slice, or all users
(a snapshot). Nothing at or after D is read.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import date, timedelta

from pyspark.sql import Column, DataFrame, Observation, Window
from pyspark.sql import functions as F

from gpl_core.lake import Snapshot
from spark_jobs.columns import padded, sids_in_force, unit_hash
from spark_jobs.session import SparkStep, job_main

_ORDER = ("event_time", "item_index", "kind")


@dataclass(frozen=True)
class Base:
    """The slice that a new one builds on; `day` None: build from scratch."""

    day: date | None
    snapshot: bool  # the new slice holds all users


def choose_base(table: Snapshot | None, run_date: date, sid_version: str, snapshot_every: int) -> Base:
    """The newest slice before `run_date` of the same SIDs, unless the next snapshot is due."""
    slices: dict[date, tuple[str, bool]] = {}
    for _, mark in table.marks() if table else ():
        for name in mark.slices:
            details = (str(mark.details.get("sid_version")), bool(mark.details.get("snapshot")))
            slices.setdefault(date.fromisoformat(name), details)
    usable = {d: whole for d, (version, whole) in slices.items() if d < run_date and version == sid_version}
    snapshots = [d for d, whole in usable.items() if whole]
    if not snapshots or (run_date - max(snapshots)).days >= snapshot_every:
        return Base(None, snapshot=True)
    return Base(max(usable), snapshot=False)


def changed_users(interactions: DataFrame, base: date, run_date: date, history_days: int) -> DataFrame:
    """Users with an event since `base`, or whose events have left the history window since then."""
    window = timedelta(days=history_days)
    new = F.col("dt").between(F.lit(base), F.lit(run_date - timedelta(days=1)))
    left = F.col("dt").between(F.lit(base - window), F.lit(run_date - window - timedelta(days=1)))
    return interactions.where(new | left).select("user_id").distinct()


def build_sequences(
    events: DataFrame, *, sid_version: str, levels: int, length: int, seed: int, run_date: date
) -> DataFrame:
    """The last `length` positives of every user in `events` (with their items' `sid`), oldest first.

    keep_u is a hash of the event, not a random number: a re-run keeps the same targets.
    """
    newest_first = Window.partitionBy("user_id").orderBy(*[F.col(c).desc() for c in _ORDER])
    keep_u = unit_hash(F.col("user_id"), F.col("item_id"), F.unix_micros("event_time"), F.lit(seed)).cast("float")
    last = (
        events.withColumn("_place", F.row_number().over(newest_first))
        .where(F.col("_place") <= length)
        .select("user_id", *_ORDER, "sid", keep_u.alias("keep_u"))
    )
    ordered = F.sort_array(F.collect_list(F.struct(*_ORDER, "sid", "keep_u")))
    users = last.groupBy("user_id").agg(ordered.alias("events"))
    flat_sid = F.flatten(F.col("events.sid"))
    items = F.col("events.item_index")
    text = F.concat_ws(",", F.lit(sid_version), items.cast("array<string>"), flat_sid.cast("array<string>"))
    return users.select(
        "user_id",
        _int_padded(flat_sid, length * levels).alias("sid"),
        _int_padded(items, length).alias("item_index"),
        padded(F.col("events.keep_u"), length, F.lit(-1.0).cast("float")).alias("keep_u"),
        F.size("events").alias("length"),
        F.unix_micros(F.element_at(F.col("events.event_time"), -1)).alias("last_event_time"),
        F.sha2(text, 256).substr(1, 32).alias("sequence_hash"),
        F.lit(sid_version).alias("sid_version"),
        F.lit((run_date - date(1970, 1, 1)).days).alias("day"),
        F.lit(run_date).alias("dt"),
    )


def _int_padded(array: Column, length: int) -> Column:
    return padded(array, length, F.lit(-1))


def count_stats(interactions: DataFrame, impressions: DataFrame, key: str, run_date: date) -> DataFrame:
    """Impressions, clicks and positives per `key`."""
    zero = F.lit(0).cast("long")
    shown = impressions.select(key, F.lit(1).cast("long").alias("i"), F.col("clicked").cast("long").alias("c"),
                               zero.alias("p"))  # fmt: skip
    liked = interactions.select(key, zero.alias("i"), zero.alias("c"), F.lit(1).cast("long").alias("p"))
    return (
        shown.union(liked)
        .groupBy(key)
        .agg(F.sum("i").alias("impressions"), F.sum("c").alias("clicks"), F.sum("p").alias("positives"))
        .withColumn("dt", F.lit(run_date))
    )


def run(step: SparkStep) -> None:
    """Write the three slices of the run date."""
    context, config, day = step.context, step.config.sequences, step.run_date
    sid_version = context.artifact("tokenizer").version
    lake = context.lake
    base = choose_base(
        lake.open("user_sequences") if lake.exists("user_sequences") else None, day, sid_version, config.snapshot_every
    )
    yesterday = day - timedelta(days=1)
    oldest = day - timedelta(days=config.history_days)
    events = step.read_dates("interactions", oldest, yesterday)
    if base.day is not None:
        # What left the window since the base is read to find its users, not to enter their sequences.
        seen = step.read_dates("interactions", base.day - timedelta(days=config.history_days), yesterday)
        events = events.join(changed_users(seen, base.day, day, config.history_days), "user_id", "left_semi")
    sids = sids_in_force(step.read("item_sids"), sid_version)
    observed = Observation(f"sequences_{day}_{context.run_id}")
    with_sid = (
        events.join(sids, "item_index", "left")
        .observe(
            observed,
            F.count(F.lit(1)).alias("events"),
            F.count(F.when(F.col("sid").isNull(), 1)).alias("without_sid"),
        )
        .where("sid IS NOT NULL")
    )
    rows = build_sequences(
        with_sid, sid_version=sid_version, levels=step.config.tokenizer.levels, length=config.max_length,
        seed=step.config.run.seed, run_date=day,
    )  # fmt: skip
    details = {
        "snapshot": base.snapshot, "base": base.day.isoformat() if base.day else "", "sid_version": sid_version
    }  # fmt: skip
    # As many files as shuffle partitions, so that every rank of a trainer gets some.
    parts = int(step.spark.conf.get("spark.sql.shuffle.partitions"))
    step.write_slice("user_sequences", rows.repartition(parts, "user_id"), details=details)
    found = observed.get
    context.counts.rows_in = found["events"]
    context.counts.rows_dropped = found["without_sid"]
    context.counts.details = {**details, "events_without_sid": found["without_sid"]}

    window = day - timedelta(days=config.stats_days)
    liked = step.read_dates("interactions", window, yesterday)
    shown = step.read_dates("impressions", window, yesterday)
    items = count_stats(liked, shown, "item_index", day)
    # One row, broadcast: the sum over the window's positives.
    total = items.agg(F.greatest(F.sum("positives"), F.lit(1)).alias("_all"))
    share = (F.col("positives") / F.col("_all")).cast("double")
    shares = items.crossJoin(F.broadcast(total)).withColumn("popularity_share", share).drop("_all")
    step.write_slice("item_stats", shares)
    step.write_slice("user_stats", count_stats(liked, shown, "user_id", day))


def main() -> None:
    """Entry point."""
    job_main("sequences", run)


if __name__ == "__main__":
    main()
