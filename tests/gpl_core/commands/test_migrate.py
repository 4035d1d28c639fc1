"""`gpl migrate`: a table is brought from version 1 to 2 as its contract declares; any other drift is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from gpl_core.cli import main
from gpl_core.commands import migrate as module
from gpl_core.commands.migrate import Migrated, migrate
from gpl_core.contracts.contract import Column, Contract, Migration, load_contract, parse_contract
from gpl_core.errors import ConflictError, ContractError
from gpl_core.graph.job_runs import JobRun
from gpl_core.lakehouse.commit import transact
from gpl_core.lakehouse.lake import Lake
from tests.support import DAY, ONE, config_file, put, small_config

ONE_COLUMNS = (
    Column("user_id", "string", False, "User"),
    Column("clicks", "int", False, "Clicks", min=0),
    Column("mood", "string", False, "Gone in version 2", allowed=("good", "bad")),
    Column("dt", "date", False, "Date", unit="UTC date"),
)
V1 = Contract("user_stats", 1, "d", "sequences", "g", ("user_id",), ("dt",), ("analyst",), ONE_COLUMNS)
V2 = replace(
    V1,
    version=2,
    columns=(
        ONE_COLUMNS[0],
        Column("positives", "long", False, "Called clicks before", min=0, max=9),
        Column("source", "string", False, "New", allowed=("web", "app")),
        Column("note", "string", True, "New, may be null"),
        ONE_COLUMNS[3],
    ),
    migrations=(Migration(2, rename={"clicks": "positives"}, add={"source": "web"}, drop=("mood",)),),
)
ROWS = {
    DAY: [{"user_id": "a", "clicks": 1, "mood": "good"}, {"user_id": "b", "clicks": 2, "mood": "bad"}],
    DAY + ONE: [{"user_id": "c", "clicks": 3, "mood": "good"}],
}


@pytest.fixture
def lake(tmp_path) -> Lake:
    """user_stats as version 1 wrote it: two dates, three files."""
    made = Lake(str(tmp_path / "lake"))
    for day, rows in ROWS.items():
        put(made, "user_stats", [{**r, "dt": day} for r in rows], day=day, contract=V1, file_rows=1)
    return made


def as_it_was(lake: Lake) -> bool:
    return lake.open("user_stats", contract=V1).read().num_rows == 3


def test_from_version_1_to_2_with_every_row_and_both_dates(lake):
    assert migrate(lake, V2, {}, dry_run=True).rows == 3
    assert as_it_was(lake)
    with pytest.raises(
        ContractError, match=r"(?s)version 1, this code reads version 2; run `gpl migrate`.*'positives'"
    ):
        lake.open("user_stats", contract=V2)

    done = migrate(lake, V2, {})
    assert (done.before, done.after, done.files, done.rows) == (1, 2, 3, 3)
    snapshot = lake.open("user_stats", contract=V2)
    assert sorted(map(tuple, (r.values() for r in snapshot.read().to_pylist()))) == [
        ("a", 1, "web", None, DAY), ("b", 2, "web", None, DAY), ("c", 3, "web", None, DAY + ONE),
    ]  # fmt: skip
    assert {pq.ParquetFile(u).schema_arrow.field("positives").type for u in snapshot.uris(snapshot.files)} == {
        V2.arrow_schema().field("positives").type
    }, "the files themselves, for readers without Delta"
    checks = {k: v for k, v in snapshot.properties.items() if k.startswith("delta.constraints.")}
    assert checks == {f"delta.constraints.{n}": sql for n, sql in V2.checks().items()}
    assert snapshot.mark(DAY.isoformat(), "sequences") is not None, "the mark still says who wrote the slice"
    assert snapshot._table.metadata().partition_columns == ["dt"]
    with pytest.raises(ContractError, match="was written under contract version 2, this code reads version 1"):
        lake.open("user_stats", contract=V1)
    assert migrate(lake, V2, {}) is None
    put(lake, "user_stats", [{"user_id": "d", "positives": 4, "source": "app", "note": "n", "dt": DAY}], contract=V2)
    assert lake.open("user_stats", contract=V2).read().num_rows == 2


def test_killed_between_the_rows_and_the_version_it_continues_there(lake, monkeypatch):
    def killed(*given):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module, "_stamp", killed)
        with pytest.raises(KeyboardInterrupt):
            migrate(lake, V2, {})
    for contract in (V1, V2):  # neither release touches it meanwhile
        with pytest.raises(ContractError):
            lake.open("user_stats", contract=contract)
    assert migrate(lake, V2, {}).files == 0, "the rows are there already"
    assert lake.open("user_stats", contract=V2).read().num_rows == 3


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"migrations": ()}, r"declares no migration from there to version 2 \(migrations to none\)"),
        ({"version": 3}, r"no migration from there to version 3 \(migrations to \[2\]\)"),
        ({"migrations": (Migration(2, rename={"clicks": "positives"}, add={"source": "web"}),)},
         r"do not cover the columns \['mood'\]"),
        ({"migrations": (Migration(2, rename={"clicks": "positives"}, drop=("mood",)),)}, r"do not add \['source'\]"),
        ({"migrations": (Migration(2, rename={"clicks": "positives"}, add={"source": "fax"}, drop=("mood",)),)},
         r"source: 1 row broke 'one of web, app', e.g. 'fax'; nothing was changed"),
        ({"migrations": (Migration(2, rename={"user_id": "positives", "clicks": "user_id"}, add={"source": "web"},
                                   drop=("mood",)),)},
         r"column 'positives' \(string\) cannot become int64"),
    ],
)  # fmt: skip
def test_what_is_not_declared_or_does_not_fit_changes_nothing(lake, change, said):
    files = {p for p in Path(lake.uri("user_stats")).rglob("*.parquet")}
    with pytest.raises(ContractError, match=said):
        migrate(lake, replace(V2, **change), {})
    assert as_it_was(lake)
    assert {p for p in Path(lake.uri("user_stats")).rglob("*.parquet")} == files, "no orphans"


def test_a_type_alone_may_change(lake):
    columns = tuple(replace(c, type="long") if c.name == "clicks" else c for c in ONE_COLUMNS)
    wider = replace(V1, version=2, columns=columns, migrations=(Migration(2),))
    assert migrate(lake, wider, {}).rows == 3
    assert sorted(lake.open("user_stats", contract=wider).read()["clicks"].to_pylist()) == [1, 2, 3]


@pytest.mark.parametrize(("table", "code", "said"), [
    ("raw_items", 2, "'raw_items' is not a table of gpl; did you mean items?"),
    ("items", 4, "table items"),
])  # fmt: skip
def test_a_table_that_cannot_be_migrated_is_named(tmp_path, capsys, table, code, said):
    assert main(["migrate", "--config", str(config_file(tmp_path)), table]) == code
    assert said in capsys.readouterr().err


def test_an_interruption_after_the_commit_keeps_the_new_version(lake, monkeypatch):
    def interrupted(*given, **named):
        transact(*given, **named)
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "transact", interrupted)
    with pytest.raises(KeyboardInterrupt):
        migrate(lake, V2, {})
    assert migrate(lake, V2, {}) == Migrated(1, 2), "only the version was left to set"
    assert lake.open("user_stats", contract=V2).read().num_rows == 3


def test_a_value_that_the_new_range_refuses_is_named(lake):
    put(lake, "user_stats", [{"user_id": "z", "clicks": 10, "mood": "bad", "dt": DAY}], contract=V1, mode="append")
    with pytest.raises(ContractError, match=r"positives: 1 row broke '<= 9', e.g. 10"):
        migrate(lake, V2, {})


def test_two_versions_at_once(lake):
    """Version 3 renames what version 2 made."""
    columns = tuple(replace(c, name="kind") if c.name == "source" else c for c in V2.columns)
    v3 = replace(V2, version=3, columns=columns, migrations=(*V2.migrations, Migration(3, rename={"source": "kind"})))
    assert migrate(lake, v3, {}).after == 3
    assert set(lake.open("user_stats", contract=v3).read().column("kind").to_pylist()) == {"web"}


def test_passthrough_columns_are_kept(tmp_path):
    lake = Lake(str(tmp_path))
    price = Column("price", "double", True, "Passed through")
    put(lake, "user_stats", [{**ROWS[DAY][0], "price": 2.5, "dt": DAY}], contract=V1.with_columns((price,)))
    with pytest.raises(ContractError, match=r"do not cover the columns \['price'\]"):
        migrate(lake, V2, {})
    migrate(lake, V2, {"price": "double"})
    found = lake.open("user_stats", contract=V2.with_columns((price,))).read()
    assert found.column("price").to_pylist() == [2.5]


def test_nothing_is_migrated_under_a_running_step(lake):
    JobRun(lake, "sequences", DAY, "night").begin()
    with pytest.raises(ContractError, match=r"according to job_runs, sequences is still running.*--ended RUN_ID"):
        migrate(lake, V2, {})
    assert migrate(lake, V2, {}, ended=["night"]) is not None


def test_a_concurrent_writer_is_reported_and_nothing_changes(lake, monkeypatch):
    rewritten = module._rewritten

    def slow(*given):
        put(lake, "user_stats", [{"user_id": "z", "clicks": 1, "mood": "bad", "dt": DAY}], contract=V1, mode="append")
        return rewritten(*given)

    monkeypatch.setattr(module, "_rewritten", slow)
    with pytest.raises(ConflictError, match="another run wrote it in the meantime; run gpl migrate again"):
        migrate(lake, V2, {})
    assert lake.open("user_stats", contract=V1).version > 2


@pytest.mark.parametrize(("moment", "conflict"), [("_rewrite_all", True), ("_stamp", False), ("_add_columns", True)])
def test_of_two_migrations_at_once_one_does_the_work(lake, monkeypatch, moment, conflict):
    """The other one takes place when this one has looked, before one of its commits."""
    contract = V2 if moment != "_add_columns" else replace(V1, columns=(*ONE_COLUMNS, V2.columns[3]))
    real, others = getattr(module, moment), []

    def overtaken(*given):
        if not others:
            others.append(None)
            others[0] = migrate(lake, contract, {})
        return real(*given)

    monkeypatch.setattr(module, moment, overtaken)
    if conflict:
        with pytest.raises(ConflictError, match=r"user_stats: another run wrote it in the meantime; run gpl migrate"):
            migrate(lake, contract, {})
    else:
        assert migrate(lake, contract, {}).rows == 3
    assert others[0] is not None
    assert lake.open("user_stats", contract=contract).read().num_rows == 3
    assert migrate(lake, contract, {}) is None


def test_new_nullable_columns_are_added_in_place(tmp_path, capsys):
    """A job_runs table from before steps recorded their cost."""
    lake, contract = Lake(small_config(tmp_path).lakehouse.root), load_contract("job_runs")
    old = replace(contract, columns=tuple(c for c in contract.columns if c.name not in ("core_seconds", "bytes_in")))
    put(lake, "job_runs", 2, contract=old, mode="append")
    assert lake.open("job_runs").read().column("bytes_in").null_count == 2, "it can be read as it is"
    assert main(["migrate", "--config", str(config_file(tmp_path)), "job_runs"]) == 0
    assert "job_runs: columns added: core_seconds, bytes_in" in capsys.readouterr().out
    assert {"core_seconds", "bytes_in"} <= {f.name for f in lake.open("job_runs")._table.schema().fields}
    put(lake, "job_runs", 1, mode="append")
    assert lake.open("job_runs").read().num_rows == 3
    assert main(["migrate", "--config", str(config_file(tmp_path))]) == 0
    assert "every table matches the current contract" in capsys.readouterr().out


def test_drift_without_a_new_version_is_refused_column_by_column(lake):
    columns = (ONE_COLUMNS[0], replace(ONE_COLUMNS[1], type="double"), Column("age", "int", False, "x"), ONE_COLUMNS[3])
    said = r"(?s)drifted from contract version 1:.*'clicks' is integer, expected double.*missing column 'age' .integer"
    with pytest.raises(ContractError, match=said):
        lake.open("user_stats", contract=replace(V1, columns=columns))


def test_a_contract_declares_its_migrations_in_its_yaml():
    text = """
name: t
version: 2
description: d
owner: o
grain: g
primary_key: [a]
partition_by: []
consumers: [analyst]
columns:
  - {name: a, type: int, nullable: false, comment: "A number"}
migrations:
  - {to: 2, rename: {b: a}, add: {c: 1}, drop: [d]}
"""
    assert parse_contract(text, "t.yaml").migrations == (Migration(2, {"b": "a"}, {"c": 1}, ("d",)),)
    with pytest.raises(ContractError, match=r"migrations\.0\.to: required.*migrations\.0\.rnm: unknown key"):
        parse_contract(text.replace("to: 2, rename", "rnm"), "t.yaml")


def test_an_anchor_cache_of_version_1_keeps_its_rows_and_is_passed_over(tmp_path):
    """Its rows have no prefixes; the added value matches no configured number, so they are generated again."""
    now = load_contract("interest_anchors")
    new = ("prefixes", "prefix_log_probs")
    old = replace(now, version=1, columns=tuple(c for c in now.columns if c.name not in new), migrations=())
    lake = Lake(str(tmp_path / "lake"))
    row = {"user_id": "a", "sequence_hash": "h", "anchor_sids": [1, 2, 3] * 2, "log_prob": [-1.0] * 2,
           "anchor_count": 2, "sid_version": "s", "model_version": "m", "dt": DAY}  # fmt: skip
    put(lake, "interest_anchors", [row], day=DAY, contract=old, partition={"model_version": "m"})
    with pytest.raises(ContractError, match="gpl migrate"):
        lake.open("interest_anchors").read()
    assert migrate(lake, now, {}).rows == 1
    (found,) = lake.open("interest_anchors").read().to_pylist()
    assert {n: found[n] for n in ("user_id", "log_prob", *new)} == {
        "user_id": "a", "log_prob": [-1.0] * 2, "prefixes": [-1], "prefix_log_probs": [-100.0],
    }  # fmt: skip
