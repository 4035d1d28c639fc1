"""Rows of a raw table without Spark, each checked as ingest checks it, by the rules of `contracts/raw_values.py`."""

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import date, timedelta
from typing import Any

from gpl_core.config import Config
from gpl_core.contracts.raw_values import YES, bare_type, cast, day_of, midnight, rules_of
from gpl_core.lakehouse.query import Query
from gpl_core.lakehouse.snapshot import Snapshot

_DAY = 86_400_000_000
_TEXTS = ("title", "description", "category")
_TIME_TYPES = {
    "date": "Date32", "timestamp_ntz": "Timestamp(Microsecond, None)",
    "timestamp": 'Timestamp(Microsecond, Some("UTC"))',
}  # fmt: skip


@dataclass
class Sample:
    """What was found among rows of one table."""

    rows: int = 0
    refused: int = 0  # rows that fail a check
    faults: dict[str, tuple[int, str]] = field(default_factory=dict)  # check, as quarantine names it -> (rows, example)

    def add(self, fault: str, example: Any = None, rows: int = 1) -> None:
        """Count `rows` more that fail the check `fault`."""
        count, first = self.faults.get(fault, (0, "" if example is None else str(example)[:100]))
        self.faults[fault] = (count + rows, first)


class RawSample:
    """Checks rows of raw tables of the slice `day`; items and opt-outs as of its end."""

    def __init__(self, query: Query, config: Config, day: date):
        self._query, self._config, self._day = query, config, day
        self._first = min(config.run.first_date, day)

    def check(self, snapshot: Snapshot, most: int, items: Snapshot | None = None) -> Sample:
        """What ingest would find in the rows of the slice, at most `most` of them.

        items: raw_items, in which the items of events are looked up.
        """
        contract, types = snapshot.contract, snapshot.types
        dated, rules = "dt" in contract.partition_by, tuple(rules_of(contract, types))
        found, good = Sample(), list[dict[str, Any]]()
        ids = Counter[str]()
        for raw in self._raw_rows(snapshot, list(types)):
            row = {c.name: cast(raw.get(c.name), types.get(c.name), c.type) for c in contract.columns}
            values = [(rule, raw[rule.column.name], row[rule.column.name]) for rule in rules]
            failed = [(rule.name, before) for rule, before, after in values if rule.fails(before, after)]
            if not self._is_of_slice(row, dated):
                continue
            if dated and not _is_on(row["dt"], row["event_time"]):
                failed.append(("event_time_is_within_dt", None))
            if contract.name == "raw_items":
                failed += _item_faults(row, self._config.ingest.image_embedding_length)
            for name, example in failed:
                found.add(name, example)
            if items and row["item_id"]:
                ids[row["item_id"]] += 1
            found.rows += 1
            found.refused += bool(failed)
            if not failed:
                good.append({name: row[name] for name in {"item_id", *contract.primary_key} & row.keys()})
            if found.rows == most:
                break
        unknown = self._unknown(items, set(ids)) if items else set()
        if unknown:
            found.add("item_id_is_known", min(unknown), sum(ids[i] for i in unknown))
        known = [row for row in good if row.get("item_id") not in unknown]
        keys = Counter(tuple(row[k] for k in contract.primary_key) for row in known)
        found.refused += len(good) - len(known)
        if contract.name != "raw_opt_outs" and (copies := len(known) - len(keys)):  # of opt-outs the earliest counts
            found.add("key_is_unique", ", ".join(map(str, keys.most_common(1)[0][0])), copies)
            found.refused += copies
        return found

    def _is_of_slice(self, row: dict[str, Any], dated: bool) -> bool:
        """Whether the row belongs to the slice; puts its date into `dt`."""
        if dated:
            row["dt"] = day_of(row["dt"], row["event_time"], self._first)
            return bool(row["dt"] == self._day.isoformat())
        valid_from = row.get("updated_at", row.get("opted_out_at"))
        return valid_from is None or bool(valid_from < midnight(self._day) + _DAY)

    def _raw_rows(self, snapshot: Snapshot, names: Sequence[str]) -> Iterator[dict[str, Any]]:
        columns = ", ".join(_value(snapshot, name) for name in names)
        dated = "dt" in snapshot.contract.partition_by
        where = f" WHERE {in_days(snapshot, self._day, self._day, missing=True)}" if dated else ""
        for values in self._query.run(f"SELECT {columns} FROM {snapshot.contract.name}{where}").rows:
            yield dict(zip(names, values, strict=True))

    def _unknown(self, items: Snapshot, ids: set[str]) -> set[str]:
        """Those of `ids` that no item has whose id and time can be read."""
        for raw in self._raw_rows(items, ["item_id", "updated_at"]):
            row = {
                name: cast(value, items.types[name], items.contract.column(name).type) for name, value in raw.items()
            }
            if row["updated_at"] is not None and self._is_of_slice(row, False):
                ids.discard(row["item_id"])
        return ids


def _is_on(day: str, micros: int | None) -> bool:
    start = midnight(date.fromisoformat(day))
    return micros is None or start <= micros < start + _DAY


def _item_faults(row: dict[str, Any], length: int) -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    vector = row.get("image_embedding") if length else None
    if vector is not None and len(vector) != length:
        found.append(("image_embedding_has_valid_length", len(vector)))
    if vector is not None and any(v is None or not abs(v) < float("inf") for v in vector):
        found.append(("image_embedding_is_finite", None))
    text = any(re.sub(r"[ \t\n\x0b\f\r]+", " ", row[name] or "").strip(" ") for name in _TEXTS)
    if not text and not row["image"] and not (row["image_uri"] or "").strip(" ") and vector is None:
        found.append(("item_has_content", None))
    return found


# ---- SQL ---------------------------------------------------------------------------------------------------------


def _name(snapshot: Snapshot, column: str) -> str:
    return '"' + snapshot.columns.get(column, column).replace('"', '""') + '"'


def _value(snapshot: Snapshot, column: str) -> str:
    """Our `column` in the form that `raw_values` takes."""
    name, kind = _name(snapshot, column), snapshot.types[column]
    forms: dict[str, Callable[[str], str]] = {
        "date": "CAST({} AS VARCHAR)".format,
        "timestamp": "arrow_cast({}, 'Int64')".format,
        "timestamp_ntz": "arrow_cast({}, 'Int64')".format,
        "binary": "length(encode({}, 'hex')) / 2".format,  # the engine does not measure binaries
        "decimal": "CAST({} AS VARCHAR)".format,
    }
    form = forms.get(bare_type(kind), str)
    return f'{form(name)} AS "{column}"'


def in_days(snapshot: Snapshot, start: date, end: date, *, missing: bool = False) -> str:
    """SQL: whether a row of a table with dates is of the days `start` to `end`; `missing`: or says no usable date.

    Of text and numbers that are no partition always true: only `raw_values` can read them.
    """
    name, kind = _name(snapshot, "dt"), snapshot.types["dt"]
    if kind in _TIME_TYPES:

        def literal(day: date) -> str:
            return f"DATE '{day}'" if kind == "date" else f"arrow_cast({midnight(day)}, '{_TIME_TYPES[kind]}')"

        known = f"{name} >= {literal(start)} AND {name} < {literal(end + timedelta(days=1))}"
        unusable = f"{name} IS NULL OR {name} < {literal(date.min)} OR {name} >= {literal(date.max)}"
        return f"({known} OR {unusable})" if missing else f"({known})"
    files = snapshot.select(start=start, end=end, undated=missing)
    texts = {f.partition.get(snapshot.columns.get("dt", "dt")) for f in files}
    listed = ", ".join("'" + text.replace("'", "''") + "'" for text in sorted(filter(None, texts)))
    if len(texts) > len(set(filter(None, texts))):  # no partition
        return "true"
    return f"(CAST({name} AS VARCHAR) IN ({listed or 'NULL'}){f' OR {name} IS NULL' if missing else ''})"


def is_true(snapshot: Snapshot, column: str) -> str:
    """SQL: whether our boolean `column` is true, whatever its type."""
    name, kind = _name(snapshot, column), snapshot.types[column]
    if kind == "boolean":
        return name
    if kind == "string":
        return f"lower(trim({name})) IN ({', '.join(repr(word) for word in YES)})"
    return f"{name} = 1"
