"""`gpl check-raw`: every problem of the raw tables at once, from their schemas, logs and a sample of rows.

The rules are those of ingest (spark_jobs/common/raw_checks.py): an error here is refused or quarantined there.
"""

import argparse
import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, timedelta
from typing import Any, Literal

from deltalake import DeltaTable

from gpl_core.commands.command import Command, run_dates
from gpl_core.config import Config
from gpl_core.contracts.contract import Column, Contract, load_contract
from gpl_core.contracts.types import arrow_type, spark_type
from gpl_core.errors import ContractError, GplError, MissingInputError, UsageError
from gpl_core.graph.arguments import add_dates
from gpl_core.lakehouse.engine import UnreadableError
from gpl_core.lakehouse.lake import Lake
from gpl_core.lakehouse.log import open_table
from gpl_core.lakehouse.query import Query
from gpl_core.lakehouse.snapshot import Snapshot
from gpl_core.lakehouse.storage import filesystem

TABLES = ("raw_items", "raw_impressions", "raw_candidates", "raw_interactions", "raw_opt_outs")
_OPTIONAL = ("raw_interactions", "raw_opt_outs")
_NUMBERS = {"byte", "short", "integer", "long", "float", "double"}
_WHOLE = {"byte", "short", "integer", "long"}
# contract type -> names in Delta of the other types that can be cast to it
_CASTABLE = {
    "string": _NUMBERS | {"boolean"},
    **dict.fromkeys(("int", "long", "double"), _NUMBERS | {"string", "boolean"}),
    "boolean": _WHOLE | {"string"},
    "timestamp": {"string", "date", "timestamp_ntz"},
}


@dataclass(frozen=True)
class Finding:
    """One problem of a raw table."""

    level: Literal["error", "warning"]
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
    errors = sum(f.level == "error" for f in found)
    print(f"{errors} error(s), {len(found) - errors} warning(s)" if found else "the raw tables can be ingested")
    return ContractError.exit_code if errors else 0


def check_raw(config: Config, dates: Sequence[date], sample_rows: int) -> list[Finding]:
    """Findings for all raw tables; at most `sample_rows` rows of each are read, of the first of `dates` that it has."""
    lake = Lake.of(config.lakehouse)
    found: list[Finding] = []
    readable: list[str] = []
    for name in TABLES:
        try:
            lake.uri(name)
        except MissingInputError as problem:  # named by a catalog that gpl register has not asked yet
            found.append(Finding("error", name, str(problem).removeprefix(f"table {name}: ")))
            continue
        problems = list(_table(lake, load_contract(name)))
        found += problems
        if lake.exists(name) and not any(p.level == "error" for p in problems):
            readable.append(name)
            if "dt" in load_contract(name).partition_by:
                found += _slices(lake, config, name, dates)
    query = Query(lake)
    for name in tuple(readable):
        try:
            query.open(name)
        except UnreadableError as problem:  # ingest reads it
            readable.remove(name)
            found.append(Finding("warning", name, f"no rows were looked at: {problem}"))
    for name in readable:
        found += _rows(query, lake, load_contract(name), dates, sample_rows, "raw_items" in readable)
    if "raw_impressions" in readable:
        found += _rate(query, lake, config, dates[0])
    return found


# ---- schemas and logs --------------------------------------------------------------------------------------------


def _table(lake: Lake, contract: Contract) -> Iterator[Finding]:
    name, uri = contract.name, lake.uri(contract.name)

    def error(text: str) -> Finding:
        return Finding("error", name, text)

    if not lake.exists(name):
        absent = f"there is no Delta table at {uri}"
        fs, path = filesystem(uri)
        if any(fs.glob(f"{path}/{deep}*.parquet") for deep in ("", "*/")):
            dated = " PARTITIONED BY (dt DATE)" if "dt" in contract.partition_by else ""
            convert = f"CONVERT TO DELTA parquet.`{uri}`{dated}"
            yield error(f"{absent}: it has Parquet files without a log; in Spark: {convert}")
        elif name in lake.overrides:
            todo = "remove the setting" if name in _OPTIONAL else "correct the setting"
            yield error(f"{absent}, where lakehouse.tables.{name} places it: write it, or {todo}")
        elif name == "raw_interactions":
            yield Finding("warning", name, f"none at {uri}: only clicked impressions count as positives")
        elif name not in _OPTIONAL:
            yield error(f"{absent}: write it, or set lakehouse.tables.{name}")
        return
    try:
        table = open_table(uri)
    except (GplError, OSError) as problem:
        yield error(f"the Delta table at {uri} cannot be opened: {problem}")
        return
    if name == "raw_items" and not table.file_uris():
        yield error("it has no rows: every event would be quarantined because its item is unknown")
    have = _columns(lake, name)
    for column in contract.columns:
        if column.name not in have:
            if not column.nullable:
                close = difflib.get_close_matches(column.name, have, 1, 0.5)
                hints = [f"; if it is '{c}': lakehouse.columns.{name}: {{{column.name}: {c}}}" for c in close]
                yield error(f"column '{column.name}' ({column.type}) is missing{''.join(hints)}")
        elif wrong := _wrong_type(column, have[column.name]):
            yield error(wrong)
    if "dt" in contract.partition_by and "dt" in have and "dt" not in table.metadata().partition_columns:
        found = ", ".join(table.metadata().partition_columns) or "nothing"
        yield error(f"partitioned by {found}, expected dt: write it with partitionBy('dt')")


def _columns(lake: Lake, name: str) -> dict[str, str]:
    """Our name of each column -> the name of its type in Delta."""
    kinds = {f.name: _kind(f.type) for f in DeltaTable(lake.uri(name)).schema().fields}
    theirs = lake.columns.get(name, {})
    mapped = {our: kinds[their] for our, their in theirs.items() if their in kinds}
    return {c: k for c, k in kinds.items() if c not in (*theirs, *theirs.values())} | mapped


def _source(lake: Lake, name: str) -> str:
    """The table under our column names, as SQL."""
    theirs = lake.columns.get(name, {})
    return "(SELECT " + ", ".join(f'"{theirs.get(c, c)}" AS "{c}"' for c in _columns(lake, name)) + f" FROM {name})"


def _kind(kind: Any) -> str:
    """The name of a type in Delta; `array` for arrays of numbers."""
    text = getattr(kind, "type", str(kind))
    if (element := getattr(kind, "element_type", None)) is not None:
        return "array" if getattr(element, "type", "") in _NUMBERS else "array of others"
    return text if isinstance(text, str) else str(kind)


def _wrong_type(column: Column, kind: str) -> str:
    if column.type.startswith("array<"):
        return "" if kind == "array" else f"column '{column.name}' is {kind}, expected {column.type}"
    if kind in {spark_type(arrow_type(column.type)), *_CASTABLE.get(column.type, ())} or kind.startswith("decimal"):
        return ""
    return f"column '{column.name}' is {kind}, expected {column.type}, to which it cannot be cast"


def _slices(lake: Lake, config: Config, name: str, dates: Sequence[date]) -> Iterator[Finding]:
    table = Snapshot(lake.uri(name), load_contract(name))
    have = set(table.slices())
    missing = [d.isoformat() for d in dates if d not in have]
    if missing and name not in _OPTIONAL:
        known = f"it has {min(have)} to {max(have)}" if have else "it has no rows"
        yield Finding("error", name, f"no slice for {_some(missing)}; {known}")
    start = config.run.history_start
    if name == "raw_impressions" and start is not None:
        days = [start + timedelta(days=i) for i in range((dates[0] - start).days)]
        if missing := [d.isoformat() for d in days if d not in have]:
            yield Finding("warning", name, f"history from run.history_start {start} on lacks {_some(missing)}")


def _some(words: Sequence[str], most: int = 5) -> str:
    return ", ".join(words[:most]) + (f" and {len(words) - most} more" if len(words) > most else "")


# ---- a sample of rows --------------------------------------------------------------------------------------------


def _rows(
    query: Query, lake: Lake, contract: Contract, dates: Sequence[date], most: int, items: bool
) -> Iterator[Finding]:
    name, have = contract.name, _columns(lake, contract.name)
    where, day = "", None
    if "dt" in contract.partition_by:
        present = set(Snapshot(lake.uri(name), contract).slices())
        if (day := next((d for d in dates if d in present), None)) is None:
            return
        where = f" WHERE dt = DATE '{day}'"
    sample = f"(SELECT * FROM {_source(lake, name)} AS r{where} LIMIT {most}) AS s"
    faults = _faults(contract, have, day)
    counts = [f", count(*) FILTER (WHERE {condition}) AS c{i}" for i, condition in enumerate(faults.values())]
    keys = ", ".join(k for k in contract.primary_key if k in have)
    try:
        row = query.rows(f"SELECT count(*) AS total{''.join(counts)} FROM {sample}")[0]
        for place, text in enumerate(faults):
            if bad := row[f"c{place}"]:
                yield Finding("error", name, f"{text} in {bad:,} of {row['total']:,} sampled rows")
        repeated = f"SELECT 1 FROM {sample} GROUP BY {keys} HAVING count(*) > 1"
        if twice := query.rows(f"SELECT count(*) AS n FROM ({repeated}) AS d")[0]["n"]:
            yield Finding("warning", name, f"{twice:,} keys ({keys}) occur more than once: one row of each is kept")
        if items and name != "raw_items" and "item_id" in have:
            unknown = query.rows(
                f"SELECT count(*) AS n, min(s.item_id) AS example FROM {sample} LEFT JOIN (SELECT DISTINCT item_id "
                f"FROM {_source(lake, 'raw_items')} AS r) AS i ON i.item_id = s.item_id WHERE i.item_id IS NULL"
            )[0]
            if unknown["n"]:
                found = f"{unknown['n']:,} of {row['total']:,} sampled rows, e.g. '{unknown['example']}'"
                yield Finding("error", name, f"item_id not in raw_items in {found}")
    except GplError as problem:
        yield Finding("error", name, f"rows cannot be read: {problem}")


def _faults(contract: Contract, have: Mapping[str, str], day: date | None) -> dict[str, str]:
    """What can be wrong with a row -> the SQL condition for it."""
    faults = {}
    for column in contract.columns:
        name, kind = column.name, have.get(column.name)
        if kind is None or name == "dt":
            continue
        if not column.nullable:
            faults[f"{name} is null"] = f"{name} IS NULL"
        if column.type == kind == "string" and not column.nullable:
            faults[f"{name} is empty"] = f"{name} = ''"
        text = column.type == "string"
        value = name if text == (kind == "string") else f"try_cast({name} AS {'VARCHAR' if text else 'DOUBLE'})"
        if column.type != "binary" and (check := column.check_sql(value)):  # DataFusion does not measure binaries
            faults[f"{name} breaks {column.check_sql()}"] = f"NOT ({check})"
    if day is not None and have["event_time"] != "string":
        low, high = (f"CAST(TIMESTAMP '{d}T00:00:00Z' AS TIMESTAMP)" for d in (day, day + timedelta(days=1)))
        time = "CAST(event_time AS TIMESTAMP)"
        faults[f"event_time is not within dt {day} (UTC)"] = f"{time} < {low} OR {time} >= {high}"
    if contract.name == "raw_items":
        content = [c for c in ("title", "description", "image", "image_uri", "image_embedding") if c in have]
        empty = [f"({c} IS NULL OR {c} = '')" if have[c] == "string" else f"{c} IS NULL" for c in content]
        faults["no title, description or picture: nothing to encode"] = " AND ".join(empty) or "true"
    return faults


def _rate(query: Query, lake: Lake, config: Config, day: date) -> Iterator[Finding]:
    """Whether the label rate can be estimated: the one setting that needs thought."""
    wanted = config.labels.calibrator
    if wanted.target_rate != "uniform" and wanted.kind == "quantile":
        return
    start = day - timedelta(days=wanted.window_days)
    rows = query.rows(
        f"SELECT count(*) AS n FROM {_source(lake, 'raw_impressions')} AS r "
        f"WHERE dt >= DATE '{start}' AND dt < DATE '{day}' AND is_random"
    )[0]["n"]
    if rows < wanted.min_rows:
        yield Finding(
            "error", "raw_impressions",
            f"{rows:,} uniformly exposed rows (is_random) in the {wanted.window_days} days before {day}, but "
            f"labels.calibrator.min_rows is {wanted.min_rows:,}: set labels.calibrator.target_rate to the click rate "
            "you expect of unexposed pairs, or log a slice of random exposure",
        )  # fmt: skip


COMMAND = Command(
    "check-raw", "check the raw tables before the first run: every problem at once", run, add_arguments,
    examples=("--config shop.yaml", "--config shop.yaml --start-date 2026-03-01 --end-date 2026-03-07",),
)  # fmt: skip
