"""Exposed and unexposed samples: exclusion, stratified draws and their probabilities."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable
from copy import copy

import pytest
from pyspark.sql import functions as F

from gpl_core.errors import ConflictError
from spark_jobs import ingest, samples
from spark_jobs.samples import never_exposed, sample_unexposed
from spark_jobs.step import SparkStep
from tests.spark_jobs.tiny_lake import D, TinyLake, at, day

pytestmark = pytest.mark.spark


@pytest.fixture(scope="module")
def ingested(tmp_path_factory, spark) -> TinyLake:
    """
    u1 saw a yesterday and b today, at 20:00; its request r1 at 12:00 recalled a, b, c, d.
    u2 saw everything that its request r2 recalled. u3 saw c, u1 did not.
    """
    made = TinyLake(tmp_path_factory.mktemp("ingested"), spark, "samples.exposure_window_days=2")
    made.items(*[{"item_id": i} for i in "abcd"])
    made.impressions(("r0", "u1", "a", 1), dt=day(-1))
    made.impressions(("r2", "u2", "a", 0), ("r2", "u2", "b", 1), ("r3", "u3", "c", 0), ("r4", "u1", "b", 0, 20.0))
    made.candidates(
        ("r1", "u1", "a"), ("r1", "u1", "b"), ("r1", "u1", "c"), ("r1", "u1", "d"), ("r2", "u2", "a"), ("r2", "u2", "b")
    )
    made.candidates(dt=day(-1))
    made.interactions(dt=day(-1))
    made.run("ingest", ingest.run, dates=(day(-1), D))
    return made


@pytest.fixture
def lake(ingested, tmp_path) -> TinyLake:
    return ingested.copied(tmp_path)


def test_pairs_exposed_in_the_window_are_never_unexposed(lake):
    assert lake.run("samples", samples.run) == "done"
    assert lake.rows("unexposed_samples", "request_id", "user_id", "item_id", "sampling_probability") == [
        ("r1", "u1", "c", 1.0), ("r1", "u1", "d", 1.0),
    ]  # fmt: skip
    assert lake.rows("exposed_samples", "request_id", "item_id", "label") == [
        ("r2", "a", 0), ("r2", "b", 1), ("r3", "c", 0), ("r4", "b", 0),
    ]  # fmt: skip
    details = lake.context.counts.details
    assert (details["candidates_exposed_in_window"], details["not_drawn"]) == (4, 0)

    # A shorter window forgets what was seen yesterday: the setting is part of the fingerprint.
    assert lake.run("samples", samples.run) == "noop"
    assert lake.run("samples", samples.run, D, "samples.exposure_window_days=1") == "done"
    assert {row[0] for row in lake.rows("unexposed_samples", "item_id")} == {"a", "c", "d"}


def overtaken(
    lake: TinyLake, name: str, job: Callable[[SparkStep], None], *others: tuple
) -> tuple[list[str], TinyLake]:  # fmt: skip
    """How `others`, arguments of lake.run, end within a run of D that has looked at the tables, and how that ends; the
    lake with its context."""
    slow, ends = copy(lake), []

    def within(step: SparkStep) -> None:
        for other in others:
            ends.append(lake.run(name, job, *other))
        job(step)

    ends.append(slow.run(name, within))
    return ends, slow


def test_a_run_commits_only_on_top_of_what_it_decided_on(lake):
    """Another run of the same work ends after this one has looked at the tables."""
    lake.impressions(("r5", "u1", "d", 0, 21.0), dt=D)
    lake.items({"item_id": "e", "updated_at": at(0)})
    assert overtaken(lake, "ingest", ingest.run, (D,))[0] == ["done", "noop"]
    assert lake.rows("items", "item_id", "item_index") == [(i, n) for n, i in enumerate("abcde")]
    assert lake.rows("impressions", "item_id", dt=D) == [("a",), ("b",), ("b",), ("c",), ("d",)]


@pytest.mark.slow
def test_samples_are_committed_only_on_top_of_what_they_were_decided_on(lake):
    """The other run is of the same work, of another slice, of other inputs."""
    assert overtaken(lake, "samples", samples.run, (D,))[0] == ["done", "noop"]
    lake.opt_outs(("u1", at(-9)))
    before = lake.rows("exposed_samples", dt=D)
    ends, slow = overtaken(lake, "samples", samples.run, (day(-1),))
    assert ends == ["done", "done"]
    assert lake.rows("exposed_samples", dt=D) == before
    assert lake.rows("unexposed_samples", dt=D) == []
    assert slow.context.counts.rows_out == len(before)  # of this run's commits alone

    lake.opt_outs(("u2", at(-9)))
    version = lake.version("exposed_samples")
    with pytest.raises(ConflictError, match=r"exposed_samples.*another run.*run the step again"):
        overtaken(lake, "samples", samples.run, (D, "samples.exposure_window_days=1"))
    assert lake.version("exposed_samples") == version + 1
    assert lake.run("samples", samples.run) == "done"


def test_withdrawn_items_and_users_who_opted_out_give_no_unexposed_samples(lake):
    """Of u1's candidates c and d, d is withdrawn on D, c only after it; then u1 opts out."""
    until = {i: int(time.timestamp() * 1e6) for i, time in (("d", at(0, 23)), ("c", at(1, 0)), ("b", at(-1)))}
    items = lake.lake.open("items").read().to_pylist()
    lake.table("items", [{**row, "withdrawn_at": until.get(row["item_id"], row["withdrawn_at"])} for row in items])
    assert lake.run("samples", samples.run) == "done"
    assert lake.rows("unexposed_samples", "item_id", "sampling_probability") == [("c", 1.0)]
    exposed = lake.rows("exposed_samples")
    details = lake.context.counts.details
    assert [details[k] for k in ("candidates_withdrawn", "exposed_withdrawn", "candidates_exposed_in_window",
                                 "candidates_opted_out", "unexposed_sampled")] == [3, 2, 2, 0, 1]  # fmt: skip

    lake.opt_outs(("u1", at(1, 0)), ("u2", at(-9)))
    assert lake.run("samples", samples.run) == "done"  # for u2, who has no unexposed candidate
    assert lake.rows("unexposed_samples", "item_id") == [("c",)]
    lake.opt_outs(("u1", at(1, 1)))
    assert lake.run("samples", samples.run) == "noop"  # tomorrow is no affair of today
    lake.opt_outs(("u1", None), ("u9", at(1)))
    assert lake.run("samples", samples.run) == "done"
    assert lake.rows("unexposed_samples") == []
    assert lake.rows("exposed_samples") == exposed
    details = lake.context.counts.details
    assert [details[k] for k in ("candidates_opted_out", "not_drawn", "unexposed_sampled")] == [1, 0, 0]


def test_an_empty_day_gives_empty_slices(lake):
    for table in ("candidates", "impressions"):
        lake.table(table, [], dt=day(1).isoformat())
    assert lake.run("samples", samples.run, day(1)) == "done"
    assert lake.rows("unexposed_samples", dt=day(1)) == lake.rows("exposed_samples", dt=day(1)) == []
    assert lake.run("samples", samples.run, day(1)) == "noop"


@pytest.fixture
def candidates(spark):
    """40 requests with 5 to 34 candidates in three channels, of very different sizes."""
    return spark.range(0, 1000).selectExpr(
        "concat('r', pmod(id * id, 40)) AS request_id",
        "concat('u', pmod(id * id, 40) % 7) AS user_id",
        "concat('i', id) AS item_id",
        "element_at(array('a','a','a','a','b','b','c'), cast(pmod(xxhash64(id), 7) AS int) + 1) AS channel",
    )


def test_the_probabilities_are_exact(candidates):
    """Oracle: count per request and channel what is there and what was taken."""
    drawn = sample_unexposed(candidates, 8, seed=3).collect()
    available = defaultdict(Counter)
    for row in candidates.collect():
        available[row.request_id][row.channel] += 1
    taken = Counter((row.request_id, row.channel) for row in drawn)
    for row in drawn:
        expected = taken[row.request_id, row.channel] / available[row.request_id][row.channel]
        assert row.sampling_probability == pytest.approx(expected)
    weight = Counter()
    for row in drawn:
        weight[row.request_id] += 1 / row.sampling_probability
    for request, sizes in available.items():
        total = sum(sizes.values())
        assert sum(taken[request, c] for c in sizes) == min(8, total)
        assert all(taken[request, c] >= min(n, 8 // 3) for c, n in sizes.items())
        assert weight[request] == pytest.approx(total)


def test_more_channels_than_rows_to_draw_leave_no_channel_out(spark):
    """With one row per request, each of three equal channels is drawn about a third of the time, and says so."""
    frame = spark.range(0, 900).selectExpr(
        "concat('r', cast(id / 3 AS int)) AS request_id", "'u' AS user_id", "concat('i', id) AS item_id",
        "concat('c', id % 3) AS channel",
    )  # fmt: skip
    drawn = sample_unexposed(frame, 1, seed=1).collect()
    assert len(drawn) == 300
    assert {row.sampling_probability for row in drawn} == {1 / 3}
    # 100 expected, standard deviation 8.2
    assert all(60 < n < 140 for n in Counter(row.channel for row in drawn).values())


def test_the_draw_depends_on_the_seed_and_on_nothing_else(candidates):
    def drawn(frame, seed):
        return {(r.request_id, r.item_id) for r in sample_unexposed(frame, 5, seed).collect()}

    first = drawn(candidates, 0)
    assert drawn(candidates.repartition(7, F.rand(4)), 0) == first
    assert drawn(candidates.orderBy(F.desc("item_id")).coalesce(1), 0) == first
    assert drawn(candidates, 1) != first


def test_exclusion_is_by_user_and_item(spark):
    pairs = spark.createDataFrame(
        [("u1", 1, "r1"), ("u1", 2, "r1"), ("u2", 1, "r2")], "user_id string, item_index int, r string"
    )
    shown = spark.createDataFrame([("u1", 1), ("u1", 1)], "user_id string, item_index int")
    left = never_exposed(pairs, shown).select("user_id", "item_index").collect()
    assert sorted(map(tuple, left)) == [("u1", 2), ("u2", 1)]
