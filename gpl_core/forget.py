"""Remove a person from every table of this project, and from old versions when asked to vacuum.

Files that hold the person are written anew by pyarrow and swapped in one commit per table. Not by delta-rs' own DELETE:
it writes string views, which the pyarrow under Petastorm cannot read.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from deltalake import CommitProperties, DeltaTable
from deltalake.exceptions import CommitFailedError
from deltalake.transaction import AddAction, RemoveAction

from gpl_core.contracts import Contract, all_contracts
from gpl_core.errors import ConflictError, UsageError
from gpl_core.lake import DataFile, Lake, SliceMark, Snapshot
from gpl_core.storage import filesystem

_TRIES = 5

Mask = Callable[[pa.Table], pa.Array]


@dataclass(frozen=True)
class Forgotten:
    """What happened to one table: rows of the person, files written anew, old files deleted, dates concerned."""

    table: str
    rows: int
    files: int
    vacuumed: int
    owner: str
    dates: tuple[str, ...] = ()


def forget(
    lake: Lake, user: str, *, dry_run: bool = False, vacuum_hours: int | None = None
) -> Iterator[Forgotten]:  # fmt: skip
    """Remove `user` table by table; the platform's own tables are counted, never changed.

    vacuum_hours: also delete the files of versions older than this (0: all but the newest), so that the rows are gone
    from the disk; None leaves old versions readable until somebody vacuums.

    Raises:
        ConflictError: a table was written at the same time, again and again.
    """
    if not user:
        raise UsageError("--user is empty; expected the platform's user id")
    for contract in all_contracts().values():
        found = holds(contract, user)
        if found is None or not lake.exists(contract.name):
            continue
        columns, mask = found
        if contract.owner == "platform":
            rows, files = _count(lake.open(contract.name), columns, mask)
            yield Forgotten(contract.name, rows, len(files), 0, "platform")
            continue
        rows, files = _remove(lake, contract, columns, mask, dry_run)
        gone = 0
        if vacuum_hours is not None and not dry_run:
            gone = len(
                DeltaTable(lake.uri(contract.name)).vacuum(
                    retention_hours=vacuum_hours, dry_run=False, enforce_retention_duration=False
                )
            )
        dates = tuple(sorted({f.partition["dt"] for f in files if "dt" in f.partition}))
        yield Forgotten(contract.name, rows, len(files), gone, contract.owner, dates)


def holds(contract: Contract, user: str) -> tuple[list[str], Mask] | None:
    """The columns to look at and which rows are the person's; None for a table that names no user."""
    if "user_id" in contract.column_names:
        return ["user_id"], lambda rows: pc.fill_null(pc.equal(rows["user_id"], user), False)
    if contract.name == "worker_rejects":
        return ["key"], lambda rows: pc.equal(rows["key"], f"user_id={user}")
    if contract.name == "quarantine":
        return ["row_json"], lambda rows: pa.array([_names(text, user) for text in rows["row_json"].to_pylist()])
    return None


def _names(text: str, user: str) -> bool:
    """Whether a quarantined row is of `user`; a row whose JSON is broken is, when the id stands in it."""
    try:
        return user in text and json.loads(text).get("user_id") == user
    except (ValueError, AttributeError):
        return True


def _count(snapshot: Snapshot, columns: list[str], mask: Mask) -> tuple[int, list[DataFile]]:
    """Rows of the person, and the files that hold them; only the columns of the mask are read."""
    rows, files = 0, []
    for file, uri in zip(snapshot.files, snapshot.uris(snapshot.files), strict=True):
        fs, path = filesystem(uri)
        with fs.open(path, "rb") as handle:
            reader = pq.ParquetFile(handle)
            physical = [snapshot.columns.get(c, c) for c in columns]
            mine = sum(
                pc.sum(mask(reader.read_row_group(g, columns=physical).rename_columns(columns))).as_py() or 0
                for g in range(reader.num_row_groups)
            )
        if mine:
            rows += mine
            files.append(file)
    return rows, files


def _remove(
    lake: Lake, contract: Contract, columns: list[str], mask: Mask, dry_run: bool
) -> tuple[int, list[DataFile]]:  # fmt: skip
    for _ in range(_TRIES):
        snapshot = lake.open(contract.name)
        rows, files = _count(snapshot, columns, mask)
        if dry_run or not files:
            return rows, files
        table = DeltaTable(snapshot.uri, version=snapshot.version)
        now = int(datetime.now(UTC).timestamp() * 1000)
        actions: list[AddAction | RemoveAction] = []
        for file in files:
            partition: dict[str, str | None] = {k: v for k, v in file.partition.items() if k in contract.partition_by}
            actions.append(RemoveAction(file.path, True, now, file.size, partition))
            if (made := _without(snapshot, file, mask, partition)) is not None:
                actions.append(made)
        try:
            table.create_write_transaction(
                actions, "append", table.schema(), list(contract.partition_by) or None,
                commit_properties=CommitProperties(
                    # No slice: what a step has done stays done. Its readers see new files, and are stale.
                    custom_metadata={"userMetadata": SliceMark("forget", {}, "forget").to_json()},
                    max_commit_retries=0,
                ),
            )  # fmt: skip
            return rows, files
        except CommitFailedError:  # somebody else committed: look again; the new files are nobody's
            continue
    raise ConflictError(f"table {contract.name}: written by other runs {_TRIES} times meanwhile; run gpl forget again")


def _without(snapshot: Snapshot, file: DataFile, mask: Mask, partition: dict[str, str | None]) -> AddAction | None:
    """`file` written anew without the person, row group by row group; None when nothing is left."""
    (uri,) = snapshot.uris([file])
    folder = file.path.rpartition("/")[0]
    path = f"{folder}/part-{uuid.uuid4()}.parquet".lstrip("/")
    fs, base = filesystem(snapshot.uri)
    _, old = filesystem(uri)
    rows = 0
    with fs.open(old, "rb") as source, fs.open(f"{base}/{path}", "wb") as sink:
        reader = pq.ParquetFile(source)
        with pq.ParquetWriter(sink, reader.schema_arrow, compression="zstd") as writer:
            for group in range(reader.num_row_groups):
                kept = reader.read_row_group(group)
                kept = kept.filter(pc.invert(mask(kept)))
                if len(kept):
                    writer.write_table(kept, row_group_size=len(kept))
                    rows += len(kept)
    if not rows:
        fs.rm(f"{base}/{path}")
        return None
    modified = int(datetime.now(UTC).timestamp() * 1000)
    return AddAction(path, fs.size(f"{base}/{path}"), partition, modified, True, json.dumps({"numRecords": rows}))


def forget_everywhere(lake: Lake, user: str, *, dry_run: bool, vacuum_hours: int | None) -> int:
    """What `gpl forget` does: one line per table, the manifests it voids, what is left to do. Returns the exit code."""
    if vacuum_hours is not None and vacuum_hours < 0:
        raise UsageError(f"--vacuum-hours {vacuum_hours}: expected 0 or more")
    left: list[str] = []
    dates: set[str] = set()
    for found in forget(lake, user, dry_run=dry_run, vacuum_hours=vacuum_hours):
        if found.owner == "platform":
            left += [f"{found.table} still has {found.rows:,} rows: it is the platform's"] if found.rows else []
            continue
        if found.rows or found.vacuumed:
            verb = "would be removed" if dry_run else "removed"
            print(f"{found.table}: {found.rows:,} rows {verb}, {found.vacuumed:,} old files deleted")
        if found.table == "training_feed":
            dates |= set(found.dates)
    if dates and not dry_run:
        for day in sorted(dates):
            _void_manifest(lake, day)
        span = f"--start-date {min(dates)} --end-date {max(dates)}"
        left.append(f"slices that were built on the removed rows are stale; gpl run {span} builds them anew")
    if vacuum_hours is None and not dry_run:
        left.append("old versions still hold the rows: run it again with --vacuum-hours N when no reader pins them")
    left.append("not touched: models trained on the person's history, logs/, work/, and file statistics in _delta_log")
    for line in left:
        print(f"left: {line}")
    return 0


def _void_manifest(lake: Lake, day: str) -> None:
    """Delete the feed's manifest of `day`: its files and sums are those of before."""
    fs, path = filesystem(lake.path("manifests", "training_feed", f"{day}.json"))
    if fs.exists(path):
        fs.rm(path)
