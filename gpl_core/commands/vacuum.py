"""`gpl vacuum`: delete the files of old versions that no run needs.

Deleting files writes no log, so one implementation serves the tables of both engines.
"""

import argparse
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any

from deltalake import DeltaTable

from gpl_core.commands.command import Command
from gpl_core.config import Config
from gpl_core.contracts.contract import all_contracts
from gpl_core.errors import ContractError, counted
from gpl_core.graph.arguments import count
from gpl_core.graph.steps import STEPS
from gpl_core.lakehouse.lake import Lake
from gpl_core.lakehouse.storage import filesystem


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--retention-hours", type=count, default=168, metavar="N", help="keep files of versions younger than this (168)"
    )
    add_ended(parser)
    parser.add_argument("--dry-run", action="store_true", help="count only")


def add_ended(parser: argparse.ArgumentParser) -> None:
    """`--ended`: runs that were killed and could not record it themselves."""
    parser.add_argument(
        "--ended", action="append", default=[], metavar="RUN_ID", help="treat this run as ended (killed); repeatable"
    )


def run(args: argparse.Namespace, config: Config) -> int:
    """One line per table that has old files."""
    files, verb = 0, "would be deleted" if args.dry_run else "deleted"
    lake = Lake.of(config.lakehouse)
    for found in vacuum(lake, args.retention_hours, dry_run=args.dry_run, ended=args.ended):
        files += found.files
        if found.files:
            print(f"{found.table}: {counted(found.files, 'file')}, {found.bytes:,} bytes {verb}")
    print(f"in total {counted(files, 'file')} {verb}")
    return 0


def check_retention(lake: Lake, retention: timedelta, ended: Sequence[str] = ()) -> set[str]:
    """Refuse a retention that could delete files a run is still reading; returns the steps that are running.

    A run reads the versions that were newest when it started, so files must be kept for at least its age. Runs outside
    this project (trainers) are assumed to take no longer than this project's longest run.
    """
    running, now = alive(lake, ended), datetime.now(UTC)
    if running and now - (oldest := min(running, key=lambda r: r["started_at"]))["started_at"] > retention:
        raise ContractError(
            f"run {oldest['run_id']} ({oldest['step']} for {oldest['run_date']}) has been running since "
            f"{oldest['started_at']:%Y-%m-%d %H:%M} UTC and may read files that this would delete: keep at least "
            f"{_hours(now - oldest['started_at'])} hours, or add --ended {oldest['run_id']} if it was killed"
        )
    longest = max((r for r in _recorded(lake) if r["status"] == "done"), key=lambda r: r["seconds"], default=None)
    if longest and timedelta(seconds=longest["seconds"]) > retention:
        raise ContractError(
            f"run {longest['run_id']} ({longest['step']} for {longest['run_date']}) took {longest['seconds']:.0f} s, "
            f"longer than a retention of {retention}: keep at least "
            f"{_hours(timedelta(seconds=longest['seconds']))} hours"
        )
    return {r["step"] for r in running}


def attempts(lake: Lake) -> set[tuple[object, ...]]:
    """The attempts of `job_runs` that have ended."""
    return {_attempt(row) for row in _recorded(lake) if row["status"] != "running"}


def alive(
    lake: Lake, ended: Sequence[str] = (), known: Collection[tuple[object, ...]] | None = None
) -> list[dict[str, Any]]:
    """The rows of `job_runs` whose run is under way, or (known) has written something and is not in these `attempts`.

    No clock is asked: those of two machines differ.
    A row with status `running` counts unless a later attempt is done or the run is in `ended`: a killed run cannot
    record its end. One that was refused or had nothing to do says nothing of the first, which may be at work.
    """
    rows = _recorded(lake)
    over = {(r["step"], r["run_date"], r["attempt"]) for r in rows if r["status"] == "done"}

    def counts(row: dict[str, Any]) -> bool:
        if row["status"] == "running":
            later = any((s, d) == (row["step"], row["run_date"]) and a > row["attempt"] for s, d, a in over)
            return not later and row["run_id"] not in ended
        return known is not None and row["status"] != "noop" and _attempt(row) not in known

    return [r for r in rows if counts(r)]


def _attempt(row: Mapping[str, Any]) -> tuple[object, ...]:
    return row["run_id"], row["step"], row["run_date"], row["attempt"]


def _recorded(lake: Lake) -> list[dict[str, Any]]:
    if not lake.exists("job_runs"):
        return []
    columns = ["run_id", "step", "run_date", "attempt", "status", "seconds", "started_at"]
    found: list[dict[str, Any]] = lake.open("job_runs").read(columns=columns).to_pylist()
    return found


def _hours(time: timedelta) -> int:
    return int(time.total_seconds() // 3600) + 1


@dataclass(frozen=True)
class Vacuumed:
    """Old files of one table, and their bytes."""

    table: str
    files: int
    bytes: int


def vacuum(lake: Lake, hours: int, *, dry_run: bool = False, ended: Sequence[str] = ()) -> Iterator[Vacuumed]:
    """Delete the files that no version of the last `hours` uses, table by table; the platform's tables are left alone.

    Files that were never committed (by killed writers) are deleted too, unless a step that writes the table is running:
    it may be reusing what an earlier, killed run has written.
    """
    check_retention(lake, timedelta(hours=hours), ended)
    for contract in all_contracts().values():
        if contract.owner != "platform":
            busy = partial(_is_written_to, lake, contract.name, ended)
            yield delete_old_files(lake, contract.name, hours, dry_run=dry_run, orphans=True, busy=busy)


def _is_written_to(lake: Lake, table: str, ended: Sequence[str]) -> bool:
    running = {row["step"] for row in alive(lake, ended)}
    return any(table in (*step.writes, *step.also_writes) for step in STEPS if step.name in running)


def delete_old_files(
    lake: Lake, table: str, hours: int, *, dry_run: bool = False, orphans: bool = False,
    only: Callable[[str], bool] = lambda uri: True, busy: Callable[[], object] = lambda: False,
) -> Vacuumed:  # fmt: skip
    """Delete the files of one table that no version of the last `hours` uses; orphans: those of killed writers too.

    delta-rs lists them; they are deleted here so that it does not write a vacuum commit into the logs of Spark's
    tables. The caller must know that no run still needs them. Without a table, what a writer left that was killed
    before it made one are orphans.

    only: whether the file with this location is to go. busy: whether a run may be writing the table, so that orphans
    stay; asked after they were listed, because a run is on record before its first file.
    """
    uri = lake.uri(table)
    fs, base = filesystem(uri)
    if lake.exists(table):
        of = partial(DeltaTable(uri).vacuum, hours, dry_run=True, enforce_retention_duration=False)
        listed = of(full=orphans)
        if orphans and listed and busy():
            listed = of(full=False)
        paths = [f"{base}/{p}" for p in listed]
    else:
        before = datetime.now(UTC) - timedelta(hours=hours)
        paths = [p for p in (fs.find(base) if orphans and fs.exists(base) else ()) if fs.modified(p) <= before]
        paths = [] if paths and busy() else paths
    there = {p: fs.size(p) for p in paths if fs.isfile(p) and only(fs.unstrip_protocol(p))}
    if there and not dry_run:
        fs.rm(list(there))
    return Vacuumed(table, len(there), sum(there.values()))


COMMAND = Command(
    "vacuum", "delete the files of old versions that no run needs", run, add_arguments, in_shadow=False,
    examples=("--config shop.yaml --dry-run", "--config shop.yaml --retention-hours 336",),
)  # fmt: skip
