"""Contracts: what is declared once must come out the same everywhere, and bad rows must not pass."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpl_core.commands.tables import dictionary
from gpl_core.contracts import contract as contracts
from gpl_core.contracts.arrow_checks import check_batch
from gpl_core.contracts.contract import Column, Contract, all_contracts, load_contract, parse_contract
from gpl_core.contracts.types import arrow_type, spark_type
from gpl_core.errors import ContractError, UsageError
from tests.support import DIMS, data_table, legal_rows

NAMES = sorted(all_contracts())
NUMERIC = {"int", "long", "float", "double"}
# Any number is legal here: scores and figures of unknown scale, seeds, hashes.
FREE_NUMBERS = {
    ("candidates", "recall_score"), ("raw_candidates", "recall_score"), ("evaluations", "value"),
    ("evaluations", "low"), ("evaluations", "high"), ("evaluations", "seed"),
    *(("control_evaluations", name) for name in ("value", "low", "high", "seed")), ("training_feed", "shuffle_key"),
    *(("truth_metrics", name) for name in ("value", "low", "high", "seed")),
}  # fmt: skip


def make(*columns: Column, enforced: bool = True) -> Contract:
    return Contract("t", 1, "d", "o", "g", (columns[0].name,), (), ("analyst",), columns, enforced)


# ---- what is shipped -------------------------------------------------------------------------------------------


def test_every_file_is_named_after_its_table_and_version_is_a_positive_integer():
    files = {p.stem for p in Path(contracts.__file__).parents[2].joinpath("schemas").glob("*.yaml")}
    assert files == set(NAMES)
    assert all(isinstance(c.version, int) and c.version >= 1 for c in all_contracts().values())


@pytest.mark.parametrize("name", NAMES)
def test_every_column_says_what_it_holds(name):
    for column in load_contract(name).columns:
        assert len(column.comment) > 3, f"{name}.{column.name} has no comment"
        bounded = column.unit or column.allowed or column.min is not None or column.max is not None
        if column.type in NUMERIC and (name, column.name) not in FREE_NUMBERS:
            assert bounded, f"{name}.{column.name} has neither unit nor range"
        if column.type in ("timestamp", "date"):
            assert "UTC" in column.unit, f"{name}.{column.name} does not name its time zone"


@pytest.mark.parametrize("name", [n for n in NAMES if "gpu_worker" in load_contract(n).consumers] + ["training_feed"])
def test_tables_that_workers_read_hold_only_what_petastorm_reads(name):
    contract = load_contract(name)
    for column in contract.columns:
        assert not column.nullable, f"{name}.{column.name}: workers read no nulls"
        if column.name in contract.partition_by:
            continue
        kind = spark_type(arrow_type(column.type))
        if isinstance(kind, dict):
            assert kind["type"] == "array", f"{name}.{column.name}: no structs"
            assert kind["elementType"] in ("integer", "long", "float"), f"{name}.{column.name}: arrays of numbers only"
            assert column.length, f"{name}.{column.name}: arrays have one length"
        else:
            assert kind not in ("date", "timestamp"), f"{name}.{column.name}: times are int64 microseconds"


@pytest.mark.parametrize("name", NAMES)
def test_partition_columns_stand_last_as_delta_rs_and_spark_both_list_them(name):
    contract = load_contract(name)
    count = len(contract.partition_by)
    assert set(contract.column_names[len(contract.columns) - count :]) == set(contract.partition_by)
    assert all(contract.column(k).nullable is False for k in contract.primary_key)


@pytest.mark.parametrize("name", NAMES)
def test_legal_rows_pass(name):
    contract = load_contract(name)
    assert check_batch(contract, data_table(contract, legal_rows(contract, 20)), DIMS) == []


def test_the_data_dictionary_in_docs_is_up_to_date():
    committed = Path(__file__).parents[3].joinpath("docs", "tables.md")
    assert committed.read_text(encoding="utf-8") == dictionary() + "\n", (
        "docs/tables.md is out of date: run `gpl tables > docs/tables.md`"
    )


def test_the_data_dictionary_names_every_column_in_a_row_of_six_cells():
    rows = [line for line in dictionary().partition("# Views")[0].splitlines() if line.startswith("| ")]
    for contract in all_contracts().values():
        for column in contract.columns:
            assert any(line.startswith(f"| {column.name} |") and column.comment in line for line in rows)
    assert all(line.replace("\\|", "").count("|") == 7 for line in rows)


# ---- parsing ---------------------------------------------------------------------------------------------------

GOOD = """
name: t
version: 2
description: "d"
owner: o
grain: "g"
primary_key: [a]
partition_by: [dt]
consumers: [analyst]
columns:
  - {name: a, type: "int", nullable: false, comment: "c", min: 0}
  - {name: dt, type: "date", nullable: false, comment: "c"}
"""


def test_a_good_contract_parses():
    contract = parse_contract(GOOD, "t.yaml")
    assert (contract.version, contract.partition_by, contract.column("a").min) == (2, ("dt",), 0)


def test_everything_wrong_with_a_contract_is_listed_at_once():
    text = GOOD.replace("owner: o\n", "onwer: o\n").replace("[analyst]", "[analist]").replace(
        "columns:\n",
        'columns:\n  - {name: b, type: "array<nope>", nullable: false, comment: "c"}\n'
        '  - {name: c, type: "struct<x>", nullable: false, comment: "c"}\n'
        '  - {name: d, type: "int", nullabel: true, comment: "c"}\n',
    )  # fmt: skip
    with pytest.raises(ContractError) as caught:
        parse_contract(text, "t.yaml")
    message = str(caught.value)
    for part in (
        "t.yaml",
        "onwer",
        "owner: required",
        "analist",
        "'nope'",
        "columns.c",
        "struct",
        "nullabel",
        "columns.d.nullable: required",
    ):
        assert part in message, f"{part} is not named in: {message}"
    assert "names the unknown column" not in message, "a and dt are declared: no follow-up errors"


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (("primary_key: [a]", "primary_key: [zz]"), "zz"),
        (("partition_by: [dt]", "partition_by: [day]"), "day"),
        (("{name: dt", "{name: a"), "twice"),
        (("version: 2", "version: two"), "version"),
        (('nullable: false, comment: "c", min: 0', 'nullable: maybe, comment: "c", min: 0'), "nullable"),
        (("min: 0", "min: zero"), "min"),
        (("name: t\n", "- name: t\n"), "t.yaml"),
        ((GOOD, ""), "t.yaml"),
    ],
)
def test_a_wrong_contract_is_refused_by_name(change, named):
    with pytest.raises(ContractError, match=named):
        parse_contract(GOOD.replace(*change), "t.yaml")


def test_an_unknown_table_or_column_names_the_known_ones():
    with pytest.raises(UsageError, match=r"no contract for table 'itmes'.*items"):
        load_contract("itmes")
    with pytest.raises(ContractError, match=r"no column 'itm'.*item_index"):
        load_contract("items").column("itm")


@pytest.mark.parametrize(
    ("text", "arrow"),
    [
        ("array<array<int>>", pa.list_(pa.list_(pa.int32()))),
        ("struct<a:int,b:array<struct<c:string,d:double>>>",
         pa.struct([("a", pa.int32()), ("b", pa.list_(pa.struct([("c", pa.string()), ("d", pa.float64())])))])),
    ],
)  # fmt: skip
def test_nested_types_come_out_alike(text, arrow):
    contract = make(Column("x", text, False, "c"))
    assert contract.arrow_schema().field("x").type == arrow


WRONG_TYPES = ["", "nope", "array<>", "array<int", "struct<>", "struct<a>", "struct<a:>", "map<a,b>"]


@pytest.mark.parametrize("text", WRONG_TYPES)
def test_an_unknown_type_is_refused_with_the_known_ones(text):
    with pytest.raises(ValueError, match="known: string"):
        arrow_type(text)


def test_passthrough_columns_stand_before_the_partition_and_may_not_clash():
    feed = load_contract("training_feed")
    wider = feed.with_columns((Column("price", "double", True, "Price"),))
    assert wider.column_names[-2:] == ("price", "dt")
    with pytest.raises(UsageError, match="label"):
        feed.with_columns((Column("label", "double", True, "x"),))


# ---- row checks, against a loop over Python values -------------------------------------------------------------

FLOATS = st.one_of(
    st.none(), st.floats(-3, 3, width=32), st.sampled_from([math.nan, math.inf, -math.inf, 0.0, -0.0, 1.0, -1.0])
)
COLUMNS = (
    Column("f", "double", False, "c", min=-1, max=1),
    Column("g", "double", True, "c", min=0),
    Column("i", "int", False, "c", min=0, max=5),
    Column("s", "string", False, "c", allowed=("x", "y")),
    Column("n", "int", True, "c", allowed=("0", "1")),
    Column("v", "array<float>", False, "c", length="d"),
    Column("w", "array<int>", False, "c", length="open"),
)
ROW = st.fixed_dictionaries(
    {
        "f": FLOATS,
        "g": FLOATS,
        "i": st.one_of(st.none(), st.integers(-2, 8)),
        "s": st.one_of(st.none(), st.sampled_from(["x", "y", "", "X", "z"])),
        "n": st.one_of(st.none(), st.integers(-1, 2)),
        "v": st.one_of(st.none(), st.lists(FLOATS, max_size=4)),
        "w": st.one_of(st.none(), st.lists(st.one_of(st.none(), st.integers(-1, 1)), max_size=2)),
    }
)


def slow_checks(rows: list[dict]) -> dict[str, int]:
    """`column/kind` -> rows (elements, for elements) that break it, one value at a time."""
    found: dict[str, int] = {}

    def note(key: str) -> None:
        found[key] = found.get(key, 0) + 1

    first = next((len(r["w"]) for r in rows if r["w"] is not None), 0)
    for row in rows:
        for column in COLUMNS:
            value = row[column.name]
            if value is None:
                if not column.nullable:
                    note(f"{column.name}/not null")
                continue
            if isinstance(value, list):
                if len(value) != (3 if column.name == "v" else first):
                    note(f"{column.name}/length")
                for element in value:
                    if element is None:
                        note(f"{column.name}/no null element")
                    elif not math.isfinite(element):
                        note(f"{column.name}/finite")
                continue
            if isinstance(value, float) and not math.isfinite(value):
                note(f"{column.name}/finite")
            if column.allowed and str(value) not in column.allowed:
                note(f"{column.name}/one of")
            if column.min is not None and value < column.min:
                note(f"{column.name}/>=")
            if column.max is not None and value > column.max:
                note(f"{column.name}/<=")
    return found


def kind_of(check: str) -> str:
    known = ("not null", "no null element", "finite", "one of", ">=", "<=")
    return "length" if "array length" in check else next(k for k in known if check.startswith(k))


@settings(max_examples=200, deadline=None)
@given(st.lists(ROW, max_size=6), st.booleans())
def test_row_checks_equal_a_loop_over_the_values(rows, chunked):
    contract = make(*COLUMNS)
    table = pa.Table.from_pylist(rows, schema=contract.arrow_schema())
    if chunked and len(rows) > 1:
        table = pa.concat_tables([table.slice(0, 1), table.slice(1)])
    form = re.compile(r"(\w+): (\d+) rows? broke '(.*)', e\.g\. .*")
    said = [form.fullmatch(words) for words in check_batch(contract, table, {"d": 3})]
    found = {f"{match[1]}/{kind_of(match[3])}": int(match[2]) for match in said}
    assert found == slow_checks(rows)


def test_a_violation_names_column_count_value_and_check():
    contract = make(COLUMNS[2])
    (violation,) = check_batch(contract, pa.table({"i": pa.array([1, 9, 7], pa.int32())}))
    assert violation == "i: 2 rows broke '<= 5', e.g. 9"


@pytest.mark.parametrize(
    ("table", "named"),
    [
        ({"x": pa.array([1], pa.int32())}, "'i' .* is missing"),
        ({"i": pa.array([1], pa.int64())}, "'i' is int64, expected int32"),
        ({"i": pa.array([1], pa.int32()), "x": pa.array([1])}, "'x' is not in the contract"),
    ],
)
def test_a_batch_of_another_shape_is_refused(table, named):
    with pytest.raises(ContractError, match=named):
        check_batch(make(COLUMNS[2]), pa.table(table))


def test_slices_of_larger_arrays_are_checked_by_their_own_rows():
    contract = make(COLUMNS[5], COLUMNS[2])
    table = pa.table(
        {"v": [[math.nan] * 3, [1.0] * 3, [1.0]], "i": pa.array([-1, 1, 9], pa.int32())},
        schema=contract.arrow_schema(),
    )
    assert check_batch(contract, table.slice(1, 1), {"d": 3}) == []
    assert check_batch(contract, table.to_batches()[0].slice(1, 1), {"d": 3}) == []
