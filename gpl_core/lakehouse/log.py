"""The commits of a Delta log: what they say of themselves, and which partitions' rows they changed."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass

from gpl_core.lakehouse.marks import SliceMark
from gpl_core.lakehouse.storage import filesystem

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


def read_log(uri: str, last: int, since: int = -1) -> tuple[LogEntry, ...]:
    """The commits after version `since`, up to version `last`, of the table at `uri`, newest first.

    Read from the log's files: delta-rs' `history` lists every commit there is and numbers them downwards from the
    version it has loaded, so that a pinned table, or one that another run commits to, gets the wrong ones.
    """
    fs, log = filesystem(f"{uri}/_delta_log")
    commits = {int(m[1]): p for p in fs.ls(log, detail=False, refresh=True) if (m := _COMMIT_FILE.search(p))}
    versions = sorted((v for v in commits if since < v <= last), reverse=True)
    return tuple(_entry(version, fs.cat_file(commits[version])) for version in versions)


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
