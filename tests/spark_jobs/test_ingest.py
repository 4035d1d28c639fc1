"""Ingest: what is accepted, what is quarantined and why, and that nothing is lost on the way."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pytest
from deltalake import write_deltalake
from py4j.protocol import Py4JJavaError
from pyspark.sql import functions as F

from gpl_core.cli import main
from gpl_core.commands.forget import forget
from gpl_core.contracts.contract import NO_STATISTICS, load_contract
from gpl_core.errors import ContractError, MissingInputError, QuarantineError, classified
from gpl_core.graph.steps import engine_of
from gpl_core.lakehouse.lake import Lake
from gpl_core.lakehouse.person import Person
from gpl_core.lakehouse.rewrite import remove_rows
from spark_jobs import ingest, retry_quarantine
from spark_jobs.common import columns, raw_checks
from spark_jobs.run import work_done
from spark_jobs.step import SparkStep
from tests.persons import files_with
from tests.spark_jobs.tiny_lake import D, TinyLake, at, day
from tests.support import ODD, spark_conf, truncated

pytestmark = pytest.mark.spark


@pytest.fixture(scope="module")
def written(tmp_path_factory, spark) -> TinyLake:
    """
    | request | user | exposed      | recalled                   |
    |---------|------|--------------|----------------------------|
    | r1      | u1   | a (clicked)  | a (two channels), b, c     |
    | r2      | u2   | b            | b, c                       |
    """
    made = TinyLake(tmp_path_factory.mktemp("written") / ODD, spark)
    made.items({"item_id": "a"}, {"item_id": "b"}, {"item_id": "c", "brand": "acme"})
    made.impressions(("r1", "u1", "a", 1), ("r2", "u2", "b", 0))
    made.candidates(
        ("r1", "u1", "a", "two_tower", 0.25), ("r1", "u1", "a", "popular", 0.75), ("r1", "u1", "b"), ("r1", "u1", "c"),
        ("r2", "u2", "b", "popular", None), ("r2", "u2", "c"),
    )  # fmt: skip
    made.interactions(("u3", "c", 9.0), ("u1", "a", 12.0, "click"), ("u1", "a", 12.0, "cart"))  # the click is r1's
    return made


@pytest.fixture(scope="module")
def done(written, tmp_path_factory) -> TinyLake:
    """The same, ingested once for all tests that start from there."""
    made = written.copied(tmp_path_factory.mktemp("done") / ODD)
    assert made.run("ingest", ingest.run) == "done"
    return made


@pytest.fixture
def lake(written, tmp_path) -> TinyLake:
    return written.copied(tmp_path)


@pytest.fixture
def ingested(done, tmp_path) -> TinyLake:
    return done.copied(tmp_path)


def reasons(lake: TinyLake) -> list[tuple]:
    """(table, check names, columns, occurrences) of every quarantined row."""
    found = []
    for table, failed, n in lake.rows("quarantine", "source_table", "failed_checks", "occurrences"):
        found.append((table, tuple(dict(c)["name"] for c in failed), n))
    return sorted(found)


def test_clean_tables(ingested):
    lake = ingested
    assert lake.rows("items", "item_id", "item_index", "text") == [
        ("a", 0, "title of a"), ("b", 1, "title of b"), ("c", 2, "title of c. acme"),
    ]  # fmt: skip
    assert lake.rows("impressions", "request_id", "item_id", "item_index", "clicked") == [
        ("r1", "a", 0, 1), ("r2", "b", 1, 0),
    ]  # fmt: skip
    assert lake.rows("candidates", "request_id", "item_id", "channels", "channel", "recall_score") == [
        ("r1", "a", ("popular", "two_tower"), "popular", 0.75),
        ("r1", "b", ("two_tower",), "two_tower", 0.5),
        ("r1", "c", ("two_tower",), "two_tower", 0.5),
        ("r2", "b", ("popular",), "popular", 0.0),
        ("r2", "c", ("two_tower",), "two_tower", 0.5),
    ]
    assert lake.rows("interactions", "user_id", "item_id", "kind") == [
        ("u1", "a", "cart"), ("u1", "a", "click"), ("u3", "c", "purchase"),
    ]  # fmt: skip
    assert lake.rows("quarantine") == []
    counts = lake.context.counts
    assert (counts.rows_in, counts.rows_quarantined, counts.rows_dropped) == (11, 0, 2)
    assert counts.details["clicks_reported_twice"] == 1


def test_what_it_cost_stands_in_job_runs(done):
    ((status, busy, gpu, read, details),) = done.rows(
        "job_runs", "status", "core_seconds", "gpu_seconds", "bytes_in", "details"
    )  # fmt: skip
    assert (status, gpu) == ("done", 0.0)
    assert (busy > 0, read > 0) == (True, True)
    assert json.loads(details)["spark"]["shuffled_bytes"] > 0


def test_only_tasks_count_as_work(spark):
    """Not the driver's own time, which Spark shows as its executor's."""
    idle = work_done(spark).tolist()
    assert work_done(spark).tolist() == idle
    spark.range(1000).repartition(3).count()
    busy = work_done(spark).tolist()
    assert busy[0] >= idle[0]
    assert busy[3] >= idle[3] + 4


def test_each_log_is_written_by_one_engine(done):
    """Their ways of locking a log never have to agree: delta-rs creates every table, its step's engine goes on."""
    for table in ("items", "impressions", "candidates", "interactions", "quarantine", "job_runs"):
        logs = sorted((done.root / "tables" / table / "_delta_log").glob("*.json"))[1:]
        said = [json.loads(line)["commitInfo"]["engineInfo"] for p in logs for line in p.read_text().splitlines()
                if line.startswith('{"commitInfo"')]  # fmt: skip
        engines = {"spark" if "Spark" in text else "delta-rs" for text in said}
        assert engines == {engine_of(table)}, table


def test_second_run_does_nothing_and_a_forced_one_gives_the_same_rows(ingested):
    lake = ingested
    tables = ("items", "impressions", "candidates", "interactions", "quarantine")
    before = {t: (lake.version(t), lake.rows(t)) for t in tables}
    assert lake.run("ingest", ingest.run) == "noop"
    assert {t: lake.version(t) for t in tables} == {t: v for t, (v, _) in before.items()}
    assert lake.run("ingest", ingest.run, force=True) == "done"
    assert {t: lake.rows(t) for t in tables} == {t: r for t, (_, r) in before.items()}
    assert lake.version("items") == before["items"][0]  # nothing changed there: no commit


def test_every_bad_row_is_quarantined_with_its_reasons(ingested):
    lake = ingested
    good = {t: lake.rows(t) for t in ("impressions", "candidates", "interactions")}
    lake.impressions(
        (None, "u1", "a", 0),  # null key
        ("r3", "", "a", 0),  # empty id
        ("r3", "u1", "a", 2),  # clicked is neither 0 nor 1
        ("r3", "u1", "nowhere", None, 30.0),  # three checks at once
        ("r3", "u1", "nowhere", 1, 30.0),
        ("r3", "u1", "b", 0, -0.5),  # the day before
    )
    # The position tells the rows of one key apart: a tie of everything else.
    lake.impressions(("r2", "u2", "b", 0), ("r1", "u1", "a", 0, 13.0), ("r2", "u2", "b", 0), ("r2", "u2", "b", 0))
    lake.candidates(("r2", "u2", "nowhere"), ("r2", "u2", "c"), ("r2", "u2", "c"), ("r2", "u2", "c", "two_tower", 0.1))
    lake.candidates(("r2", "u2", "a", "popular", float("nan")), ("r2", "u2", "a", None))
    lake.interactions(("u3", "c", 9.0), ("u3", "nowhere", 9.0), ("u4", "c", 25.0))
    lake.items(
        {"item_id": "empty", "title": " "}, {"item_id": None}, {"item_id": "picture", "title": "", "image": b"x"}
    )

    assert lake.run("ingest", ingest.run) == "done"
    assert reasons(lake) == sorted([
        ("raw_impressions", ("request_id_is_not_null",), 1),
        ("raw_impressions", ("user_id_is_not_empty",), 1),
        ("raw_impressions", ("clicked_is_in_list",), 1),
        ("raw_impressions", ("clicked_is_not_null", "event_time_is_within_dt", "item_id_is_known"), 1),
        ("raw_impressions", ("event_time_is_within_dt", "item_id_is_known"), 1),
        ("raw_impressions", ("event_time_is_within_dt",), 1),
        ("raw_impressions", ("key_is_unique",), 1),  # r2 b at position 0: the original is at position 1
        ("raw_impressions", ("key_is_unique",), 1),
        ("raw_impressions", ("key_is_unique",), 1),
        ("raw_impressions", ("key_is_unique",), 1),
        ("raw_candidates", ("item_id_is_known",), 1),
        ("raw_candidates", ("key_is_unique",), 2),  # identical rows: one stays, two are one row here
        ("raw_candidates", ("key_is_unique",), 1),
        ("raw_candidates", ("recall_score_is_finite",), 1),
        ("raw_candidates", ("channel_is_not_null",), 1),
        ("raw_interactions", ("key_is_unique",), 1),
        ("raw_interactions", ("item_id_is_known",), 1),
        ("raw_interactions", ("event_time_is_within_dt",), 1),
        ("raw_items", ("item_has_content",), 1),
        ("raw_items", ("item_id_is_not_null",), 1),
    ])  # fmt: skip
    kept = {t: lake.rows(t) for t in good}
    assert kept["candidates"] == good["candidates"]
    assert kept["interactions"] == good["interactions"]
    assert [r[:2] for r in kept["impressions"]] == [r[:2] for r in good["impressions"]]
    assert [row[0] for row in lake.rows("items", "item_id")] == ["a", "b", "c", "picture"]
    counts = lake.context.counts
    written = sum(len(rows) for rows in kept.values())
    assert (
        counts.rows_in + 1 == written + counts.rows_quarantined - 2 + counts.rows_dropped
    )  # 1 click is new, 2 are items
    message = {json.loads(j)["item_id"]: c for j, c in lake.rows("quarantine", "row_json", "failed_checks")}["empty"]
    assert dict(message[0])["columns"] == ("title", "description", "category", "image", "image_uri")


def test_a_person_who_is_forgotten_is_in_no_file_that_spark_wrote(ingested, tmp_path):
    """Not in the logs and their checksums either: ids in a table's statistics would outlive the rows."""
    lake, user, earlier = ingested, "zz-the-largest-id", "impressions"
    settings = ", ".join(f"'{k}' = '32'" for k in NO_STATISTICS)  # as tables of earlier releases have it
    lake.spark.sql(f"ALTER TABLE delta.`{lake.lake.uri(earlier)}` SET TBLPROPERTIES ({settings})")
    lake.impressions(("r3", user, "a", 2), ("r3", user, "b", 1), ("r3", "u1", "c", 7))
    lake.interactions((user, "c", 9.0), (user, "c", 9.0), (user, "nowhere", 9.0))
    assert lake.run("ingest", ingest.run) == "done"
    assert user not in json.dumps(lake.context.counts.details)
    found = files_with(lake.root, user)
    assert {f.split("/")[1] for f in found if "_delta_log" not in f} == {earlier, "interactions", "quarantine"}
    assert {f.split("/")[1] for f in found if "_delta_log" in f} == {earlier}
    for table in ("raw_impressions", "raw_interactions"):
        contract = load_contract(table)
        assert remove_rows(lake.lake, contract, Person(user).traces(contract).removals, "platform")
    arguments = ["forget", "--config", "quickstart", "--set", f"lakehouse.root={lake.root}", "--user", user]
    assert main([*arguments, "--vacuum-hours", "0"]) == 0
    assert files_with(lake.root, user) == []
    assert reasons(lake) == [("raw_impressions", ("clicked_is_in_list",), 1)]
    elsewhere = lake.copied(tmp_path / "read by a session that knows nothing of it")
    for table in (earlier, "interactions", "quarantine"):
        read = lake.spark.read.format("delta").load(elsewhere.lake.uri(table))
        assert read.count() == len(lake.rows(table)), table


def test_too_much_quarantine_stops_the_step_after_writing_it(ingested):
    lake = ingested
    versions = {t: lake.version(t) for t in ("items", "impressions", "candidates", "interactions")}
    lake.impressions(("r3", "u1", "a", 7))
    lake.items({"item_id": "new"})
    with pytest.raises(QuarantineError, match=r"raw_impressions: 1 of 3 rows \(33.3%\)[^$]*clicked is 7"):
        lake.run("ingest", ingest.run, D, "ingest.max_quarantine_share=0.1")
    assert {t: lake.version(t) for t in versions} == versions
    assert reasons(lake) == [("raw_impressions", ("clicked_is_in_list",), 1)]


def test_rows_whose_item_came_late_are_accepted_by_a_retry_and_nothing_else_is_written(ingested, monkeypatch):
    """The item is described on D + 1: no raw slice of D changed, so ingest of D is done by what the tables say."""
    lake = ingested
    lake.candidates(("r2", "u2", "late"), ("r2", "u2", "never"))
    lake.run("ingest", ingest.run)
    before = lake.rows("candidates")
    lake.items({"item_id": "late", "updated_at": at(1)})
    assert lake.run("ingest", ingest.run, day(1)) == "done"
    assert all(lake.rows(t, dt=day(1)) == [] for t in ("impressions", "candidates", "interactions"))  # an empty day
    assert lake.run("ingest", ingest.run, day(1)) == "noop"
    assert lake.run("ingest", ingest.run) == "noop"
    versions = {t: lake.version(t) for t in ("impressions", "interactions", "items")}

    write = SparkStep.write_slice

    def killed(step: SparkStep, table: str, *given, **more):
        if table == "quarantine":
            raise KeyboardInterrupt
        return write(step, table, *given, **more)

    monkeypatch.setattr(SparkStep, "write_slice", killed)
    with pytest.raises(KeyboardInterrupt):
        lake.run("ingest", retry_quarantine.run, force=True)
    monkeypatch.setattr(SparkStep, "write_slice", write)
    assert len(reasons(lake)) == 2, "not lost: the next retry finds it again"
    lake.run("ingest", retry_quarantine.run, force=True)
    assert lake.context.counts.details["retried"] == {"raw_candidates": 1}
    assert [r for r in lake.rows("candidates") if r not in before] == [
        r for r in lake.rows("candidates") if "late" in r
    ]
    assert len(lake.rows("candidates")) == len(before) + 1
    assert reasons(lake) == [("raw_candidates", ("item_id_is_known",), 1)]
    assert {t: lake.version(t) for t in versions} == versions
    assert lake.run("ingest", ingest.run) == "noop"

    versions = {t: lake.version(t) for t in ("candidates", "quarantine", *versions)}
    lake.run("ingest", retry_quarantine.run, force=True)
    assert {t: lake.version(t) for t in versions} == versions, "a second retry has nothing to do"


def test_items_are_updated_by_later_updates_only_and_keep_their_index(ingested):
    lake = ingested
    lake.items(
        {"item_id": "b", "title": "newer", "updated_at": at(0, 3.0)},
        {"item_id": "b", "title": "tomorrow's", "updated_at": at(1, 3.0)},
        {"item_id": "a", "title": "older", "updated_at": at(-3)},
        {"item_id": "0", "title": "first by name, fourth by arrival", "updated_at": at(0, 4.0)},
        {"item_id": "c", "title": "title of c", "brand": "acme", "withdrawn_at": at(0), "updated_at": at(0)},
    )
    before = dict(lake.rows("items", "item_id", "content_hash"))
    lake.run("ingest", ingest.run)
    assert lake.rows("items", "item_id", "item_index", "title") == [
        ("0", 3, "first by name, fourth by arrival"), ("a", 0, "title of a"), ("b", 1, "newer"), ("c", 2, "title of c"),
    ]  # fmt: skip
    after = dict(lake.rows("items", "item_id", "content_hash"))
    assert (after["a"], after["c"]) == (before["a"], before["c"])  # withdrawn, not another content
    assert after["b"] != before["b"]
    assert dict(lake.rows("items", "item_id", "withdrawn_at"))["c"] == at(0).timestamp() * 1e6


@pytest.mark.slow
def test_history_in_one_go_equals_day_by_day(lake):
    lake.impressions(("r1", "u1", "a", 1), ("r9", "u1", "b", 1), dt=day(-1))
    lake.candidates(("r1", "u1", "a"), ("r1", "u1", "zz"), dt=day(-1))
    tables = ("impressions", "candidates", "interactions", "quarantine", "items")
    lake.run("ingest", ingest.run, dates=(day(-1), D))
    at_once = {t: lake.rows(t) for t in tables}
    for on in (day(-1), D):
        assert lake.run("ingest", ingest.run, on) == "noop"
        lake.run("ingest", ingest.run, on, force=True)
    assert {t: lake.rows(t) for t in tables} == at_once


def test_a_column_that_cannot_be_cast_is_refused_before_anything_is_written(tmp_path, spark):
    """What is cast: test_same_rules.py."""
    lake = TinyLake(tmp_path, spark)
    lake.items({"item_id": "7"})
    contract = load_contract("raw_impressions").arrow_schema()
    at_ = contract.get_field_index("clicked")
    lake.raw("raw_impressions", [], D, schema=contract.set(at_, pa.field("clicked", pa.list_(pa.int32()))))
    lake.candidates()
    with pytest.raises(ContractError, match=r"(?s)raw_impressions.*'clicked' is array<integer>, expected int"):
        lake.run("ingest", ingest.run)
    assert not lake.lake.exists("impressions")
    assert not lake.lake.exists("quarantine")


def test_missing_table_and_missing_column_are_refused_by_name(tmp_path, spark):
    lake = TinyLake(tmp_path, spark)
    lake.items({"item_id": "a"})
    with pytest.raises(MissingInputError, match="raw_impressions"):
        lake.run("ingest", ingest.run)
    lake.raw("raw_impressions", [], D, schema=pa.schema([("request_id", pa.string()), ("dt", pa.date32())]))
    lake.candidates()
    with pytest.raises(ContractError, match=r"(?s)raw_impressions.*item_id"):
        lake.run("ingest", ingest.run)


@pytest.mark.slow
def test_layout_partition_number_and_hashes_decide_nothing(tmp_path, spark, monkeypatch):
    """The same rows: appended one by one in reverse, with other shuffle partitions; where all keys have one hash; and
    where keys that occur twice are too many to be broadcast."""
    rows = [
        ("r1", "u1", "a", 0, 12.0),
        ("r1", "u1", "a", 1, 12.0),
        ("r1", "u2", "a", 0, 12.0),
        ("r1", "u1", "b", 0, 9.0),
    ]
    found = []
    for turn, parts in (("one", 2), ("two", 5), ("three", 2)):
        if turn == "three":
            monkeypatch.setattr(raw_checks, "key_hash", lambda key: F.lit(7).cast("long"))
            monkeypatch.setattr(columns, "_MOST_BROADCAST", 0)
        lake = TinyLake(tmp_path / turn, spark)
        lake.items({"item_id": "a"}, {"item_id": "b"})
        lake.candidates()
        for some in [[r] for r in reversed(rows)] if turn == "two" else [rows]:
            lake.impressions(*some)
        with spark_conf(spark, {"spark.sql.shuffle.partitions": parts}):
            lake.run("ingest", ingest.run)
        found.append(
            (lake.rows("impressions", "request_id", "item_id", "user_id", "clicked"), len(lake.rows("quarantine")))
        )
    assert found[0][0] == [("r1", "a", "u1", 1), ("r1", "b", "u1", 0)]
    assert found == [(found[0][0], 2)] * 3


def test_extra_columns_do_no_harm_and_pass_through_by_configuration(tmp_path, spark):
    """Of names that we use ourselves, of types that have no hash; in rows that are copies or quarantined too. This
    platform calls an item's id sku, its title item_id, and a click c."""
    lake = TinyLake(
        tmp_path, spark, "feed.passthrough={price: double, note: string}",
        "lakehouse.columns={raw_items: {item_id: sku, title: item_id}, raw_impressions: {item_id: sku, clicked: c}}",
    )  # fmt: skip
    updated = pa.array([at(-1)], pa.timestamp("us", "UTC"))
    write_deltalake(
        lake.lake.uri("raw_items"), pa.table({"sku": ["a"], "item_id": ["title of a"], "updated_at": updated})
    )
    lake.candidates(("r1", "u1", "a"))
    spark.sql(f"""
        CREATE TABLE delta.`{lake.lake.uri("raw_impressions")}` USING delta PARTITIONED BY (dt) AS
        SELECT request_id, 'a' sku, 'z' ITEM_ID, 'u1' User_Id, TIMESTAMP'2026-01-10 12:00:00' event_time, 0 position,
            clicked c, false is_random, DATE'2026-01-10' dt, price, 7 item_index, 'x' _raw, 'y' _bad, 'z' `a.b`,
            map('k', 1) attributes, parse_json('{{"k": [1]}}') payload
        FROM VALUES ('r1', 0, '2.5'), ('r2', 0, NULL), ('r2', 0, NULL), ('r3', 7, '1'), ('r4', 0, '12,50')
            AS rows(request_id, clicked, price)
    """)
    lake.run("ingest", ingest.run)
    assert lake.rows("items", "item_id", "title") == [("a", "title of a")]
    frame = spark.read.format("delta").load(lake.lake.uri("impressions"))
    assert sorted(map(tuple, frame.select("request_id", "item_id", "price", "note").collect())) == [
        ("r1", "a", 2.5, ""), ("r2", "a", 0.0, ""),
    ]  # fmt: skip
    assert reasons(lake) == [
        ("raw_impressions", ("clicked_is_in_list",), 1), ("raw_impressions", ("key_is_unique",), 1),
        ("raw_impressions", ("price_has_valid_type",), 1),
    ]  # fmt: skip
    row = next(json.loads(row) for (row,) in lake.rows("quarantine", "row_json") if "12,50" in row)
    assert (row["_raw"], row["a.b"], row["attributes"], row["payload"]) == ("x", "z", {"k": 1}, {"k": [1]})


@pytest.mark.parametrize("layout", ["encoded partitions", "deletion vectors", "shallow clone"])
def test_raw_rows_of_a_person_are_counted_in_every_layout(tmp_path, spark, layout):
    """`gpl forget` reads the platform's rows without Spark, as any reader of Delta sees them."""
    uri, source = f"{tmp_path}/tables/raw_interactions", f"{tmp_path}/elsewhere"
    lake = Lake(str(tmp_path))
    rows = [(user, item, at(0), "purchase", D, "a b%/ü") for user, item in ((501, "a"), (502, "a"), (501, "b"))]
    kinds = "user_id bigint, item_id string, event_time timestamp, kind string, dt date, country string"
    writer = spark.createDataFrame(rows, kinds).write.format("delta").partitionBy("dt", "country")
    if layout == "deletion vectors":
        writer = writer.option("delta.enableDeletionVectors", "true")
    writer.save(source if layout == "shallow clone" else uri)
    if layout == "shallow clone":
        spark.sql(f"CREATE TABLE delta.`{uri}` SHALLOW CLONE delta.`{source}`")
    if layout == "deletion vectors":
        spark.sql(f"DELETE FROM delta.`{uri}` WHERE user_id = 501 AND item_id = 'b'")
    there = 1 if layout == "deletion vectors" else 2
    found = {f.place: f for f in forget(lake, Person("501"))}
    assert found["raw_interactions"].found == there, found["raw_interactions"].left
    assert f"raw_interactions still has {there} rows" in found["raw_interactions"].left


@pytest.mark.parametrize("damage", [truncated, Path.unlink])
def test_a_damaged_raw_file_is_named(lake, damage):
    (path,) = (lake.root / "tables" / "raw_candidates").rglob("*.parquet")
    damage(path)
    with pytest.raises(Py4JJavaError) as caught:
        lake.run("ingest", ingest.run)
    told = classified(caught.value)
    assert isinstance(told, ContractError)
    assert path.name in str(told)
    ((status, name, message),) = lake.rows("job_runs", "status", "error_class", "error_message")
    assert (status, name, message) == ("failed", "ContractError", str(told))


def test_a_log_that_promises_other_rows_than_are_read_is_refused_with_both_counts(lake):
    """As a writer with a defect leaves it, or a storage that lost rows."""
    (commit,) = Path(lake.lake.uri("raw_candidates"), "_delta_log").glob("*0.json")
    commit.write_text(commit.read_text().replace(r"{\"numRecords\":6", r"{\"numRecords\":8"))
    with pytest.raises(ContractError, match=rf"raw_candidates: the log of version 0 says 8 rows of {D} .* 6 were read"):
        lake.run("ingest", ingest.run)
