"""`gpl init`: a configuration for the user's own Delta tables, from what their logs show."""

import argparse
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from datetime import date, timedelta
from importlib import resources
from pathlib import Path

import yaml

from gpl_core.commands.command import Command
from gpl_core.commands.settings import json_schema
from gpl_core.conf.sections import CATALOG
from gpl_core.config import load_config
from gpl_core.contracts.contract import load_contract
from gpl_core.errors import GplError, MissingInputError, UsageError
from gpl_core.graph.arguments import add_dates, given_dates
from gpl_core.graph.steps import ONE_DAY
from gpl_core.lakehouse.raw_mapping import (
    EVENTS,
    RAW,
    REQUIRED,
    SeenTable,
    columns_of,
    find_tables,
    lacking,
    look,
    propose,
)
from gpl_core.lakehouse.snapshot import Snapshot

_WEEK, _HISTORY = timedelta(days=6), timedelta(days=90)
_WANTED = {
    "raw_items": "the items", "raw_impressions": "what was shown", "raw_candidates": "what was recalled",
    "raw_interactions": "other positive events", "raw_opt_outs": "users to leave out",
}  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "tables", nargs="+", metavar="PLACE",
        help="a Delta table, a folder that contains Delta tables (up to three levels deep), or RAW_TABLE=LOCATION, "
        "where LOCATION may be catalog://database.table",
    )  # fmt: skip
    parser.add_argument("--out", default="gpl.yaml", metavar="FILE", help="the configuration to write (gpl.yaml)")
    parser.add_argument("--root", default="", help="folder for everything gpl writes (default: lakehouse/NAME)")
    parser.add_argument("--yes", action="store_true", help="ask no questions; accept every proposal")
    add_dates(parser)


def run(args: argparse.Namespace) -> int:
    """Propose, ask for what cannot be seen, write; exit code 4 when a required table or column is still missing."""
    out = Path(args.out)
    if out.is_dir():
        raise UsageError(f"--out {out} is a folder; give the file to write, as in {out / 'gpl.yaml'}")
    schema = out.with_suffix(".schema.json")
    if there := [str(path) for path in (out, schema) if path.exists()]:
        raise UsageError(f"{', '.join(there)}: already exists and is not overwritten; choose another --out")
    asks = not args.yes and sys.stdin.isatty()
    named, tables = _seen(args.tables)
    free = [t for t in tables if t not in named.values()]
    chosen = {**{raw: table for raw, table in propose(free).items() if raw not in named}, **named}
    if asks:
        chosen |= _asked_tables(chosen, tables)
    chosen = {raw: chosen[raw] for raw in RAW if raw in chosen}
    mapped = {raw: columns_of(raw, table) for raw, table in chosen.items() if table.kinds}
    if asks:
        for raw, columns in mapped.items():
            columns |= _asked_columns(raw, columns, chosen[raw])
    if not chosen:
        seen = ", ".join(table.location for table in tables)
        raise MissingInputError(f"{seen}: none looks like a raw table; name it yourself, as in raw_items=LOCATION")
    dates = _dates(args, chosen, mapped, asks)
    root = args.root or str(out.parent / "lakehouse" / out.stem)
    if asks and not args.root:
        root = _ask(f"Where should gpl write its tables, models and reports? [{root}] ") or root
    root = root if "://" in root else str(Path(root).absolute())
    out.parent.mkdir(parents=True, exist_ok=True)
    missing = {raw: names for raw, columns in mapped.items() if (names := lacking(raw, columns))}
    out.write_text(_configuration(schema.name, root, chosen, mapped, missing, dates), encoding="utf-8")
    try:
        load_config(str(out))
    except UsageError:
        out.unlink()
        raise
    schema.write_text(json_schema() + "\n", encoding="utf-8")
    return _told(out, schema, chosen, mapped, missing)


def _seen(places: Sequence[str]) -> tuple[dict[str, SeenTable], list[SeenTable]]:
    """The tables that the arguments name a raw table for, and all that were found; of a catalog's no column is seen."""
    named: dict[str, SeenTable] = {}
    found: dict[str, SeenTable] = {}
    for place in places:
        raw, sign, location = place.partition("=")
        if not sign or "/" in raw:
            raw, location = "", place
        elif raw not in RAW:
            raise UsageError(f"{place}: '{raw}' is no raw table; these are {', '.join(RAW)}")
        if location.startswith(CATALOG):
            if not raw:
                raise UsageError(f"{place}: say which table that is: raw_items={place}")
            named[raw] = SeenTable(location, {})
            continue
        location = location if "://" in location else str(Path(location).absolute())
        tables = [table for at in find_tables(location) if (table := _looked(at))]
        if not tables or (raw and len(tables) > 1):
            count = len(tables) or "no"
            raise MissingInputError(f"{location}: {count} Delta tables (folders with _delta_log) are there or below it")
        found |= {table.location: table for table in tables}
        if raw:
            named[raw] = tables[0]
    return named, [*found.values()]


def _looked(location: str) -> SeenTable | None:
    try:
        return look(location)
    except GplError as problem:  # another table's damage is no reason to stop
        print(f"warning: {problem}", file=sys.stderr)
        return None


# ---- what only the user knows ------------------------------------------------------------------------------------


def _ask(question: str) -> str:
    try:
        return input(question).strip()
    except EOFError:
        raise UsageError("the input ended before all questions were answered; --yes asks none") from None


def _asked_tables(chosen: Mapping[str, SeenTable], tables: Sequence[SeenTable]) -> dict[str, SeenTable]:
    found: dict[str, SeenTable] = {}
    for raw in (name for name in REQUIRED if name not in chosen):
        free = [t for t in tables if t not in [*chosen.values(), *found.values()]]
        for number, table in enumerate(free, 1):
            print(f"  {number}: {table.location} ({', '.join(table.kinds)})")
        answer = _ask(f"Which of these is {raw}, {_WANTED[raw]}? (number, Enter: none) ") if free else ""
        if answer in map(str, range(1, len(free) + 1)):
            found[raw] = free[int(answer) - 1]
    return found


def _asked_columns(raw: str, columns: Mapping[str, str], table: SeenTable) -> dict[str, str]:
    found: dict[str, str] = {}
    names = {their.lower(): their for their in table.kinds}
    for our in lacking(raw, columns):
        meaning = load_contract(raw).column(our).comment
        answer = _ask(f"Which column of {table.location} is {our} ({meaning})? {', '.join(table.kinds)} (Enter: none) ")
        if answer.lower() in names:
            found[our] = names[answer.lower()]
    return found


def _asked_date(question: str) -> date:
    while True:
        try:
            return date.fromisoformat(_ask(f"{question} (YYYY-MM-DD) "))
        except ValueError:
            print("please enter a date such as 2026-03-01")


def _dates(
    args: argparse.Namespace, chosen: Mapping[str, SeenTable], mapped: Mapping[str, Mapping[str, str]], asks: bool
) -> tuple[date, date, date]:
    """First date of history, first and last run date: the last week with a day before it and, if possible, after."""
    days = {
        raw: Snapshot(chosen[raw].location, load_contract(raw), None, columns).slices()
        for raw, columns in mapped.items()
        if raw in EVENTS and "dt" in columns
    }
    needed = [days.get(raw, ()) for raw in EVENTS if raw in REQUIRED]
    if given := given_dates(args):
        start, end = given[0], given[-1]
    elif all(needed) and (first := max(d[0] for d in needed)) <= (last := min(d[-1] for d in needed)):
        earliest = min(first + ONE_DAY, last)  # the first run date needs a click rate from the day before it
        end = max(earliest, last - ONE_DAY)
        start = max(earliest, end - _WEEK)
    elif asks:
        start, end = _asked_date("First run date"), _asked_date("Last run date")
    else:
        raise UsageError("the logs do not show which dates the tables have in common: pass --start-date and --end-date")
    # What was recalled is no history.
    history = min((d[0] for raw, d in days.items() if d and raw != "raw_candidates"), default=start)
    return min(start, max(history, start - _HISTORY)), start, end


# ---- what is written ---------------------------------------------------------------------------------------------


def _configuration(
    schema: str, root: str, chosen: Mapping[str, SeenTable], mapped: Mapping[str, Mapping[str, str]],
    missing: Mapping[str, Sequence[str]], dates: tuple[date, date, date],
) -> str:  # fmt: skip
    """The configuration's text."""
    from jinja2 import Environment, StrictUndefined  # few commands need it

    gpus, cores = len([*Path("/dev").glob("nvidia[0-9]*")]), len(os.sched_getaffinity(0))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2**30
    driver = ["--master", f"local[{cores}]", "--driver-memory", f"{min(8, max(1, memory // 2))}g"]
    history, start, end = dates
    jinja = Environment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True)
    jinja.filters["flow"] = _flow
    return jinja.from_string((resources.files("gpl_core.commands") / "init.jinja").read_text("utf-8")).render(
        schema=schema, root=root, wanted=_WANTED, required=REQUIRED, chosen=chosen, missing=missing,
        renamed={raw: names for raw, columns in mapped.items() if (names := _renamed(columns))},
        history=history, start=start, end=end, driver=driver, cores=cores, memory=memory, gpus=gpus,
    )  # fmt: skip


def _flow(value: object) -> str:
    text: str = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, allow_unicode=True, width=10**6)
    return text.removesuffix("\n").removesuffix("\n...")


def _renamed(columns: Mapping[str, str]) -> dict[str, str]:
    return {our: their for our, their in columns.items() if their.lower() != our}


def _told(
    out: Path, schema: Path, chosen: Mapping[str, SeenTable], mapped: Mapping[str, Mapping[str, str]],
    missing: Mapping[str, Sequence[str]],
) -> int:  # fmt: skip
    """Print what was found and what comes next; returns the exit code."""
    for raw in RAW:
        if raw in chosen:
            names = ", ".join(f"{our} is {their}" for our, their in _renamed(mapped.get(raw, {})).items())
            print(f"{raw}: {chosen[raw].location}" + (f" ({names})" if names else ""))
        elif raw in REQUIRED:
            print(f"{raw}: not found")
        if raw in missing:
            print(f"{raw}: no column found for {', '.join(missing[raw])}")
    complete = not missing and chosen.keys() >= {*REQUIRED}
    config, todo = shlex.quote(str(out)), "" if complete else ": fill in what was not found"
    print(f"wrote {out}, with {schema.name} next to it{todo}. Next:")
    if any(table.location.startswith(CATALOG) for table in chosen.values()):
        print(f"  gpl register --config {config}    # asks Spark's catalog where the tables are")
    print(f"  gpl check-raw --config {config}   # every problem of the tables at once")
    print(f"  gpl run --config {config}         # again after a failure")
    return 0 if complete else MissingInputError.exit_code


COMMAND = Command(
    "init", "write a configuration for your own Delta tables, from what their logs show", run, add_arguments,
    needs_config=False,
    examples=(
        "/data/shop --out shop.yaml",
        "raw_items=/data/items /data/events --out shop.yaml --yes",
        "raw_items=catalog://shop.items raw_impressions=catalog://shop.shown raw_candidates=catalog://shop.recalled",
    ),
)  # fmt: skip
