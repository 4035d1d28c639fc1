"""The commits of a Delta log: what they say of themselves, and which partitions' rows they changed."""

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

from deltalake import DeltaTable
from deltalake.exceptions import DeltaError, TableNotFoundError
from fsspec import AbstractFileSystem

from gpl_core.errors import ContractError, plain
from gpl_core.lakehouse.marks import SliceMark
from gpl_core.lakehouse.storage import filesystem, write_whole

_COMMIT_FILE = re.compile(r"/(\d{20})\.json$")


@dataclass(frozen=True)
class LogEntry:
    """One commit."""

    version: int
    mark: SliceMark | None  # None for a commit that is not one of ours
    # Partition values of the files that it added or removed. Files that only regroup rows (compaction) do not count: by
    # Delta's protocol their actions say `dataChange = false`.
    changed: tuple[Mapping[str, str | None], ...]

    def changes(self, partition: Mapping[str, str]) -> bool:
        """Whether rows of the partition with the values `partition` changed."""
        return any(all(values.get(k, v) == v for k, v in partition.items()) for values in self.changed)


def open_table(uri: str, version: int | None = None) -> DeltaTable:
    """The Delta table at `uri`, its newest version unless given.

    Raises:
        TableNotFoundError: there is none.
        ContractError: a commit in its log is damaged, named (delta-rs would pass over one of no bytes), or the log
            cannot be read for another reason, such as an unknown version.
    """
    try:
        table = DeltaTable(uri, version=version)
    except TableNotFoundError:
        raise
    except DeltaError as error:
        _refuse_damage(uri, whole=True)
        raise ContractError(f"the Delta log at {uri} cannot be read: {plain(error)}") from error
    if "://" not in uri:  # an object store shows an object only when it is complete
        _refuse_damage(uri, whole=False)
    return table


def _refuse_damage(uri: str, *, whole: bool) -> None:
    """Refuse a log in which a commit has no bytes, or (`whole`) is not JSON."""
    fs, log = filesystem(f"{uri}/_delta_log")
    if whole:
        damaged = [path for path in _commits(fs, log).values() if not _is_json(fs.cat_file(path))]
    else:
        damaged = [e.path for e in os.scandir(log) if _COMMIT_FILE.search(e.path) and not e.stat().st_size]
    if damaged:
        raise ContractError(
            f"the commit {min(damaged)} is damaged; restore it from a copy, or, if it is the newest one, delete it and "
            "write again what it had written"
        )


def _commits(fs: AbstractFileSystem, log: str) -> dict[int, str]:
    """Version -> path of the commits in the folder `log`, never from a cached listing: other processes write too."""
    return {int(m[1]): p for p in fs.ls(log, detail=False, refresh=True) if (m := _COMMIT_FILE.search(p))}


def _is_json(commit: bytes) -> bool:
    try:
        return bool([json.loads(line) for line in commit.splitlines()])
    except ValueError:
        return False


def read_log(uri: str, last: int, since: int = -1) -> tuple[LogEntry, ...]:
    """The commits after version `since`, up to version `last`, of the table at `uri`, newest first.

    Read from the log's files: delta-rs' `history` lists every commit there is and numbers them downwards from the
    version it has loaded, so that a pinned table, or one that another run commits to, gets the wrong ones.
    """
    fs, log = filesystem(f"{uri}/_delta_log")
    commits = _commits(fs, log)
    versions = sorted((v for v in commits if since < v <= last), reverse=True)
    try:
        return tuple(_entry(version, fs.cat_file(commits[version])) for version in versions)
    except ValueError:
        _refuse_damage(uri, whole=True)
        raise


def drop_statistics(uri: str) -> bool:
    """Take the smallest and largest values of columns out of the log at `uri`; returns whether there were any.

    Our tables have none (`Contract.table_properties`), those of earlier releases do, and the values may be user ids.
    Commits are written again in place: by Delta's protocol a file's statistics may be missing. What engines make from
    the commits (checkpoints, checksums) is deleted first, so that a kill in between leaves something to be found.
    ContractError when commits were deleted from the log: only its checkpoints know what they held.
    """
    fs, log = filesystem(f"{uri}/_delta_log")
    there = fs.find(log) if fs.exists(log) else []
    commits = {p: fs.cat_file(p) for p in there if _COMMIT_FILE.search(p)}
    holding = {p: body for p, body in commits.items() if b"minValues" in body}
    if not holding:
        return False
    if len(commits) <= max(int(m[1]) for p in commits if (m := _COMMIT_FILE.search(p))):
        raise ContractError(f"{log}: commits are missing, so statistics of columns cannot be taken out of it")
    fs.rm([p for p in there if p not in commits])
    for path, body in holding.items():
        write_whole(fs.unstrip_protocol(path), b"\n".join(map(_without_statistics, body.splitlines())) + b"\n")
    return True


def _without_statistics(line: bytes) -> bytes:
    if b"minValues" not in line:
        return line
    action = json.loads(line)
    for part in action.values():
        if "stats" in part:
            part["stats"] = json.dumps({"numRecords": json.loads(part["stats"])["numRecords"]})
    return json.dumps(action).encode()


def _entry(version: int, commit: bytes) -> LogEntry:
    mark = None
    changed: dict[str, Mapping[str, str | None]] = {}
    for line in commit.splitlines():
        if line.lstrip().startswith(b'{"commitInfo"'):
            mark = SliceMark.from_json(json.loads(line)["commitInfo"].get("userMetadata"))
        elif b'"dataChange":true' in line:
            for action in json.loads(line).values():
                values = action.get("partitionValues") or {}  # a removal need not name them: it may be of any partition
                changed[json.dumps(values, sort_keys=True)] = values
    return LogEntry(version, mark, tuple(changed.values()))
