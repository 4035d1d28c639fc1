"""Bring a table from the version of its contract that it was written under to today's, as the contract declares.

    migrations:
      - {to: 2, rename: {old_name: new_name}, add: {column: value}, drop: [column]}

Types follow from the contract; a value that does not survive the cast refuses the whole migration. All files are
written anew and swapped together with the schema in one commit; the last one stamps the version. In between, and at any
kill, the old version stands in the table, every step refuses it, and the same command goes on where it stopped.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from deltalake import CommitProperties, DeltaTable
from deltalake import Schema as DeltaSchema
from deltalake.exceptions import CommitFailedError

from gpl_core.commands.optimize import check_retention
from gpl_core.contracts.contract import CONTRACT_VERSION, Column, Contract, Migration
from gpl_core.errors import ConflictError, ContractError
from gpl_core.lakehouse.files import DataFile, rows_in
from gpl_core.lakehouse.lake import Lake
from gpl_core.lakehouse.marks import SliceMark
from gpl_core.lakehouse.snapshot import Snapshot
from gpl_core.lakehouse.storage import filesystem
from gpl_core.lakehouse.writer import add_action


@dataclass(frozen=True)
class Migrated:
    """What was done, or would be: version before and after, columns added in place, files and rows written anew."""

    before: int
    after: int
    added: tuple[str, ...] = ()
    files: int = 0
    rows: int = 0


def migrate(
    lake: Lake, contract: Contract, passthrough: Mapping[str, str], *, dry_run: bool = False, ended: Sequence[str] = ()
) -> Migrated | None:
    """Migrate the table of `contract`; None when it is of this version and has every column.

    passthrough: extra columns of the feed and their types (`feed.passthrough`), which are kept.

    Raises:
        ContractError: no declared way from its version, rows that do not fit, or a run under way.
        ConflictError: another run wrote the table at the same time.
    """
    snapshot = Snapshot(lake.uri(contract.name), contract)
    table = DeltaTable(snapshot.uri, version=snapshot.version)
    found = int(snapshot.properties.get(CONTRACT_VERSION, contract.version))
    have = [f.name for f in table.schema().fields]
    if found == contract.version:
        new = tuple(c.name for c in contract.columns if c.nullable and c.name not in have)
        if new and not dry_run:
            fields = {f.name: f for f in DeltaSchema.from_json(contract.spark_json()).fields}
            table.alter.add_columns([fields[n] for n in new])
        return Migrated(found, found, new) if new else None
    steps = path(contract, found)
    if running := check_retention(lake, timedelta.max, ended):
        raise ContractError(
            f"table {contract.name}: {', '.join(sorted(running))} is running by job_runs; migrate when nothing runs, "
            "or say --ended RUN_ID of a killed run"
        )
    done = have == [c.name for c in contract.columns]  # by a migration that was killed before it stamped the version
    names = [] if done else renamed(have, steps)
    extra = tuple(
        Column(n, passthrough[n], True, "Passed through from the raw tables (feed.passthrough)")
        for n in names if n in passthrough and n not in contract.column_names
    )  # fmt: skip
    unknown = [n for n in names if n not in contract.column_names and n not in passthrough]
    missing = [] if done else [c.name for c in contract.columns if c.name not in names and not c.nullable]
    if unknown or missing:
        raise ContractError(
            f"table {contract.name}: its migrations from version {found} to {contract.version} leave the column(s) "
            f"{unknown or 'none'} unaccounted for and do not make {missing or 'none'}; declare them in "
            f"schemas/{contract.name}.yaml"
        )
    files = [] if done else list(snapshot.files)
    result = Migrated(found, contract.version, (), len(files), rows_in(files))
    if dry_run:
        return result
    if not done:
        _rewrite_all(lake, snapshot, table, contract.with_columns(extra) if extra else contract, steps)
    _stamp(lake, contract)
    return result


def path(contract: Contract, found: int) -> tuple[Migration, ...]:
    """The declared migrations from version `found` to the contract's; ContractError where one is not declared."""
    by_target = {m.to: m for m in contract.migrations}
    wanted = range(found + 1, contract.version + 1)
    if found > contract.version or any(v not in by_target for v in wanted):
        raise ContractError(
            f"table {contract.name}: was written under contract version {found}, and schemas/{contract.name}.yaml "
            f"declares no way from there to version {contract.version} "
            f"(migrations to {sorted(by_target) or 'none'}); rebuild the table, or use the matching release"
        )
    return tuple(by_target[v] for v in wanted)


def renamed(columns: Sequence[str], steps: Sequence[Migration]) -> list[str]:
    """Column names after `steps`."""
    names = list(columns)
    for step in steps:
        names = [step.rename.get(n, n) for n in names if n not in step.drop]
        names += [n for n in step.add if n not in names]
    return names


def transformed(rows: pa.Table, steps: Sequence[Migration], wanted: pa.Schema) -> pa.Table:
    """`rows` after `steps`, in the types and order of `wanted`.

    Raises:
        ContractError: a value does not survive its cast; names the column.
    """
    for step in steps:
        rows = rows.drop_columns([n for n in step.drop if n in rows.column_names])
        rows = rows.rename_columns([step.rename.get(n, n) for n in rows.column_names])
        for name, value in step.add.items():
            kind = wanted.field(name).type if name in wanted.names else None
            rows = rows.append_column(name, pa.array([value] * len(rows), kind))
    arrays = []
    for field in wanted:
        if field.name not in rows.column_names:
            arrays.append(pa.nulls(len(rows), field.type))
            continue
        try:
            arrays.append(rows.column(field.name).cast(field.type))
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
            was = rows.column(field.name).type
            raise ContractError(f"column '{field.name}' ({was}) cannot become {field.type}: {error}") from None
    return pa.table(arrays, schema=wanted)


def _rewrite_all(
    lake: Lake, snapshot: Snapshot, table: DeltaTable, contract: Contract, steps: Sequence[Migration]
) -> None:
    """Every file anew, in its partition and with its row groups; one commit of files and schema."""
    parts: list[Mapping[str, Any]] = []
    fs, base = filesystem(snapshot.uri)
    try:
        for file, uri in zip(snapshot.files, snapshot.uris(snapshot.files), strict=True):
            parts += _rewritten(lake, contract, file, uri, steps)
        table.create_write_transaction(
            [add_action(p) for p in parts], "overwrite", DeltaSchema.from_json(contract.spark_json()),
            list(contract.partition_by) or None,
            commit_properties=CommitProperties(
                # No slice: the writer's slices are of the old version, and stale by their fingerprint.
                custom_metadata={"userMetadata": SliceMark("migrate", {}, "").to_json()}, max_commit_retries=0
            ),
        )  # fmt: skip
    except BaseException as error:
        if parts:
            fs.rm([f"{base}/{p['path']}" for p in parts])
        if isinstance(error, CommitFailedError):
            raise ConflictError(
                f"table {contract.name}: written by another run meanwhile; nothing was changed, run gpl migrate again"
            ) from error
        raise


def _rewritten(
    lake: Lake, contract: Contract, file: DataFile, uri: str, steps: Sequence[Migration]
) -> list[dict[str, Any]]:  # fmt: skip
    schema = contract.arrow_schema(partitions=False)
    fs, source = filesystem(uri)
    partition = {k: file.partition[k] for k in contract.partition_by}
    with fs.open(source, "rb") as handle:
        reader = pq.ParquetFile(handle)
        groups = range(reader.num_row_groups)
        largest = max((reader.metadata.row_group(g).num_rows for g in groups), default=1)
        options = {"row_group_rows": largest, "file_rows": 2**62}
        with lake.writer(contract, partition, dims={}, **options) as writer:
            for group in groups:
                try:
                    writer.write(transformed(reader.read_row_group(group), steps, schema))
                except ContractError as error:
                    raise ContractError(f"table {contract.name}: {file.path}: {error}; nothing was changed") from None
    return writer.parts


def _stamp(lake: Lake, contract: Contract) -> None:
    """Version and constraints of today: from here on steps accept the table."""
    table = DeltaTable(lake.uri(contract.name))
    have = [k.removeprefix("delta.constraints.") for k in table.metadata().configuration if "constraints." in k]
    for name in sorted(set(have) - set(contract.checks())):  # it may name a column that is gone
        table.alter.drop_constraint(name)
    table.alter.set_table_properties(contract.table_properties(), raise_if_not_exists=False)


def migrate_all(
    lake: Lake, contracts: Sequence[Contract], passthrough: Mapping[str, str], *, dry_run: bool, ended: Sequence[str]
) -> int:
    """What `gpl migrate` does: one line per table that was not of today's contract. Returns the exit code."""
    done = 0
    for contract in contracts:
        if contract.owner == "platform" or not lake.exists(contract.name):
            continue
        found = migrate(lake, contract, passthrough, dry_run=dry_run, ended=ended)
        if found is None:
            continue
        done += 1
        would = "would be " if dry_run else ""
        if found.added:
            print(f"{contract.name}: columns {would}added: {', '.join(found.added)}")
        else:
            print(
                f"{contract.name}: version {found.before} {would}migrated to {found.after}, {found.rows:,} rows in "
                f"{found.files:,} files"
            )
    if not done:
        print("every table is of today's contract")
    return 0
