"""The deletion vectors of a table's files, read from its log: delta-rs applies them in SQL but does not list them.

Its own `deletion_vectors` unpacks every vector, a byte per row of the table, and both it and the engine hang on more
than 512 of them at once (1.6.6).
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from fsspec import AbstractFileSystem

from gpl_core.errors import ContractError
from gpl_core.lakehouse.log import commit_path
from gpl_core.lakehouse.storage import filesystem

_CHECKPOINT = re.compile(r"/(\d{20})\.checkpoint\.(?:\d{10}\.(\d{10})\.|[0-9a-f-]{36}\.)?(?:parquet|json)$")
# Of a checkpoint's columns: what a file or a sidecar is called, and the file's vector.
_COLUMNS = ["add.path", "add.deletionVector", "sidecar.path"]


@dataclass(frozen=True)
class DeletionVector:
    """Rows of a data file that are deleted without the file's being written again."""

    identity: str  # no other vector of the table has it
    rows: int

    @staticmethod
    def of(descriptor: Mapping[str, Any]) -> "DeletionVector":
        """The vector that an action of the log describes."""
        place = f"{descriptor['storageType']}{descriptor['pathOrInlineDv']}@{descriptor.get('offset') or 0}"
        return DeletionVector(place, int(descriptor["cardinality"]))


def deletion_vectors(uri: str, version: int) -> dict[str, DeletionVector]:
    """Path (as in the log) -> vector, of the live files that have one in `version` of the table at `uri`.

    ContractError when the log lacks a commit that is needed for it.
    """
    fs, log = filesystem(f"{uri}/_delta_log")
    start, checkpoint = _newest_checkpoint(fs.ls(log, detail=False, refresh=True), version)
    found: dict[str, DeletionVector] = {}
    for path in checkpoint:
        adds, sidecars = _read_checkpoint(fs, path)
        for sidecar in sidecars:
            adds += _read_checkpoint(fs, f"{log}/_sidecars/{sidecar.rpartition('/')[2]}")[0]
        found.update((add["path"], DeletionVector.of(add["deletionVector"])) for add in adds)
    for number in range(start + 1, version + 1):
        commit = commit_path(log, number)
        try:
            actions = list(_file_actions(fs.cat_file(commit).splitlines()))
        except FileNotFoundError:
            raise ContractError(f"the commit {commit} is gone, and no checkpoint has what it did") from None
        for kind, action in actions:
            if kind == "remove":
                found.pop(action["path"], None)
        for kind, action in actions:
            if kind == "add" and action.get("deletionVector"):
                found[action["path"]] = DeletionVector.of(action["deletionVector"])
    return found


def _newest_checkpoint(names: Iterable[str], version: int) -> tuple[int, list[str]]:
    """(version, files) of the newest whole checkpoint up to `version`; (-1, []) without one."""
    whole: dict[int, list[str]] = {}
    parts: dict[tuple[int, int], list[str]] = {}
    for name in names:
        if not (found := _CHECKPOINT.search(name)) or int(found[1]) > version:
            continue
        if not found[2]:
            whole[int(found[1])] = [name]
            continue
        several = parts.setdefault((int(found[1]), int(found[2])), [])
        several.append(name)
        if len(several) == int(found[2]):
            whole[int(found[1])] = several
    return max(whole.items(), default=(-1, []))


def _read_checkpoint(fs: AbstractFileSystem, path: str) -> tuple[list[dict[str, Any]], list[str]]:
    """(files with a vector, names of sidecars) in one file of a checkpoint."""
    if path.endswith(".json"):
        actions = [json.loads(line) for line in fs.cat_file(path).splitlines()]
        adds = [a["add"] for a in actions if a.get("add", {}).get("deletionVector")]
        return adds, [a["sidecar"]["path"] for a in actions if "sidecar" in a]
    with fs.open(path, "rb") as handle:
        rows = pq.ParquetFile(handle).read(columns=_COLUMNS)
    return _with(rows, "add", "deletionVector"), [s["path"] for s in _with(rows, "sidecar", "path")]


def _with(rows: pa.Table, column: str, field: str) -> list[dict[str, Any]]:
    """The structs in `column` whose `field` is there."""
    if column not in rows.column_names or rows.schema.field(column).type.get_field_index(field) < 0:
        return []
    structs = rows[column].combine_chunks()
    value = pc.struct_field(structs, field)
    if pa.types.is_struct(value.type):  # null where its fields are
        value = pc.struct_field(value, 0)
    found: list[dict[str, Any]] = structs.filter(pc.is_valid(value)).to_pylist()
    return found


def _file_actions(lines: Iterable[bytes]) -> Iterator[tuple[str, dict[str, Any]]]:
    for line in lines:
        if b'"path"' in line:
            for kind, action in json.loads(line).items():
                if kind in ("add", "remove"):
                    yield kind, action
