"""Data files of a table, as its log lists them."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from hashlib import sha256
from typing import Any


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


def rows_in(files: Iterable[DataFile]) -> int:
    """Rows in `files` by the log's statistics."""
    return sum(f.rows for f in files)


def digest_of(files: Iterable[DataFile]) -> str:
    """Hash of a set of live files: equal digests mean the same rows; "" for none."""
    paths = sorted(f.path + f.vector for f in files)
    return hash_text("\n".join(paths)) if paths else ""


def hash_text(text: str) -> str:
    """A short hash of `text`."""
    return sha256(text.encode()).hexdigest()[:16]
