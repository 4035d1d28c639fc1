"""Ingest: what is accepted, what is quarantined and why, and that nothing is lost on the way."""

from __future__ import annotations

import pytest

from spark_jobs import ingest
from tests.spark_jobs.tiny_lake import TinyLake

pytestmark = pytest.mark.spark


@pytest.fixture
def lake(tmp_path, spark) -> TinyLake:
    """
    | request | user | exposed      | recalled                   |
    |---------|------|--------------|----------------------------|
    | r1      | u1   | a (clicked)  | a (two channels), b, c     |
    | r2      | u2   | b            | b, c                       |
    """
    made = TinyLake(tmp_path, spark)
    made.items({"item_id": "a"}, {"item_id": "b"}, {"item_id": "c", "brand": "acme"})
    made.impressions(("r1", "u1", "a", 1), ("r2", "u2", "b", 0))
    made.candidates(
        ("r1", "u1", "a", "two_tower", 0.25), ("r1", "u1", "a", "popular", 0.75), ("r1", "u1", "b"), ("r1", "u1", "c"),
        ("r2", "u2", "b", "popular", None), ("r2", "u2", "c"),
    )  # fmt: skip
    made.interactions(("u3", "c", 9.0))
    return made


def reasons(lake: TinyLake) -> list[tuple]:
    """(table, check names, columns, occurrences) of every quarantined row."""
    found = []
    for table, checks, n in lake.rows("quarantine", "source_table", "failed_checks", "occurrences"):
        found.append((table, tuple(dict(c)["name"] for c in checks), n))
    return sorted(found)


def test_clean_tables(lake):
    assert lake.run("ingest", ingest.run) == "done"
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
    assert lake.rows("interactions", "user_id", "item_id", "kind") == [("u1", "a", "click"), ("u3", "c", "purchase")]
    assert lake.rows("quarantine") == []
    counts = lake.context.counts
    assert (counts.rows_in, counts.rows_quarantined, counts.rows_dropped) == (9, 0, 1)


def test_second_run_does_nothing_and_a_forced_one_gives_the_same_rows(lake):
    lake.run("ingest", ingest.run)
    tables = ("items", "impressions", "candidates", "interactions", "quarantine")
    before = {t: (lake.version(t), lake.rows(t)) for t in tables}
    assert lake.run("ingest", ingest.run) == "noop"
    assert {t: lake.version(t) for t in tables} == {t: v for t, (v, _) in before.items()}
    assert lake.run("ingest", ingest.run, force=True) == "done"
    assert {t: lake.rows(t) for t in tables} == {t: r for t, (_, r) in before.items()}
    assert lake.version("items") == before["items"][0]  # nothing changed there: no commit
