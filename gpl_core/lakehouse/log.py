"""The commits of a Delta log: their metadata, and the partitions whose rows they changed."""

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from deltalake import DeltaTable
from deltalake.exceptions import DeltaError, TableNotFoundError

from gpl_core.errors import ContractError, plain
from gpl_core.lakehouse.marks import SliceMark
from gpl_core.lakehouse.storage import filesystem, write_whole

_COMMIT_FILE = re.compile(r"/(\d{20})\.json$")
_CHANGED = re.compile(rb'"dataChange"\s*:\s*true')


class LogEntry(NamedTuple):
    """One commit; a tuple, for there may be thousands."""

    version: int
    timestamp: int | None  # milliseconds, as its writer says
    step: str | None  # of our mark, as what follows; None for a commit that is not one of ours
    run_id: str
    slices: Mapping[str, str]
    # Partition values of the files that it added or removed. Files that only regroup rows (compaction) do not count: by
    # Delta's protocol their actions say `dataChange = false`.
    changed: Sequence[Mapping[str, str | None]]
    details: Mapping[str, Any]

    @property
    def mark(self) -> SliceMark | None:
        """What the commit says of itself."""
        return None if self.step is None else SliceMark(self.step, self.slices, self.run_id, self.details)

    def changes(self, partition: Mapping[str, str]) -> bool:
        """Whether rows of the partition with the values `partition` changed."""
        return any(all(values.get(k, v) == v for k, v in partition.items()) for values in self.changed)


def open_table(uri: str, version: int | None = None) -> DeltaTable:
    """The Delta table at `uri`, its newest version unless given; TableNotFoundError when there is none.

    ContractError names a damaged commit (delta-rs would pass over one of no bytes), or says why the log cannot be read.
    """
    try:
        table = DeltaTable(uri, version=version)
    except TableNotFoundError:
        if version is None or not DeltaTable.is_deltatable(uri):
            raise
        raise ContractError(f"the Delta log at {uri} has been cleaned of version {version}") from None
    except DeltaError as error:
        _refuse_damage(uri)
        raise ContractError(f"the Delta log at {uri} cannot be read: {plain(error)}") from error
    if "://" not in uri:  # an object store shows an object only when it is complete
        _refuse_empty(uri, table.version())
    return table


def _refuse_empty(uri: str, version: int) -> None:
    """Refuse a log on a disk in which a commit has no bytes: one after the checkpoint from which `version` is made."""
    log = filesystem(f"{uri}/_delta_log")[1]
    # From the next commit on, in case delta-rs has passed over the newest.
    for path in (commit_path(log, number) for number in range(version + 1, -1, -1)):
        if os.path.exists(path) and not os.path.getsize(path):
            raise _damaged(path)
        if os.path.exists(path.replace(".json", ".checkpoint.parquet")):
            return


def _refuse_damage(uri: str) -> None:
    """Refuse a log in which a commit is not JSON."""
    fs, log = filesystem(f"{uri}/_delta_log")
    for path in sorted(p for p in fs.ls(log, detail=False, refresh=True) if _COMMIT_FILE.search(p)):
        try:
            lines = [json.loads(line) for line in fs.cat_file(path).splitlines()]
        except ValueError:
            lines = []
        if not lines:
            raise _damaged(path)


def _damaged(path: str) -> ContractError:
    return ContractError(
        f"the commit {path} is damaged; restore it from a copy, or, if it is the newest one, delete it and write again "
        "what it had written"
    )


def commit_path(log: str, version: int) -> str:
    """Path of the commit that made `version`, in the folder `log`."""
    return f"{log}/{version:020d}.json"


def read_log(uri: str, last: int, since: int = -1) -> Iterator[LogEntry]:
    """The commits after version `since`, up to version `last`, of the table at `uri`, newest first.

    They end at the first one that is not there: a log is cleaned from its beginning on.

    Read from the log's files: delta-rs' `history` lists every commit there is and numbers them downwards from the
    version it has loaded, so that a pinned table, or one that another run commits to, gets the wrong ones.
    """
    fs, log = filesystem(f"{uri}/_delta_log")
    for version in range(last, since, -1):
        path = commit_path(log, version)
        try:
            entry = _entry(version, fs.cat_file(path))
        except FileNotFoundError:
            return
        except ValueError:
            raise _damaged(path) from None
        yield entry


def read_changes(uri: str, last: int, since: int) -> Iterator[dict[str, Any]]:
    """The `add` and `remove` actions that changed rows after version `since`, up to version `last`, oldest first.

    ContractError when the log was cleaned of some.
    """
    fs, log = filesystem(f"{uri}/_delta_log")
    for version in range(since + 1, last + 1):
        try:
            commit = fs.cat_file(commit_path(log, version))
        except FileNotFoundError:
            raise ContractError(f"the Delta log at {uri} was cleaned of version {version}") from None
        for line in commit.splitlines():
            if _CHANGED.search(line):
                yield from json.loads(line).values()


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
    if not commit:
        raise ValueError("it has no bytes")
    mark, time = None, None
    changed: dict[str, Mapping[str, str | None]] = {}
    for line in commit.splitlines():
        if line.lstrip().startswith(b'{"commitInfo"'):
            info = json.loads(line)["commitInfo"]
            mark, time = SliceMark.from_json(info.get("userMetadata")), info.get("timestamp")
        elif _CHANGED.search(line):
            for action in json.loads(line).values():
                values = action.get("partitionValues") or {}  # a removal need not name them: it may be of any partition
                changed[json.dumps(values, sort_keys=True)] = values
    if mark is None:
        return LogEntry(version, time, None, "", {}, [*changed.values()], {})
    return LogEntry(version, time, mark.step, mark.run_id, mark.slices, [*changed.values()], mark.details)
