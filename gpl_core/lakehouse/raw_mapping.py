"""Proposes, from names and types, which of a platform's tables and columns are which raw tables and columns."""

import json
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

import fsspec
import pyarrow as pa
import yaml

from gpl_core.contracts.contract import CONTRACT_NAME, load_contract
from gpl_core.contracts.raw_values import cast, castable
from gpl_core.lakehouse.log import open_table
from gpl_core.lakehouse.storage import filesystem
from gpl_core.lakehouse.table_layout import SORTED

log = logging.getLogger("gpl")

REQUIRED = ("raw_items", "raw_impressions", "raw_candidates")
EVENTS = ("raw_impressions", "raw_candidates", "raw_interactions")
RAW = (*REQUIRED, "raw_interactions", "raw_opt_outs")
_LEAST = 0.6  # of the columns that a raw table must have


@cache
def _names() -> dict[str, Any]:
    """raw_names.yaml."""
    found: dict[str, Any] = yaml.safe_load((resources.files("gpl_core.lakehouse") / "raw_names.yaml").read_bytes())
    return found


@dataclass(frozen=True)
class SeenTable:
    """A Delta table as its log shows it."""

    location: str
    kinds: Mapping[str, Any]  # column -> type, as Delta's JSON has it
    days: Sequence[str] = ()  # partition columns whose values are all dates
    contract: str = ""  # of a table that this project made

    @property
    def name(self) -> str:
        """The last folder of its location."""
        return self.location.rstrip("/").rpartition("/")[2].lower()


def look(location: str) -> SeenTable:
    """The table at `location`; TableNotFoundError when there is none, ContractError for a damaged log."""
    table = open_table(location)
    kinds = {f.name: json.loads(f.type.to_json()) for f in table.schema().fields}
    partitions = table.metadata().partition_columns
    files = pa.table(table.get_add_actions(flatten=True)) if partitions else None
    days = [n for n in partitions if files is not None and castable(kinds[n], "date") and _are_days(files, n, kinds[n])]
    return SeenTable(location, kinds, days, table.metadata().configuration.get(CONTRACT_NAME) or "")


def _are_days(files: pa.Table, partition: str, kind: Any) -> bool:
    values = {text for text in files[f"partition.{partition}"].cast(pa.string()).to_pylist() if text is not None}
    return bool(values) and all(cast(value, kind, "date") for value in values)


def find_tables(folder: str, depth: int = 3) -> list[str]:
    """Locations of the Delta tables at and below `folder`, sorted."""
    fs, path = filesystem(folder)
    return _tables_below(fs, path, folder.rstrip("/"), depth) if fs.isdir(path) else []


def _tables_below(fs: fsspec.AbstractFileSystem, path: str, folder: str, depth: int) -> list[str]:
    inside = sorted(
        e["name"].rstrip("/") for e in fs.ls(path, detail=True)
        if e["type"] == "directory" or (e["type"] != "file" and fs.isdir(e["name"]))  # a link
    )  # fmt: skip
    if any(entry.endswith("/_delta_log") for entry in inside):
        return [folder]
    found: list[str] = []
    for entry in inside if depth else ():
        below = f"{folder}/{entry.rpartition('/')[2]}"
        try:
            found += _tables_below(fs, entry, below, depth - 1)
        except PermissionError:  # another's folder, such as lost+found
            log.warning("%s cannot be read and is passed over", below)
    return found


def columns_of(raw: str, table: SeenTable) -> dict[str, str]:
    """Our column -> the platform's: by our name, else by names that mean the same; types must fit."""
    contract = load_contract(raw)
    fits = {(c.name, their) for c in contract.columns for their, kind in table.kinds.items() if castable(kind, c.type)}
    found = {our: their for our in contract.column_names for their in table.kinds
             if their.lower() == our and (our, their) in fits}  # fmt: skip
    for column in sorted(contract.columns, key=lambda c: c.nullable):
        if column.name in found or column.name == "dt":
            continue
        free = {_key(their): their for their in table.kinds if their not in found.values()}
        likely = (free.get(_key(word)) for word in _names()["columns"].get(column.name, ()))
        if their := next((t for t in likely if (column.name, t) in fits), None):
            found[column.name] = their
    if raw in EVENTS and "dt" not in found and (day := _day(table, found.get("event_time"))):
        found["dt"] = day
    return {our: found[our] for our in contract.column_names if our in found}


def _day(table: SeenTable, time: str | None) -> str | None:
    """The column that dates rows, the one that tells the dates of files before any other."""
    if table.days:
        return table.days[0]
    if time and table.kinds[time] in SORTED:
        return time
    named = {_key(their): their for their in table.kinds}
    return next((named[key] for key in map(_key, _names()["columns"]["dt"]) if key in named), time)


def lacking(raw: str, columns: Mapping[str, str]) -> list[str]:
    """The columns that `raw` must have and `columns` does not name."""
    return [c.name for c in load_contract(raw).columns if not c.nullable and c.name not in columns]


def propose(tables: Sequence[SeenTable]) -> dict[str, SeenTable]:
    """Raw table -> the one of `tables` that fits best; a table is one of them at most."""
    fits = [(_fit(raw, table), raw, table) for raw in RAW for table in tables]
    chosen: dict[str, SeenTable] = {}
    for fit, raw, table in sorted(fits, key=lambda f: -f[0]):
        if fit and raw not in chosen and table not in chosen.values():
            chosen[raw] = table
    return {raw: chosen[raw] for raw in RAW if raw in chosen}


def _fit(raw: str, table: SeenTable) -> float:
    """How well `table` fits `raw`; 0: it does not. Whether it is there at all must be clear of an optional one."""
    if table.contract not in ("", raw):
        return 0.0
    columns = columns_of(raw, table)
    needed = [c.name for c in load_contract(raw).columns if not c.nullable]
    share = sum(name in columns for name in needed) / len(needed)
    known = _names()["tables"][raw]
    named = any(word in table.name for word in known["words"])
    if share < (_LEAST if raw in REQUIRED else 1) or not (named or columns.keys() & set(known["telling"])):
        return 0.0
    return share + named / 2 + (raw in table.name) + len(columns) / 100


def _key(name: str) -> str:
    return re.sub(r"^is_|_?id$|_key$", "", name.lower()).replace("_", "")
