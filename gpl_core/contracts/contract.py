"""Table contracts: one YAML file per table in `schemas/`, turned into everything that must agree with it.

A column is declared once, in its table's YAML. From there come the Spark schema (as the JSON text that
`pyspark.sql.types.StructType.fromJson` reads, so this module needs no Spark), the DDL with CHECK constraints,
the pyarrow schema, the row checks and the data dictionary.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from importlib import resources
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import yaml

from gpl_core.errors import ContractError, UsageError

CONTRACT_NAME = "gpl.contract"
CONTRACT_VERSION = "gpl.contract_version"

_SCALARS: dict[str, tuple[str, str, pa.DataType]] = {
    # contract type -> (Spark JSON, DDL, pyarrow)
    "string": ("string", "STRING", pa.string()),
    "int": ("integer", "INT", pa.int32()),
    "long": ("long", "BIGINT", pa.int64()),
    "float": ("float", "FLOAT", pa.float32()),
    "double": ("double", "DOUBLE", pa.float64()),
    "boolean": ("boolean", "BOOLEAN", pa.bool_()),
    "date": ("date", "DATE", pa.date32()),
    "timestamp": ("timestamp", "TIMESTAMP", pa.timestamp("us", tz="UTC")),
    "binary": ("binary", "BINARY", pa.binary()),
}
_TOP_KEYS: dict[str, type | tuple[type, ...]] = {
    "name": str, "version": int, "description": str, "owner": str, "grain": str, "primary_key": list,
    "partition_by": list, "consumers": list, "columns": list, "enforced": bool, "properties": dict, "migrations": list,
}  # fmt: skip
_COLUMN_KEYS: dict[str, type | tuple[type, ...]] = {
    "name": str, "type": str, "nullable": bool, "comment": str, "unit": str, "min": (int, float), "max": (int, float),
    "allowed": list, "length": str,
}  # fmt: skip
_MIGRATION_KEYS: dict[str, type | tuple[type, ...]] = {"to": int, "rename": dict, "add": dict, "drop": list}
_CONSUMERS = {"analyst", "trainer", "gpu_worker"}


@dataclass(frozen=True)
class Column:
    """One column of a contract.

    `length` is the array length as a product of named dimensions (`"H*L"`); their values come with the run's
    configuration. `low`/`high` bound the value, elements of arrays excluded.
    """

    name: str
    type: str
    nullable: bool
    comment: str
    unit: str = ""
    low: float | None = None
    high: float | None = None
    allowed: tuple[str, ...] = ()
    length: str = ""

    def expected_length(self, dims: Mapping[str, int]) -> int | None:
        """Array length under `dims`, or None when the contract or `dims` leave it open."""
        names = [part.strip() for part in self.length.split("*")] if self.length else []
        if not names or any(name not in dims for name in names):
            return None
        return math.prod(dims[name] for name in names)

    def check_sql(self) -> str:
        """The CHECK expression of this column, empty when there is nothing to check."""
        literal = (lambda v: f"'{v}'") if self.type == "string" else str
        if self.allowed:
            check = " OR ".join(f"{self.name} = {literal(v)}" for v in self.allowed)
        else:
            bounds = [(">=", self.low), ("<=", self.high)]
            check = " AND ".join(f"{self.name} {sign} {bound}" for sign, bound in bounds if bound is not None)
        # To Delta a CHECK that is null is violated.
        return f"{self.name} IS NULL OR ({check})" if check and self.nullable else check


@dataclass(frozen=True)
class Violation:
    """One row check that failed: which column, how many rows, one bad value and what was expected."""

    column: str
    check: str
    rows: int
    example: str

    def __str__(self) -> str:
        return f"{self.column}: {self.rows} row(s) break '{self.check}', e.g. {self.example}"


@dataclass(frozen=True)
class Migration:
    """From the version before `to`: columns dropped, renamed (old -> new), then added with one value for every row."""

    to: int
    rename: Mapping[str, str] = field(default_factory=dict, hash=False)
    add: Mapping[str, Any] = field(default_factory=dict, hash=False)
    drop: tuple[str, ...] = ()


@dataclass(frozen=True)
class Contract:
    """One table's contract; see `schemas/<name>.yaml`."""

    name: str
    version: int
    description: str
    owner: str
    grain: str
    primary_key: tuple[str, ...]
    partition_by: tuple[str, ...]
    consumers: tuple[str, ...]
    columns: tuple[Column, ...]
    enforced: bool = True
    properties: tuple[tuple[str, str], ...] = field(default_factory=tuple)
    migrations: tuple[Migration, ...] = ()

    @property
    def column_names(self) -> tuple[str, ...]:
        return tuple(column.name for column in self.columns)

    def column(self, name: str) -> Column:
        """The column called `name`; ContractError when there is none."""
        for column in self.columns:
            if column.name == name:
                return column
        raise ContractError(f"table {self.name}: no column '{name}'; it has {', '.join(self.column_names)}")

    def with_columns(self, extra: tuple[Column, ...]) -> Contract:
        """This contract with `extra` columns before the partition columns (passthrough features)."""
        clash = [c.name for c in extra if c.name in self.column_names]
        if clash:
            raise UsageError(f"passthrough columns {clash} are already columns of {self.name}; choose other names")
        body = tuple(c for c in self.columns if c.name not in self.partition_by)
        tail = tuple(c for c in self.columns if c.name in self.partition_by)
        return replace(self, columns=body + extra + tail)

    def is_nullable(self, column: Column) -> bool:
        """Physical nullability: a platform table may hold anything, ingest decides row by row."""
        return column.nullable or not self.enforced

    # ---- Spark -------------------------------------------------------------------------------------------------

    def spark_json(self) -> str:
        """The Spark schema as JSON text (also Delta's own schema text), comments included."""
        fields = [
            {
                "name": c.name,
                "type": _spark_type(parse_type(c.type)),
                "nullable": self.is_nullable(c),
                "metadata": {"comment": _comment(c)},
            }
            for c in self.columns
        ]
        return json.dumps({"type": "struct", "fields": fields})

    def table_properties(self) -> dict[str, str]:
        """TBLPROPERTIES: contract name and version, constraints, and what every reader here relies on."""
        properties = {
            CONTRACT_NAME: self.name,
            CONTRACT_VERSION: str(self.version),
            # Fingerprints live in commit metadata: the log must outlive the slices it vouches for.
            "delta.logRetentionDuration": "interval 3650 days",
            # Petastorm and plain Parquet readers cannot apply deletion vectors.
            "delta.enableDeletionVectors": "false",
            **dict(self.properties),
        }
        for name, expression in self.checks().items():
            properties[f"delta.constraints.{name}"] = expression
        return properties

    def checks(self) -> dict[str, str]:
        """CHECK constraints by name; none for tables that the platform owns."""
        if not self.enforced:
            return {}
        return {f"{c.name}_in_range": c.check_sql() for c in self.columns if c.check_sql()}

    def ddl(self, location: str) -> str:
        """`CREATE TABLE IF NOT EXISTS` for the Delta table at `location` (a path)."""
        columns = ",\n  ".join(
            f"{c.name} {_ddl_type(parse_type(c.type))}{'' if self.is_nullable(c) else ' NOT NULL'}"
            f" COMMENT {_sql_string(_comment(c))}"
            for c in self.columns
        )
        partition = f"\nPARTITIONED BY ({', '.join(self.partition_by)})" if self.partition_by else ""
        properties = ",\n  ".join(
            f"{_sql_string(k)} = {_sql_string(v)}" for k, v in sorted(self.table_properties().items())
        )
        return (
            f"CREATE TABLE IF NOT EXISTS delta.`{location}` (\n  {columns}\n) USING DELTA{partition}\n"
            f"COMMENT {_sql_string(self.description)}\nTBLPROPERTIES (\n  {properties}\n)"
        )

    # ---- Arrow -------------------------------------------------------------------------------------------------

    def arrow_schema(self, *, partitions: bool = True) -> pa.Schema:
        """The pyarrow schema; without `partitions`, what stands in the data files."""
        return pa.schema(
            [
                pa.field(c.name, _arrow_type(parse_type(c.type)), nullable=self.is_nullable(c))
                for c in self.columns
                if partitions or c.name not in self.partition_by
            ]
        )

    def check_batch(self, batch: pa.RecordBatch | pa.Table, dims: Mapping[str, int] | None = None) -> list[Violation]:
        """Every row check of this contract that `batch` breaks: types, nulls, NaN, ranges, allowed values, lengths.

        Delta's CHECK constraints are not applied to files that a transaction adds, so workers check before they
        commit. Columns of `batch` must be the data columns, in any order.

        Raises:
            ContractError: a column is missing, unknown or of another type.
        """
        wanted = self.arrow_schema(partitions=False)
        problems = schema_differences(wanted, batch.schema)
        if problems:
            raise ContractError(f"table {self.name}: the batch does not fit the contract: " + "; ".join(problems))
        violations = []
        for column in self.columns:
            if column.name not in self.partition_by:
                violations += _check_column(column, batch.column(column.name), self.is_nullable(column), dims or {})
        return violations


def _check_column(
    column: Column, values: pa.Array | pa.ChunkedArray, nullable: bool, dims: Mapping[str, int]
) -> list[Violation]:
    if isinstance(values, pa.ChunkedArray):
        values = values.combine_chunks()
    if isinstance(values, pa.ChunkedArray):  # an empty chunked array has no chunk to combine
        values = pa.array([], values.type)
    found: list[Violation] = []

    def note(check: str, bad: pa.Array) -> None:
        bad = pc.fill_null(bad, False)
        rows = pc.sum(bad).as_py() or 0
        if rows:
            example = values.filter(bad)[0].as_py()
            found.append(Violation(column.name, check, rows, repr(example)[:120]))

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
        if flat.null_count and not nullable:
            found.append(Violation(column.name, "no null element", flat.null_count, "null"))
        if pa.types.is_floating(flat.type):
            bad = pc.sum(pc.invert(pc.is_finite(flat))).as_py() or 0
            if bad:
                found.append(Violation(column.name, "finite elements", bad, "NaN or infinite"))
        return found
    if pa.types.is_floating(kind):
        note("finite", pc.invert(pc.is_finite(values)))
    if column.allowed:
        allowed = pa.array(column.allowed if kind == pa.string() else [int(v) for v in column.allowed]).cast(kind)
        # is_in calls a null a value that is not allowed; a CHECK constraint lets it pass, and so do we
        note(f"one of {', '.join(column.allowed)}", pc.and_(pc.is_valid(values), pc.invert(pc.is_in(values, allowed))))
    if column.low is not None:
        note(f">= {column.low}", pc.less(values, column.low))
    if column.high is not None:
        note(f"<= {column.high}", pc.greater(values, column.high))
    return found


def schema_differences(wanted: pa.Schema, found: pa.Schema) -> list[str]:
    """Column-by-column differences of two schemas by name and type, order and nullability ignored."""
    problems = []
    for f in wanted:
        if f.name not in found.names:
            problems.append(f"column '{f.name}' ({f.type}) is missing")
        elif found.field(f.name).type != f.type:
            problems.append(f"column '{f.name}' is {found.field(f.name).type}, expected {f.type}")
    problems += [f"column '{name}' is not in the contract" for name in found.names if name not in wanted.names]
    return problems


# ---- types -----------------------------------------------------------------------------------------------------

Parsed = str | tuple[str, Any]  # "int" | ("array", Parsed) | ("struct", ((name, Parsed), …))


def parse_type(text: str) -> Parsed:
    """Parse a contract type: a scalar, `array<T>` or `struct<name:T,…>`.

    Raises:
        ContractError: unknown type.
    """
    text = text.strip()
    if text in _SCALARS:
        return text
    if match := re.fullmatch(r"array<(.*)>", text):
        return ("array", parse_type(match.group(1)))
    if match := re.fullmatch(r"struct<(.*)>", text):
        parts = [part.partition(":") for part in _split_top(match.group(1))]
        if all(name.strip() for name, _, _ in parts):
            return ("struct", tuple((name.strip(), parse_type(kind)) for name, _, kind in parts))
    raise ContractError(f"unknown type '{text}'; known: {', '.join(_SCALARS)}, array<…>, struct<name:type,…>")


def _split_top(text: str) -> list[str]:
    parts, depth, start = [], 0, 0
    for i, char in enumerate(text):
        depth += (char == "<") - (char == ">")
        if char == "," and depth == 0:
            parts.append(text[start:i])
            start = i + 1
    return [*parts, text[start:]]


def _spark_type(kind: Parsed) -> Any:
    if isinstance(kind, str):
        return _SCALARS[kind][0]
    if kind[0] == "array":
        return {"type": "array", "elementType": _spark_type(kind[1]), "containsNull": True}
    return {
        "type": "struct",
        "fields": [{"name": n, "type": _spark_type(k), "nullable": True, "metadata": {}} for n, k in kind[1]],
    }


def _ddl_type(kind: Parsed) -> str:
    if isinstance(kind, str):
        return _SCALARS[kind][1]
    if kind[0] == "array":
        return f"ARRAY<{_ddl_type(kind[1])}>"
    return "STRUCT<" + ", ".join(f"{n}: {_ddl_type(k)}" for n, k in kind[1]) + ">"


def _arrow_type(kind: Parsed) -> pa.DataType:
    if isinstance(kind, str):
        return _SCALARS[kind][2]
    if kind[0] == "array":
        return pa.list_(pa.field("element", _arrow_type(kind[1])))
    return pa.struct([pa.field(n, _arrow_type(k)) for n, k in kind[1]])


def _comment(column: Column) -> str:
    return f"{column.comment} [{column.unit}]" if column.unit else column.comment


def _sql_string(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


# ---- loading ---------------------------------------------------------------------------------------------------


@cache
def all_contracts() -> dict[str, Contract]:
    """Every shipped contract by table name, in name order."""
    folder = resources.files("schemas")
    names = sorted(entry.name for entry in folder.iterdir() if entry.name.endswith(".yaml"))
    return {c.name: c for c in (parse_contract((folder / n).read_text(encoding="utf-8"), n) for n in names)}


def load_contract(name: str) -> Contract:
    """The contract of table `name`.

    Raises:
        UsageError: there is no such contract.
    """
    try:
        return all_contracts()[name]
    except KeyError:
        raise UsageError(f"no contract for table '{name}'; known tables: {', '.join(all_contracts())}") from None


def parse_contract(text: str, source: str) -> Contract:
    """Parse one contract's YAML.

    Raises:
        ContractError: lists everything that is wrong with it, naming `source`.
    """
    try:
        raw = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ContractError(f"contract {source}: not valid YAML: {error}") from None
    if not isinstance(raw, dict):
        raise ContractError(f"contract {source}: expected a mapping, found {type(raw).__name__}")
    problems = _wrong_keys(raw, _TOP_KEYS, set(_TOP_KEYS) - {"enforced", "properties", "migrations"})
    entries = raw["columns"] if isinstance(raw.get("columns"), list) else []
    columns, names = [], []
    for entry in entries:
        if not isinstance(entry, dict):
            problems.append(f"column {entry!r}: expected a mapping")
            continue
        name = str(entry.get("name", "?"))
        names.append(name)
        wrong = _wrong_keys(entry, _COLUMN_KEYS, {"name", "type", "nullable", "comment"})
        if isinstance(entry.get("type"), str):
            try:
                parse_type(entry["type"])
            except ContractError as error:
                wrong.append(str(error))
        problems += [f"column '{name}': {w}" for w in wrong]
        if wrong:
            continue
        columns.append(
            Column(
                name=name,
                type=entry["type"],
                nullable=entry["nullable"],
                comment=entry["comment"],
                unit=entry.get("unit", ""),
                low=entry.get("min"),
                high=entry.get("max"),
                allowed=tuple(str(v) for v in entry.get("allowed", [])),
                length=entry.get("length", ""),
            )
        )
    problems += [f"column '{n}' is declared twice" for n in sorted({n for n in names if names.count(n) > 1})]
    for key in ("primary_key", "partition_by"):
        problems += [f"{key} names the unknown column '{n}'" for n in _listed(raw, key) if n not in names]
    problems += [f"unknown consumer '{c}'" for c in _listed(raw, "consumers") if c not in _CONSUMERS]
    for entry in _listed(raw, "migrations"):
        wrong = _wrong_keys(entry, _MIGRATION_KEYS, {"to"}) if isinstance(entry, dict) else ["expected a mapping"]
        problems += [f"migration {entry!r}: {w}" for w in wrong]
    if problems:
        raise ContractError(f"contract {source}: " + "; ".join(problems))
    return Contract(
        name=raw["name"],
        version=raw["version"],
        description=raw["description"],
        owner=raw["owner"],
        grain=raw["grain"],
        primary_key=tuple(raw["primary_key"]),
        partition_by=tuple(raw["partition_by"]),
        consumers=tuple(raw["consumers"]),
        columns=tuple(columns),
        enforced=raw.get("enforced", True),
        properties=tuple(sorted((k, str(v)) for k, v in raw.get("properties", {}).items())),
        migrations=tuple(
            Migration(m["to"], m.get("rename", {}), m.get("add", {}), tuple(m.get("drop", [])))
            for m in raw.get("migrations", [])
        ),
    )


def _wrong_keys(raw: Mapping[str, Any], known: Mapping[str, type | tuple[type, ...]], required: set[str]) -> list[str]:
    problems = [f"unknown key '{k}'" for k in raw if k not in known]
    problems += [f"missing key '{k}'" for k in known if k in required and k not in raw]
    for key, kind in known.items():
        # bool is an int to Python, not to a contract
        if key in raw and (not isinstance(raw[key], kind) or (isinstance(raw[key], bool) and kind is not bool)):
            expected = kind.__name__ if isinstance(kind, type) else "number"
            problems.append(f"key '{key}' is {raw[key]!r}, expected a value of type {expected}")
    return problems


def _listed(raw: Mapping[str, Any], key: str) -> list[Any]:
    return raw[key] if isinstance(raw.get(key), list) else []


def data_dictionary() -> str:
    """The data dictionary as Markdown, one section per table."""
    parts = ["# Tables\n", "Generated from `schemas/` by `gpl tables`; do not edit.\n"]
    for contract in all_contracts().values():
        parts.append(f"## {contract.name}\n\n{contract.description}.\n")
        partition = f" · partitioned by {', '.join(contract.partition_by)}" if contract.partition_by else ""
        parts.append(
            f"Version {contract.version} · written by {contract.owner} · {contract.grain} "
            f"(key: {', '.join(contract.primary_key)}){partition} · read by {', '.join(contract.consumers)}\n"
        )
        parts.append("| column | type | null | meaning | unit | range |\n|---|---|---|---|---|---|")
        for c in contract.columns:
            kind = c.type.replace("|", "\\|") + (f" of {c.length}" if c.length else "")
            bounds = ", ".join(c.allowed) or " to ".join("…" if v is None else f"{v:g}" for v in (c.low, c.high))
            bounds = "" if bounds == "… to …" else bounds
            parts.append(f"| {c.name} | {kind} | {'yes' if c.nullable else 'no'} | {c.comment} | {c.unit} | {bounds} |")
        parts.append("")
    return "\n".join(parts)
