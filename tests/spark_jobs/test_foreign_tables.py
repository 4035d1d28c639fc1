"""Raw tables with what other engines write of Delta: each is read as a plain one is, by Spark and without it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import pytest
from delta.tables import DeltaTable, IdentityGenerator
from pyspark.sql import SparkSession

from gpl_core.commands.check_raw import check_raw
from gpl_core.commands.forget import forget
from gpl_core.contracts.contract import load_contract
from gpl_core.errors import ContractError
from gpl_core.graph.planner import Planner
from gpl_core.graph.steps import find_step
from gpl_core.lakehouse.person import Person
from gpl_core.lakehouse.query import Query
from spark_jobs import ingest
from spark_jobs.step import spark_schema
from tests.spark_jobs.tiny_lake import D, TinyLake, day

pytestmark = pytest.mark.spark

DATES = (D, day(1))
TABLE = "raw_impressions"
VECTORS = "'delta.enableDeletionVectors' = 'true'"
NAMES = "'delta.columnMapping.mode' = 'name'"
REST = "item_id, event_time, position, clicked, is_random, dt"


def made(properties: str, columns: str = "*", source: str = "{plain}", layout: str = "PARTITIONED BY (dt)") -> str:
    """The statement that makes {t} of the rows of {plain}."""
    given = f"TBLPROPERTIES ({properties})" if properties else ""
    rows = f"SELECT /*+ COALESCE(1) */ {columns} FROM {source}"
    return f"CREATE TABLE {{t}} USING delta {layout} {given} AS {rows}"


# Rows that are taken away again: by a vector, where the table has them.
GHOSTS = (
    f"(SELECT request_id, user_id, {REST} FROM {{plain}} "
    f"UNION ALL SELECT concat(request_id, '-ghost') AS request_id, user_id, {REST} FROM {{plain}})"
)
LAID = "DELETE FROM {t} WHERE request_id LIKE '%ghost'"
HAUNTED = (made(VECTORS, source=GHOSTS), LAID)
LATER = "UPDATE {t} SET position = position + 0 WHERE clicked >= 0"
FEATURES: dict[str, Sequence[str]] = {
    "column mapping": (
        made(NAMES, f"request_id, user_id AS uid, 1 AS junk, 2 AS `with, a space`, {REST}"),
        "ALTER TABLE {t} RENAME COLUMN uid TO user_id", "ALTER TABLE {t} DROP COLUMN junk",
        "ALTER TABLE {t} ADD COLUMN junk STRING",
    ),
    "column mapping by id": (
        made("'delta.columnMapping.mode' = 'id'", f"request_id, user_id AS uid, {REST}"),
        "ALTER TABLE {t} RENAME COLUMN uid TO user_id",
    ),
    "column mapping later": (
        made("", f"request_id AS r, user_id, {REST}"),
        f"ALTER TABLE {{t}} SET TBLPROPERTIES ({NAMES}, "
        "'delta.minReaderVersion' = '2', 'delta.minWriterVersion' = '5')",
        "ALTER TABLE {t} RENAME COLUMN r TO request_id",
    ),
    "vectors under a mapping": (made(f"{VECTORS}, {NAMES}", source=GHOSTS), LAID),
    "type widening": (
        made("'delta.enableTypeWidening' = 'true'", "* EXCEPT (position), CAST(position AS SMALLINT) AS position"),
        "ALTER TABLE {t} ALTER COLUMN position TYPE INT",
    ),
    "v2 checkpoints": (
        made(
            f"{VECTORS}, 'delta.checkpointPolicy' = 'v2', 'delta.checkpointInterval' = '2'", source=GHOSTS
        ), LAID, LATER,
    ),
    # Each date in a file of its own, as clustering leaves them sooner or later.
    "liquid clustering": (
        made(f"{VECTORS}, {NAMES}", source=f"{GHOSTS} WHERE dt = DATE '{D}'", layout="CLUSTER BY (dt)"),
        f"INSERT INTO {{t}} SELECT /*+ COALESCE(1) */ * FROM {GHOSTS} WHERE dt > DATE '{D}'", LAID,
    ),
    "row tracking": (made(f"{VECTORS}, 'delta.enableRowTracking' = 'true'", source=GHOSTS), LAID),
    "in-commit timestamps": (made("'delta.enableInCommitTimestamps' = 'true'"), LATER),
    "generated and identity columns": (
        "INSERT INTO {t} (request_id, item_id, user_id, event_time, position, clicked, is_random) "
        "SELECT request_id, item_id, user_id, event_time, position, clicked, is_random FROM {plain}",
    ),
    "shallow clone": (*[s.replace("{t}", "{other}") for s in HAUNTED], "CREATE TABLE {t} SHALLOW CLONE {other}"),
    "restored": (*HAUNTED, "DELETE FROM {t} WHERE clicked = 1", "RESTORE TABLE {t} TO VERSION AS OF 1"),
    "log cleaned to its checkpoint": (
        made(f"{VECTORS}, 'delta.checkpointInterval' = '2'", source=GHOSTS), LAID, LATER, LATER,
    ),
    "change data feed, no statistics": (
        made(f"{VECTORS}, 'delta.enableChangeDataFeed' = 'true', 'delta.dataSkippingNumIndexedCols' = '0'"), LATER
    ),
}  # fmt: skip
UNREADABLE = ("type widening",)  # by delta-rs


@pytest.fixture(scope="module")
def plain(tmp_path_factory, spark) -> TinyLake:
    """Raw rows of two dates; u1 has two impressions on each."""
    lake = TinyLake(tmp_path_factory.mktemp("plain"), spark)
    lake.items({"item_id": "a"}, {"item_id": "b"})
    for dt in DATES:
        lake.impressions(("r1", "u1", "a", 1), ("r1", "u1", "b", 0), ("r2", "u2", "b", 0), dt=dt)
        lake.candidates(("r1", "u1", "a"), ("r1", "u1", "b"), ("r2", "u2", "b"), dt=dt)
    return lake


@pytest.fixture(scope="module")
def plain_ingested(plain) -> TinyLake:
    """The same, ingested."""
    assert plain.run("ingest", ingest.run, dates=DATES) == "done"
    return plain


def changed(spark: SparkSession, root: Path, plain: TinyLake, statements: Iterable[str]) -> str:
    """Run `statements`; {t} is the raw table under `root`, {plain} the plain one. Returns {t}."""
    table = f"delta.`{root}/tables/{TABLE}`"
    for statement in statements:
        spark.sql(statement.format(t=table, plain=f"delta.`{plain.lake.uri(TABLE)}`", other=f"delta.`{root}/other`"))
    return table


def foreign(spark: SparkSession, root: Path, plain: TinyLake, statements: Iterable[str]) -> TinyLake:
    """A lakehouse under `root` with the raw rows of `plain`, the impressions written by `statements`."""
    others = ", ".join(f"{table}: {plain.lake.uri(table)}" for table in ("raw_items", "raw_candidates"))
    lake = TinyLake(root, spark, f"lakehouse.tables={{{others}}}")
    changed(spark, root, plain, statements)
    return lake


def states(lake: TinyLake) -> list[str]:
    """Of ingest, on both dates."""
    planner = Planner(lake.config())
    return [planner.state(find_step("ingest"), dt).status for dt in DATES]


def left_by_forget(lake: TinyLake, user: str) -> tuple[int, str]:
    """(rows of `user` in the raw impressions, what is left to do there) as gpl forget counts them."""
    (found,) = [f for f in forget(Planner(lake.config()).lake, Person(user), dry_run=True) if f.place == TABLE]
    return found.found, found.left


def test_a_change_of_a_table_with_deletion_vectors_is_seen_and_a_purge_after_it_is_none(spark, plain, tmp_path):
    """With what a managed platform switches on by itself, all at once."""
    lake = foreign(spark, tmp_path, plain, [
        made(
            f"{VECTORS}, {NAMES}, 'delta.enableRowTracking' = 'true', 'delta.enableInCommitTimestamps' = 'true', "
            "'delta.checkpointPolicy' = 'v2', 'delta.checkpointInterval' = '2'", source=GHOSTS,
        ), LAID,
    ])  # fmt: skip
    snapshot = Planner(lake.config()).lake.open(TABLE)
    assert (len(snapshot.deletion_vectors), sum(f.rows for f in snapshot.files)) == (2, 6)
    with pytest.raises(ContractError, match="raw_impressions: version 1 uses columnMapping, deletionVectors"):
        snapshot.read()
    assert lake.run("ingest", ingest.run, dates=DATES) == "done"
    shown = (("r1", "u1", "a", 1), ("r1", "u1", "b", 0), ("r2", "u2", "b", 0))
    found = lake.rows("impressions", "request_id", "user_id", "item_id", "clicked", "dt")
    assert found == sorted(((*row, dt) for row in shown for dt in DATES), key=repr)
    assert left_by_forget(lake, "u1")[0] == 4

    merge = (
        f"MERGE INTO {{t}} USING (SELECT 'u1' AS u) ON user_id = u AND dt = DATE '{day(1)}' "
        "WHEN MATCHED AND item_id = 'a' THEN DELETE WHEN MATCHED THEN UPDATE SET clicked = 1"
    )
    changed(spark, tmp_path, plain, [merge])
    assert states(lake) == ["done", "stale"]
    assert lake.run("ingest", ingest.run, day(1)) == "done"
    assert lake.rows("impressions", "user_id", "item_id", "clicked", dt=day(1)) == [("u1", "b", 1), ("u2", "b", 0)]
    assert left_by_forget(lake, "u1")[0] == 3
    changed(spark, tmp_path, plain, ["REORG TABLE {t} APPLY (PURGE)"])
    assert Planner(lake.config()).lake.open(TABLE).deletion_vectors == {}
    assert states(lake) == ["done", "done"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "change",
    ["DELETE FROM {t} WHERE item_id = 'a' AND {on}", "UPDATE {t} SET clicked = 1 WHERE user_id = 'u1' AND {on}"],
)
def test_a_change_that_no_run_has_seen_is_not_hidden_by_the_purge_after_it(spark, plain, tmp_path, change):
    lake = foreign(spark, tmp_path, plain, HAUNTED)
    assert lake.run("ingest", ingest.run, dates=DATES) == "done"
    changed(spark, tmp_path, plain, [change.replace("{on}", f"dt = DATE '{day(1)}'"), "REORG TABLE {t} APPLY (PURGE)"])
    assert Planner(lake.config()).lake.open(TABLE).deletion_vectors == {}
    assert states(lake) == ["done", "stale"]
    changed(spark, tmp_path, plain, ["RESTORE TABLE {t} TO VERSION AS OF 1"])
    assert states(lake) == ["done", "done"]


@pytest.mark.slow
@pytest.mark.parametrize("feature", FEATURES)
def test_each_feature_is_read_everywhere(spark, plain_ingested, tmp_path, feature):
    plain = plain_ingested
    if feature.startswith("generated"):  # only this builder makes them at a path
        builder = DeltaTable.create(spark).location(f"{tmp_path}/tables/{TABLE}").partitionedBy("dt")
        builder = builder.addColumn("id", "BIGINT", generatedAlwaysAs=IdentityGenerator())
        for field in spark_schema(load_contract(TABLE)):
            made_of = "CAST(event_time AS DATE)" if field.name == "dt" else None
            builder = builder.addColumn(field.name, field.dataType, generatedAlwaysAs=made_of)
        builder.execute()
    lake = foreign(spark, tmp_path, plain, FEATURES[feature])
    if feature.startswith("log cleaned"):
        for commit in sorted(Path(tmp_path, "tables", TABLE, "_delta_log").glob("0*.json"))[:2]:
            commit.unlink()
            commit.with_name(f".{commit.name}.crc").unlink(missing_ok=True)
            commit.with_suffix(".crc").unlink(missing_ok=True)
    readable = feature not in UNREADABLE
    found, expected = ([f for f in check_raw(at.config(), DATES, 100) if f.table == TABLE] for at in (lake, plain))
    if readable:
        assert found == expected
    else:
        assert [(f.level, f.text[:25]) for f in found] == [("warning", "no rows were checked: tab")]

    assert lake.run("ingest", ingest.run, dates=DATES) == "done"
    for table in ("items", "impressions", "candidates", "interactions", "quarantine"):
        assert lake.rows(table) == plain.rows(table), table

    count = f"SELECT count(*) AS n, count(DISTINCT request_id) AS requests FROM {TABLE} WHERE user_id = 'u1'"
    rows, left = left_by_forget(lake, "u1")
    if readable:
        assert Query(Planner(lake.config()).lake).rows(count) == [{"n": 4, "requests": 1}]
        assert (rows, "still has 4 rows" in left) == (4, True)
    else:
        with pytest.raises(ContractError, match=r"raw_impressions at .* uses typeWidening.* DROP FEATURE typeWidening"):
            Query(Planner(lake.config()).lake).rows(count)
        assert "could not be searched: table raw_impressions" in left
        assert "\n" not in left

    assert states(lake) == ["done", "done"]
    changed(spark, tmp_path, plain, [f"DELETE FROM {{t}} WHERE user_id = 'u1' AND dt = DATE '{day(1)}'"])
    assert states(lake) == ["done", "stale"]
    assert lake.run("ingest", ingest.run, day(1)) == "done"
    assert lake.rows("impressions", "user_id", dt=day(1)) == [("u2",)]
