"""Both engines agree on every declared column: what one writes the other reads, comments, constraints and marks too.

A Spark statement costs more than it proves, so all columns of all contracts stand side by side in one wide table
(`items__title`, …), made by Spark and by delta-rs; a few contracts of special shape are tried as they are.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

import pytest

from gpl_core.contracts.contract import CONTRACT_NAME, CONTRACT_VERSION, Column, Contract, all_contracts, load_contract
from gpl_core.errors import ContractError
from gpl_core.lakehouse.lake import Lake
from gpl_core.lakehouse.marks import SliceMark
from gpl_core.lakehouse.snapshot import Snapshot
from tests.support import DAY, data_table, default_partition, legal_rows, partition_text, put

pytestmark = pytest.mark.spark

WIDE = Contract(
    name="wide", version=3, description="All columns; it's \"quoted\"", owner="tests", grain="one row",
    primary_key=("dt",), partition_by=("dt",), consumers=("analyst",),
    columns=(
        *(replace(c, name=f"{name}__{c.name}") for name, t in all_contracts().items() for c in t.columns),
        load_contract("truth").column("dt"),
    ),
)  # fmt: skip
# Two partition columns, one of them a string; no partition and nothing enforced.
SPECIAL = ("worker_rejects", "raw_items")
CONTRACTS = {"wide": WIDE, **{n: load_contract(n) for n in SPECIAL}}
MARK = SliceMark("spark", {DAY.isoformat(): "fp"}, "run", {"text": "ключ \"'\\"})


@dataclass
class Lakes:
    """`by_spark` holds tables that Spark created, `by_arrow` those that delta-rs created; both hold both's rows."""

    spark: Any
    by_spark: Lake
    by_arrow: Lake

    @property
    def both(self) -> tuple[Lake, Lake]:
        return self.by_spark, self.by_arrow

    def open(self, lake: Lake, name: str) -> Snapshot:
        return lake.open(name, contract=CONTRACTS[name])

    def frame(self, name: str, rows: list[dict]) -> Any:
        """`rows` as a DataFrame of exactly the contract's schema."""
        from spark_jobs.step import spark_schema

        schema = spark_schema(CONTRACTS[name])
        for field in schema:
            field.nullable = True  # a frame that promises "no nulls" is believed, not checked
        return self.spark.createDataFrame([tuple(r[f.name] for f in schema) for r in rows], schema)

    def append(self, lake: Lake, name: str, rows: list[dict]) -> None:
        """Append `rows` with Spark."""
        writer = self.frame(name, rows).coalesce(1).write.format("delta").mode("append")
        writer.option("userMetadata", MARK.to_json()).save(lake.uri(name))

    def read(self, lake: Lake, name: str) -> list[dict]:
        """All rows, read with Spark."""
        return [row.asDict(recursive=True) for row in self.spark.read.format("delta").load(lake.uri(name)).collect()]


def of_spark(name: str) -> list[dict]:
    return legal_rows(CONTRACTS[name], 4, seed=2)


def of_arrow(name: str) -> list[dict]:
    return legal_rows(CONTRACTS[name], 5, seed=1)


def create_by_spark(spark: Any, location: str, contract: Contract) -> None:
    """As earlier versions created tables: with Spark."""
    from delta.tables import DeltaTable

    from spark_jobs.step import spark_schema

    table = DeltaTable.createIfNotExists(spark).location(location).addColumns(spark_schema(contract))
    table = table.comment(contract.description).partitionedBy(*contract.partition_by)
    for name, value in contract.table_properties().items():
        table = table.property(name, value)
    table.execute()


@pytest.fixture(scope="module")
def lakes(spark, tmp_path_factory) -> Lakes:
    """Each engine makes its tables; delta-rs writes to its own, then Spark to both, then delta-rs to Spark's."""
    made = Lakes(spark, Lake(str(tmp_path_factory.mktemp("spark"))), Lake(str(tmp_path_factory.mktemp("arrow"))))
    for name, contract in CONTRACTS.items():
        create_by_spark(spark, made.by_spark.uri(name), contract)
        put(made.by_arrow, name, of_arrow(name), mode="append", contract=contract)
        made.append(made.by_spark, name, of_spark(name))
        made.append(made.by_arrow, name, of_spark(name))
        put(made.by_spark, name, of_arrow(name), mode="append", contract=contract)
    return made


def comparable(rows: list[dict]) -> list[str]:
    """Rows as text in one order; times as numbers, binary as bytes."""

    def plain(value: Any) -> Any:
        if isinstance(value, bytearray):
            return bytes(value)
        if isinstance(value, datetime):
            return value.timestamp()
        if isinstance(value, dict):
            return {k: plain(v) for k, v in sorted(value.items())}
        return [plain(v) for v in value] if isinstance(value, list) else value

    return sorted(repr(plain(row)) for row in rows)


@pytest.mark.parametrize("name", CONTRACTS)
def test_what_one_engine_writes_the_other_reads_back_equal(lakes, name):
    expected = comparable(of_spark(name) + of_arrow(name))
    for lake in lakes.both:
        assert comparable(lakes.open(lake, name).read().to_pylist()) == expected
        assert comparable(lakes.read(lake, name)) == expected


@pytest.mark.parametrize("name", CONTRACTS)
def test_both_engines_see_the_declared_columns_whoever_made_the_table(lakes, name):
    from spark_jobs.step import spark_schema

    contract = CONTRACTS[name]
    wanted = [(f.name, f.dataType.simpleString(), f.metadata["comment"]) for f in spark_schema(contract)]
    for lake in lakes.both:
        found = lakes.spark.read.format("delta").load(lake.uri(name)).schema
        assert [(f.name, f.dataType.simpleString(), f.metadata.get("comment")) for f in found] == wanted
        snapshot = lakes.open(lake, name)
        fields = snapshot._table.schema().fields
        assert [(f.name, f.metadata.get("comment")) for f in fields] == [(n, comment) for n, _, comment in wanted]
        assert {f.name: f.nullable for f in fields} == {c.name: contract.is_nullable(c) for c in contract.columns}
        assert snapshot._table.metadata().partition_columns == list(contract.partition_by)
        assert snapshot._table.metadata().description == contract.description
        assert (snapshot.properties[CONTRACT_NAME], snapshot.properties[CONTRACT_VERSION]) == (
            name, str(contract.version),
        )  # fmt: skip
        expected = contract.table_properties()
        assert {k: v for k, v in snapshot.properties.items() if k in expected} == expected


def test_spark_parses_the_schema_and_constraints_of_every_contract(spark):
    from spark_jobs.step import spark_schema

    parser = spark._jsparkSession.sessionState().sqlParser()
    for contract in all_contracts().values():
        assert spark.createDataFrame([], spark_schema(contract)).columns == list(contract.column_names)
        for check in contract.checks().values():
            parser.parseExpression(check)


def test_a_mark_of_spark_is_read_through_delta_rs_and_the_reverse(lakes):
    for lake in lakes.both:
        version, mark = lakes.open(lake, "worker_rejects").mark(DAY.isoformat(), "spark")
        assert mark == MARK
        history = lakes.spark.sql(f"DESCRIBE HISTORY delta.`{lake.uri('worker_rejects')}`").collect()
        texts = {row["version"]: row["userMetadata"] for row in history}
        assert SliceMark.from_json(texts[version]) == mark
        other, by_hand = lakes.open(lake, "worker_rejects").mark(DAY.isoformat(), "workers")
        assert SliceMark.from_json(texts[other]) == by_hand


def test_rows_and_sizes_of_files_of_both_engines_stand_in_the_log(lakes):
    for lake in lakes.both:
        snapshot = lakes.open(lake, "wide")
        assert sorted(f.rows for f in snapshot.files) == [4, 5]
        assert {f.partition["dt"] for f in snapshot.files} == {DAY.isoformat()}
        assert all(f.size > 0 for f in snapshot.files)


# ---- constraints -----------------------------------------------------------------------------------------------


def bad_values(column: Column) -> list[Any]:
    """Values outside the range of `column`: NaN where the range has an upper end, text and bytes that are too long."""
    if column.allowed:
        return ["nonsense"] if column.type == "string" else [99]
    floating = column.type in ("float", "double")
    bad: list[Any] = [] if column.min is None else [column.min - 1]
    if column.max is not None:
        bad += [column.max + 1] + ([float("nan")] if floating else [])
    if column.max_length is not None:
        bad.append(("x" if column.type == "string" else b"x") * (column.max_length + 1))
    return [float(v) for v in bad] if floating else bad


def full_row(contract: Contract) -> dict:
    """A legal row without nulls: a CHECK lets a null pass."""
    return legal_rows(replace(contract, columns=tuple(replace(c, nullable=False) for c in contract.columns)), 1)[0]


def test_every_range_is_a_constraint_of_the_table_that_spark_evaluates_to_no_for_bad_values(lakes):
    checks = WIDE.checks()
    assert len(checks) == sum(1 for c in WIDE.columns if bad_values(c))
    for lake in lakes.both:
        properties = lakes.open(lake, "wide").properties
        assert {k[18:]: v for k, v in properties.items() if k.startswith("delta.constraints.")} == checks
    good = full_row(WIDE)
    most = max(len(bad_values(c)) for c in WIDE.columns)
    bad = [
        {**good, **{c.name: values[min(i, len(values) - 1)] for c in WIDE.columns if (values := bad_values(c))}}
        for i in range(most)
    ]
    frame = lakes.frame("wide", [good, *bad])
    passed, *refused = frame.selectExpr(*[f"({sql}) AS {n}" for n, sql in checks.items()]).collect()
    assert all(passed), passed
    for row in refused:
        assert not any(row), [n for n, held in row.asDict().items() if held]


@pytest.mark.parametrize("made_by", ["by_spark", "by_arrow"])
@pytest.mark.parametrize(
    ("column", "value", "named"),
    [
        ("job_runs__status", "nonsense", "job_runs__status_in_range"),
        ("pseudo_labels__pseudo_label", float("nan"), "pseudo_labels__pseudo_label_in_range"),
        ("item_sids__issue", -1, "item_sids__issue_in_range"),
        ("items__title", None, "items__title"),
    ],
)
def test_spark_refuses_a_bad_row_whoever_made_the_table(lakes, made_by, column, value, named):
    lake = getattr(lakes, made_by)
    version = lakes.open(lake, "wide").version
    good = full_row(WIDE)
    with pytest.raises(Exception, match="(?i)check constraint|not null") as caught:  # noqa: RUF043
        lakes.append(lake, "wide", [good, {**good, column: value}])
    assert named in str(caught.value)
    assert lakes.open(lake, "wide").version == version


def test_our_row_checks_refuse_what_the_constraints_would(tmp_path):
    """delta-rs does not apply CHECK constraints to the files that a transaction adds."""
    lake, good = Lake(str(tmp_path)), full_row(WIDE)
    for column in WIDE.columns:
        narrow = replace(WIDE, columns=(column, WIDE.column("dt"))) if column.name != "dt" else WIDE
        for value in bad_values(column):
            writer = lake.writer(narrow, partition_text(default_partition(WIDE)), dims={})
            with pytest.raises(ContractError, match=f"{column.name}: 1 row"), writer:
                writer.write(data_table(narrow, [good, {**good, column.name: value}]))


def test_delta_rs_reads_the_same_schema_text_as_spark():
    from deltalake import Schema
    from pyspark.sql.types import StructType

    for contract in all_contracts().values():
        text = contract.spark_json()
        assert StructType.fromJson(json.loads(text)).fieldNames() == [f.name for f in Schema.from_json(text).fields]
