"""The index of a table's log: the metadata of each commit, in one file (`_gpl/commits`) in the table's folder.

State is derived from the marks of all commits, over all years. The index stores them, so that only one file and the few
commits after it must be read, and the log may be cleaned. A run writes the index when it starts and after each commit;
it contains nothing that was not in the log. The log takes precedence: it is read backward from its end until a commit
matches the index exactly, or completely if none does.
"""

import hashlib
import json
import logging
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache

from gpl_core.lakehouse.log import LogEntry, read_log
from gpl_core.lakehouse.marks import WHOLE
from gpl_core.lakehouse.storage import filesystem, write_whole

log = logging.getLogger("gpl")

# Three lines: a checksum of the others; what planners ask for, quick to parse after thousands of commits; all commits.
INDEX = "_gpl/commits"


@dataclass(frozen=True)
class _Index:
    """The file as it was read."""

    newest: LogEntry
    begins: int  # version of its oldest commit
    prints: Mapping[str, str]  # slice -> "version:fingerprint" of the commits that wrote it, newest first
    changes: Mapping[str, int]  # slice -> newest version that changed its rows
    packed: bytes

    @cached_property
    def commits(self) -> tuple[LogEntry, ...]:
        """All of them, newest first."""
        return tuple(LogEntry(*row) for row in json.loads(zlib.decompress(self.packed)))


@dataclass(frozen=True)
class History:
    """The commits up to one version of a table, without a gap."""

    read: tuple[LogEntry, ...]  # from the log, newest first
    older: _Index | None  # what was before them
    begins: int  # version of the oldest one; 0 unless the log was cleaned of commits that no index has
    indexed: int = -1  # newest version in the index, -1 when there is none that agrees with the log

    @cached_property
    def commits(self) -> tuple[LogEntry, ...]:
        """All of them, newest first."""
        return (*self.read, *(self.older.commits if self.older else ()))

    @cached_property
    def changes(self) -> dict[str, int]:
        """Slice -> newest version that changed its rows."""
        return {**(self.older.changes if self.older else {}), **newest_changes(self.read)}

    @property
    def slices(self) -> set[str]:
        """What steps have written, also where no row is left."""
        return {*(self.older.prints if self.older else ()), *(name for entry in self.read for name in entry.slices)}

    @cached_property
    def refused(self) -> dict[str, int]:
        """Slice -> version, of those whose newest commit says that they are made from nothing (`Lake.refuse`)."""
        newest: dict[str, tuple[int, str]] = {}
        for entry in self.read:
            for name, fingerprint in entry.slices.items():
                newest.setdefault(name, (entry.version, fingerprint))
        for name, text in self.older.prints.items() if self.older else ():
            version, _, fingerprint = text.partition("\n")[0].partition(":")
            newest.setdefault(name, (int(version), fingerprint))
        return {name: version for name, (version, fingerprint) in newest.items() if not fingerprint}

    def fingerprints(self, slice_name: str) -> list[tuple[int, str]]:
        """(version, fingerprint) of the commits that wrote the slice, newest first."""
        older = self.older.prints.get(slice_name, "").splitlines() if self.older else ()
        return [
            *((entry.version, entry.slices[slice_name]) for entry in self.read if slice_name in entry.slices),
            *((int(version), fingerprint) for version, _, fingerprint in (text.partition(":") for text in older)),
        ]


def newest_changes(commits: Iterable[LogEntry], dt: str = "dt") -> dict[str, int]:
    """Slice -> the newest of `commits` (newest first) that changed its rows; `*`: rows of no date, or of any.

    dt: what the log calls the column, where a platform's table has another name for it.
    """
    found: dict[str, int] = {}
    for entry in commits:
        for values in entry.changed:
            found.setdefault(str(values.get(dt, WHOLE)), entry.version)
    return found


def read_history(uri: str, table_id: str, last: int) -> History:
    """The commits up to version `last` of the table at `uri`."""
    index = _load(uri, table_id)
    read: list[LogEntry] = []
    for entry in read_log(uri, last):
        if index and _same(entry, index.newest):
            return History(tuple(read), index, index.begins, entry.version)
        if index and index.begins <= entry.version < index.newest.version:
            known = index.commits[index.newest.version - entry.version :]
            if _same(entry, known[0]):  # an older version was asked for, or the log was set back and has gone on
                indexed = entry.version if read else index.newest.version
                return History((*read, *known), None, index.begins, indexed)
        read.append(entry)
    begins = read[-1].version if read else last + 1
    if index and begins == index.newest.version + 1:  # the log was cleaned of what the index has
        return History(tuple(read), index, index.begins, index.newest.version)
    if begins:
        _say(uri, begins)
    return History(tuple(read), None, begins)


def _same(entry: LogEntry, known: LogEntry) -> bool:
    return entry._replace(details={}) == known._replace(details={})  # in these a number may not equal itself


def write_index(uri: str, table_id: str, history: History) -> None:
    """Write the index again with the commits of `history`, unless it has them."""
    if not history.read or history.indexed >= history.read[0].version:
        return
    prints = {name: "\n".join(f"{v}:{fingerprint}" for v, fingerprint in history.fingerprints(name))
              for name in sorted(history.slices)}  # fmt: skip
    head = json.dumps([table_id, history.read[0], history.begins, prints, history.changes])
    packed = zlib.compress(json.dumps(history.commits).encode(), 1)
    body = head.encode() + b"\n" + packed
    write_whole(f"{uri}/{INDEX}", hashlib.sha256(body).hexdigest().encode() + b"\n" + body)


def _load(uri: str, table_id: str) -> _Index | None:
    """None without a whole index of this very table."""
    fs, path = filesystem(f"{uri}/{INDEX}")
    try:
        checksum, _, body = fs.cat_file(path).partition(b"\n")
    except FileNotFoundError:
        return None
    if hashlib.sha256(body).hexdigest().encode() != checksum:
        return None
    head, _, packed = body.partition(b"\n")
    table, newest, begins, prints, changes = json.loads(head)
    return _Index(LogEntry(*newest), begins, prints, changes, packed) if table == table_id else None


@lru_cache(maxsize=1024)
def _say(uri: str, begins: int) -> None:
    """Warn of a log that has lost commits, once per process."""
    log.warning(
        "%s: its log begins at version %d and %s does not have what was before; slices written before it count as not "
        "written", uri, begins, INDEX,
    )  # fmt: skip
