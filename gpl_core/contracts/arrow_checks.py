"""Row checks of a contract on Arrow batches.

Delta's CHECK constraints are not applied to files that a transaction adds, so workers check before they commit.
"""

from collections.abc import Mapping

import pyarrow as pa
import pyarrow.compute as pc

from gpl_core.contracts.contract import Column, Contract
from gpl_core.errors import ContractError, counted


def check_batch(
    contract: Contract, batch: pa.RecordBatch | pa.Table, dims: Mapping[str, int] | None = None
) -> list[str]:
    """Every check that `batch` breaks, in words: nulls, NaN, ranges, allowed values, array lengths under `dims`.

    Columns of `batch` must be the data columns, in any order; ContractError when one is missing, unknown or of another
    type.
    """
    problems = schema_differences(contract.arrow_schema(partitions=False), batch.schema)
    if problems:
        raise ContractError(f"table {contract.name}: the batch does not fit the contract: " + "; ".join(problems))
    violations = []
    for column in contract.columns:
        if column.name not in contract.partition_by:
            violations += _check_column(column, batch.column(column.name), contract.is_nullable(column), dims or {})
    return violations


def _check_column(
    column: Column, values: pa.Array | pa.ChunkedArray, nullable: bool, dims: Mapping[str, int]
) -> list[str]:
    if isinstance(values, pa.ChunkedArray):
        values = values.combine_chunks()
    found: list[str] = []

    def say(check: str, rows: int, example: str) -> None:
        if rows:
            found.append(f"{column.name}: {counted(rows, 'row')} broke '{check}', e.g. {example}")

    def note(check: str, bad: pa.Array) -> None:
        bad = values.filter(pc.fill_null(bad, False))
        say(check, len(bad), repr(bad[0].as_py())[:120] if len(bad) else "")

    if not nullable:
        note("not null", pc.is_null(values))
    kind = values.type
    if pa.types.is_list(kind):
        lengths = pc.list_value_length(values)
        expected = column.expected_length(dims)
        if expected is not None:
            note(f"array length = {expected} ({column.length})", pc.not_equal(lengths, expected))
        elif column.length and len(known := lengths.drop_null()):
            first = known[0]
            note(f"one array length ({column.length}), here {first.as_py()}", pc.not_equal(lengths, first))
        flat = values.flatten()
        if not nullable:
            say("no null element", flat.null_count, "null")
        if pa.types.is_floating(flat.type):
            say("finite elements", pc.sum(pc.invert(pc.is_finite(flat))).as_py() or 0, "NaN or infinite")
        return found
    if pa.types.is_floating(kind):
        note("finite", pc.invert(pc.is_finite(values)))
    if column.allowed:
        allowed = pa.array(column.allowed if kind == pa.string() else [int(v) for v in column.allowed]).cast(kind)
        # is_in is false for a null; a CHECK constraint lets it pass, and so do we.
        note(f"one of {', '.join(column.allowed)}", pc.and_(pc.is_valid(values), pc.invert(pc.is_in(values, allowed))))
    if column.min is not None:
        note(f">= {column.min}", pc.less(values, column.min))
    if column.max is not None:
        note(f"<= {column.max}", pc.greater(values, column.max))
    if column.max_length is not None:
        size = pc.utf8_length if column.type == "string" else pc.binary_length
        note(f"length <= {column.max_length}", pc.greater(size(values), column.max_length))
    return found


def schema_differences(wanted: pa.Schema, found: pa.Schema) -> list[str]:
    """Differences between two schemas in names and types of columns; order and nullability do not count."""
    problems = []
    for f in wanted:
        if f.name not in found.names:
            problems.append(f"column '{f.name}' ({f.type}) is missing")
        elif found.field(f.name).type != f.type:
            problems.append(f"column '{f.name}' is {found.field(f.name).type}, expected {f.type}")
    problems += [f"column '{name}' is not in the contract" for name in found.names if name not in wanted.names]
    return problems
