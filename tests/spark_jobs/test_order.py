"""Order never decides: the same rows in other files, in reverse, over other partitions, give the same tables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from spark_jobs import anchor_requests, ingest, pseudo_labels, samples, score_requests, sequences, training_feed
from tests.spark_jobs.label_lake import FeedLake, score
from tests.spark_jobs.tiny_lake import D, day
from tests.support import spark_conf

pytestmark = [pytest.mark.spark, pytest.mark.slow]

TABLES = (
    "quarantine", "items", "impressions", "candidates", "interactions", "exposed_samples", "unexposed_samples",
    "user_sequences", "item_stats", "user_stats", "anchor_requests", "score_requests", "pseudo_labels", "training_feed",
)  # fmt: skip


class TurnedLake(FeedLake):
    """Every raw row comes in a file of its own, the last one first."""

    def raw(self, table: str, rows: Sequence[dict[str, Any]], *args: Any, **options: Any) -> None:
        for row in reversed(rows):
            super().raw(table, [row], *args, **options)

    def table(self, name: str, rows: Sequence[dict[str, Any]], fingerprint: str = "", **partition: str) -> None:
        super().table(name, rows[::-1], fingerprint, **partition)


def build(lake: FeedLake) -> dict[str, list[tuple]]:
    """From raw rows with every kind of tie, and what workers would make, to the feed: table -> rows but run ids."""
    items, users = [f"i{n}" for n in range(7)], ("u1", "u2", "u3")
    # Descriptions and impressions that only their order tells apart, events of one time, channels of one score.
    lake.items(*[{"item_id": i} for i in (*items, "i0", "i6")])
    lake.impressions(("r0", "u1", "i0", 1), ("r0", "u2", "i1", 1), ("r0", "u3", "i2", 1), dt=day(-1))
    lake.impressions(
        *[("r1", u, "i0", c) for u in users for c in (0, 1)], ("r2", "u2", "lost", 0), ("r2", "u2", "i1", 1)
    )
    lake.interactions(*[(u, i, 3.0) for u in users for i in items], ("u1", "i0", 3.0), dt=day(-1))
    lake.interactions(*[(u, "i1", 2.0) for u in users])
    lake.candidates(dt=day(-1))
    lake.candidates(
        *[(f"q{u}", u, i, channel) for u in users for i in items for channel in ("a", "b")],
        *[("q1", u, "i3") for u in users], ("q1", "u1", "i3"),
    )  # fmt: skip
    lake.run("ingest", ingest.run, dates=(day(-1), D))
    lake.sids(*[(n, 0, (n, n, n), 0) for n in range(len(items))])
    for name, job in (("samples", samples), ("sequences", sequences), ("anchor_requests", anchor_requests)):
        lake.run(name, job.run)
    lake.answers([
        {"user_id": user, "sequence_hash": digest, "anchor_count": 2, "anchor_sids": [0, 0, 0, 1, 1, 1],
         "log_prob": [-1.0, -2.0], "prefixes": [1, -1, -1], "prefix_log_probs": [-0.5], "sid_version": lake.tokenizer}
        for user, digest in lake.rows("anchor_requests", "user_id", "sequence_hash")
    ], lake.model)  # fmt: skip
    lake.run("score_requests", score_requests.run)
    lake.platt()
    lake.scores(*[score(u, n, (n + len(u)) / 9) for u in users for n in range(len(items))])
    for name, job in (("pseudo_labels", pseudo_labels), ("training_feed", training_feed)):
        lake.run(name, job.run)
    found = {}
    for table in TABLES:
        columns = [c for c in lake.lake.open(table).contract.column_names if c != "run_id"]
        found[table] = lake.rows(table, *columns)
    return found


def test_every_table_of_spark_is_the_same_whatever_the_files_and_partitions(tmp_path, spark):
    one = build(FeedLake(tmp_path / "one", spark, "samples.unexposed_per_request=3"))
    with spark_conf(spark, {"spark.sql.shuffle.partitions": 5}):
        other = build(TurnedLake(tmp_path / "other", spark, "samples.unexposed_per_request=3"))
    for table in TABLES:
        assert one[table], table
        assert other[table] == one[table], table
    assert len(one["unexposed_samples"]) < 3 * 6  # some were not drawn: which ones is no matter of order either
