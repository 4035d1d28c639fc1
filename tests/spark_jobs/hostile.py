"""Raw tables in which each row is good but for one hostile value, and what has to become of it.

A mutant is a table, a column and a value. Its row carries a key of its own, unless the key is what is hostile. An event
whose hostile item_id is legal finds its item: the same value is an item_id in raw_items.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
from deltalake import write_deltalake

from gpl_core.config import Config, with_passthrough
from gpl_core.contracts.contract import Column, Contract, load_contract
from gpl_core.contracts.types import arrow_type
from tests.spark_jobs.tiny_lake import D, TinyLake, at

PASSTHROUGH = "feed.passthrough={price: double, note: string}"
EMBEDDING = "ingest.image_embedding_length=2"
EVENTS = {"raw_impressions": "impressions", "raw_candidates": "candidates", "raw_interactions": "interactions"}
TABLES = ("raw_items", *EVENTS, "raw_opt_outs")


def micros(offset: int, hour: float = 12.0) -> int:
    """A time on D + offset, as Parquet holds it."""
    return int(at(offset, hour).timestamp() * 1_000_000)


YEAR_1, YEAR_1582, YEAR_9999 = -62_135_596_800_000_000, -12_219_292_800_000_000, 253_402_300_799_999_999
TEXTS = (
    None, b"", b" ", b"\0", b"a\0", bytes(range(1, 32)), b"\x7f\xc2\x85\xe2\x80\xa8", "\u202egpj.exe".encode(),
    "👩\u200d👩\u200d👧".encode(), "e\u0301".encode(), "\ufeff\uffff".encode(), "\U0010ffff".encode(), b"\xed\xa0\x80",
    b"\xed\xa0\xbd\xed\xb8\x80", b"\xff\xfe", b"ok\xc3", b"\xc0\x80", b"null", b"NaN", b"-1", b"\\N", b"a,b\"c'd\\",
    b"'; DROP TABLE items; --", b'{"item_id": "a"}', b"../../etc/passwd", b"<script>alert(1)</script>", b"${jndi:x}",
    b"%2e%2e%00", b"file:///dev/zero", b"${spark.driver.host}", b"dt=2026-01-10/x", b"\r\n\t",
)  # fmt: skip
VALUES: dict[str, tuple[Any, ...]] = {
    "int": (None, 0, 1, 2, -1, 2**31 - 1, -(2**31)),
    "double": (None, -0.0, math.nan, math.inf, -math.inf, 5e-324, 1.7976931348623157e308, -1.7976931348623157e308),
    "boolean": (None, True, False),
    "timestamp": (
        None, 0, -1, -2, 1, YEAR_1, YEAR_1 - 1, YEAR_1582, YEAR_9999, YEAR_9999 + 1, 2**63 - 1, -(2**63), micros(0, 0),
        micros(0, 0) - 1, micros(1, 0) - 1, micros(1, 0), 2**31 * 1_000_000,
    ),
    "binary": (None, b"", b"\0", b"\x89PNG\r\n\x1a\n" + b"\0" * 1000, b"GIF89a", bytes(range(256))),
    "array<float>": (
        None, [], [1.0], [1.0, 2.0], [-0.0, 0.0], [math.nan, 1.0], [math.inf, 1.0], [None, 1.0], [3.4e38, 3.4e38],
        [1.0] * 3, [1.0] * 10_000,
    ),
}  # fmt: skip
CASTABLE = ("int", "double", "boolean", "timestamp")
# In columns of text where the contract has another type: what a cast may trip over.
WORDS = (
    None, b"", b" 1 ", b"1", b"0", b"true", b"yes", b"1e400", b"-1e400", b"9" * 400, b"0x10", b"1.5", b"12,50",
    "\uff11".encode(), b"1\0", b"NaN", b"Infinity", b"2026-01-10", b"2026-01-10 12:00:00", b"2026-01-10T12:00:00+25:00",
    b"2026-13-45", b"0000-00-00", b"+294247-01-10T04:00:54.775807Z", b"-290308-12-21", b"epoch", b"now", b"\xff",
)  # fmt: skip


@dataclass(frozen=True)
class Mutant:
    """One value in one column of a raw table."""

    table: str
    column: Column
    value: Any

    @property
    def is_later(self) -> bool:
        """Whether it is an item that becomes valid after D, which is no affair of D."""
        in_time = isinstance(self.value, int) and self.value >= micros(1, 0)
        return self.column.name == "updated_at" and in_time

    @property
    def fate(self) -> str:
        """`refused`, `written` or `later`, by the contract of the raw table; not of a word in place of a number."""
        column, value = self.column, self.value
        if value is None:
            return "written" if column.nullable else "refused"
        if column.name == "updated_at":
            return "later" if self.is_later else "written"
        if column.name == "event_time":
            return "written" if micros(0, 0) <= value < micros(1, 0) else "refused"
        if column.name == "withdrawn_at":
            return "written" if value >= -1 else "refused"
        return "refused" if self._is_bad() else "written"

    def _is_bad(self) -> bool:
        column, value = self.column, self.value
        if column.type == "string":
            try:
                text = value.decode()
            except UnicodeDecodeError:
                return True
            is_id = column.name in ("item_id", "user_id", "request_id", "channel", "kind")
            return len(text) > (column.max_length or len(text)) or (is_id and not text)
        if column.type == "binary":
            return len(value) > (column.max_length or 0)
        if column.type == "array<float>":
            return len(value) != 2 or not all(v is not None and math.isfinite(v) for v in value)
        if column.type == "double":
            return not math.isfinite(value)
        low = -math.inf if column.min is None else column.min
        return value < low or bool(column.allowed and str(value) not in column.allowed)


def contract_of(table: str, config: Config) -> Contract:
    """The contract of a raw table with what is passed through."""
    return with_passthrough(table, config) if table in ("raw_impressions", "raw_candidates") else load_contract(table)


def mutants(config: Config, huge: int, as_text: bool = False) -> Iterator[Mutant]:
    """Every hostile value in every column of every raw table; the longest text has `huge` characters."""
    for table in TABLES:
        for column in contract_of(table, config).columns:
            if column.name == "dt":
                continue
            values: tuple[Any, ...] = VALUES.get(column.type, TEXTS)
            if as_text:
                values = WORDS if column.type in CASTABLE else ()
            elif column.max_length is not None:
                letter = "é".encode() if column.type == "string" else b"x"
                values = (
                    *values,
                    letter * (column.max_length + 1),
                    *((letter * column.max_length,) * (len(letter) - 1)),
                )
                values = (*values, b"x" * huge) if column.type == "string" else values
            yield from (Mutant(table, column, value) for value in values)


def write_hostile(lake: TinyLake, made: list[Mutant], as_text: bool = False) -> None:
    """Write the raw tables: item `a`, and a row per mutant."""
    good = {
        "item_id": b"a", "request_id": b"r", "user_id": b"u", "event_time": micros(0), "position": 0, "clicked": 1,
        "is_random": False, "channel": b"popular", "recall_score": 0.5, "kind": b"cart", "price": 1.0, "note": b"n",
        "updated_at": micros(-1), "title": b"t", "description": b"d", "category": b"c", "brand": b"b", "image": b"x",
        "image_uri": b"", "image_embedding": [1.0, 0.0], "withdrawn_at": None, "opted_out_at": None, "dt": D,
    }  # fmt: skip
    written_as_text = {
        "event_time": b"2026-01-10 12:00:00", "position": b"0", "clicked": b"1", "is_random": b"false",
        "recall_score": b"0.5", "price": b"1.0", "updated_at": b"2026-01-09 12:00:00", "opted_out_at": None,
    } if as_text else {}  # fmt: skip
    own_key = {"raw_items": "item_id"}
    for table in TABLES:
        contract = contract_of(table, lake.config())
        rows = [{**good, **written_as_text}] if table == "raw_items" else []
        for number, mutant in enumerate(m for m in made if m.table == table):
            own = f"{table}-{number}".encode()  # the user's too: a click of each impression is an interaction
            row = {**good, **written_as_text, "user_id": own, own_key.get(table, "request_id"): own}
            rows.append({**row, mutant.column.name: mutant.value})
        columns = {c.name: _array([row[c.name] for row in rows], c, as_text) for c in contract.columns}
        if rows:
            write_deltalake(lake.lake.uri(table), pa.table(columns), partition_by=list(contract.partition_by) or None)


def _array(values: list[Any], column: Column, as_text: bool) -> pa.Array:
    if column.type == "string" or (as_text and column.type in CASTABLE):
        return pa.array(values, pa.binary()).view(pa.string())  # not checked, as by many a writer
    if column.type == "timestamp":
        return pa.array(values, pa.int64()).cast(pa.timestamp("us", "UTC"))
    return pa.array(values, arrow_type(column.type))


def refused_columns(lake: TinyLake) -> Counter[tuple[str, tuple[str, ...]]]:
    """(raw table, columns that its failed checks name) -> quarantined rows."""
    found: Counter[tuple[str, tuple[str, ...]]] = Counter()
    for table, failed, rows in lake.rows("quarantine", "source_table", "failed_checks", "occurrences"):
        found[table, tuple(sorted({c for check in failed for c in dict(check)["columns"]}))] += rows
    return found


def written_rows(lake: TinyLake) -> Counter[str]:
    """Raw table -> rows that ingest made of its mutants: without item a, and without the clicks among interactions."""
    found = Counter({raw: len(lake.rows(clean)) for raw, clean in EVENTS.items()})
    found["raw_items"] = len(lake.rows("items")) - 1
    found["raw_interactions"] -= sum(clicked for (clicked,) in lake.rows("impressions", "clicked"))
    return found


def unaccounted(lake: TinyLake, made: list[Mutant]) -> int:
    """Mutants that were neither written nor quarantined, or both."""
    left = Counter(m.table for m in made if m.table != "raw_opt_outs" and not m.is_later)
    left.subtract(written_rows(lake))
    for (table, _), rows in refused_columns(lake).items():
        left[table] -= rows if table != "raw_opt_outs" else 0
    return sum(map(abs, left.values()))
