"""Where an id stands in the files of a lakehouse: every file is searched as it is, and decoded."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq


def files_with(root: Path, user: str, *but: str) -> list[str]:
    """Files under `root` that hold the text `user`, without the tables `but` (default: the platform's)."""
    left_out = but or ("raw_",)
    found = []
    for path in sorted(p for p in root.rglob("*") if p.is_file()):
        inside = path.relative_to(root)
        if inside.parts[0] == "tables" and inside.parts[1].startswith(left_out):
            continue
        if user.encode() in path.read_bytes() or user in _decoded(path):
            found.append(str(inside))
    return found


def _decoded(path: Path) -> str:
    if path.suffix == ".gz":
        return gzip.decompress(path.read_bytes()).decode()
    if path.suffix == ".json":
        return "\n".join(_texts(json.loads(line)) for line in _documents(path))
    if path.suffix == ".parquet":
        return _parquet(path)
    return ""  # text, and tensors with their names in front, are searched as they are


def _documents(path: Path) -> list[str]:
    text = path.read_text("utf-8")
    return text.splitlines() if "_delta_log" in path.parts else [text]


def _texts(value: Any) -> str:
    """Every text in a JSON value, JSON in a text (statistics, marks) decoded too."""
    if isinstance(value, dict):
        return "\n".join(f"{k}\n{_texts(v)}" for k, v in value.items())
    if isinstance(value, list):
        return "\n".join(map(_texts, value))
    if isinstance(value, str) and value[:1] in "{[":
        try:
            return _texts(json.loads(value))
        except ValueError:
            return value
    return str(value)


def _parquet(path: Path) -> str:
    """All rows, and what stands in dictionaries without a row."""
    file = pq.ParquetFile(path)
    words = [f.name for f in file.schema_arrow if pa.types.is_string(f.type)]
    rows = pq.ParquetFile(path, read_dictionary=words).read()
    kept = [str(c.dictionary.to_pylist()) for name in words for c in rows[name].chunks]
    return str([_texts(row) for row in file.read().to_pylist()]) + "".join(kept)
