"""User sequences and counts: against a loop over events, incremental against from scratch, and no look ahead."""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from datetime import date, datetime, timedelta
from pathlib import Path

import pytest
from pyspark.sql import functions as F

from spark_jobs import sequences
from spark_jobs.common.histories import latest_sequences, newest_snapshot
from spark_jobs.sequences import build_sequences
from tests.spark_jobs.tiny_lake import D, TinyLake, at, day

pytestmark = pytest.mark.spark

H, HISTORY = 4, 5
SETTINGS = (f"sequences.max_length={H}", f"sequences.history_days={HISTORY}", "sequences.stats_days=3")
Event = tuple[str, int, datetime, str]  # user, item, time, kind


def sid(item: int) -> list[int]:
    return [item, item + 1, item % 3]


class SequenceLake(TinyLake):
    """Items 0 … 9 have semantic IDs, item 10 has none; events are written straight into table interactions."""

    def __init__(self, root: Path, spark, *overrides: str):
        super().__init__(root, spark, *SETTINGS, *overrides)
        self.version_of_sids = self.artifact("tokenizer", day(-30)).version
        self.sids(range(10))
        self.events: list[Event] = []
        self.table("impressions", [], dt=day(-1).isoformat())

    def sids(self, items, *retired: dict) -> None:
        rows = [
            {"item_index": i, "issue": 0, "sid": sid(i), "residual_norm": 0.0, "bucket_size": 1, "content_hash": "h",
             "retired_at": 0} for i in items
        ]  # fmt: skip
        self.table("item_sids", [*rows, *retired], sid_version=self.version_of_sids)

    def add(self, *events: Event) -> None:
        """Write `events` beside those that are there; slices that stay the same are left alone."""
        self.events += events
        for dt in sorted({e[2].date() for e in events}):
            rows = [
                {"user_id": u, "item_id": f"i{i}", "item_index": i, "event_time": t, "kind": k}
                for u, i, t, k in self.events
                if t.date() == dt
            ]
            self.table("interactions", rows, dt=dt.isoformat())

    def expected(self, on: date) -> dict[str, list[int]]:
        """Oracle: user -> items of the last H events in [on - HISTORY, on) whose item has a semantic ID."""
        known = {row[0] for row in self.rows("item_sids", "item_index")}
        found = defaultdict(list)
        for user, item, time, kind in self.events:
            if on - timedelta(days=HISTORY) <= time.date() < on and item in known:
                found[user].append((time, item, kind))
        return {u: [i for _, i, _ in sorted(events)][-H:] for u, events in found.items()}

    def latest(self, on: date) -> dict[str, list[int]]:
        """user -> items by the reader's rule."""
        frame = self.spark.read.format("delta").load(self.lake.uri("user_sequences"))
        start = newest_snapshot(self.lake.open("user_sequences"), on, self.version_of_sids)
        rows = latest_sequences(frame.where(F.col("dt") >= start), self.version_of_sids, on, HISTORY).collect()
        return {r["user_id"]: [i for i in r["item_index"] if i >= 0] for r in rows}


def draw(seed: int, users: int = 8, days: int = 9, items: int = 11) -> list[Event]:
    """Random events of the days before D + 3, about half of the users active on each."""
    rng = random.Random(seed)
    found = []
    for offset in range(3 - days, 3):
        for user in range(users):
            if rng.random() < 0.4:
                times = [rng.choice((8.0, 8.0, 20.0)) for _ in range(rng.randint(1, 3))]  # ties in time
                found += [
                    (f"u{user}", rng.randrange(items), at(offset, t), rng.choice(("click", "cart"))) for t in times
                ]
    return list(dict.fromkeys(found))


def test_any_number_of_days_equals_a_rebuild_and_a_loop_over_events(tmp_path, spark):
    lake = SequenceLake(tmp_path, spark)
    lake.add(*draw(1))
    for offset in range(3):  # D is a snapshot, D + 1 and D + 2 build on the day before
        assert lake.run("sequences", sequences.run, day(offset)) == "done"
        assert lake.context.counts.details["snapshot"] is (offset == 0)
        assert lake.latest(day(offset)) == lake.expected(day(offset))
    slice_ = {row[0] for row in lake.rows("user_sequences", "user_id", dt=day(2))}
    new = {u for u, _, t, _ in lake.events if t.date() == day(1)}
    left = {u for u, _, t, _ in lake.events if t.date() == day(1 - HISTORY)}
    assert slice_ <= new | left  # the work follows the changed users
    assert lake.run("sequences", sequences.run, day(2)) == "noop"

    # An item gets its semantic ID late: its users' sequences change although they did nothing.
    lake.sids(range(11))
    lake.run("sequences", sequences.run, day(2), force=True)
    assert lake.latest(day(2)) == lake.expected(day(2))

    # An event arrives late, for a date that the base has already looked at: from scratch.
    lake.add(("u0", 3, at(-1, 23.0), "late"))
    assert lake.run("sequences", sequences.run, day(2)) == "done"
    assert lake.context.counts.details["snapshot"] is True
    assert lake.latest(day(2)) == lake.expected(day(2))


def test_a_correction_of_a_day_that_has_left_the_window_since_the_base_is_seen(tmp_path, spark):
    """u0's event of that day is taken back: nothing of u0 is left there to say whose sequence is stale."""
    lake = SequenceLake(tmp_path, spark)
    taken = ("u0", 1, at(-HISTORY), "click")
    lake.add(taken, ("u0", 2, at(-2), "click"), ("u1", 3, at(-HISTORY), "click"))
    lake.run("sequences", sequences.run)
    lake.events.remove(taken)
    lake.add(("u1", 4, at(-HISTORY, 13.0), "click"))
    lake.run("sequences", sequences.run, day(1))
    assert lake.latest(day(1)) == lake.expected(day(1)) == {"u0": [2]}


def test_a_base_whose_item_sids_were_vacuumed_is_not_built_on(tmp_path, spark):
    lake = SequenceLake(tmp_path, spark)
    lake.add(*draw(3))
    lake.run("sequences", sequences.run)
    old = lake.lake.open("item_sids")
    lake.sids(range(11))
    for uri in old.uris(old.files):
        Path(uri).unlink()
    assert lake.run("sequences", sequences.run, day(1)) == "done"
    assert lake.context.counts.details["snapshot"] is True
    assert lake.latest(day(1)) == lake.expected(day(1))


def test_nothing_at_or_after_the_run_date_is_read(tmp_path, spark):
    lake = SequenceLake(tmp_path, spark)
    lake.add(*[e for e in draw(2) if e[2].date() < D])
    lake.run("sequences", sequences.run)
    tables = ("user_sequences", "item_stats", "user_stats")
    before = {t: lake.rows(t) for t in tables}
    lake.add(*[(f"u{i}", 1, at(0, 0.0), "planted") for i in range(9)], *[("u1", 2, at(1), "planted")])
    lake.table("impressions", [
        {"request_id": "r", "item_id": "i1", "item_index": 1, "user_id": "u1", "event_time": at(0), "position": 0,
         "clicked": 1, "is_random": False}], dt=D.isoformat())  # fmt: skip
    assert lake.run("sequences", sequences.run) == "noop"
    lake.run("sequences", sequences.run, force=True)
    assert {t: lake.rows(t) for t in tables} == before


def test_rows_of_a_sequence(spark):
    """
    u1: items 3 and 5 at 9:00 (a tie: the smaller one is older), item 3 again at 10:00; one more than fits.
    """
    events = [
        ("u1", "i7", 7, at(-3), "click"), ("u1", "i3", 3, at(-2, 10), "click"), ("u1", "i5", 5, at(-2, 9), "cart"),
        ("u1", "i3", 3, at(-2, 9), "click"), ("u2", "i7", 7, at(-1), "click"),
    ]  # fmt: skip
    frame = spark.createDataFrame(
        events, "user_id string, item_id string, item_index int, event_time timestamp, kind string"
    )
    frame = frame.withColumn("sid", F.array(F.col("item_index"), F.lit(0)))

    def build(frame, seed=0):
        rows = build_sequences(frame, sid_version="v1", levels=2, length=3, seed=seed, run_date=D).collect()
        return {r["user_id"]: r.asDict() for r in rows}

    rows = build(frame)
    assert rows["u1"]["item_index"] == [3, 5, 3]
    assert rows["u1"]["sid"] == [3, 0, 5, 0, 3, 0]
    assert rows["u1"]["length"] == 3
    assert rows["u1"]["last_event_time"] == at(-2, 10).timestamp() * 1e6
    assert rows["u2"]["item_index"] == [7, -1, -1]
    assert rows["u2"]["sid"] == [7, 0, -1, -1, -1, -1]
    assert rows["u2"]["keep_u"][1:] == [-1.0, -1.0]
    keep = rows["u1"]["keep_u"]
    assert all(0 <= u < 1 for u in keep)
    assert len(set(keep)) == 3  # a hash of the event, not of the item
    assert build(frame.repartition(5))["u1"] == rows["u1"]
    assert build(frame, seed=1)["u1"]["keep_u"] != keep
    assert build(frame, seed=1)["u1"]["sequence_hash"] == rows["u1"]["sequence_hash"]
    assert build(frame.where("kind = 'click'"))["u1"]["sequence_hash"] != rows["u1"]["sequence_hash"]


@pytest.mark.slow
def test_counts_that_build_on_the_day_before_equal_a_loop_over_events(tmp_path, spark):
    lake = SequenceLake(tmp_path, spark, "sequences.snapshot_every=2")
    lake.add(*draw(3))
    rng = random.Random(3)
    shown = {o: [(f"u{rng.randrange(6)}", rng.randrange(8), rng.randrange(2)) for _ in range(5)] for o in range(-6, 3)}

    def write(offset: int) -> None:
        lake.table("impressions", [
            {"request_id": f"r{n}", "item_id": f"i{i}", "item_index": i, "user_id": u, "event_time": at(offset),
             "position": n, "clicked": c, "is_random": False} for n, (u, i, c) in enumerate(shown[offset])
        ], dt=day(offset).isoformat())  # fmt: skip

    def expected(on: int, field: int) -> list[tuple]:
        counts: dict = defaultdict(lambda: [0, 0, 0])
        for offset in range(on - 3, on):  # sequences.stats_days
            for row in shown[offset]:
                counts[row[field]][0] += 1
                counts[row[field]][1] += row[2]
        for event in lake.events:
            if day(on - HISTORY) <= event[2].date() < day(on):
                counts[event[field]][2] += 1
        return sorted([(key, *c) for key, c in counts.items()], key=repr)

    def check(on: int, base: str) -> None:
        assert lake.run("sequences", sequences.run, day(on)) == "done"
        for field, table in enumerate(("user_stats", "item_stats")):
            key = ("user_id", "item_index")[field]
            assert lake.rows(table, key, "impressions", "clicks", "positives", dt=day(on)) == expected(on, field)
            mark = lake.lake.open(table).mark(day(on).isoformat())
            assert mark is not None
            assert mark[1].details["base"] == base

    for offset in shown:
        write(offset)
    check(0, "")
    check(1, day(0).isoformat())
    check(3, day(1).isoformat())  # a date was left out
    for late, base in ((0, day(0).isoformat()), (-1, "")):  # D + 1 had seen both dates, D the second only
        shown[late].append(("u9", 9, 1))
        write(late)
        check(2, base)
    check(3, day(2).isoformat())
    assert lake.run("sequences", sequences.run, day(3)) == "noop"
    lake.run("sequences", sequences.run, day(3), "sequences.stats_days=2")  # another window: no base fits
    mark = lake.lake.open("item_stats").mark(day(3).isoformat())
    assert mark is not None
    assert mark[1].details["base"] == ""


def test_counts_before_the_date(tmp_path, spark):
    lake = SequenceLake(tmp_path, spark)
    lake.add(
        ("u1", 1, at(-1), "click"), ("u1", 1, at(-4), "click"), ("u2", 10, at(-2), "cart"), ("u2", 1, at(-6), "cart")
    )
    shown = [("u1", 1, 1, -1), ("u2", 1, 0, -1), ("u1", 2, 0, -3), ("u3", 1, 1, -4)]  # D - 4 lies before the window
    for offset in (-1, -3, -4):
        lake.table("impressions", [
            {"request_id": f"r{n}", "item_id": f"i{i}", "item_index": i, "user_id": u, "event_time": at(o),
             "position": 0, "clicked": c, "is_random": False} for n, (u, i, c, o) in enumerate(shown) if o == offset
        ], dt=day(offset).isoformat())  # fmt: skip
    lake.run("sequences", sequences.run)
    positives = Counter({1: 2, 10: 1})
    assert lake.rows("item_stats", "item_index", "impressions", "clicks", "positives", "popularity_share") == [
        (1, 2, 1, 2, 2 / 3), (10, 0, 0, positives[10], 1 / 3), (2, 1, 0, 0, 0.0),
    ]  # fmt: skip
    assert lake.rows("user_stats", "user_id", "impressions", "clicks", "positives") == [
        ("u1", 2, 1, 2),
        ("u2", 1, 0, 1),
    ]
    assert lake.context.counts.details["events_without_sid"] == 1
