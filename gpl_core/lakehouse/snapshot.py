"""A pinned version of a table: its files, the marks of its commits, and its rows; read without a JVM."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import date, datetime
from functools import cached_property
from typing import Any
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.parquet as pq
from arro3.core import DataType
from deltalake import QueryBuilder
from deltalake.exceptions import TableNotFoundError

from gpl_core.contracts.contract import CONTRACT_NAME, CONTRACT_VERSION, Contract
from gpl_core.contracts.raw_values import type_text
from gpl_core.errors import ContractError, MissingInputError
from gpl_core.lakehouse.deletion_vectors import DeletionVector, deletion_vectors
from gpl_core.lakehouse.engine import register
from gpl_core.lakehouse.files import DataFile, hash_text
from gpl_core.lakehouse.log import open_table, read_changes, read_log
from gpl_core.lakehouse.log_index import History, newest_changes, read_history, write_index
from gpl_core.lakehouse.marks import WHOLE, SliceMark
from gpl_core.lakehouse.storage import open_parquet
from gpl_core.lakehouse.table_layout import EARLIEST, LATEST, TableLayout

_NOT_IN_THE_FILES = {"deletionVectors", "columnMapping", "typeWidening"}
_PHYSICAL = "delta.columnMapping.physicalName"
_NO_VECTOR = DeletionVector("", 0)


def absence(contract: Contract, uri: str) -> str:
    """That `uri` holds no table, and what to do about it."""
    if contract.owner == "platform":
        remedy = f"it is the platform's input: write it, or set lakehouse.tables.{contract.name}"
    elif contract.owner == "simulation":
        remedy = "gpl simulate writes it; real data has no such table"
    elif contract.owner.startswith("gpl "):
        remedy = f"{contract.owner} writes it"
    else:
        remedy = f"run the step {contract.owner} first, or correct lakehouse.root"
    return f"there is no Delta table at {uri}; {remedy}"


class Snapshot:
    """One version of one table, pinned: everything read through it belongs to that version."""

    def __init__(
        self, uri: str, contract: Contract, version: int | None = None, columns: Mapping[str, str] | None = None
    ):
        try:
            self._table = open_table(uri, version)
        except TableNotFoundError:
            raise MissingInputError(f"table {contract.name}: {absence(contract, uri)}") from None
        self.uri = uri
        self.contract = contract
        self.version: int = self._table.version()
        # Column mapping gives a column a name of its own in data files and log; -> the table's name.
        self._logical = {str(f.metadata.get(_PHYSICAL, f.name)): f.name for f in self._table.schema().fields}
        kinds = {f.name: json.loads(f.type.to_json()) for f in self._table.schema().fields}
        self.layout = TableLayout(contract, kinds, columns or {}, self._logical)
        self.columns = self.layout.columns
        self.types = self.layout.types

    @property
    def properties(self) -> dict[str, str]:
        return {k: v for k, v in self._table.metadata().configuration.items() if v is not None}

    @property
    def column_names(self) -> list[str]:
        return [f.name for f in self._table.schema().fields]

    def check_contract(self) -> None:
        """Refuse a table that another contract, or another version of it, made.

        The ContractError names both versions, or the differing columns.
        """
        found = self.properties.get(CONTRACT_VERSION)
        if found is not None and self.properties.get(CONTRACT_NAME) != self.contract.name:
            raise ContractError(f"{self.uri}: holds table '{self.properties[CONTRACT_NAME]}', not {self.contract.name}")
        problems = self._drift()
        if found is not None and int(found) != self.contract.version:
            raise ContractError(
                f"table {self.contract.name}: was written under contract version {found}, this code reads version "
                f"{self.contract.version}; run `gpl migrate` or use the matching release"
                + "".join(f"\n  {p}" for p in problems)
            )
        if problems:
            raise ContractError(
                f"table {self.contract.name} at {self.uri}: its schema drifted from contract version "
                f"{self.contract.version}:\n  " + "\n  ".join(problems)
            )
        partitions = self._table.metadata().partition_columns
        if self.contract.owner != "platform" and not set(self.contract.partition_by) <= set(partitions):
            divided = ", ".join(partitions) or "nothing"
            raise ContractError(
                f"table {self.contract.name} at {self.uri}: partitioned by {divided}, expected "
                f"{', '.join(self.contract.partition_by)}; write it with that partition"
            )

    def _drift(self) -> list[str]:
        """Column-by-column differences from the contract; additional columns do not count.

        Types of a platform's table are for ingest to judge, which casts row by row.
        """
        problems = []
        for column in self.contract.columns:
            wanted, found = column.delta_type, self.types.get(column.name)
            if found is None and not column.nullable:
                there = ", ".join(self.column_names)
                problems.append(f"missing column '{column.name}' ({type_text(wanted)}); it has {there}")
            elif found not in (None, wanted) and self.contract.enforced:
                problems.append(f"column '{column.name}' is {type_text(found)}, expected {type_text(wanted)}")
        return problems

    @property
    def _features(self) -> set[str]:
        return {f.removesuffix("-preview") for f in self._table.protocol().reader_features or ()}

    def check_plain(self) -> None:
        """ContractError for a table whose Parquet files alone do not reveal its rows and columns."""
        hidden = self._features & _NOT_IN_THE_FILES
        if self.properties.get("delta.columnMapping.mode", "none") != "none":
            hidden.add("columnMapping")
        if hidden:
            raise ContractError(
                f"table {self.contract.name}: version {self.version} uses {', '.join(sorted(hidden))}, which its "
                "Parquet files alone do not reveal; drop the feature (ALTER TABLE … DROP FEATURE) before workers read "
                "it"
            )

    @cached_property
    def deletion_vectors(self) -> Mapping[str, DeletionVector]:
        """Path of a live file -> its deletion vector."""
        return deletion_vectors(self.uri, self.version) if "deletionVectors" in self._features else {}

    def _unmapped(self, statistic: str) -> str:
        """`min.column` and the like, the column by its name in the table."""
        kind, _, column = statistic.partition(".")
        return f"{kind}.{self._logical.get(column, column)}" if column else statistic

    @cached_property
    def files(self) -> tuple[DataFile, ...]:
        """Live data files, ordered by path."""
        actions = pa.table(self._table.get_add_actions(flatten=True))
        actions = actions.rename_columns([self._unmapped(name) for name in actions.column_names])
        for place, column in enumerate(actions.schema):  # a platform's dates and times may lie outside of Python's
            if pa.types.is_timestamp(column.type):
                micros = actions[place].cast(pa.timestamp("us", column.type.tz)).cast(pa.int64())
                actions = actions.set_column(place, column.name, micros)
            elif pa.types.is_date(column.type):
                actions = actions.set_column(place, column.name, actions[place].cast(pa.string()))
        rows = actions.to_pylist()
        if strays := set(self.deletion_vectors) - {row["path"] for row in rows}:
            raise ContractError(
                f"table {self.contract.name} at {self.uri}: version {self.version} has deletion vectors of files that "
                f"are not in it, {min(strays)} for one; write a checkpoint of the table with Spark"
            )
        found = []
        for row in rows:
            partition = {k.removeprefix("partition."): str(v) for k, v in row.items() if k.startswith("partition.")}
            vector = self.deletion_vectors.get(row["path"], _NO_VECTOR)
            records = row["num_records"] - vector.rows if row["num_records"] is not None else -1
            minima, (days, undated) = self.layout.minima(row), self.layout.days(row)
            found.append(DataFile(
                row["path"], partition, records, row["size_bytes"], minima, row["modification_time"], vector.identity,
                days, undated,
            ))  # fmt: skip
        return tuple(sorted(found, key=lambda f: f.path))

    def select(
        self,
        *,
        start: date | None = None,
        end: date | None = None,
        undated: bool = False,
        where: Mapping[str, str] | None = None,
        before: tuple[str, datetime] | None = None,
    ) -> tuple[DataFile, ...]:
        """Files that may have rows of the dates `start` to `end`, with the partition values `where`.

        `undated` adds those that may have rows with neither a date nor a time.
        `before=(column, time)` leaves out files whose smallest `column`, by the log's statistics, is not before `time`
        (an int column is compared in microseconds); files without statistics stay in.
        """
        chosen = []
        for f in self.files:
            if not f.may_have(start, end) and not (undated and f.undated):
                continue
            if any(f.partition.get(k) != v for k, v in (where or {}).items()):
                continue
            if before is not None and before[0] in f.stats_min and not _earlier(f.stats_min[before[0]], before[1]):
                continue
            chosen.append(f)
        return tuple(chosen)

    def slices(self) -> tuple[date, ...]:
        """The dates that live files have, ascending: of a file with rows of several dates the first and the last."""
        named = {day for f in self.files for day in f.days}
        return tuple(sorted(date.fromisoformat(day) for day in named if day not in (EARLIEST, LATEST)))

    def may_have(self, day: date) -> bool:
        """Whether some live file may have rows of `day`."""
        return any(f.may_have(day, day) for f in self.files)

    def uris(self, files: Iterable[DataFile]) -> list[str]:
        """Absolute locations of `files`, as Petastorm and pyarrow take them."""
        base = self.uri.rstrip("/")
        # In the log a path is encoded as in a URI; it is absolute in a shallow clone (file:/…).
        return [unquote(f.path) if ":/" in f.path else f"{base}/{unquote(f.path)}" for f in files]

    @cached_property
    def _id(self) -> str:
        return str(self._table.metadata().id)

    @cached_property
    def history(self) -> History:
        """The commits up to this version, as far back as index and log go."""
        return read_history(self.uri, self._id, self.version)

    def index(self) -> None:
        """Bring the index of the log up to this version: for whoever has committed, or will."""
        write_index(self.uri, self._id, self.history)

    def changes_since(self, version: int) -> dict[str, int]:
        """Slice -> newest version that changed its rows, of the commits after `version`; compaction changes none.

        A slice is an ISO date. `*` means all: for a table without dates, a removal that names no date, or a log that
        was cleaned of such commits.
        """
        if self.contract.owner == "platform" and "dt" in self.contract.partition_by:
            return self._changed_days(version)
        commits = tuple(read_log(self.uri, self.version, version))
        if len(commits) < self.version - version:
            return {WHOLE: self.version}
        theirs = self.columns.get("dt", "dt")
        return newest_changes(commits, next((k for k, v in self._logical.items() if v == theirs), theirs))

    def _changed_days(self, version: int) -> dict[str, int]:
        before = Snapshot(self.uri, self.contract, version, self.layout.mapped)
        known = {f.path: (EARLIEST, LATEST) if f.undated else f.days for f in before.files}
        changed = self.layout.changed_days(read_changes(self.uri, self.version, version), known)
        return {WHOLE if day == LATEST else day: self.version for day in changed}

    @cached_property
    def _changes(self) -> dict[str, int]:
        changes = dict(self.history.changes)
        if begins := self.history.begins:  # of slices that did not change since, only that is known
            for file in self.files:
                changes.setdefault(file.partition.get("dt", WHOLE), -begins)
        return changes

    def identity(self, start: date | None = None, end: date | None = None) -> str:
        """Hash of the newest changes to the slices `start` to `end`: equal identities mean the same rows; "" for none.

        The table's own id is part of it: a table that was deleted and made again counts its versions from the start.
        """
        found = in_span(self._changes, start, end)
        return hash_text(json.dumps([self._id, sorted(found.items())])) if found else ""

    def marks(self) -> list[tuple[int, SliceMark]]:
        """(version, mark) of this table's commits up to this version, newest first."""
        return [(entry.version, mark) for entry in self.history.commits if (mark := entry.mark) is not None]

    def mark(self, slice_name: str, step: str | None = None) -> tuple[int, SliceMark] | None:
        """The newest commit that wrote `slice_name`, by `step` when given; None when none did."""
        for entry in self.history.commits:
            if slice_name in entry.slices and step in (None, entry.step) and (mark := entry.mark) is not None:
                return entry.version, mark
        return None

    def transaction_version(self, app_id: str) -> int:
        """Last recorded version of the application transaction `app_id`, -1 when there is none."""
        version = self._table.transaction_version(app_id)
        return -1 if version is None else version

    def read(self, files: Sequence[DataFile] | None = None, columns: list[str] | None = None) -> pa.Table:
        """Read `files` (default: all) into memory, partition columns included. For bounded tables only.

        ContractError for a column that the contract does not have.
        """
        self.check_plain()
        files = self.files if files is None else files
        wanted = list(self.contract.column_names) if columns is None else columns
        for name in wanted:
            self.contract.column(name)
        schema = pa.schema([f for f in self.contract.arrow_schema() if f.name in wanted])
        in_file = [c for c in wanted if c not in self.contract.partition_by]
        ours = {theirs: our for our, theirs in self.columns.items() if our in in_file}
        parts = []
        for f, uri in zip(files, self.uris(files), strict=True):
            with self.reading(uri), open_parquet(uri) as handle:
                part = pq.ParquetFile(handle).read(columns=[self.columns.get(c, c) for c in in_file])
            part = part.rename_columns([ours.get(c, c) for c in part.column_names])
            arrays = [_column_of(part, f, schema.field(n)) for n in schema.names]
            parts.append(pa.table(arrays, schema=schema))
        return pa.concat_tables(parts) if parts else schema.empty_table()

    @contextmanager
    def reading(self, uri: str) -> Iterator[None]:
        """A block that reads the data file `uri`; ContractError names it when it is gone or no Parquet."""
        try:
            yield
        except (OSError, pa.ArrowInvalid) as error:
            if isinstance(error, FileNotFoundError):
                what = "is gone: it was vacuumed, or deleted"
            elif isinstance(error, OSError) and error.errno:  # of the disk; pyarrow's own, about the content, has none
                raise
            else:
                what = f"cannot be read ({str(error).splitlines()[0]})"
            raise ContractError(
                f"table {self.contract.name}: file {uri} of version {self.version} {what}; run the step again, and if "
                "that does not help restore the file, or write its slice again"
            ) from error

    def row_groups(self, files: Sequence[DataFile], columns: Sequence[str]) -> Iterator[pa.Table]:
        """`columns` (none of the partition) of `files` under our names, one row group in memory at a time."""
        self.check_plain()
        theirs = [self.columns.get(c, c) for c in columns]
        for uri in self.uris(files):
            with self.reading(uri), open_parquet(uri) as handle:
                reader = pq.ParquetFile(handle)
                for group in range(reader.num_row_groups):
                    rows = reader.read_row_group(group, columns=theirs)
                    yield rows.select(theirs).rename_columns(list(columns))

    def scan(self, columns: Sequence[str]) -> Iterator[pa.Table]:
        """`columns` of all rows under our names, as a reader of Delta sees them, a batch in memory at a time.

        UnreadableError when delta-rs' engine cannot read the table.
        """
        engine = QueryBuilder()
        register(engine, self.contract.name, self.uri, self._table)
        theirs = [self.columns.get(c, c).replace('"', '""') for c in columns]
        wanted = ", ".join(f'"{their}" AS "{our}"' for their, our in zip(theirs, columns, strict=True))
        for batch in engine.execute(f"SELECT {wanted} FROM {self.contract.name}"):
            yield pa.table({our: _without_views(batch.column(at)) for at, our in enumerate(columns)})


def in_span(slices: Mapping[str, int], start: date | None, end: date | None) -> dict[str, int]:
    """The entries of `slices` from `start` to `end` (None: no limit), and that of `*`."""
    first, last = start.isoformat() if start else "", end.isoformat() if end else "~"
    return {name: version for name, version in slices.items() if name == WHOLE or first <= name <= last}


def _without_views(column: Any) -> pa.Array:
    """A column of the engine's for pyarrow 14, which knows no views of texts and bytes."""
    for view, plain in ((DataType.string_view(), DataType.string()), (DataType.binary_view(), DataType.binary())):
        if column.type == view:
            column = column.cast(plain)
    return pa.array(column)


def _column_of(part: pa.Table, file: DataFile, wanted: pa.Field) -> pa.Array | pa.ChunkedArray:
    if wanted.name in part.column_names:
        return part.column(wanted.name).cast(wanted.type)
    if wanted.name in file.partition:
        return pa.array([file.partition[wanted.name]] * len(part)).cast(wanted.type)
    return pa.nulls(len(part), wanted.type)  # a nullable column that was added after this file was written


def _earlier(value: Any, time: datetime) -> bool:
    """Whether `value`, microseconds or an ISO date, comes before the start of a day, `time`."""
    if isinstance(value, int):
        return value < int(time.timestamp() * 1_000_000)
    return not isinstance(value, str) or value < time.date().isoformat()
