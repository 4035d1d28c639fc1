"""Keeping tables in shape: few files of a good size, and no old ones, while steps and trainers read.

`optimize` regroups rows into larger files, in commits that say of every file that no data changed: what was built on
the slice stays done (`Snapshot.identity`). Each table is compacted by the engine that writes it: here those of the
workers and the small logs, in `spark_jobs/optimize.py` those of Spark. `vacuum` deletes files and writes no log, so one
room serves all tables.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from typing import Any

import pyarrow as pa
from deltalake import DeltaTable

from gpl_core.contracts.contract import Contract, all_contracts
from gpl_core.errors import ConflictError, ContractError, UsageError
from gpl_core.graph.steps import engine_of, find_step
from gpl_core.lakehouse.files import DataFile
from gpl_core.lakehouse.lake import Lake
from gpl_core.lakehouse.marks import SliceMark
from gpl_core.lakehouse.rewrite import swap
from gpl_core.lakehouse.snapshot import Snapshot
from gpl_core.lakehouse.storage import filesystem

_TRIES = 5
_ROW_GROUP_ROWS = 16_384
# Written in even files, its rows in shuffle order across them: regrouping would only undo that.
LEFT_ALONE = ("training_feed",)


def compactable(lake: Lake, engine: str) -> list[Contract]:
    """The contracts of the existing tables that `optimize` regroups through `engine`."""
    return [
        c for n, c in all_contracts().items()
        if c.owner not in ("platform", "simulation") and n not in LEFT_ALONE and engine_of(n) == engine
        and lake.exists(n)
    ]  # fmt: skip


# ---- optimize --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Compacted:
    """What became of one table: files before and after among those looked at."""

    table: str
    before: int
    after: int


def compact(
    lake: Lake, contract: Contract, dates: Sequence[date], file_bytes: int, run_id: str = ""
) -> Compacted:  # fmt: skip
    """Regroup the small files of `dates` (of a table without dates: all) into files of up to about `file_bytes`.

    Rows and their order within the files stay; nothing is done, and nothing committed, where no two files fit together.

    Raises:
        ConflictError: the table was written at the same time, again and again.
    """
    for _ in range(_TRIES):
        snapshot = lake.open(contract.name)
        files = _in_dates(snapshot, dates)
        groups = [g for part in _by_partition(files) for g in bins(part, file_bytes)]
        if contract.name == "job_runs":
            groups = [g for g in groups if "running" not in snapshot.read(g, ["status"]).column(0).to_pylist()]
        if not groups:
            return Compacted(contract.name, len(files), len(files))
        parts = [_rewrite(lake, snapshot, group) for group in groups]
        gone = [file for group in groups for file in group]
        if swap(snapshot, gone, parts, SliceMark("optimize", {}, run_id), data_change=False):
            return Compacted(contract.name, len(files), len(files) - len(gone) + len(parts))
    raise ConflictError(
        f"table {contract.name}: written by other runs {_TRIES} times meanwhile; run gpl optimize again"
    )


def _in_dates(snapshot: Snapshot, dates: Sequence[date]) -> list[DataFile]:
    if "dt" not in snapshot.contract.partition_by:
        return list(snapshot.files)
    wanted = {d.isoformat() for d in dates}
    return [f for f in snapshot.files if f.partition["dt"] in wanted]


def _by_partition(files: Iterable[DataFile]) -> Iterator[list[DataFile]]:
    found: dict[str, list[DataFile]] = {}
    for file in files:
        found.setdefault(json.dumps(dict(file.partition), sort_keys=True), []).append(file)
    yield from found.values()


def bins(files: Sequence[DataFile], file_bytes: int) -> list[list[DataFile]]:
    """Groups of two or more of `files`, in their order, whose sizes add up to at most `file_bytes`."""
    found: list[list[DataFile]] = []
    size = 0
    for file in files:
        if found and size + file.size <= file_bytes:
            found[-1].append(file)
            size += file.size
        else:
            found.append([file])
            size = file.size
    return [group for group in found if len(group) > 1]


def _rewrite(lake: Lake, snapshot: Snapshot, group: Sequence[DataFile]) -> dict[str, Any]:
    """The rows of `group` in one new part file, a file at a time in memory; row groups as a worker writes them."""
    contract = snapshot.contract
    partition = {k: group[0].partition[k] for k in contract.partition_by}
    held: list[pa.Table] = []
    with lake.writer(contract, partition, dims={}, row_group_rows=_ROW_GROUP_ROWS, file_rows=2**62) as writer:
        for file in group:
            held.append(snapshot.read([file]).drop_columns(list(contract.partition_by)))
            if sum(map(len, held)) >= _ROW_GROUP_ROWS or file is group[-1]:
                writer.write(pa.concat_tables(held))
                held = []
    return writer.parts[0]


# ---- vacuum ----------------------------------------------------------------------------------------------------


def check_retention(lake: Lake, retention: timedelta, ended: Sequence[str] = ()) -> set[str]:
    """Refuse a retention that may take files from a run; returns the steps that run now.

    A run reads the versions that were newest when it began, so its age is the least retention. A row that still says
    `running` counts unless a later attempt has ended, or its run is among `ended`: a killed run cannot say so itself.
    Runs that this project does not see (trainers) may take as long as its own: the longest one bounds them from below.

    Raises:
        ContractError: names the run, and the hours that it needs.
    """
    if not lake.exists("job_runs"):
        return set()
    columns = ["run_id", "step", "run_date", "attempt", "status", "seconds", "started_at"]
    rows = lake.open("job_runs").read(columns=columns).to_pylist()
    over = {(r["step"], r["run_date"], r["attempt"]) for r in rows if r["status"] != "running"}
    now = datetime.now(UTC)
    running = [
        r for r in rows
        if r["status"] == "running" and r["run_id"] not in ended
        and not any((s, d) == (r["step"], r["run_date"]) and a > r["attempt"] for s, d, a in over)
    ]  # fmt: skip
    if running and now - (oldest := min(running, key=lambda r: r["started_at"]))["started_at"] > retention:
        raise ContractError(
            f"run {oldest['run_id']} ({oldest['step']} for {oldest['run_date']}) has been running since "
            f"{oldest['started_at']:%Y-%m-%d %H:%M} UTC and may read files that this would delete: keep at least "
            f"{_hours(now - oldest['started_at'])} hours, or say --ended {oldest['run_id']} when it was killed"
        )
    longest = max((r for r in rows if r["status"] == "done"), key=lambda r: r["seconds"], default=None)
    if longest and timedelta(seconds=longest["seconds"]) > retention:
        raise ContractError(
            f"run {longest['run_id']} ({longest['step']} for {longest['run_date']}) took {longest['seconds']:.0f} s, "
            f"longer than a retention of {retention}: keep at least "
            f"{_hours(timedelta(seconds=longest['seconds']))} hours"
        )
    return {r["step"] for r in running}


def _hours(time: timedelta) -> int:
    return int(time.total_seconds() // 3600) + 1


@dataclass(frozen=True)
class Vacuumed:
    """Old files of one table, and their bytes."""

    table: str
    files: int
    bytes: int


def vacuum(lake: Lake, hours: int, *, dry_run: bool = False, ended: Sequence[str] = ()) -> Iterator[Vacuumed]:
    """Delete files that no version of the last `hours` names, table by table; the platform's own are left alone.

    Files that no commit ever named (of killed writers) go too, unless a step that writes the table runs: it may be
    taking up what an earlier, killed run of it has written.

    Raises:
        ContractError: a run may still need such files.
    """
    if hours < 0:
        raise UsageError(f"--retention-hours {hours}: expected 0 or more")
    running = check_retention(lake, timedelta(hours=hours), ended)
    for contract in all_contracts().values():
        if contract.owner == "platform" or not lake.exists(contract.name):
            continue
        busy = any(contract.name in (*(s := find_step(n)).writes, *s.also_writes) for n in running)
        yield delete_old_files(lake, contract.name, hours, dry_run=dry_run, orphans=not busy)


def delete_old_files(
    lake: Lake, table: str, hours: int, *, dry_run: bool = False, orphans: bool = False
) -> Vacuumed:  # fmt: skip
    """Delete the files of one table that no version of the last `hours` names; orphans: those of killed writers too.

    delta-rs says which; deleting them ourselves keeps its own record of the vacuum out of Spark's logs. Whether a run
    still needs them is for the caller to know.
    """
    uri = lake.uri(table)
    paths = DeltaTable(uri).vacuum(
        retention_hours=hours, dry_run=True, enforce_retention_duration=False, full=orphans
    )  # fmt: skip
    fs, base = filesystem(uri)
    there = {p: fs.size(f"{base}/{p}") for p in paths if fs.isfile(f"{base}/{p}")}
    if there and not dry_run:
        fs.rm([f"{base}/{p}" for p in there])
    return Vacuumed(table, len(there), sum(there.values()))
