"""The type language of contracts: scalars, `array<T>` and `struct<name:T,…>`; as Spark and as pyarrow types."""

import re
from typing import Any

import pyarrow as pa

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

_SPARK = {arrow: spark for spark, arrow in _SCALARS.values()}


def arrow_type(text: str) -> pa.DataType:
    """A contract type as a pyarrow type; ValueError for an unknown one."""
    text = text.strip()
    if text in _SCALARS:
        return _SCALARS[text][1]
    if match := re.fullmatch(r"array<(.*)>", text):
        return pa.list_(pa.field("element", arrow_type(match[1])))
    if match := re.fullmatch(r"struct<(.*)>", text):
        parts = [part.partition(":") for part in _split(match[1])]
        if all(name.strip() for name, _, _ in parts):
            return pa.struct([pa.field(name.strip(), arrow_type(kind)) for name, _, kind in parts])
    raise ValueError(f"unknown type '{text}'; known: {', '.join(_SCALARS)}, array<…>, struct<name:type,…>")


def _split(fields: str) -> list[str]:
    """The fields of a struct, split at the commas that stand outside every `<…>`."""
    parts, depth, start = [], 0, 0
    for i, char in enumerate(fields):
        depth += (char == "<") - (char == ">")
        if char == "," and depth == 0:
            parts.append(fields[start:i])
            start = i + 1
    return [*parts, fields[start:]]


def spark_type(kind: pa.DataType) -> Any:
    """The type of a column as Spark's JSON has it, which is Delta's too."""
    if pa.types.is_list(kind):
        return {"type": "array", "elementType": spark_type(kind.value_type), "containsNull": True}
    if pa.types.is_struct(kind):
        fields = [{"name": f.name, "type": spark_type(f.type), "nullable": True, "metadata": {}} for f in kind]
        return {"type": "struct", "fields": fields}
    return _SPARK[kind]
