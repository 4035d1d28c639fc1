"""`gpl sql`: a read-only statement over tables and views, without Spark."""

import argparse
import base64
import csv
import json
import math
import sys
from itertools import islice
from typing import Any

from rich.markup import escape
from rich.table import Column, Table

from gpl_core.commands.command import Command, assignments
from gpl_core.config import Config
from gpl_core.errors import UsageError
from gpl_core.graph.terminal import console
from gpl_core.lakehouse.lake import Lake
from gpl_core.lakehouse.query import Query, Result

_SHOWN_ROWS = 1000
_VERSION = "TABLE=N, for example training_feed=3"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("statement", nargs="+", help="SELECT …, EXPLAIN …, DESCRIBE name or SHOW TABLES, in quotes")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_const", dest="form", const="json", help="one JSON object per row")
    form.add_argument("--csv", action="store_const", dest="form", const="csv", help="CSV with a header")
    parser.add_argument(
        "--version", action="append", default=[], metavar="TABLE=N", help="read this version of a table; repeatable"
    )


def run(args: argparse.Namespace, config: Config) -> int:
    """Print the result, and to stderr the versions it was read from."""
    if len(args.statement) > 1:
        raise UsageError('put the statement in quotes, as in "SELECT * FROM items"; otherwise the shell splits it')
    versions = {}
    for table, number in assignments("--version", args.version, _VERSION).items():
        if not number.isdigit():
            raise UsageError(f"--version {table}={number}: expected {_VERSION}")
        versions[table] = int(number)
    query = Query(Lake.of(config.lakehouse), versions)
    _print(query.run(args.statement[0]), args.form)
    if query.versions:
        print("read: " + ", ".join(f"{t}@{v}" for t, v in sorted(query.versions.items())), file=sys.stderr)
    return 0


def _print(result: Result, form: str | None) -> None:
    """Print `result`: its first 1,000 rows as a table, or all of it as `json` (one object per line) or `csv`."""
    if form == "json":
        for row in result.rows:
            body = {c: _plain(v) for c, v in zip(result.columns, row, strict=True)}
            print(json.dumps(body, default=str, ensure_ascii=False))
        return
    if form == "csv":
        writer = csv.writer(sys.stdout, lineterminator="\n")
        writer.writerow(result.columns)
        writer.writerows(("" if v is None else _plain(v) for v in row) for row in result.rows)
        return
    out, rows = console(), iter(result.rows)
    first = list(islice(rows, _SHOWN_ROWS))
    kinds = [{type(v) for v in column} - {type(None)} for column in zip(*first)] or [set()] * len(result.columns)
    columns = (
        Column(escape(name), justify="right" if kind and kind <= {int, float} else "left")
        for name, kind in zip(result.columns, kinds, strict=True)
    )
    table, cells = Table(*columns), [[_shown(v) for v in row] for row in first]
    for texts in cells:
        table.add_row(*map(escape, texts))
    if out.measure(table, options=out.options.update(max_width=100_000)).maximum <= out.width:
        out.print(table)
    else:  # wrapped cells could not be read: one field per line
        wide = max(map(len, result.columns))
        for number, texts in enumerate(cells, 1):
            out.rule(f"row {number}", align="left")
            for name, cell in zip(result.columns, texts, strict=True):
                out.print(f"{name:<{wide}}  {cell}", markup=False, soft_wrap=True)
    if next(rows, None):
        print(f"only the first {_SHOWN_ROWS:,} rows are shown; use --csv or --json for all rows")


def _plain(value: Any) -> Any:
    """`value` for JSON and CSV, at any depth: bytes (pictures) in base64, NaN and infinities as null."""
    if isinstance(value, list):
        return [_plain(v) for v in value]
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _shown(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, bytes):
        return f"{len(value):,} bytes"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


COMMAND = Command(
    "sql", "read-only SQL over tables and views, without Spark", run, add_arguments,
    examples=(
        '--config shop.yaml "SELECT * FROM coverage"',
        '--config shop.yaml --csv "SELECT * FROM pseudo_labels" > labels.csv',
    ),
)  # fmt: skip
