"""`gpl check-raw`: every problem of the raw tables at once, from their schemas, logs and a sample of rows.

The rules are those of ingest (spark_jobs/common/raw_checks.py): an error here is refused or quarantined there.
"""

import argparse
import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, timedelta
from typing import Literal

from deltalake.exceptions import DeltaError

from gpl_core.commands.command import Command, run_dates
from gpl_core.config import Config, date_range, with_passthrough
from gpl_core.contracts.contract import Contract, load_contract
from gpl_core.contracts.raw_values import WHOLE_KINDS, drift
from gpl_core.errors import ContractError, GplError, MissingInputError, UsageError, counted, some
from gpl_core.graph.arguments import add_dates
from gpl_core.lakehouse.engine import UnreadableError
from gpl_core.lakehouse.lake import Lake
from gpl_core.lakehouse.query import Query
from gpl_core.lakehouse.raw_mapping import RAW, REQUIRED
from gpl_core.lakehouse.raw_sample import RawSample, in_days, is_true
from gpl_core.lakehouse.snapshot import Snapshot
from gpl_core.lakehouse.storage import filesystem
from gpl_core.lakehouse.table_layout import EARLIEST, LATEST

_SNAPSHOTS = (
    "; if each day adds the whole catalog: lakehouse.columns.raw_items: {updated_at: C}, where C is the snapshot's date"
)


@dataclass(frozen=True)
class Finding:
    """One problem of a raw table."""

    level: Literal["error", "warning", "note"]
    table: str
    text: str


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_dates(parser)
    parser.add_argument(
        "--sample-rows", type=int, default=100_000, metavar="N", help="rows read per table (default 100,000)"
    )


def run(args: argparse.Namespace, config: Config) -> int:
    """Print the findings; exit code 3 if one is an error."""
    if args.sample_rows < 1:
        raise UsageError(f"--sample-rows {args.sample_rows}: expected at least 1")
    found = check_raw(config, run_dates(args, config), args.sample_rows)
    for finding in found:
        print(f"{finding.level}: {finding.table}: {finding.text}")
    errors, warnings = (sum(f.level == level for f in found) for level in ("error", "warning"))
    counts = f"{counted(errors, 'error')}, {counted(warnings, 'warning')}"
    print(counts if errors + warnings else "the raw tables can be ingested")
    return ContractError.exit_code if errors else 0


def check_raw(config: Config, dates: Sequence[date], sample_rows: int) -> list[Finding]:
    """Findings for all raw tables; at most `sample_rows` rows of each are read, of the first of `dates` that it has.

    An error is what `ingest` refuses; a warning is what it quarantines, or what costs more than it needs to; a note
    says what an optional table would add.
    """
    lake = Lake.of(config.lakehouse)
    found: list[Finding] = []
    readable: dict[str, Snapshot] = {}
    for name in RAW:
        try:
            lake.uri(name)
        except MissingInputError as problem:  # named by a catalog that gpl register has not asked yet
            found.append(Finding("error", name, str(problem).removeprefix(f"table {name}: ")))
            continue
        passes = name in ("raw_impressions", "raw_candidates")
        contract = with_passthrough(name, config) if passes else load_contract(name)
        if not lake.exists(name):
            found += _absent(lake, contract)
            continue
        try:
            table = Snapshot(lake.uri(name), contract, None, lake.columns.get(name))
            wrong = list(_schema(table))
            found += wrong or _layout(table, dates)
        except (GplError, OSError) as problem:
            found.append(Finding("error", name, f"the Delta table at {lake.uri(name)} cannot be opened: {problem}"))
            continue
        if not wrong:
            readable[name] = table
    found += _history(readable, config, dates[0])
    query = Query(lake)
    for name in tuple(readable):
        try:
            query.open(name)
        except UnreadableError as problem:  # ingest reads it
            del readable[name]
            found.append(Finding("warning", name, f"no rows were checked: {problem}"))
    for table in readable.values():
        checks = _rows(query, table, config, dates, sample_rows, readable.get("raw_items"))
        found += _readable(checks, table.contract.name)
    if "raw_impressions" in readable:
        found += _readable(_rate(query, readable["raw_impressions"], config, dates[0]), "raw_impressions")
    return found


# ---- schemas and logs --------------------------------------------------------------------------------------------


def _absent(lake: Lake, contract: Contract) -> Iterator[Finding]:
    name, uri = contract.name, lake.uri(contract.name)
    absent = f"there is no Delta table at {uri}"
    fs, path = filesystem(uri)
    if any(fs.glob(f"{path}/{deep}*.parquet") for deep in ("", "*/")):
        dated = " PARTITIONED BY (dt DATE)" if "dt" in contract.partition_by else ""
        convert = f"CONVERT TO DELTA parquet.`{uri}`{dated}"
        yield Finding("error", name, f"{absent}: it has Parquet files without a log; in Spark: {convert}")
    elif name in lake.overrides:
        todo = "correct the setting" if name in REQUIRED else "remove the setting"
        placed = f"where lakehouse.tables.{name} places it: write it, or {todo}"
        yield Finding("error", name, f"{absent}, {placed}")
    elif name == "raw_interactions":
        yield Finding("note", name, f"no table at {uri}; it is optional: without it, only clicks count as positives")
    elif name in REQUIRED:
        yield Finding("error", name, f"{absent}: write it, or set lakehouse.tables.{name}")


def _schema(table: Snapshot) -> Iterator[Finding]:
    name = table.contract.name
    if name == "raw_items" and not table.files:
        yield Finding("error", name, "it has no rows: every event would be quarantined because its item is unknown")
    for text in drift(table.contract, table.types):
        column = text.split("'")[1]
        close = difflib.get_close_matches(column, table.column_names, 1, 0.5) if text.endswith("missing") else []
        hints = [f"; if it is '{c}': lakehouse.columns.{name}: {{{column}: {c}}}" for c in close]
        yield Finding("error", name, text + "".join(hints))


def _layout(table: Snapshot, dates: Sequence[date]) -> Iterator[Finding]:
    """Of a table with dates: which are missing, and which files count to more of them than they need to."""
    if "dt" not in table.contract.partition_by:
        return
    name, have = table.contract.name, table.slices()
    missing = [d for d in dates if not table.may_have(d)]
    if missing and name in REQUIRED:
        known = f"it has {have[0]} to {have[-1]}" if have else "it has no rows"
        yield Finding("error", name, f"no slice for {some(missing)}; {known}")
    unknown = [f for f in table.files if f.days == (EARLIEST, LATEST)]
    if not unknown:
        return
    column, kind = table.columns.get("dt", "dt"), table.types["dt"]
    why = f"the log has no minimum and maximum of '{column}' for them"
    if kind in ("string", *WHOLE_KINDS) and column not in table.files[0].partition:
        why = f"'{column}' ({kind}) does not sort in date order"
    yield Finding(
        "warning", name,
        f"{len(unknown):,} of {len(table.files):,} files belong to every date, so all dates become stale when one "
        f"changes: {why}; partition by that column, or set lakehouse.columns.{name}: {{dt: event_time}}",
    )  # fmt: skip


def _history(tables: Mapping[str, Snapshot], config: Config, first: date) -> Iterator[Finding]:
    """Days before the first run date of which no table of users' events has a row."""
    start = config.run.history_start
    events = {name: tables[name] for name in ("raw_impressions", "raw_interactions") if name in tables}
    if start is None or not events:
        return
    days = date_range(start, first - timedelta(days=1))
    if missing := [d for d in days if not any(table.may_have(d) for table in events.values())]:
        text = f"the history since run.history_start {start} has no rows for {some(missing)}"
        yield Finding("warning", " and ".join(events), text)


# ---- a sample of rows --------------------------------------------------------------------------------------------


def _readable(checks: Iterator[Finding], name: str) -> Iterator[Finding]:
    """What `checks` of rows find; that the rows cannot be read is a finding too."""
    try:
        yield from checks
    except (GplError, DeltaError) as problem:
        yield Finding("error", name, f"rows cannot be read: {problem}")


def _rows(
    query: Query, table: Snapshot, config: Config, dates: Sequence[date], most: int, items: Snapshot | None
) -> Iterator[Finding]:
    name, day = table.contract.name, dates[0]
    if "dt" in table.contract.partition_by:
        if (present := next((d for d in dates if table.may_have(d)), None)) is None:
            return
        day = present
    events = name not in ("raw_items", "raw_opt_outs")
    sample = RawSample(query, config, day).check(table, most, items if events else None)
    limit = config.ingest.max_quarantine_share
    too_many = sample.refused > limit * sample.rows
    for fault, (rows, example) in sample.faults.items():
        text = f"{fault} does not hold for {rows:,} of {sample.rows:,} sampled rows"
        text += f", e.g. {example!r}" if example else ""
        text += _SNAPSHOTS if (name, fault) == ("raw_items", "key_is_unique") else ""
        yield Finding("error" if too_many else "warning", name, text)
    if too_many:
        share = f"{sample.refused / sample.rows:.1%} of the rows"
        yield Finding("error", name, f"{share} would be quarantined, but ingest.max_quarantine_share is {limit:.1%}")


def _rate(query: Query, table: Snapshot, config: Config, day: date) -> Iterator[Finding]:
    """Whether the label rate can be estimated: the one setting that needs thought."""
    wanted = config.labels.calibrator
    if isinstance(wanted.target_rate, float) and wanted.kind == "quantile":
        return
    start, end = day - timedelta(days=wanted.window_days), day - timedelta(days=1)
    condition = f"{in_days(table, start, end)} AND {is_true(table, 'is_random')}"
    rows = query.rows(f"SELECT count(*) AS n FROM raw_impressions WHERE {condition}")[0]["n"]
    if rows < wanted.min_rows:
        is_error = wanted.target_rate == "uniform" or wanted.kind != "quantile"
        if not is_error and not query.rows(f"SELECT 1 FROM raw_impressions WHERE {in_days(table, start, end)} LIMIT 1"):
            yield Finding(
                "error", "raw_impressions",
                f"no rows in the {wanted.window_days} days before {day}, so there is no click rate for the labels; "
                "start on a later date, or set labels.calibrator.target_rate to the click rate you expect of unexposed "
                "pairs",
            )  # fmt: skip
            return
        share = f"the mean label will be {wanted.exposed_share:g} times the exposed click rate; it is better to "
        yield Finding(
            "error" if is_error else "warning", "raw_impressions",
            f"{rows:,} uniformly exposed rows (is_random) in the {wanted.window_days} days before {day}, but "
            f"labels.calibrator.min_rows is {wanted.min_rows:,}: {'' if is_error else share}set "
            "labels.calibrator.target_rate to the click rate you expect of unexposed pairs, or log a slice of random "
            "exposure",
        )  # fmt: skip


COMMAND = Command(
    "check-raw", "check the raw tables before the first run: every problem at once", run, add_arguments,
    examples=("--config shop.yaml", "--config shop.yaml --start-date 2026-03-01 --end-date 2026-03-07",),
)  # fmt: skip
