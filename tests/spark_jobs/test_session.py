"""One commit per slice: what a write replaces, refuses and leaves in the log."""

from __future__ import annotations

from dataclasses import replace

import pyarrow.compute as pc
import pytest
from pyspark.sql import functions as F

from gpl_core.contracts.contract import load_contract
from gpl_core.errors import ConflictError, ContractError, UsageError
from gpl_core.graph.planner import Planner, StepState
from gpl_core.graph.step_run import StepContext
from gpl_core.lakehouse.rewrite import Removal, all_but, remove_rows
from spark_jobs import session
from spark_jobs.step import SparkStep, spark_schema
from tests.spark_jobs.tiny_lake import D, TinyLake, day

pytestmark = pytest.mark.spark


@pytest.fixture
def lake(tmp_path, spark) -> TinyLake:
    return TinyLake(tmp_path, spark)


def step_of(lake: TinyLake, on=D, fingerprint: str = "f1") -> SparkStep:
    """A run of `sequences` that may write user_stats."""
    state = StepState("absent", "", fingerprint, {})
    return SparkStep(lake.spark, StepContext(Planner(lake.config()), "sequences", on, state, "run-1"))


def stats(lake: TinyLake, *users: str, on=D, clicks: int = 0):
    rows = lake.spark.createDataFrame([(u,) for u in users], "user_id string")
    return rows.select(
        "user_id", F.lit(1).alias("impressions"), F.lit(clicks).alias("clicks"), F.lit(2).alias("positives"),
        F.lit(on).alias("dt"),
    )  # fmt: skip


def test_a_slice_is_replaced_whole_and_no_other(lake):
    first = step_of(lake).write_slice("user_stats", stats(lake, "a", "b"))
    step_of(lake, day(1), "f2").write_slice("user_stats", stats(lake, "c", on=day(1)))
    again = step_of(lake, D, "f3").write_slice("user_stats", stats(lake, "d"), details={"why": "late data"})
    assert (first.rows, again.rows) == (2, 1)
    assert lake.rows("user_stats", "user_id", "dt") == [("c", day(1)), ("d", D)]
    version, mark = lake.lake.open("user_stats").mark(D.isoformat())
    assert (version, mark.step, mark.slices, mark.details["why"]) == (
        again.version_after, "sequences", {D.isoformat(): "f3"}, "late data",
    )  # fmt: skip

    empty = step_of(lake, D, "f4").write_slice("user_stats", stats(lake, "x").limit(0))
    assert empty.rows == 0
    assert lake.rows("user_stats", "user_id") == [("c",)]
    assert lake.lake.open("user_stats").mark(D.isoformat())[1].slices == {D.isoformat(): "f4"}


def test_rows_that_break_the_contract_or_the_slice_leave_the_table_alone(lake):
    step_of(lake).write_slice("user_stats", stats(lake, "a"))
    before = lake.version("user_stats")
    with pytest.raises(Exception, match=r"(?i)clicks_in_range|CHECK constraint"):
        step_of(lake).write_slice("user_stats", stats(lake, "b", clicks=-1))
    with pytest.raises(Exception, match=r"REPLACE_WHERE_MISMATCH"):
        step_of(lake).write_slice("user_stats", stats(lake, "b", on=day(3)))
    with pytest.raises(ContractError, match=r"lacks.*positives.*unknown columns.*liked"):
        step_of(lake).write_slice("user_stats", stats(lake, "b").withColumnRenamed("positives", "liked"))
    assert lake.version("user_stats") == before
    assert lake.rows("user_stats", "user_id") == [("a",)]


def test_of_two_runs_at_once_one_wins_and_the_other_says_so(lake):
    """The second run writes after the first has pinned its table and before the first commits."""
    step_of(lake).write_slice("user_stats", stats(lake, "a"))
    slow, fast = step_of(lake, D, "slow"), step_of(lake, D, "fast")
    contract = load_contract("user_stats")

    def save(app_id: str, version: int, mark: str, uri: str) -> None:
        fast.write_slice("user_stats", stats(lake, "fast"))
        columns = contract.column_names
        rows = stats(lake, "slow").select(*[F.col(f.name).cast(f.dataType) for f in spark_schema(contract)])
        writer = rows.select(*columns).write.format("delta").mode("overwrite").option("userMetadata", mark)
        writer.option("txnAppId", app_id).option("txnVersion", version).option("replaceWhere", f"dt = DATE '{D}'").save(
            uri
        )

    with pytest.raises(ConflictError, match="another run"):
        slow._commit(contract, save, None)
    assert lake.rows("user_stats", "user_id") == [("fast",)]


def test_rows_that_left_the_slice_meanwhile_are_a_conflict_and_other_slices_are_none(lake):
    """As a run of several dates, or gpl forget, changes it: under another application transaction."""
    for on in (D, day(1)):
        step_of(lake, on).write_slice("user_stats", stats(lake, "a", "b", on=on))
    decided = lake.version("user_stats")

    def again(on):
        step = step_of(lake, on, "f2")
        step.context.state = replace(step.context.state, outputs={"user_stats": decided})
        return step.write_slice("user_stats", stats(lake, "a", "b", on=on))

    but_a = all_but(lambda rows: pc.equal(rows["user_id"], "a"))
    remove_rows(
        lake.lake, load_contract("user_stats"), lambda s: [Removal(f, 1, but_a) for f in s.select(start=D, end=D)], "f"
    )
    with pytest.raises(ConflictError, match=r"user_stats: slice .* was written by another run in the meantime"):
        again(D)
    assert again(day(1)).rows == 2
    assert lake.rows("user_stats", "user_id", dt=D) == [("b",)]


def test_a_merge_that_counts_on_from_an_old_version_is_refused(lake):
    """Otherwise two runs would both give the next item_index to items of their own."""
    contract = load_contract("user_stats")
    step_of(lake).create_table(contract)
    since = lake.version("user_stats")

    def merge(user: str) -> None:
        rows = stats(lake, user).select(*[F.col(f.name).cast(f.dataType) for f in spark_schema(contract)])
        columns = {c: f"new.{c}" for c in contract.column_names}
        step_of(lake, D, user).merge(
            contract,
            lambda target: (
                target.alias("old")
                .merge(rows.alias("new"), "old.user_id = new.user_id")
                .whenNotMatchedInsert(values=columns)
                .execute()
            ),
            since,
        )

    merge("first")
    with pytest.raises(ConflictError, match="another run"):
        merge("second")
    assert lake.rows("user_stats", "user_id") == [("first",)]


def test_what_results_depend_on_is_ours_whatever_the_launcher_says(spark, caplog):
    others = {
        "spark.sql.session.timeZone": "America/New_York", "spark.sql.timestampType": "TIMESTAMP_NTZ",
        "spark.sql.storeAssignmentPolicy": "LEGACY", "spark.sql.sources.partitionOverwriteMode": "DYNAMIC",
        "spark.sql.parquet.datetimeRebaseModeInRead": "LEGACY", "spark.databricks.delta.stalenessLimit": "1h",
        "spark.sql.parquet.datetimeRebaseModeInWrite": "LEGACY", "spark.sql.parquet.outputTimestampType": "INT96",
    }  # fmt: skip
    flipped = {"true": "false", "false": "true"}
    hostile = {key: flipped.get(value) or others[key] for key, value in session._SETTLED.items()}
    unwanted = {
        "spark.sql.legacy.timeParserPolicy": "LEGACY",
        "spark.databricks.delta.properties.defaults.columnMapping.mode": "name",
        "spark.databricks.delta.commitInfo.userMetadata": "the platform's",
    }
    for key, value in {**hostile, **unwanted}.items():
        spark.conf.set(key, value)
    assert session.start_session("again") is spark
    assert {key: spark.conf.get(key) for key in hostile} == session._SETTLED
    assert not set(unwanted) & set(spark.conf.getAll)
    said = [record.getMessage() for record in caplog.records]
    assert all(any(key in line for line in said) for key in {**hostile, **unwanted})
    assert "spark.sql.session.timeZone is UTC here, not America/New_York as the launcher has it" in said


def test_deltas_extension_stands_beside_the_launchers_and_another_catalog_is_refused_by_name():
    extensions, delta = "spark.sql.extensions", "io.delta.sql.DeltaSparkSessionExtension"
    assert session._with_delta({})[extensions] == delta
    assert session._with_delta({extensions: delta})[extensions] == delta
    assert session._with_delta({extensions: "org.Other, org.More"})[extensions] == f"org.Other,org.More,{delta}"
    with pytest.raises(UsageError, match=r"spark\.sql\.catalog\.spark_catalog=org\.Other, expected org\.apache"):
        session._with_delta({"spark.sql.catalog.spark_catalog": "org.Other"})
