"""The lakehouse without a JVM: pinned snapshots, checked part files and atomic commits through delta-rs.

Layout under `lakehouse.root`: `tables/<name>` (Delta), `artifacts/<kind>/<version>` (see `artifacts.py`),
`reports/`, `work/` (checkpoints of running workers; never read by another step).

Every commit of a step carries, as its `userMetadata`, a `SliceMark` in JSON: which step wrote which slice from inputs
of which fingerprint. What is done or stale is read from there (see `pipeline.py`).
"""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from copy import copy
from dataclasses import dataclass, field, replace
from datetime import UTC, date, datetime
from functools import cache, cached_property
from hashlib import sha256
from types import TracebackType
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
from deltalake import CommitProperties, DeltaTable, Transaction
from deltalake import Schema as DeltaSchema
from deltalake.exceptions import CommitFailedError, DeltaError, TableNotFoundError
from deltalake.schema import PrimitiveType
from deltalake.transaction import AddAction, RemoveAction

from gpl_core.config import CATALOG, Lakehouse
from gpl_core.contracts.contract import CONTRACT_NAME, CONTRACT_VERSION, Contract, load_contract
from gpl_core.errors import ConflictError, ContractError, MissingInputError
from gpl_core.lakehouse.storage import filesystem

LOCATIONS = "catalog.json"  # under the root
WHOLE = "*"  # slice name of tables without a dt partition
_COMMIT_TRIES = 15
_COMMIT_FILE = re.compile(r"/(\d{20})\.json$")
_NOT_IN_THE_FILES = {"deletionVectors", "columnMapping", "typeWidening"}
_PARTITION_VALUE = re.compile("[A-Za-z0-9_=-]+")


@dataclass(frozen=True)
class SliceMark:
    """What a commit says about itself: `slices` maps a slice (an ISO date, or `*`) to its input fingerprint."""

    step: str
    slices: Mapping[str, str]
    run_id: str
    details: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> str:
        """The text that goes into `userMetadata`."""
        body = {"step": self.step, "slices": dict(self.slices), "run_id": self.run_id, "details": dict(self.details)}
        return json.dumps({"gpl": body}, sort_keys=True)

    @staticmethod
    def from_json(text: str | None) -> SliceMark | None:
        """Parse `userMetadata`; None when the commit is not one of ours."""
        try:
            body = json.loads(text or "")["gpl"]
            return SliceMark(body["step"], body["slices"], body["run_id"], body.get("details", {}))
        except (ValueError, KeyError, TypeError):
            return None


@dataclass(frozen=True)
class DataFile:
    """One live data file of a snapshot."""

    path: str
    partition: Mapping[str, str]
    rows: int
    size: int
    stats_min: Mapping[str, Any]


class Snapshot:
    """One version of one table, pinned: everything read through it belongs to that version.

    Attributes:
        columns: our column -> the name it has in the (platform's) table, where the two differ.
    """

    def __init__(
        self, uri: str, contract: Contract, version: int | None = None, columns: Mapping[str, str] | None = None
    ):  # fmt: skip
        self.columns = dict(columns or {})
        self._ours = {theirs: ours for ours, theirs in self.columns.items()}
        try:
            self._table = DeltaTable(uri, version=version)
        except TableNotFoundError:
            raise MissingInputError(
                f"table {contract.name}: there is no Delta table at {uri}; run the step '{contract.owner}' first"
                if contract.owner != "platform"
                else f"table {contract.name}: there is no Delta table at {uri}; it is the platform's input: "
                "write it, or point lakehouse.tables at it"
            ) from None
        self.uri = uri
        self.contract = contract
        self.version: int = self._table.version()

    @property
    def properties(self) -> dict[str, str]:
        return {k: v for k, v in self._table.metadata().configuration.items() if v is not None}

    def check_contract(self) -> None:
        """Refuse a table that another contract, or another version of it, made.

        Raises:
            ContractError: naming both versions, or the differing columns.
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
        if not set(self.contract.partition_by) <= set(partitions):
            divided = ", ".join(partitions) or "nothing"
            raise ContractError(
                f"table {self.contract.name} at {self.uri}: partitioned by {divided}, expected "
                f"{', '.join(self.contract.partition_by)}; write it with that partition"
            )

    def _drift(self) -> list[str]:
        """Column-by-column differences from the contract; additional columns are none.

        Types of a platform's table are for ingest to judge, which casts row by row.
        """
        have = {self._ours.get(f.name, f.name): f.type for f in self._table.schema().fields}
        problems = []
        for name, wanted, nullable in _delta_fields(self.contract):
            if name not in have:
                missing = f"missing column '{name}' ({_type_name(wanted)}); it has {', '.join(have)}"
                problems += [] if nullable else [missing]
            elif self.contract.enforced and have[name] != wanted:
                problems.append(f"column '{name}' is {_type_name(have[name])}, expected {_type_name(wanted)}")
        return problems

    @property
    def hidden_features(self) -> list[str]:
        """Delta features of this table that a reader of plain Parquet files would not see: wrong rows or columns."""
        protocol = self._table.protocol()
        found = {f.removesuffix("-preview") for f in protocol.reader_features or ()} & _NOT_IN_THE_FILES
        if self.properties.get("delta.columnMapping.mode", "none") != "none":
            found.add("columnMapping")
        return sorted(found)

    @cached_property
    def files(self) -> tuple[DataFile, ...]:
        """Live data files, ordered by path."""
        rows = pa.table(self._table.get_add_actions(flatten=True)).to_pylist()
        found = []
        for row in rows:
            partition = {k.removeprefix("partition."): str(v) for k, v in row.items() if k.startswith("partition.")}
            found_minima = {
                name: v for k, v in row.items()
                # A null may stand for any value: a column with nulls has no minimum.
                if (name := k.removeprefix("min.")) != k and v is not None and not row.get(f"null_count.{name}")
            }  # fmt: skip
            minima = {self._ours.get(k, k): v for k, v in found_minima.items()}
            records = row["num_records"] if row["num_records"] is not None else -1
            found.append(DataFile(row["path"], partition, records, row["size_bytes"], minima))
        return tuple(sorted(found, key=lambda f: f.path))

    def select(
        self,
        *,
        start: date | None = None,
        end: date | None = None,
        where: Mapping[str, str] | None = None,
        before: tuple[str, datetime] | None = None,
    ) -> tuple[DataFile, ...]:
        """Files of the partitions `start <= dt <= end` with the partition values `where`.

        `before=(column, time)` leaves out files whose smallest `column`, by the log's statistics, is not before `time`
        (an int column is compared in microseconds); files without statistics stay in.
        """
        chosen = []
        for f in self.files:
            if start is not None and f.partition["dt"] < start.isoformat():
                continue
            if end is not None and f.partition["dt"] > end.isoformat():
                continue
            if any(f.partition.get(k) != v for k, v in (where or {}).items()):
                continue
            if before is not None and before[0] in f.stats_min and not _earlier(f.stats_min[before[0]], before[1]):
                continue
            chosen.append(f)
        return tuple(chosen)

    def slices(self) -> tuple[date, ...]:
        """The dates that have at least one live file, ascending; a platform's rows without a date belong to none."""
        return tuple(sorted({date.fromisoformat(d) for f in self.files if (d := f.partition["dt"]) != "None"}))

    def uris(self, files: Iterable[DataFile]) -> list[str]:
        """Absolute locations of `files`, as Petastorm and pyarrow take them."""
        base = self.uri.rstrip("/")
        return [f.path if "://" in f.path else f"{base}/{f.path}" for f in files]

    @staticmethod
    def digest(files: Iterable[DataFile]) -> str:
        """Hash of the set of live files: equal digests mean the same rows."""
        return _hash_of(f.path for f in files)

    def identity(self, files: Iterable[DataFile]) -> str:
        """`digest` under which compaction changes nothing: a file that regroups rows stands for those it is made of."""
        return _hash_of(_followed_back(files, self._history[1]))

    def uncompacted(self, version: int) -> Snapshot | None:
        """This snapshot as if what has only regrouped rows since `version` had not happened; None when the log has
        been cleaned of that version. Reads the commits since then alone."""
        try:
            then = Snapshot(self.uri, self.contract, version, self.columns).files
        except (MissingInputError, DeltaError, OSError):
            return None
        live = _followed_back(self.files, self._read_log(version)[1])
        live |= {f.path: f for f in then if f.path in live}  # with the statistics that a removal does not tell
        made = copy(self)
        made.files = tuple(live[path] for path in sorted(live))
        return made

    @staticmethod
    def rows(files: Iterable[DataFile]) -> int:
        """Rows in `files` by the log's statistics."""
        return sum(f.rows for f in files)

    def marks(self) -> list[tuple[int, SliceMark]]:
        """(version, mark) of this table's commits up to this version, newest first.

        Read from the log itself: delta-rs' `history` lists every commit there is and numbers them downwards from the
        version it has loaded, so that a pinned table, or one that another run commits to, gets the wrong ones.
        """
        return list(self._history[0])

    @cached_property
    def _history(self) -> tuple[tuple[tuple[int, SliceMark], ...], tuple[tuple[set[str], set[str]], ...]]:
        return self._read_log()

    def _read_log(
        self, since: int = -1
    ) -> tuple[tuple[tuple[int, SliceMark], ...], tuple[tuple[set[str], set[str]], ...]]:
        """Commits after version `since`, newest first: (version, mark), and of those that only regroup rows (files
        gone, come)."""
        fs, log = filesystem(f"{self.uri}/_delta_log")
        commits = {int(m[1]): p for p in fs.ls(log, detail=False, refresh=True) if (m := _COMMIT_FILE.search(p))}
        marks, regrouped = [], []
        for version in sorted((v for v in commits if since < v <= self.version), reverse=True):
            text = fs.cat_file(commits[version])
            for line in text.splitlines():
                if not line.lstrip().startswith(b'{"commitInfo"'):
                    continue
                mark = SliceMark.from_json(json.loads(line)["commitInfo"].get("userMetadata"))
                if mark is not None:
                    marks.append((version, mark))
            # By the protocol a commit whose files all say dataChange = false leaves the rows as they are.
            if b'"dataChange":false' in text and b'"dataChange":true' not in text:
                regrouped += _regrouped(text)
        return tuple(marks), tuple(regrouped)

    def mark(self, slice_name: str, step: str | None = None) -> tuple[int, SliceMark] | None:
        """The newest commit that wrote `slice_name`, by `step` when given; None when none did."""
        for version, mark in self.marks():
            if slice_name in mark.slices and step in (None, mark.step):
                return version, mark
        return None

    def transaction_version(self, app_id: str) -> int:
        """Last recorded version of the application transaction `app_id`, -1 when there is none."""
        version = self._table.transaction_version(app_id)
        return -1 if version is None else version

    def read(self, files: Sequence[DataFile] | None = None, columns: list[str] | None = None) -> pa.Table:
        """Read `files` (default: all) into memory, partition columns included. For bounded tables only."""
        files = self.files if files is None else files
        wanted = columns or list(self.contract.column_names)
        schema = pa.schema([f for f in self.contract.arrow_schema() if f.name in wanted])
        in_file = [c for c in wanted if c not in self.contract.partition_by]
        parts = []
        for f, uri in zip(files, self.uris(files), strict=True):
            with fsspec.open(uri, "rb") as handle:
                part = pq.ParquetFile(handle).read(columns=[self.columns.get(c, c) for c in in_file])
            part = part.rename_columns([self._ours.get(c, c) for c in part.column_names])
            arrays = [_column_of(part, f, schema.field(n)) for n in schema.names]
            parts.append(pa.table(arrays, schema=schema))
        return pa.concat_tables(parts) if parts else schema.empty_table()

    def row_groups(self, files: Sequence[DataFile], columns: Sequence[str]) -> Iterator[pa.Table]:
        """`columns` (none of the partition) of `files` under our names, one row group in memory at a time."""
        physical = [self.columns.get(c, c) for c in columns]
        for uri in self.uris(files):
            fs, path = filesystem(uri)
            with fs.open(path, "rb") as handle:
                reader = pq.ParquetFile(handle)
                for group in range(reader.num_row_groups):
                    rows = reader.read_row_group(group, columns=physical)
                    yield rows.select(physical).rename_columns(list(columns))


@cache
def _delta_fields(contract: Contract) -> tuple[tuple[str, Any, bool], ...]:
    """Name, Delta type, and whether it may be missing, of each column of `contract`."""
    fields = DeltaSchema.from_json(contract.spark_json()).fields
    return tuple((f.name, f.type, c.nullable) for f, c in zip(fields, contract.columns, strict=True))


def _type_name(kind: Any) -> str:
    return kind.type if isinstance(kind, PrimitiveType) else str(kind)


def _hash_of(paths: Iterable[str]) -> str:
    return sha256("\n".join(sorted(paths)).encode()).hexdigest()[:16]


def _followed_back(
    files: Iterable[DataFile], regrouped: Iterable[tuple[set[str], set[str]]]
) -> dict[str, DataFile]:  # fmt: skip
    """Path -> file of what `files` were made of: one that regroups rows stands for those whose rows it holds."""
    live = {f.path: f for f in files}
    for gone, come in regrouped:
        if come <= live.keys():
            like = live[next(iter(come))]  # of the same partition
            kept = {path: f for path, f in live.items() if path not in come}
            live = kept | {path: replace(like, path=path, rows=-1, stats_min={}) for path in gone}
    return live


def _regrouped(commit: bytes) -> list[tuple[set[str], set[str]]]:
    """(files gone, files come) of each partition in a commit that compacts."""
    found: dict[str, tuple[set[str], set[str]]] = {}
    for line in commit.splitlines():
        action = json.loads(line)
        for place, kind in enumerate(("remove", "add")):
            if kind in action:
                partition = json.dumps(action[kind].get("partitionValues"), sort_keys=True)
                found.setdefault(partition, (set(), set()))[place].add(action[kind]["path"])
    return [(gone, come) for gone, come in found.values() if gone and come]


def file_groups(files: Iterable[DataFile], rows: int) -> Iterator[tuple[DataFile, ...]]:
    """`files`, in their order, in groups of at most `rows` rows by the log's statistics; a larger file comes alone."""
    group: list[DataFile] = []
    for f in files:
        if group and Snapshot.rows(group) + f.rows > rows:
            yield tuple(group)
            group = []
        group.append(f)
    if group:
        yield tuple(group)


def _column_of(part: pa.Table, file: DataFile, wanted: pa.Field) -> pa.Array | pa.ChunkedArray:
    if wanted.name in part.column_names:
        return part.column(wanted.name).cast(wanted.type)
    if wanted.name in file.partition:
        return pa.array([file.partition[wanted.name]] * len(part)).cast(wanted.type)
    return pa.nulls(len(part), wanted.type)  # a nullable column that was added after this file was written


def _earlier(value: Any, time: datetime) -> bool:
    if isinstance(value, int):
        return value < int(time.timestamp() * 1_000_000)
    if isinstance(value, datetime):
        return (value if value.tzinfo else value.replace(tzinfo=UTC)) < time
    return True


class Lake:
    """All tables under one root.

    `overrides` maps a table to a location of its own, or a raw table to its name in Spark's catalog; `columns` to the
    platform's names of its columns (raw tables).
    """

    def __init__(
        self, root: str, overrides: Mapping[str, str] | None = None,
        columns: Mapping[str, Mapping[str, str]] | None = None,
    ):  # fmt: skip
        self.root = root.rstrip("/")
        self.overrides = dict(overrides or {})
        self.columns = {table: dict(names) for table, names in (columns or {}).items()}

    @classmethod
    def of(cls, settings: Lakehouse) -> Lake:
        """The lake that the configuration's section `lakehouse` describes."""
        shadow = settings.shadow
        borrowed = {t: f"{shadow.of}/tables/{t}" for t in shadow.tables}
        return cls(settings.root, {**borrowed, **settings.tables}, settings.columns)

    def uri(self, table: str) -> str:
        """Location of `table`.

        Raises:
            MissingInputError: it is named by Spark's catalog, and `gpl register` has not looked up where it lies.
        """
        location = self.overrides.get(table, f"{self.root}/tables/{table}").rstrip("/")
        if not location.startswith(CATALOG):
            return location
        if location not in self._located:
            raise MissingInputError(
                f"table {table}: where {location} lies is not known to {self.path(LOCATIONS)}; run gpl register, which "
                "asks Spark's catalog"
            )
        return self._located[location]

    @cached_property
    def _located(self) -> dict[str, str]:
        """catalog://name -> location, as `gpl register` found them: the workers have no catalog to ask."""
        fs, path = filesystem(self.path(LOCATIONS))
        return dict(json.loads(fs.cat_file(path))) if fs.exists(path) else {}

    def path(self, *parts: str) -> str:
        """A location under the root that is not a table."""
        return "/".join((self.root, *parts))

    def exists(self, table: str) -> bool:
        """Whether `table` is a Delta table."""
        return DeltaTable.is_deltatable(self.uri(table))

    def open(self, table: str, version: int | None = None, *, contract: Contract | None = None) -> Snapshot:
        """Pin `table` (its newest version unless given) after comparing its contract.

        Raises:
            MissingInputError: no such table.
            ContractError: it was made under another contract.
        """
        snapshot = Snapshot(self.uri(table), contract or load_contract(table), version, self.columns.get(table))
        snapshot.check_contract()
        return snapshot

    def create(self, contract: Contract, properties: Mapping[str, str] | None = None) -> Snapshot:
        """Create the table of `contract` through delta-rs when it does not exist; open it."""
        if not self.exists(contract.name):
            DeltaTable.create(
                self.uri(contract.name),
                DeltaSchema.from_json(contract.spark_json()),
                mode="ignore",
                partition_by=list(contract.partition_by),
                name=contract.name,
                description=contract.description,
                # CHECK constraints need writer version 3, which delta-rs does not raise by itself.
                configuration={**contract.table_properties(), **(properties or {}), "delta.minWriterVersion": "3"},
                raise_if_key_not_exists=False,
            )
        return self.open(contract.name, contract=contract)

    def writer(
        self, contract: Contract, partition: Mapping[str, str], *, dims: Mapping[str, int], **options: Any
    ) -> PartWriter:
        """A writer of part files for one partition; see `PartWriter`."""
        return PartWriter(self.uri(contract.name), contract, partition, dims, **options)

    def commit(
        self,
        contract: Contract,
        parts: Sequence[Mapping[str, Any]],
        *,
        mark: SliceMark,
        mode: str,
        partition: Mapping[str, str] | None = None,
        app_id: str = "",
        last: int | None = None,
        replaces: Sequence[Mapping[str, Any]] = (),
    ) -> Commit:
        """Commit part files written by `PartWriter` (of all ranks) in one transaction.

        Args:
            parts: `PartWriter.parts` of every rank.
            mark: step, slices and fingerprints: kept in the commit's userMetadata and as application transaction.
            mode: `"overwrite"` replaces exactly the partition `partition`, or without one the whole table, which the
                mark must then name (`*`); `"append"` adds.
            partition: partition values that every part must have.
            app_id: application transaction to count up; made of step, table and slices when not given.
            last: the version of it that the caller has built on; read here when not given.
            replaces: parts of an earlier commit that go in this one.

        Raises:
            ContractError: a part lies outside `partition` (delta-rs itself would accept it).
            ConflictError: another run wrote the same slice (for an append: the same `app_id`) at the same time.
        """
        partition = dict(partition or {})
        for part in parts:
            strays = {k: v for k, v in partition.items() if part["partition"].get(k) != v}
            if strays:
                raise ContractError(f"table {contract.name}: part {part['path']} is not of the slice {partition}")
        if mode == "overwrite" and not partition and contract.partition_by and WHOLE not in mark.slices:
            raise ContractError(
                f"table {contract.name}: overwriting without a partition replaces the whole table, but the mark names "
                f"only {sorted(mark.slices)}; give the partition, or mark the slice '{WHOLE}'"
            )
        before = self.create(contract)
        app_id = app_id or f"{mark.step}:{contract.name}:{','.join(sorted(mark.slices))}"
        last = before.transaction_version(app_id) if last is None else last
        actions: list[AddAction | RemoveAction] = [add_action(part) for part in parts]
        now = int(datetime.now(UTC).timestamp() * 1000)
        actions += [RemoveAction(p["path"], True, now, p["size"], dict(p["partition"])) for p in replaces]
        filters = [(k, "=", v) for k, v in partition.items()] if mode == "overwrite" and partition else None
        for attempt in range(_COMMIT_TRIES):
            table = before._table
            try:
                if before.transaction_version(app_id) != last:
                    raise CommitFailedError(f"{app_id} is at {before.transaction_version(app_id)}, not {last}")
                table.create_write_transaction(
                    actions,
                    mode,
                    table.schema(),
                    list(contract.partition_by) or None,
                    filters,
                    commit_properties=CommitProperties(
                        custom_metadata={"userMetadata": mark.to_json()},
                        app_transactions=[Transaction(app_id, last + 1)],
                        max_commit_retries=0 if mode == "overwrite" else 15,
                    ),
                )
                break
            except CommitFailedError as error:
                # To delta-rs any commit that removed a file is a conflict, of another slice too. It is one only when
                # our slice moved; else the same parts are offered again on top of the newer version.
                newer = self.open(contract.name, contract=contract)
                moved = newer.transaction_version(app_id) != last
                if mode == "overwrite":
                    live = [s.identity(s.select(where=partition)) for s in (before, newer)]
                    moved = moved or live[0] != live[1]
                if moved or attempt + 1 == _COMMIT_TRIES:
                    raise ConflictError(
                        f"table {contract.name}: slice {sorted(mark.slices)} was written by another run at the same "
                        f"time ({error}); nothing was changed, run the step again"
                    ) from error
                before = newer
        after = self.open(contract.name, contract=contract)
        return Commit(before.version, after.version, sum(p["rows"] for p in parts), sum(p["size"] for p in parts))


def add_action(part: Mapping[str, Any], data_change: bool = True) -> AddAction:
    """What a commit says of a new part file (one of `PartWriter.parts`)."""
    return AddAction(
        part["path"], part["size"], dict(part["partition"]), part["modified"], data_change,
        json.dumps({"numRecords": part["rows"]}),
    )  # fmt: skip


@dataclass(frozen=True)
class Commit:
    """A finished commit: table version before and after, rows and bytes it added."""

    version_before: int
    version_after: int
    rows: int
    size: int


class PartWriter:
    """Writes checked rows of one partition into Parquet part files; nothing is visible before `Lake.commit`.

    Rows that break the contract are refused before a file is finished. Use as a context manager: leaving it on an
    error removes the unfinished files.

    Attributes:
        parts: after closing, one JSON-able dict per file: path, partition, rows, size, modified.
    """

    def __init__(
        self,
        uri: str,
        contract: Contract,
        partition: Mapping[str, str],
        dims: Mapping[str, int],
        *,
        rank: int = 0,
        row_group_rows: int = 16_384,
        file_rows: int = 1_000_000,
    ):
        if set(partition) != set(contract.partition_by):
            raise ContractError(
                f"table {contract.name} is partitioned by {contract.partition_by}, got values for {tuple(partition)}"
            )
        for column, value in partition.items():
            if not _PARTITION_VALUE.fullmatch(value):
                raise ContractError(
                    f"table {contract.name}: partition {column}='{value}' holds characters that readers of paths do "
                    "not agree about; use letters, digits, '_', '=' and '-'"
                )
        self.contract = contract
        self.partition = dict(partition)
        self.parts: list[dict[str, Any]] = []
        self._uri = uri
        self._dims = dims
        self._rank = rank
        self._row_group_rows = row_group_rows
        self._file_rows = file_rows
        self._schema = contract.arrow_schema(partitions=False)
        self._fs, self._base = filesystem(uri)
        self._open: tuple[str, Any, pq.ParquetWriter] | None = None
        self._rows = 0

    def write(self, rows: pa.Table | pa.RecordBatch) -> None:
        """Check and write `rows` (data columns, any order).

        Raises:
            ContractError: a row breaks the contract; names the column, how many rows, a value and the check.
        """
        if isinstance(rows, pa.RecordBatch):
            rows = pa.Table.from_batches([rows])
        violations = self.contract.check_batch(rows, self._dims)
        if violations:
            raise ContractError(f"table {self.contract.name}: " + "; ".join(map(str, violations)))
        rows = rows.select(self._schema.names).cast(self._schema)
        while len(rows):
            head = rows.slice(0, self._file_rows - self._rows)
            rows = rows.slice(len(head))
            self._handle().write_table(head, row_group_size=self._row_group_rows)
            self._rows += len(head)
            if self._rows >= self._file_rows:
                self._finish()

    def _handle(self) -> pq.ParquetWriter:
        if self._open is None:
            folder = "/".join(f"{k}={v}" for k, v in self.partition.items())
            name = f"part-{self._rank:05d}-{uuid.uuid4()}.parquet"
            path = f"{folder}/{name}" if folder else name
            self._fs.makedirs(f"{self._base}/{folder}", exist_ok=True)
            sink = self._fs.open(f"{self._base}/{path}", "wb")
            self._open = (path, sink, pq.ParquetWriter(sink, self._schema, compression="zstd"))
        return self._open[2]

    def _finish(self) -> None:
        if self._open is None:
            return
        path, sink, writer = self._open
        writer.close()
        sink.close()
        self._open = None
        size = self._fs.size(f"{self._base}/{path}")
        modified = int(datetime.now(UTC).timestamp() * 1000)
        self.parts.append(
            {"path": path, "partition": self.partition, "rows": self._rows, "size": size, "modified": modified}
        )
        self._rows = 0

    def __enter__(self) -> PartWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            try:
                self._finish()
            except BaseException:
                self._discard()
                raise
        else:
            self._discard()

    def _discard(self) -> None:
        """Remove what was written; on a full disk closing fails too, and must not hide the first error."""
        if self._open is not None:
            path, sink, writer = self._open
            for handle in (writer, sink):  # the writer first: its destructor would write a footer to the closed file
                with suppress(OSError, pa.ArrowInvalid):
                    handle.close()
            self._fs.rm(f"{self._base}/{path}")
        for part in self.parts:
            self._fs.rm(f"{self._base}/{part['path']}")
