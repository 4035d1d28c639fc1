"""Job: positives before the run date -> user_sequences, item_stats, user_stats.

    spark-submit … spark_jobs/sequences.py --config CONFIG --run-date D

A slice of user_sequences holds the users whose sequence may differ from their row of the base slice, or all users
(a snapshot). Nothing at or after D is read.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date, timedelta
from typing import Any

from pyspark.sql import DataFrame, Observation, Window
from pyspark.sql import functions as F

from gpl_core.lakehouse.snapshot import Snapshot
from spark_jobs.common.columns import broadcast_if_few, padded, sids_in_force, unit_hash
from spark_jobs.common.histories import slice_marks
from spark_jobs.run import job_main
from spark_jobs.step import SparkStep

_ORDER = ("event_time", "item_index", "kind")


def choose_base(
    table: Snapshot | None, run_date: date, snapshot_every: int, made_from: Mapping[str, Any],
    interactions: Snapshot, window: timedelta,
) -> tuple[date, int] | None:  # fmt: skip
    """(date, version of item_sids it was made from) of the newest slice before `run_date` that a new one may build on.

    None: there is none, or the next snapshot is due; the new slice then holds all users.

    Args:
        made_from: the sid_version and settings that a slice's mark must have.
        interactions: as they are now. A base that saw other rows in its `window` of history (late or corrected data)
            cannot be built on: it is unknown whose sequences that changed.
    """
    before = {d: m.details for d, m in slice_marks(table).items() if d < run_date}
    usable = {d: details for d, details in before.items() if made_from.items() <= details.items()}
    snapshots = [d for d, details in usable.items() if details.get("snapshot")]
    if not snapshots or (run_date - max(snapshots)).days >= snapshot_every:
        return None
    newest = max(usable)
    if usable[newest].get("events") != event_digests(interactions, newest - window, newest - timedelta(days=1)):
        return None
    return newest, int(usable[newest].get("item_sids", -1))


def event_digests(table: Snapshot, start: date, end: date) -> dict[str, str]:
    """ISO date -> short identity of the rows of that date; dates without rows too."""
    days = [start + timedelta(days=i) for i in range((end - start).days + 1)]
    return {d.isoformat(): table.identity(d, d)[:8] for d in days}


def moved_items(now: DataFrame, then: DataFrame) -> DataFrame:
    """item_index of the items whose semantic ID in force differs between two states of item_sids."""
    both = now.join(then.withColumnRenamed("sid", "_then"), "item_index", "full")
    return both.where(~F.col("sid").eqNullSafe(F.col("_then"))).select("item_index")


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
        padded(flat_sid, length * levels, F.lit(-1)).alias("sid"),
        padded(items, length, F.lit(-1)).alias("item_index"),
        padded(F.col("events.keep_u"), length, F.lit(-1.0).cast("float")).alias("keep_u"),
        F.size("events").alias("length"),
        F.unix_micros(F.element_at(F.col("events.event_time"), -1)).alias("last_event_time"),
        F.sha2(text, 256).substr(1, 32).alias("sequence_hash"),
        F.lit(sid_version).alias("sid_version"),
        F.lit((run_date - date(1970, 1, 1)).days).alias("day"),
        F.lit(run_date).alias("dt"),
    )


@dataclass(frozen=True)
class CountWindows:
    """What the counts of a run date are made of: windows that end before it."""

    run_date: date
    days: Mapping[str, int]  # table -> days of its window

    def digests(self, tables: Mapping[str, Snapshot], run_date: date) -> dict[str, dict[str, str]]:
        """Digests of every date that counts of `run_date` see, as the tables are now."""
        last = run_date - timedelta(days=1)
        return {t: event_digests(tables[t], run_date - timedelta(days=n), last) for t, n in self.days.items()}

    def base(self, table: Snapshot | None, tables: Mapping[str, Snapshot], reach: int) -> date | None:
        """The newest slice, at most `reach` days old, whose dates still have the rows it saw; None: count all rows."""
        marks = slice_marks(table)
        for days in range(1, min(reach + 1, *self.days.values())):
            day = self.run_date - timedelta(days=days)
            if day in marks and marks[day].details.get("saw") == self.digests(tables, day):
                return day
        return None

    def events(self, step: SparkStep, table: str, base: date | None) -> DataFrame:
        """Rows of the window with `sign` 1; with a base those that came since then, and with -1 those that left."""
        window, last = timedelta(days=self.days[table]), self.run_date - timedelta(days=1)
        if base is None:
            return step.read_dates(table, self.run_date - window, last).withColumn("sign", F.lit(1))
        came, left = F.col("dt") >= F.lit(base), F.col("dt") < F.lit(self.run_date - window)
        rows = step.read_dates(table, base - window, last).where(came | left)
        return rows.withColumn("sign", F.when(came, 1).otherwise(-1))


def count_stats(liked: DataFrame, shown: DataFrame, before: DataFrame | None, key: str, run_date: date) -> DataFrame:
    """Impressions, clicks and positives per `key`: signed events added to the counts `before`."""
    zero, sign = F.lit(0).cast("long"), F.col("sign").cast("long")
    rows = shown.select(key, sign.alias("i"), (sign * F.col("clicked")).alias("c"), zero.alias("p")).union(
        liked.select(key, zero.alias("i"), zero.alias("c"), sign.alias("p"))
    )
    if before is not None:
        rows = rows.union(before.select(key, "impressions", "clicks", "positives"))
    return (
        rows.groupBy(key)
        .agg(F.sum("i").alias("impressions"), F.sum("c").alias("clicks"), F.sum("p").alias("positives"))
        .where("impressions + positives > 0")
        .withColumn("dt", F.lit(run_date))
    )


def write_counts(step: SparkStep) -> None:
    """item_stats and user_stats: positives over the sequences' window, exposures over `sequences.stats_days`."""
    config, day = step.config.sequences, step.run_date
    windows = CountWindows(day, {"interactions": config.history_days, "impressions": config.stats_days})
    tables = {t: step.context.snapshot(t) for t in windows.days}
    saw = windows.digests(tables, day)
    for table, key in (("item_stats", "item_index"), ("user_stats", "user_id")):
        own = step.context.output(table)
        base = windows.base(own, tables, config.snapshot_every)
        liked, shown = (windows.events(step, t, base) for t in windows.days)
        before = None
        if own is not None and base is not None:
            before = step.read_version(table, own.version).where(F.col("dt") == F.lit(base))
        rows = count_stats(liked, shown, before, key, day)
        if table == "item_stats":
            # One row, broadcast: the sum over the window's positives.
            total = rows.agg(F.greatest(F.sum("positives"), F.lit(1)).alias("_all"))
            share = (F.col("positives") / F.col("_all")).cast("double")
            rows = rows.crossJoin(F.broadcast(total)).withColumn("popularity_share", share).drop("_all")
        step.write_slice(table, rows, details={"saw": saw, "base": base.isoformat() if base else ""})


def run(step: SparkStep) -> None:
    """Write the three slices of the run date."""
    context, config, day = step.context, step.config.sequences, step.run_date
    sid_version = context.artifact("tokenizer").version
    yesterday, window = day - timedelta(days=1), timedelta(days=config.history_days)
    interactions = context.snapshot("interactions")
    made_from = {"sid_version": sid_version, "settings": context.step.config_hash(step.config)}
    base = choose_base(context.output("user_sequences"), day, config.snapshot_every, made_from, interactions, window)
    sids_version = context.snapshot("item_sids").version
    if base is not None and base[1] != sids_version and not context.lake.has_version("item_sids", base[1]):
        base = None  # what it was made from was vacuumed: all users again
    sids = sids_in_force(step.read("item_sids"), sid_version)
    events = step.read_dates("interactions", day - window, yesterday)
    if base is not None:
        base_day, base_sids = base
        # Events that left the window since the base are read only to find their users.
        seen = step.read_dates("interactions", base_day - window, yesterday)
        users = changed_users(seen, base_day, day, config.history_days)
        if sids_version != base_sids:
            then = sids_in_force(step.read_version("item_sids", base_sids), sid_version)
            moved = events.join(moved_items(sids, then), "item_index", "left_semi")
            users = users.union(moved.select("user_id")).distinct()
        users = users.persist()
        events = events.join(broadcast_if_few(users, users.count()), "user_id", "left_semi")
    observed = Observation(f"sequences_{day}_{context.run_id}")
    found = F.count(F.lit(1)).alias("events"), F.count_if(F.col("sid").isNull()).alias("without_sid")
    with_sid = events.join(sids, "item_index", "left").observe(observed, *found).where("sid IS NOT NULL")
    rows = build_sequences(
        with_sid, sid_version=sid_version, levels=step.config.tokenizer.levels, length=config.max_length,
        seed=step.config.run.seed, run_date=day,
    )  # fmt: skip
    built_on = base[0].isoformat() if base else ""
    details = {**made_from, "snapshot": base is None, "base": built_on, "item_sids": sids_version}
    digests = event_digests(interactions, day - window, yesterday)
    step.write_slice("user_sequences", step.spread(rows, "user_id"), details={**details, "events": digests})
    context.counts.rows_in, context.counts.rows_dropped = observed.get["events"], observed.get["without_sid"]
    context.counts.details = {**details, "events_without_sid": observed.get["without_sid"]}
    write_counts(step)


if __name__ == "__main__":
    job_main("sequences", run)
