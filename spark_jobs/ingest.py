"""Job: raw tables -> items, impressions, candidates, interactions, and quarantine for what breaks the contract.

    spark-submit … spark_jobs/ingest.py --config CONFIG --run-date D

Rows in = rows out + quarantined + documented drops, per raw table, or the step fails:
    impressions    every good row is written
    candidates     one row per (request, item) with all its channels: the other rows are drops
    interactions   raw ones and clicks, each event once: a click that both report is a drop
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from functools import reduce

from delta.tables import DeltaTable
from pyspark.sql import Column, DataFrame, Observation, Window
from pyspark.sql import functions as F

from gpl_core.config import Config, with_passthrough
from gpl_core.contracts.contract import Contract, load_contract
from gpl_core.errors import ContractError, QuarantineError, counted
from gpl_core.lakehouse.files import rows_in
from gpl_core.lakehouse.lake import Commit
from spark_jobs.common.columns import only_row, passthrough_of
from spark_jobs.common.exclusions import checked_opt_outs
from spark_jobs.common.items import ItemChanges, checked_items, item_changes, latest_items
from spark_jobs.common.raw_casts import rows_of
from spark_jobs.common.raw_checks import (
    Checked,
    failed_rows,
    inside_slice,
    known_item,
    quarantine_rows,
    split,
    typed_rows,
)
from spark_jobs.run import job_main
from spark_jobs.step import SparkStep

_ROWS_PER_TASK = 4_000_000
_EVENTS = ("raw_impressions", "raw_candidates", "raw_interactions")
_EVENT = ["dt", "user_id", "item_id", "event_time", "kind"]


def first_of_key(table: str) -> tuple[list[str], list[Column]]:
    """(key of the raw table, order in which the first of several rows with one key stays)."""
    time, score = F.col("event_time"), F.col("recall_score").desc_nulls_last()
    return {
        "raw_impressions": (["dt", "request_id", "item_id"], [time, F.col("clicked").desc(), F.col("position")]),
        "raw_candidates": (["dt", "request_id", "item_id", "channel"], [time, score, F.col("user_id")]),
        "raw_interactions": (_EVENT, [time]),
    }[table]


def split_events(raw: DataFrame, contract: Contract, known: DataFrame, first: date) -> tuple[DataFrame, DataFrame]:
    """(good, bad) rows of a raw table of events: types, nulls, ranges, time inside the slice, known item, unique key.

    Args:
        known: item_id and item_index of every item.
        first: slice of rows without a date and a time.
    """
    frame, checks = typed_rows(raw, contract, first)
    checked = Checked.of(frame.join(known, "item_id", "left"), [*checks, inside_slice(), known_item()], frame)
    return split(checked, *first_of_key(contract.name))


def fold_channels(good: DataFrame) -> DataFrame:
    """One row per (request, item): its channels sorted, the first of them, the best score, `_rows` folded into it."""
    # A window, not an aggregation: collecting channels in one would serialize and sort every row twice.
    by_channel = Window.partitionBy("dt", "request_id", "item_id").orderBy("channel")
    whole = by_channel.rowsBetween(Window.unboundedPreceding, Window.unboundedFollowing)
    return good.withColumns({
        "channels": F.collect_list("channel").over(whole),
        "recall_score": F.coalesce(F.max("recall_score").over(whole), F.lit(0.0)),
        "_rows": F.count(F.lit(1)).over(whole),
        "_place": F.row_number().over(by_channel),
    }).where("_place = 1")  # fmt: skip


def positive_events(interactions: DataFrame, impressions: DataFrame) -> DataFrame:
    """raw_interactions and clicked impressions, each event once; `_raw_rows` and `_clicks` count what was merged."""
    raw = interactions.select(*_EVENT, "item_index", F.lit(1).alias("_raw"), F.lit(0).alias("_click"))
    clicked = impressions.where(F.col("clicked") == 1).withColumn("kind", F.lit("click"))
    clicks = clicked.select(*_EVENT, "item_index", F.lit(0).alias("_raw"), F.lit(1).alias("_click"))
    return raw.union(clicks).groupBy(*_EVENT).agg(
        F.max("item_index").alias("item_index"), F.sum("_raw").alias("_raw_rows"), F.sum("_click").alias("_clicks")
    )  # fmt: skip


@dataclass(frozen=True)
class Quarantined:
    """Rows refused per raw table, and one line of text per reason."""

    rows: dict[str, int]
    reasons: dict[str, list[str]]


def summarize_quarantine(slice_: DataFrame) -> Quarantined:
    """Rows and reasons of a written quarantine slice; bounded by tables x checks."""
    each = slice_.select("source_table", "occurrences", F.posexplode("failed_checks").alias("at", "check"))
    found = (
        each.groupBy("source_table", F.col("check.name").alias("name"))
        .agg(
            F.sum("occurrences").alias("n"),
            F.sum(F.when(F.col("at") == 0, F.col("occurrences")).otherwise(0)).alias("first"),
            F.min("check.message").alias("eg"),
        )
        .orderBy(F.desc("n"), "source_table", "name")
        .collect()
    )  # fmt: skip
    refused = Quarantined({}, {})
    for table, name, n, first, message in found:
        refused.rows[table] = refused.rows.get(table, 0) + first
        refused.reasons.setdefault(table, []).append(f"{name}: {counted(n, 'row')}, e.g. {message}")
    return refused


def run(step: SparkStep) -> None:
    """One date, or all dates of a bulk run: quarantine first, then items, then the three event tables."""
    context, config, dates = step.context, step.config, step.context.dates
    for table in (*_EVENTS, "raw_items", "raw_opt_outs"):
        if context.has(table):  # refuse drift before anything is written
            typed_rows(step.read(table), _raw_contract(table, config))
    in_slice = F.col("dt").between(F.lit(dates[0]), F.lit(dates[-1]))
    first = min(config.run.first_date, dates[0])
    raw = {
        t: rows_of(step.read(t), _raw_contract(t, config), dates, first)
        for t in _EVENTS if context.has(t)
    }  # fmt: skip
    rows_in = {t: step.slice_rows(t, raw.get(t)) for t in _EVENTS}
    raw_items = checked_items(step.read("raw_items"), dates[-1], first, config)
    latest, bad_items = latest_items(raw_items, config)
    rows_in["raw_items"] = raw_items.rows.where(in_slice).count()
    bad = {"raw_items": bad_items.where(in_slice)}
    if (opt_outs := checked_opt_outs(step, dates[-1], first)) is not None:
        rows_in["raw_opt_outs"] = opt_outs.rows.where(in_slice).count()
        bad["raw_opt_outs"] = failed_rows(opt_outs).where(in_slice)
    # Ingest is the only writer of items, so its newest version need not be an input. Create it even if it stays empty.
    step.create_table(load_contract("items"))
    known_at = context.lake.open("items").version
    changes = item_changes(latest, step.read_version("items", known_at))

    good = {}
    for table, rows in raw.items():
        good[table], bad[table] = split_events(rows, _raw_contract(table, config), changes.known, first)
    quarantine = reduce(
        DataFrame.unionByName, [quarantine_rows(frame, table, context.run_id) for table, frame in bad.items()]
    ).coalesce(1)
    # Written first, so that it shows what was wrong when the step refuses. A retry writes it last: a row that is
    # accepted now must stay there until it is in another table, because a killed retry leaves no trace of its own.
    retry = bool(context.rewrite)
    refused = summarize_quarantine(quarantine.persist()) if retry else _write_quarantine(step, quarantine, in_slice)
    _check_share(config, rows_in, refused)
    accepted = {t: rows_in[t] - refused.rows.get(t, 0) for t in _EVENTS}

    _write_items(step, changes, known_at)
    impressions, _ = _publish(step, "impressions", good["raw_impressions"], rows_in["raw_impressions"])
    candidates, folded = _publish(
        step, "candidates", fold_channels(good["raw_candidates"]), rows_in["raw_candidates"], ["_rows"]
    )
    clicks = step.read_version("impressions", impressions.version_after).where(in_slice)
    raw_events = good["raw_interactions"] if "raw_interactions" in good else step.empty("interactions")
    interactions, merged = _publish(
        step, "interactions", positive_events(raw_events, clicks), rows_in["raw_interactions"],
        ["_raw_rows", "_clicks"],
    )  # fmt: skip

    _check_balance(step, raw, rows_in, refused, {
        "raw_impressions": impressions.rows,
        "raw_candidates": folded.get("_rows", accepted["raw_candidates"]),
        "raw_interactions": merged.get("_raw_rows", accepted["raw_interactions"]),
    })  # fmt: skip
    dropped = accepted["raw_candidates"] - candidates.rows
    clicked = merged.get("_clicks", max(0, interactions.rows - accepted["raw_interactions"]))
    both = accepted["raw_interactions"] + clicked - interactions.rows
    commits = {"impressions": impressions, "candidates": candidates, "interactions": interactions}
    counts = context.counts
    counts.rows_in = sum(rows_in[t] for t in _EVENTS)
    counts.rows_quarantined = sum(refused.rows.values())
    counts.rows_dropped = dropped + both
    counts.details = {
        "rows_in": rows_in, "quarantined": refused.rows, "reasons": refused.reasons, "folded_channels": dropped,
        "clicks": clicked, "clicks_reported_twice": both,
        "left_as_they_were": sorted(t for t, c in commits.items() if c.version_before == c.version_after),
        "items_new": changes.new, "items_updated": changes.updated,
    }  # fmt: skip
    if retry:
        step.write_slice("quarantine", quarantine)


def _raw_contract(table: str, config: Config) -> Contract:
    return with_passthrough(table, config) if table in ("raw_impressions", "raw_candidates") else load_contract(table)


def _write_quarantine(step: SparkStep, quarantine: DataFrame, in_slice: Column) -> Quarantined:
    commit = step.write_slice("quarantine", quarantine)
    if not commit.rows:
        return Quarantined({}, {})
    return summarize_quarantine(step.read_version("quarantine", commit.version_after).where(in_slice))


def _check_share(config: Config, rows_in: dict[str, int], refused: Quarantined) -> None:
    limit = config.ingest.max_quarantine_share
    broken = []
    for table, rows in refused.rows.items():
        if (share := rows / rows_in[table]) > limit:
            top = "\n    ".join(refused.reasons[table][:3])
            broken.append(f"{table}: {rows} of {rows_in[table]} rows ({share:.1%}) were refused:\n    {top}")
    if broken:
        raise QuarantineError(
            f"more than {limit:.1%} (ingest.max_quarantine_share) of a raw table broke its contract; only table "
            "quarantine was written. Repair the raw rows, or raise the threshold:\n  " + "\n  ".join(broken)
        )


def _write_items(step: SparkStep, changes: ItemChanges, since: int) -> None:
    """Merge what changed since version `since` into table items; no commit when nothing did."""
    if not changes.new + changes.updated:
        return
    contract = load_contract("items")
    columns: dict[str, str | Column] = {c: f"new.{c}" for c in contract.column_names}

    def execute(target: DeltaTable) -> None:
        merge = target.alias("old").merge(changes.rows.alias("new"), "old.item_id = new.item_id")
        changed: dict[str, str | Column] = {c: v for c, v in columns.items() if c not in ("item_id", "item_index")}
        merge.whenMatchedUpdate(set=changed).whenNotMatchedInsert(values=columns).execute()

    # Never an append: two concurrent runs would both assign the next indices, and Delta does not detect that conflict.
    step.merge(contract, execute, since)


def _publish(
    step: SparkStep, table: str, frame: DataFrame, rows: int, sums: Sequence[str] = ()
) -> tuple[Commit, dict[str, int]]:
    """Write the slice of `table`, from about `rows` raw rows.

    A table whose own raw slices are the same as last time stays as it is (`Step.shaped_by`), and with it every step
    that reads it: late candidates do not make tomorrow's histories stale.

    Returns: (its commit, the sums of the helper columns `sums`, counted by the writing tasks; none if it stays).
    """
    context, dates = step.context, step.context.dates
    if context.is_current(table):
        snapshot = context.lake.open(table)
        kept = rows_in(snapshot.select(start=dates[0], end=dates[-1]))
        return Commit(snapshot.version, snapshot.version, kept, 0), {}
    contract = load_contract(table)
    if table != "interactions":
        frame = frame.select(*contract.column_names, *passthrough_of(frame, step.config), *sums)
        contract = with_passthrough(table, step.config)
    if len(dates) > 1:  # keep the rows of a date together, so that each date gets few files
        parts = max(1, -(-rows // len(dates) // _ROWS_PER_TASK))
        frame = frame.repartition(len(dates) * parts, "dt", F.pmod(F.xxhash64("user_id"), F.lit(parts)))
    if not sums:
        return step.write_slice(table, frame, contract=contract), {}
    seen = Observation(f"{table}_{context.run_id}")
    frame = frame.observe(seen, *[F.coalesce(F.sum(c), F.lit(0)).alias(c) for c in sums]).drop(*sums)
    return step.write_slice(table, frame, contract=contract), dict(seen.get)


def _check_balance(
    step: SparkStep, raw: dict[str, DataFrame], rows_in: dict[str, int], refused: Quarantined, accepted: dict[str, int]
) -> None:
    for table, rows in accepted.items():
        bad = refused.rows.get(table, 0)
        if not (lost := rows_in[table] - rows - bad):
            continue
        first, last = step.context.dates[0], step.context.dates[-1]
        (found,) = only_row(raw[table].agg(F.coalesce(F.sum(F.lit(1)), F.lit(0))))  # count(*) would ask the log again
        if found != rows_in[table]:
            version, uri = step.context.snapshot(table).version, step.context.lake.uri(table)
            raise ContractError(
                f"table {table}: the log of version {version} says {rows_in[table]} rows of {first} to {last}, but "
                f"{found} were read; write the slice again, or the log's statistics: ANALYZE "
                f"TABLE delta.`{uri}` COMPUTE DELTA STATISTICS"
            )
        raise ContractError(
            f"table {table}: {rows_in[table]} rows in, but {rows} accepted and {bad} quarantined: {lost} "
            "unaccounted for. This is a bug in the step ingest; please report it"
        )


if __name__ == "__main__":
    job_main("ingest", run)
