"""`gpl forget`: remove a person from every table of this project, and from old versions if asked to vacuum."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import pyarrow as pa
import pyarrow.compute as pc

from gpl_core.commands.command import Command
from gpl_core.commands.vacuum import delete_old_files
from gpl_core.config import Config
from gpl_core.contracts.contract import Contract, all_contracts
from gpl_core.errors import UsageError
from gpl_core.graph.arguments import count
from gpl_core.lakehouse.lake import Lake
from gpl_core.lakehouse.rewrite import Mask, Removal, remove_rows
from gpl_core.lakehouse.snapshot import Snapshot
from gpl_core.lakehouse.storage import filesystem


@dataclass(frozen=True)
class Forgotten:
    """What happened to one table: rows removed, files rewritten, old files deleted, dates affected."""

    table: str
    rows: int
    files: int
    vacuumed: int
    owner: str
    dates: tuple[str, ...] = ()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--user", required=True, metavar="USER_ID")
    parser.add_argument("--dry-run", action="store_true", help="count only")
    parser.add_argument(
        "--vacuum-hours", type=count, metavar="N", help="also delete the files of versions older than N hours"
    )


def run(args: argparse.Namespace, config: Config) -> int:
    """One line per table, then what is left to do; deletes the manifests of the feed's changed slices."""
    lake = Lake.of(config.lakehouse)
    left: list[str] = []
    dates: set[str] = set()
    for found in forget(lake, args.user, dry_run=args.dry_run, vacuum_hours=args.vacuum_hours):
        if found.owner == "platform":
            left += [f"{found.table} still has {found.rows:,} rows: it belongs to the platform"] if found.rows else []
            continue
        if found.rows or found.vacuumed:
            verb = "would be removed" if args.dry_run else "removed"
            print(f"{found.table}: {found.rows:,} rows {verb}, {found.vacuumed:,} old files deleted")
        if found.table == "training_feed":
            dates |= set(found.dates)
    if dates and not args.dry_run:
        for day in sorted(dates):
            _void_manifest(lake, day)
        span = f"--start-date {min(dates)} --end-date {max(dates)}"
        left.append(f"slices built on the removed rows are stale; gpl run {span} rebuilds them")
    if args.vacuum_hours is None and not args.dry_run:
        left.append("old versions still have the rows: run it again with --vacuum-hours N once no reader pins them")
    left.append("not touched: models trained on the person's history, logs/, work/, and file statistics in _delta_log")
    for line in left:
        print(f"left: {line}")
    return 0


def forget(
    lake: Lake, user: str, *, dry_run: bool = False, vacuum_hours: int | None = None
) -> Iterator[Forgotten]:  # fmt: skip
    """Remove `user` table by table; rows in the platform's own tables are counted, never changed.

    vacuum_hours: also delete the files of versions older than this (0: all but the newest), so that the rows are gone
    from the disk; None leaves old versions readable until the next vacuum.

    Raises:
        ConflictError: a table was written at the same time, repeatedly.
    """
    if not user:
        raise UsageError("--user is empty; expected the platform's user id")
    for contract in all_contracts().values():
        named = holds(contract, user)
        if named is None or not lake.exists(contract.name):
            continue
        columns, mask = named
        if contract.owner == "platform":
            found: Sequence[Removal] = _removals(lake.open(contract.name), columns, mask)
            yield Forgotten(contract.name, sum(r.rows for r in found), len(found), 0, "platform")
            continue
        found = remove_rows(lake, contract, partial(_removals, columns=columns, mask=mask), "forget", dry_run=dry_run)
        gone = 0
        if vacuum_hours is not None and not dry_run:
            gone = delete_old_files(lake, contract.name, vacuum_hours).files
        dates = tuple(sorted({r.file.partition["dt"] for r in found if "dt" in r.file.partition}))
        yield Forgotten(contract.name, sum(r.rows for r in found), len(found), gone, contract.owner, dates)


def holds(contract: Contract, user: str) -> tuple[list[str], Mask] | None:
    """The columns to read and which rows are the person's; None for a table without users."""
    if "user_id" in contract.column_names:
        return ["user_id"], lambda rows: pc.fill_null(pc.equal(rows["user_id"], user), False)
    if contract.name == "worker_rejects":
        return ["key"], lambda rows: pc.equal(rows["key"], f"user_id={user}")
    if contract.name == "quarantine":
        return ["row_json"], lambda rows: pa.array([_names(text, user) for text in rows["row_json"].to_pylist()])
    return None


def _names(text: str, user: str) -> bool:
    """Whether a quarantined row belongs to `user`; so does a row of broken JSON that contains the id."""
    try:
        return user in text and json.loads(text).get("user_id") == user
    except (ValueError, AttributeError):
        return True


def _removals(snapshot: Snapshot, columns: list[str], mask: Mask) -> list[Removal]:
    """The files that hold rows of the person; only the columns that the mask needs are read."""
    counted = [
        Removal(file, sum(pc.sum(mask(rows)).as_py() or 0 for rows in snapshot.row_groups([file], columns)), mask)
        for file in snapshot.files
    ]
    return [removal for removal in counted if removal.rows]


def _void_manifest(lake: Lake, day: str) -> None:
    """Delete the manifest of the feed for `day`: it lists the files and sums from before the removal."""
    fs, path = filesystem(lake.path("manifests", "training_feed", f"{day}.json"))
    if fs.exists(path):
        fs.rm(path)


COMMAND = Command("forget", "remove a person from every table of this project", run, add_arguments, in_shadow=False)
