"""Job: raw tables -> items, impressions, candidates, interactions, and quarantine for what breaks the contract.

    spark-submit … spark_jobs/ingest.py --config CONFIG --run-date D

Rows in = rows out + quarantined + documented drops, per raw table, or the step fails:
    impressions    every good row is written
    candidates     channels of one (request, item) are folded into one row: the others are drops
    interactions   raw ones and clicks, each event once: a click that both report is a drop
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce

from pyspark.sql import DataFrame, Observation, Window
from pyspark.sql import functions as F

from gpl_core.config import Config
from gpl_core.contracts.contract import Contract, load_contract
from gpl_core.errors import ContractError, QuarantineError
from gpl_core.lakehouse.files import rows_in
from gpl_core.lakehouse.lake import Commit
from spark_jobs.common.checks import Checked, inside_slice, known_item, quarantine_rows, split, typed_rows
from spark_jobs.common.columns import passthrough_of, with_passthrough
from spark_jobs.common.items import ItemChanges, checked_items, item_changes, latest_items
from spark_jobs.session import SparkStep, job_main

_ROWS_PER_TASK = 4_000_000
_EVENTS = ("raw_impressions", "raw_candidates", "raw_interactions")


def checked_events(raw: DataFrame, contract: Contract, known: DataFrame) -> Checked:
    """Events of a raw table, checked: types, nulls, ranges, time inside the slice, known item."""
    frame, checks = typed_rows(raw, contract)
    return Checked.of(frame.join(known, "item_id", "left"), [*checks, inside_slice(), known_item()], frame)


def split_impressions(checked: Checked) -> tuple[DataFrame, DataFrame]:
    """(good, bad) impressions: of rows with one (request, item) the earliest stays, clicked before not clicked."""
    return split(
        checked, ["dt", "request_id", "item_id"], [F.col("event_time"), F.col("clicked").desc(), F.col("position")]
    )


def split_candidates(checked: Checked) -> tuple[DataFrame, DataFrame]:
    """(good, bad) candidates: of rows with one (request, item, channel) the earliest stays, then the best score."""
    return split(
        checked,
        ["dt", "request_id", "item_id", "channel"],
        [F.col("event_time"), F.col("recall_score").desc_nulls_last(), F.col("user_id")],
    )


def split_interactions(checked: Checked) -> tuple[DataFrame, DataFrame]:
    """(good, bad) raw interactions: each event once."""
    return split(checked, ["dt", "user_id", "item_id", "event_time", "kind"], [F.col("event_time")])


def fold_channels(good: DataFrame, config: Config) -> DataFrame:
    """One row per (request, item): its channels sorted, the first of them, the best score, `_rows` folded into it."""
    extra = [f for f in config.feed.passthrough if f in good.columns]
    # A window and no aggregation: collecting channels in one would serialise and sort every row twice.
    by_channel = Window.partitionBy("dt", "request_id", "item_id").orderBy("channel")
    whole = by_channel.rowsBetween(Window.unboundedPreceding, Window.unboundedFollowing)
    folded = good.withColumns({
        "channels": F.collect_list("channel").over(whole),
        "recall_score": F.coalesce(F.max("recall_score").over(whole), F.lit(0.0)),
        "_rows": F.count(F.lit(1)).over(whole),
        "_place": F.row_number().over(by_channel),
    })  # fmt: skip
    return folded.where("_place = 1").select(
        "request_id", "item_id", "user_id", "event_time", "item_index", *extra, "channels", "channel", "recall_score",
        "dt", "_rows",
    )  # fmt: skip


def positive_events(interactions: DataFrame, impressions: DataFrame) -> DataFrame:
    """raw_interactions and clicked impressions, each event once; `_raw_rows` and `_clicks` count what was merged."""
    key = ["dt", "user_id", "item_id", "event_time", "kind"]
    raw = interactions.select(*key, "item_index", F.lit(1).alias("_raw"), F.lit(0).alias("_click"))
    clicks = impressions.where(F.col("clicked") == 1).select(
        "dt", "user_id", "item_id", "event_time", F.lit("click").alias("kind"), "item_index",
        F.lit(0).alias("_raw"), F.lit(1).alias("_click"),
    )  # fmt: skip
    return (
        raw.union(clicks)
        .groupBy(*key)
        .agg(
            F.max("item_index").alias("item_index"),
            F.sum("_raw").alias("_raw_rows"),
            F.sum("_click").alias("_clicks"),
        )
    )  # fmt: skip


@dataclass(frozen=True)
class Quarantined:
    """Rows refused per raw table, and a line per reason for people."""

    rows: dict[str, int]
    reasons: dict[str, list[str]]


def summarise_quarantine(slice_: DataFrame) -> Quarantined:
    """Rows and reasons of a written quarantine slice; bounded by tables x checks."""
    each = slice_.select("source_table", "occurrences", "row_json", F.posexplode("failed_checks").alias("at", "check"))
    example = F.struct(F.col("check.message").alias("message"), F.substring("row_json", 1, 300).alias("row"))
    found = (
        each.groupBy("source_table", F.col("check.name").alias("name"))
        .agg(
            F.sum("occurrences").alias("n"),
            F.sum(F.when(F.col("at") == 0, F.col("occurrences")).otherwise(0)).alias("first"),
            F.min(example).alias("eg"),
        )
        .orderBy(F.desc("n"), "source_table", "name")
        .collect()
    )  # fmt: skip
    rows: dict[str, int] = {}
    reasons: dict[str, list[str]] = {}
    for row in found:
        rows[row["source_table"]] = rows.get(row["source_table"], 0) + row["first"]
        text = f"{row['name']}: {row['n']} row(s), e.g. {row['eg']['message']} in {row['eg']['row']}"
        reasons.setdefault(row["source_table"], []).append(text)
    return Quarantined(rows, reasons)


def run(step: SparkStep) -> None:
    """One date, or all dates of a bulk run: quarantine first, then items, then the three event tables."""
    dates, config = step.context.dates, step.config
    for table in (*_EVENTS, "raw_items"):
        if step.context.has(table):  # refuse drift before anything is written
            typed_rows(step.read_unchecked(table), load_contract(table))
    rows_in = {t: _rows_in(step, t) for t in _EVENTS}
    raw_items = checked_items(step.read_unchecked("raw_items"), dates[0], dates[-1], config)
    latest, bad_items = latest_items(raw_items, config)
    in_slice = F.col("dt").between(F.lit(dates[0]), F.lit(dates[-1]))
    rows_in["raw_items"] = raw_items.rows.where(in_slice).count()
    # Ingest is the only writer of items, so its newest version need not be an input. It exists also when no item does.
    step.create_table(load_contract("items"))
    known_at = step.context.lake.open("items").version
    changes = item_changes(latest, step.read_version("items", known_at))

    splitters = {
        "raw_impressions": split_impressions,
        "raw_candidates": split_candidates,
        "raw_interactions": split_interactions,
    }
    good, bad = {}, {"raw_items": bad_items.where(in_slice)}
    for table, split_rows in splitters.items():
        if step.context.has(table):
            raw = step.read_unchecked(table).where(in_slice)
            good[table], bad[table] = split_rows(checked_events(raw, load_contract(table), changes.known))
    quarantine = reduce(
        DataFrame.unionByName, [quarantine_rows(frame, table, step.context.run_id) for table, frame in bad.items()]
    ).coalesce(1)  # fmt: skip
    # First, so that it tells what was wrong when the step refuses. A retry writes it last: a row that is accepted now
    # must stand there until it stands elsewhere, for the tables do not say that a killed retry is not done.
    retry = bool(step.context.rewrite)
    refused = summarise_quarantine(quarantine.persist()) if retry else _write_quarantine(step, quarantine)
    _check_share(config, rows_in, refused)

    commits = {"items": _write_items(step, changes, known_at)}
    # A table whose own raw slices are the same as last time is left alone (`Step.shaped_by`), and with it every step
    # that reads it: late candidates do not make tomorrow's histories stale.
    commits["impressions"] = _as_it_is(step, "impressions")
    if commits["impressions"] is None:
        impressions = good["raw_impressions"].select(
            *load_contract("impressions").column_names, *passthrough_of(good["raw_impressions"], config)
        )
        commits["impressions"] = step.write_slice(
            "impressions", _spread(impressions, rows_in["raw_impressions"], len(dates)),
            contract=with_passthrough("impressions", config),
        )  # fmt: skip
    written = step.read_version("impressions", commits["impressions"].version_after).where(in_slice)
    commits["candidates"] = _as_it_is(step, "candidates")
    seen = {"_rows": rows_in["raw_candidates"] - refused.rows.get("raw_candidates", 0)}
    if commits["candidates"] is None:
        folded = fold_channels(good["raw_candidates"], config)
        folded = folded.select(*load_contract("candidates").column_names, *passthrough_of(folded, config), "_rows")
        commits["candidates"], seen = _observed(
            step, "candidates", _spread(folded, rows_in["raw_candidates"], len(dates)), ["_rows"]
        )
    raw_events = good.get("raw_interactions")
    if raw_events is None:
        raw_events = step.empty("interactions")
    events = positive_events(raw_events, written)
    commits["interactions"] = _as_it_is(step, "interactions")
    merged = {"_raw_rows": rows_in["raw_interactions"] - refused.rows.get("raw_interactions", 0)}
    if commits["interactions"] is not None:
        merged["_clicks"] = max(0, commits["interactions"].rows - merged["_raw_rows"])
    else:
        commits["interactions"], merged = _observed(
            step, "interactions", _spread(events, rows_in["raw_interactions"], len(dates)), ["_raw_rows", "_clicks"]
        )
    _balance(step, rows_in, refused, changes, commits, seen["_rows"], merged)
    if retry:
        step.write_slice("quarantine", quarantine)


def _rows_in(step: SparkStep, table: str) -> int:
    """Rows of the slice by the log's statistics, by counting where the log has none."""
    if not step.context.has(table):
        return 0
    dates = step.context.dates
    files = step.context.snapshot(table).select(start=dates[0], end=dates[-1])
    if any(f.rows < 0 for f in files):
        return step.read_unchecked(table).where(F.col("dt").between(F.lit(dates[0]), F.lit(dates[-1]))).count()
    return sum(f.rows for f in files)


def _spread(frame: DataFrame, rows: int, dates: int) -> DataFrame:
    """Several dates in one commit: keep the rows of a date together, so that each gets few files."""
    if dates == 1:
        return frame
    parts = max(1, -(-rows // dates // _ROWS_PER_TASK))
    salt = F.pmod(F.xxhash64("user_id"), F.lit(parts))
    return frame.repartition(dates * parts, "dt", salt)


def _write_quarantine(step: SparkStep, quarantine: DataFrame) -> Quarantined:
    commit = step.write_slice("quarantine", quarantine)
    if not commit.rows:
        return Quarantined({}, {})
    dates = step.context.dates
    written = step.read_version("quarantine", commit.version_after)
    return summarise_quarantine(written.where(F.col("dt").between(F.lit(dates[0]), F.lit(dates[-1]))))


def _check_share(config: Config, rows_in: dict[str, int], refused: Quarantined) -> None:
    limit = config.ingest.max_quarantine_share
    broken = []
    for table, rows in refused.rows.items():
        share = rows / rows_in[table]
        if share > limit:
            top = "\n    ".join(refused.reasons[table][:3])
            broken.append(f"{table}: {rows} of {rows_in[table]} rows ({share:.1%}) were refused:\n    {top}")
    if broken:
        raise QuarantineError(
            f"more than {limit:.1%} (ingest.max_quarantine_share) of a raw table broke its contract; only table "
            "quarantine was written. Repair the raw rows, or raise the threshold:\n  " + "\n  ".join(broken)
        )


def _as_it_is(step: SparkStep, table: str) -> Commit | None:
    """The slice of `table` as an earlier run left it, when that run saw the same inputs; else None."""
    if not step.context.is_current(table):
        return None
    dates, snapshot = step.context.dates, step.context.lake.open(table)
    return Commit(snapshot.version, snapshot.version, rows_in(snapshot.select(start=dates[0], end=dates[-1])), 0)


def _write_items(step: SparkStep, changes: ItemChanges, since: int) -> Commit | None:
    """Merge what changed since version `since` into table items; no commit when nothing did."""
    contract = load_contract("items")
    if not changes.new + changes.updated:
        return None
    # Never an append: two runs at once would both give out the next indices, and Delta lets blind appends pass.
    columns = {c: f"new.{c}" for c in contract.column_names}
    return step.merge(
        contract,
        lambda target: (
            target.alias("old")
            .merge(changes.rows.alias("new"), "old.item_id = new.item_id")
            .whenMatchedUpdate(set={c: v for c, v in columns.items() if c not in ("item_id", "item_index")})
            .whenNotMatchedInsert(values=columns)
            .execute()
        ),
        since,
    )


def _observed(
    step: SparkStep, table: str, frame: DataFrame, sums: Sequence[str]
) -> tuple[Commit, dict[str, int]]:  # fmt: skip
    """Write a slice and return the sums of helper columns that are not written, counted by the writing tasks."""
    seen = Observation(f"{table}_{step.context.run_id}")
    frame = frame.observe(seen, *[F.coalesce(F.sum(c), F.lit(0)).alias(c) for c in sums]).drop(*sums)
    commit = step.write_slice(
        table, frame, contract=with_passthrough(table, step.config) if table == "candidates" else None
    )
    return commit, dict(seen.get)


def _balance(
    step: SparkStep, rows_in: dict[str, int], refused: Quarantined, changes: ItemChanges,
    commits: dict[str, Commit | None], folded: int, merged: dict[str, int],
) -> None:  # fmt: skip
    out = {t: c.rows if c else 0 for t, c in commits.items()}
    accounts = {
        "raw_impressions": (out["impressions"], 0),
        "raw_candidates": (out["candidates"], folded - out["candidates"]),
        "raw_interactions": (merged["_raw_rows"], 0),
    }
    both = merged["_raw_rows"] + merged["_clicks"] - out["interactions"]
    for table, (written, dropped) in accounts.items():
        gone = rows_in[table] - written - dropped - refused.rows.get(table, 0)
        if gone:
            raise ContractError(
                f"table {table}: {rows_in[table]} rows in, but {written} written, {refused.rows.get(table, 0)} "
                f"quarantined and {dropped} folded: {gone} unaccounted for. This is a defect of ingest, report it"
            )
    counts = step.context.counts
    counts.rows_in = sum(rows_in[t] for t in _EVENTS)
    counts.rows_quarantined = sum(refused.rows.values())
    counts.rows_dropped = folded - out["candidates"] + both
    counts.details = {
        "rows_in": rows_in,
        "quarantined": refused.rows,
        "reasons": refused.reasons,
        "folded_channels": folded - out["candidates"],
        "clicks": merged["_clicks"],
        "clicks_reported_twice": both,
        "left_as_they_were": sorted(t for t, c in commits.items() if c and c.version_before == c.version_after),
        "items_new": changes.new,
        "items_updated": changes.updated,
    }


if __name__ == "__main__":
    job_main("ingest", run)
