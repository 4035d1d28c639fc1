"""Data files of a table, as its log lists them."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import date
from hashlib import sha256
from typing import Any

from gpl_core.lakehouse.table_layout import EARLIEST, LATEST


@dataclass(frozen=True)
class DataFile:
    """One live data file of a snapshot."""

    path: str
    partition: Mapping[str, str]
    rows: int  # that a reader of the table sees: without those that a deletion vector deletes; -1: the log does not say
    size: int
    stats_min: Mapping[str, Any]
    modified: Any = None  # when it was written
    vector: str = ""  # identity of its deletion vector
    days: tuple[str, str] = (EARLIEST, LATEST)  # first and last date of its rows, as far as the log knows
    undated: bool = False  # whether some row may have neither a date nor a time

    def may_have(self, start: date | None, end: date | None) -> bool:
        """Whether some row may be of the dates `start` to `end` (None: no limit)."""
        return (end is None or self.days[0] <= end.isoformat()) and (start is None or self.days[1] >= start.isoformat())

    def is_within(self, start: date, end: date) -> bool:
        """Whether all rows are of the dates `start` to `end`."""
        return not self.undated and start.isoformat() <= self.days[0] and self.days[1] <= end.isoformat()


def rows_in(files: Iterable[DataFile]) -> int:
    """Rows in `files`; -1 when the log does not say it of each."""
    rows = [f.rows for f in files]
    return -1 if -1 in rows else sum(rows)


def digest_of(files: Iterable[DataFile]) -> str:
    """Hash of a set of live files: equal digests mean the same rows; "" for none."""
    paths = sorted(f.path + f.vector for f in files)
    return hash_text("\n".join(paths)) if paths else ""


def hash_text(text: str) -> str:
    """A short hash of `text`."""
    return sha256(text.encode()).hexdigest()[:16]
