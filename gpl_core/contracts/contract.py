"""Table contracts: one YAML file per table in `schemas/`, turned into everything that must agree with it.

A column is declared once, in its table's YAML. From there come the Spark schema (as the JSON text that
`pyspark.sql.types.StructType.fromJson` reads, so this module needs no Spark), the table's properties with its CHECK
constraints, the pyarrow schema, the row checks (`arrow_checks.py`) and the data dictionary.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import field, replace
from functools import cache
from importlib import resources
from typing import Annotated, Any, Literal, Self

import pyarrow as pa
from pydantic import (
    AfterValidator,
    ConfigDict,
    Field,
    StrictBool,
    StrictFloat,
    StrictInt,
    TypeAdapter,
    ValidationError,
    ValidationInfo,
    field_validator,
)
from pydantic.dataclasses import dataclass

from gpl_core.contracts.types import arrow_type, spark_type
from gpl_core.contracts.yaml_problems import problems_of
from gpl_core.contracts.yaml_text import InvalidYamlError, read_yaml
from gpl_core.errors import ContractError, UsageError

CONTRACT_NAME = "gpl.contract"
CONTRACT_VERSION = "gpl.contract_version"
# The log outlives what `gpl forget` removes: it holds no smallest and largest user id of a file.
NO_STATISTICS = {"delta.dataSkippingNumIndexedCols": "0"}


def _known(text: str) -> str:
    arrow_type(text)
    return text


_STRICT = ConfigDict(extra="forbid")
_Number = StrictInt | StrictFloat
_Type = Annotated[str, AfterValidator(_known)]
_Text = Annotated[str, Field(coerce_numbers_to_str=True)]


@dataclass(frozen=True, config=_STRICT)
class Column:
    """One column of a contract.

    `length` is the array length as a product of named dimensions (`"H*L"`); their values come with the run's
    configuration. `min` and `max` bound the value, but not the elements of an array; `max_length` bounds the characters
    of a string and the bytes of a binary.
    """

    name: str
    type: _Type
    nullable: StrictBool
    comment: str
    unit: str = ""
    min: _Number | None = None
    max: _Number | None = None
    allowed: tuple[_Text, ...] = ()
    length: str = ""
    max_length: StrictInt | None = None

    @property
    def delta_type(self) -> Any:
        """The type as Delta's JSON, and Spark's, has it."""
        return spark_type(arrow_type(self.type))

    def expected_length(self, dims: Mapping[str, int]) -> int | None:
        """Array length under `dims`, or None when the contract or `dims` leave it open."""
        names = [part.strip() for part in self.length.split("*")] if self.length else []
        if not names or any(name not in dims for name in names):
            return None
        return math.prod(dims[name] for name in names)

    def check_sql(self, value: str = "") -> str:
        """The CHECK expression of this column, or of the SQL `value` in its place; empty: nothing to check."""
        value = value or self.name
        literal = (lambda v: f"'{v}'") if self.type == "string" else str
        if self.allowed:
            check = " OR ".join(f"{value} = {literal(v)}" for v in self.allowed)
        else:
            size = f"{'octet_length' if self.type == 'binary' else 'length'}({value})"
            bounds = [(value, ">=", self.min), (value, "<=", self.max), (size, "<=", self.max_length)]
            check = " AND ".join(f"{what} {sign} {bound}" for what, sign, bound in bounds if bound is not None)
        # Delta considers a CHECK that is null violated.
        return f"{value} IS NULL OR ({check})" if check and self.nullable else check


@dataclass(frozen=True, config=_STRICT)
class Migration:
    """From the version before `to`: columns dropped, renamed (old -> new), then added with one value for every row."""

    to: StrictInt
    rename: dict[str, str] = field(default_factory=dict, hash=False)
    add: dict[str, Any] = field(default_factory=dict, hash=False)
    drop: tuple[str, ...] = ()


@dataclass(frozen=True, config=_STRICT)
class Contract:
    """One table's contract; see `schemas/<name>.yaml`."""

    name: str
    version: StrictInt
    description: str
    owner: str
    grain: str
    primary_key: tuple[str, ...]
    partition_by: tuple[str, ...]
    consumers: tuple[Literal["analyst", "trainer", "gpu_worker"], ...]
    columns: tuple[Column, ...]
    enforced: StrictBool = True
    migrations: tuple[Migration, ...] = ()

    @field_validator("columns")
    @classmethod
    def _consistent(cls, columns: tuple[Column, ...], info: ValidationInfo) -> tuple[Column, ...]:
        names = [c.name for c in columns]
        problems = [f"column '{n}' is declared twice" for n in sorted({n for n in names if names.count(n) > 1})]
        for key in ("primary_key", "partition_by"):
            problems += [f"{key} names the unknown column '{n}'" for n in info.data.get(key, ()) if n not in names]
        if problems:
            raise ValueError("; ".join(problems))
        return columns

    @property
    def column_names(self) -> tuple[str, ...]:
        return tuple(column.name for column in self.columns)

    def column(self, name: str) -> Column:
        """The column called `name`; ContractError when there is none."""
        for column in self.columns:
            if column.name == name:
                return column
        raise ContractError(f"table {self.name}: no column '{name}'; it has {', '.join(self.column_names)}")

    def with_columns(self, extra: tuple[Column, ...]) -> Self:
        """This contract with `extra` columns before the partition columns (passthrough features)."""
        clash = [c.name for c in extra if c.name in self.column_names]
        if clash:
            raise UsageError(f"passthrough columns {clash} are already columns of {self.name}; choose other names")
        body = tuple(c for c in self.columns if c.name not in self.partition_by)
        tail = tuple(c for c in self.columns if c.name in self.partition_by)
        return replace(self, columns=body + extra + tail)

    def is_nullable(self, column: Column) -> bool:
        """Physical nullability: a platform table may hold nulls anywhere; ingest decides row by row."""
        return column.nullable or not self.enforced

    def spark_json(self) -> str:
        """The Spark schema as JSON text (also Delta's own schema text), comments included."""
        fields = [
            {
                "name": c.name, "type": c.delta_type, "nullable": self.is_nullable(c),
                "metadata": {"comment": f"{c.comment} [{c.unit}]" if c.unit else c.comment},
            }
            for c in self.columns
        ]  # fmt: skip
        return json.dumps({"type": "struct", "fields": fields})

    def table_properties(self) -> dict[str, str]:
        """Delta's table properties: name and version of the contract, constraints, and what every reader relies on."""
        return {
            CONTRACT_NAME: self.name,
            CONTRACT_VERSION: str(self.version),
            "delta.checkpointInterval": "10",  # Spark's default, for delta-rs too: it opens at most so many commits
            **NO_STATISTICS,
            # Petastorm and plain Parquet readers cannot apply deletion vectors.
            "delta.enableDeletionVectors": "false",
            **{f"delta.constraints.{name}": expression for name, expression in self.checks().items()},
        }

    def checks(self) -> dict[str, str]:
        """CHECK constraints by name; none for tables that the platform owns."""
        return {f"{c.name}_in_range": check for c in self.columns if self.enforced and (check := c.check_sql())}

    def arrow_schema(self, *, partitions: bool = True) -> pa.Schema:
        """The pyarrow schema; without `partitions`, that of the data files."""
        columns = (c for c in self.columns if partitions or c.name not in self.partition_by)
        return pa.schema([pa.field(c.name, arrow_type(c.type), nullable=self.is_nullable(c)) for c in columns])


@cache
def all_contracts() -> dict[str, Contract]:
    """Every shipped contract by table name, in name order."""
    folder = resources.files("gpl_core") / "schemas"
    names = sorted(entry.name for entry in folder.iterdir() if entry.name.endswith(".yaml"))
    return {c.name: c for c in (parse_contract((folder / n).read_text(encoding="utf-8"), n) for n in names)}


def load_contract(name: str) -> Contract:
    """The contract of table `name`; UsageError when there is none."""
    try:
        return all_contracts()[name]
    except KeyError:
        raise UsageError(f"no contract for table '{name}'; known tables: {', '.join(all_contracts())}") from None


def parse_contract(text: str, source: str) -> Contract:
    """Parse one contract's YAML; ContractError names `source` and lists everything that is wrong with it."""
    try:
        body = read_yaml(text)
        return TypeAdapter(Contract).validate_python(body)
    except InvalidYamlError as error:
        raise ContractError(f"contract {source}: not valid YAML: {error}") from None
    except ValidationError as error:
        raise ContractError(f"contract {source}: " + "; ".join(problems_of(error, Contract, body))) from None
