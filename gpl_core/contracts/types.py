"""The type language of contracts: scalars, `array<T>` and `struct<name:T,…>`; as Spark and as pyarrow types."""

from __future__ import annotations

import re
from typing import Any

import pyarrow as pa

from gpl_core.errors import ContractError

_SCALARS: dict[str, tuple[str, pa.DataType]] = {
    # contract type -> (Spark, pyarrow)
    "string": ("string", pa.string()),
    "int": ("integer", pa.int32()),
    "long": ("long", pa.int64()),
    "float": ("float", pa.float32()),
    "double": ("double", pa.float64()),
    "boolean": ("boolean", pa.bool_()),
    "date": ("date", pa.date32()),
    "timestamp": ("timestamp", pa.timestamp("us", tz="UTC")),
    "binary": ("binary", pa.binary()),
}

Parsed = str | tuple[str, Any]  # "int" | ("array", Parsed) | ("struct", ((name, Parsed), …))


def parse_type(text: str) -> Parsed:
    """Parse a contract type.

    Raises:
        ContractError: unknown type.
    """
    text = text.strip()
    if text in _SCALARS:
        return text
    if match := re.fullmatch(r"array<(.*)>", text):
        return ("array", parse_type(match[1]))
    if match := re.fullmatch(r"struct<(.*)>", text):
        parts = [part.partition(":") for part in _split(match[1])]
        if all(name.strip() for name, _, _ in parts):
            return ("struct", tuple((name.strip(), parse_type(kind)) for name, _, kind in parts))
    raise ContractError(f"unknown type '{text}'; known: {', '.join(_SCALARS)}, array<…>, struct<name:type,…>")


def _split(fields: str) -> list[str]:
    """The fields of a struct, split at the commas that stand outside every `<…>`."""
    parts, depth, start = [], 0, 0
    for i, char in enumerate(fields):
        depth += (char == "<") - (char == ">")
        if char == "," and depth == 0:
            parts.append(fields[start:i])
            start = i + 1
    return [*parts, fields[start:]]


def spark_type(kind: Parsed) -> Any:
    """`kind` as Spark's JSON has it, which is Delta's too."""
    if isinstance(kind, str):
        return _SCALARS[kind][0]
    if kind[0] == "array":
        return {"type": "array", "elementType": spark_type(kind[1]), "containsNull": True}
    return {
        "type": "struct",
        "fields": [{"name": n, "type": spark_type(k), "nullable": True, "metadata": {}} for n, k in kind[1]],
    }


def arrow_type(kind: Parsed) -> pa.DataType:
    """`kind` as a pyarrow type."""
    if isinstance(kind, str):
        return _SCALARS[kind][1]
    if kind[0] == "array":
        return pa.list_(pa.field("element", arrow_type(kind[1])))
    return pa.struct([pa.field(n, arrow_type(k)) for n, k in kind[1]])
