"""`gpl check-raw` and ingest judge raw rows by the same rules: both are fed the same mutated tables and compared."""

from __future__ import annotations

import math
from collections import Counter
from datetime import date
from decimal import Decimal
from pathlib import Path
from random import Random
from typing import Any

import pyarrow as pa
import pytest
from deltalake import write_deltalake
from pyspark.sql import SparkSession

from gpl_core.contracts.contract import Column, Contract
from gpl_core.lakehouse.query import Query
from gpl_core.lakehouse.raw_sample import RawSample
from spark_jobs import ingest
from tests.spark_jobs.hostile import (
    EMBEDDING,
    EVENTS,
    PASSTHROUGH,
    WORDS,
    YEAR_1,
    YEAR_9999,
    contract_of,
    micros,
)
from tests.spark_jobs.tiny_lake import D, TinyLake, day

pytestmark = pytest.mark.spark

TABLES = ("raw_items", "raw_impressions", "raw_candidates", "raw_interactions", "raw_opt_outs")
ROWS, ITEMS = 60, 5  # rows per table; items that all events but the odd ones are of
_EPOCH = date(1970, 1, 1)
_NUMBERS = [0, 1, -1, 127, 2**24 - 1, 2**24 + 1, 12_345_701, 2**31, 2**53 - 1, 2**53 + 2, 2**63 - 1, 20_260_110]
_FRACTIONS = [*map(float, _NUMBERS), 0.5, -0.0, float("nan"), float("inf"), 1e300, 5e-324]
_TIMES = [
    micros(0, 0) - 1, micros(0, 0), micros(1, 0), micros(-5), 0, -1, YEAR_1, YEAR_1 - 1, YEAR_9999, 2**63 - 1, -(2**63)
]  # fmt: skip
_DAYS = [(day(n) - _EPOCH).days for n in (-1, 0, 1)] + [0, -719_162, -719_163, 2_932_896, 2_932_897]
_DATES = [
    "2026-01-10", "20260110", " 2026-01-10 ", "2026-01-10T23:30:00-01:00", "2026-01-10 00:30:00+01:00", "2026-01-10 12",
    "2026-01-10T12:00:00.123456789Z", "2026-01-10 24:00:00", "2026-02-30", "20260230", "2026-01-10 12:00 UTC", "foo",
]  # fmt: skip
# Arrow type -> odd values that a column of it may hold.
POOLS: dict[pa.DataType, list[Any]] = {
    pa.string(): [*(w.decode() for w in WORDS if w and w != b"\xff"), *_DATES, "", "1.0", "+1", "TRUE", "n", "-0"],
    pa.int8(): [v for v in _NUMBERS if -128 <= v < 128], pa.int32(): [v for v in _NUMBERS if -(2**31) <= v < 2**31],
    pa.int64(): _NUMBERS, pa.float32(): _FRACTIONS, pa.float64(): _FRACTIONS,
    pa.decimal128(20, 2): [Decimal(n) for n in (*_NUMBERS[:9], "0.50", "-1.00", "12.34", "1.00")],
    pa.bool_(): [True, False], pa.timestamp("us", "UTC"): _TIMES, pa.timestamp("us"): _TIMES, pa.date32(): _DAYS,
    pa.list_(pa.float32()): [[], [1.0], [math.nan, 1.0], [None, 1.0], [1.0] * 3], pa.binary(): [b"", b"\xff"],
}  # fmt: skip
_NUMERIC = [pa.int8(), pa.int32(), pa.int64(), pa.float32(), pa.float64(), pa.decimal128(20, 2)]
_TIMED = [pa.timestamp("us", "UTC"), pa.timestamp("us"), pa.date32(), pa.string()]
# Contract type -> Arrow types that are cast to it.
SOURCES = {
    **{to: [pa.string(), *_NUMERIC] for to in ("string", "int", "double")},
    "boolean": [pa.bool_(), pa.string(), *_NUMERIC], "timestamp": _TIMED, "date": [*_TIMED, pa.int32(), pa.int64()],
    "array<float>": [pa.list_(pa.float32())], "binary": [pa.binary()],
}  # fmt: skip


def good_value(column: Column, kind: pa.DataType, table: str, n: int) -> Any:
    """What row `n` has in `column`, of the type `kind`, when nothing is odd."""
    if column.type in ("timestamp", "date"):
        if pa.types.is_timestamp(kind):
            return micros(0)
        return (D - _EPOCH).days if pa.types.is_date32(kind) else "2026-01-10" if kind == pa.string() else 20_260_110
    if column.type in ("array<float>", "binary"):
        return [1.0, 0.0] if column.type == "array<float>" else b"x"
    number = n + 1
    if column.name in ("clicked", "is_random"):
        number = n % 2
    elif column.name == "item_id" and table != "raw_items":
        number = n % ITEMS + 1
    return str(number) if kind == pa.string() else Decimal(number) if pa.types.is_decimal(kind) else number


def array(values: list[Any], kind: pa.DataType) -> pa.Array:
    """Values as Parquet may hold them, those too that Python has no word for."""
    if pa.types.is_timestamp(kind):
        return pa.array(values, pa.int64()).cast(kind)
    if pa.types.is_date32(kind):
        return pa.array(values, pa.int32()).cast(kind)
    return pa.array([None if v is None else bool(v) for v in values] if kind == pa.bool_() else values, kind)


def raw_table(contract: Contract, random: Random) -> tuple[pa.Table, list[str]]:
    """Rows of which most have one odd value, in columns of types that are cast, some of them twice; its partitions."""
    kinds = {c.name: random.choice(SOURCES[c.type]) for c in contract.columns}
    partitions = ["dt"] if kinds.get("dt") in (pa.string(), pa.int32(), pa.int64()) or random.random() < 0.3 else []
    rows = []
    for n in range(ROWS):
        row = {c.name: good_value(c, kinds[c.name], contract.name, n) for c in contract.columns}
        column = random.choice(contract.columns)
        if (contract.name != "raw_items" or n >= ITEMS) and random.random() < 0.8:
            odd = POOLS[kinds[column.name]]
            if column.name == "dt" and partitions:  # values that a writer makes a folder of
                odd = {pa.string(): _DATES, pa.date32(): _DAYS[:3]}.get(kinds["dt"], odd)
                odd = _TIMES[:3] if pa.types.is_timestamp(kinds["dt"]) else odd
            row[column.name] = random.choice([*odd, None])
        rows += [row] * (1 if random.random() < 0.9 else 2)
    columns = {name: array([row[name] for row in rows], kind) for name, kind in kinds.items()}
    return pa.table(columns), partitions if "dt" in columns else []


def compare(root: Path, spark: SparkSession, random: Random) -> None:
    """What check-raw finds in mutated tables is what ingest quarantines."""
    lake = TinyLake(root, spark, PASSTHROUGH, EMBEDDING)
    config = lake.config()
    for name in TABLES:
        contract = contract_of(name, config)
        rows, partitions = raw_table(contract, random)
        write_deltalake(lake.lake.uri(name), rows, partition_by=partitions or None)
    assert lake.run("ingest", ingest.run) == "done"
    refused: Counter[tuple[str, str]] = Counter()
    for table, failed, rows in lake.rows("quarantine", "source_table", "failed_checks", "occurrences"):
        refused.update({(table, dict(check)["name"]): rows for check in failed})
    sample, found = RawSample(Query(lake.lake), config, D), Counter()
    items = lake.lake.open("raw_items")
    for name in TABLES:
        snapshot = lake.lake.open(name, contract=contract_of(name, config))
        checked = sample.check(snapshot, 10**6, items if name in EVENTS else None)
        found.update({(name, fault): rows for fault, (rows, _) in checked.faults.items()})
    assert found == refused
    assert len(found) > 15, "the tables are dense"


def test_check_raw_finds_what_ingest_quarantines(tmp_path, spark):
    compare(tmp_path, spark, Random(1))


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 2, 3, 4, 5])
def test_check_raw_finds_what_ingest_quarantines_in_many_tables(tmp_path, spark, seed):
    compare(tmp_path, spark, Random(seed))
