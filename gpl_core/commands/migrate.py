"""`gpl migrate`: bring tables from the contract version they were written with to the current one.

The contract declares how (`migrations`). Types follow from it; a value that cannot be cast stops the whole migration.
All files are rewritten and replaced together with the schema in one commit; another commit then sets the version. Until
then, and whenever it is killed, the table has the old version, every step refuses it, and the same command continues
where it stopped.
"""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta

import pyarrow as pa
import pyarrow.parquet as pq
from deltalake import DeltaTable
from deltalake import Schema as DeltaSchema
from deltalake.exceptions import CommitFailedError

from gpl_core.commands.command import Command
from gpl_core.commands.vacuum import add_ended, check_retention
from gpl_core.config import Config
from gpl_core.contracts.contract import CONTRACT_VERSION, Column, Contract, Migration, all_contracts
from gpl_core.errors import ConflictError, ContractError, MissingInputError, UsageError, counted, did_you_mean
from gpl_core.lakehouse.commit import Part, transact
from gpl_core.lakehouse.files import DataFile, rows_in
from gpl_core.lakehouse.lake import Lake
from gpl_core.lakehouse.marks import SliceMark
from gpl_core.lakehouse.rewrite import has_committed
from gpl_core.lakehouse.snapshot import Snapshot, absence
from gpl_core.lakehouse.storage import filesystem


@dataclass(frozen=True)
class Migrated:
    """What was done, or would be: version before and after, columns added in place, files and rows rewritten."""

    before: int
    after: int
    added: tuple[str, ...] = ()
    files: int = 0
    rows: int = 0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("table", nargs="*", help="tables to migrate (default: all)")
    add_ended(parser)
    parser.add_argument("--dry-run", action="store_true", help="only print what would be done")


def run(args: argparse.Namespace, config: Config) -> int:
    """One line per table that was not up to date."""
    lake, done, would = Lake.of(config.lakehouse), 0, "would be " if args.dry_run else ""
    ours = [c for c in all_contracts().values() if c.owner != "platform"]
    if wrong := sorted(set(args.table) - {c.name for c in ours}):
        raise UsageError(f"'{wrong[0]}' is not a table of gpl{did_you_mean(wrong[0], [c.name for c in ours])}")
    for contract in ours:
        if args.table and contract.name not in args.table:
            continue
        if not lake.exists(contract.name):
            if args.table:
                raise MissingInputError(f"table {contract.name}: {absence(contract, lake.uri(contract.name))}")
            continue
        found = migrate(lake, contract, config.feed.passthrough, dry_run=args.dry_run, ended=args.ended)
        if found is None:
            continue
        done += 1
        if found.added:
            print(f"{contract.name}: columns {would}added: {', '.join(found.added)}")
        else:
            print(
                f"{contract.name}: version {found.before} {would}migrated to {found.after}, "
                f"{counted(found.rows, 'row')} in {counted(found.files, 'file')}"
            )
    if not done:
        print("every table matches the current contract")
    return 0


def migrate(
    lake: Lake, contract: Contract, passthrough: Mapping[str, str], *, dry_run: bool = False, ended: Sequence[str] = ()
) -> Migrated | None:
    """Migrate the table of `contract`; None if it has this version and every column.

    passthrough: extra columns of the feed and their types (`feed.passthrough`), which stay.
    """
    try:
        return _migrate(lake, contract, passthrough, dry_run, ended)
    except CommitFailedError as error:
        raise ConflictError(
            f"table {contract.name}: another run wrote it in the meantime; run gpl migrate again"
        ) from error


def _migrate(
    lake: Lake, contract: Contract, passthrough: Mapping[str, str], dry_run: bool, ended: Sequence[str]
) -> Migrated | None:
    snapshot = Snapshot(lake.uri(contract.name), contract)
    table = DeltaTable(snapshot.uri, version=snapshot.version)
    found = int(snapshot.properties.get(CONTRACT_VERSION, contract.version))
    have = [f.name for f in table.schema().fields]
    if found == contract.version:
        new = tuple(c.name for c in contract.columns if c.nullable and c.name not in have)
        if new and not dry_run:
            _add_columns(table, contract, new)
        return Migrated(found, found, new) if new else None
    steps = path(contract, found)
    if running := check_retention(lake, timedelta.max, ended):
        raise ContractError(
            f"table {contract.name}: according to job_runs, {', '.join(sorted(running))} is still running; migrate "
            "when nothing is running, or add --ended RUN_ID if the run was killed"
        )
    # A migration was killed before it set the version.
    if have == list(contract.column_names) and all(snapshot.types[c.name] == c.delta_type for c in contract.columns):
        if not dry_run:
            _stamp(lake, contract)
        return Migrated(found, contract.version)
    names = _after(pa.table({n: [] for n in have}), steps, contract.arrow_schema()).column_names
    extra = tuple(
        Column(n, passthrough[n], True, "Passed through from the raw tables (feed.passthrough)")
        for n in names if n in passthrough and n not in contract.column_names
    )  # fmt: skip
    unknown = [n for n in names if n not in contract.column_names and n not in passthrough]
    missing = [c.name for c in contract.columns if c.name not in names and not c.nullable]
    if unknown or missing:
        gaps = [f"do not cover the columns {unknown}"] * bool(unknown) + [f"do not add {missing}"] * bool(missing)
        raise ContractError(
            f"table {contract.name}: its migrations from version {found} to {contract.version} {' and '.join(gaps)}; "
            f"declare these columns in schemas/{contract.name}.yaml"
        )
    if not dry_run:
        _rewrite_all(lake, snapshot, table, contract.with_columns(extra) if extra else contract, steps)
        _stamp(lake, contract)
    return Migrated(found, contract.version, (), len(snapshot.files), rows_in(snapshot.files))


def path(contract: Contract, found: int) -> tuple[Migration, ...]:
    """The declared migrations from version `found` to the contract's; ContractError if one is not declared."""
    by_target = {m.to: m for m in contract.migrations}
    wanted = range(found + 1, contract.version + 1)
    if found > contract.version or any(v not in by_target for v in wanted):
        raise ContractError(
            f"table {contract.name}: was written with contract version {found}, and schemas/{contract.name}.yaml "
            f"declares no migration from there to version {contract.version} "
            f"(migrations to {sorted(by_target) or 'none'}); rebuild the table, or use the matching release"
        )
    return tuple(by_target[v] for v in wanted)


def _after(rows: pa.Table, steps: Sequence[Migration], wanted: pa.Schema) -> pa.Table:
    """`rows` after `steps`; what they add has the type that it has in `wanted`."""
    for step in steps:
        rows = rows.drop_columns([n for n in step.drop if n in rows.column_names])
        rows = rows.rename_columns([step.rename.get(n, n) for n in rows.column_names])
        for name, value in step.add.items():
            if name not in rows.column_names:
                kind = wanted.field(name).type if name in wanted.names else None
                rows = rows.append_column(name, pa.array([value] * len(rows), kind))
    return rows


def _transformed(rows: pa.Table, steps: Sequence[Migration], wanted: pa.Schema) -> pa.Table:
    """`rows` after `steps`, in the types and order of `wanted`; ContractError names a column that cannot be cast."""
    rows = _after(rows, steps, wanted)
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
    """Rewrite every file, in its partition and with its row groups, and commit files and schema at once."""
    parts: list[Part] = []
    fs, base = filesystem(snapshot.uri)
    try:
        for file, uri in zip(snapshot.files, snapshot.uris(snapshot.files), strict=True):
            parts += _rewritten(lake, contract, file, uri, steps)
        schema = DeltaSchema.from_json(contract.spark_json())
        # The mark names no slice: those of the writer are of the old version and turn stale by their fingerprint.
        transact(table, SliceMark("migrate", {}, ""), parts, mode="overwrite", schema=schema)
    except (ContractError, CommitFailedError):  # after anything else, as Ctrl-C, the commit may name the new files
        if has_committed(snapshot, parts):
            return
        if parts:
            fs.rm([f"{base}/{p['path']}" for p in parts])
        raise


def _rewritten(lake: Lake, contract: Contract, file: DataFile, uri: str, steps: Sequence[Migration]) -> list[Part]:
    schema = contract.arrow_schema(partitions=False)
    fs, source = filesystem(uri)
    partition = {k: file.partition[k] for k in contract.partition_by}
    with fs.open(source, "rb") as handle:
        reader = pq.ParquetFile(handle)
        groups = range(reader.num_row_groups)
        largest = max((reader.metadata.row_group(g).num_rows for g in groups), default=1)
        with lake.writer(contract, partition, dims={}, row_group_rows=largest, file_rows=2**62) as writer:
            for group in groups:
                try:
                    writer.write(_transformed(reader.read_row_group(group), steps, schema))
                except ContractError as error:
                    raise ContractError(f"table {contract.name}: {file.path}: {error}; nothing was changed") from None
    return writer.parts


def _add_columns(table: DeltaTable, contract: Contract, names: Sequence[str]) -> None:
    """Add columns that may be null; the rows there are read as having none."""
    table.alter.add_columns([f for f in DeltaSchema.from_json(contract.spark_json()).fields if f.name in names])


def _stamp(lake: Lake, contract: Contract) -> None:
    """Set the current version and constraints: from here on steps accept the table."""
    table = DeltaTable(lake.uri(contract.name))
    have = [k.removeprefix("delta.constraints.") for k in table.metadata().configuration if "constraints." in k]
    for name in sorted(set(have) - set(contract.checks())):  # it may refer to a column that is gone
        table.alter.drop_constraint(name, raise_if_not_exists=False)
    table.alter.set_table_properties(contract.table_properties(), raise_if_not_exists=False)


COMMAND = Command(
    "migrate", "bring tables to the current version of their contracts", run, add_arguments, in_shadow=False,
    examples=("--config shop.yaml", "--config shop.yaml training_feed --dry-run",),
)  # fmt: skip
