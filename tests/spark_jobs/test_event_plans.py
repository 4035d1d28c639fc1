"""Physical plans from raw events to score requests, as they would be where nothing is small enough to broadcast."""

from __future__ import annotations

import pytest
from pyspark.sql import DataFrame

from spark_jobs import anchor_requests, ingest, samples, score_requests, sequences
from spark_jobs.step import SparkStep
from tests.spark_jobs.tiny_lake import PRODUCTION, D, TinyLake, at, day
from tests.support import spark_conf

pytestmark = [pytest.mark.spark, pytest.mark.slow]


def test_plans(tmp_path, spark, monkeypatch):
    lake = TinyLake(tmp_path, spark)
    lake.items({"item_id": "a"}, {"item_id": "b"}, {"item_id": "c", "withdrawn_at": at(-1)})
    lake.opt_outs(("u2", None))
    lake.impressions(("r0", "u1", "a", 1), dt=day(-1))
    lake.impressions(("r1", "u1", "a", 0))
    for offset in (-1, 0):
        lake.candidates(("r1", "u1", "b"), dt=day(offset))
        lake.interactions(("u1", "b", 3.0), dt=day(offset))
    tokenizer = lake.artifact("tokenizer", day(-2)).version
    model = lake.artifact("interest_model", day(-1), {"sid_version": tokenizer}).version
    lake.table("item_sids", [
        {"item_index": i, "issue": 0, "sid": [i, 0, 0], "residual_norm": 0.0, "bucket_size": 1, "content_hash": "h",
         "retired_at": 0} for i in (0, 1)
    ], sid_version=tokenizer)  # fmt: skip
    lake.run("ingest", ingest.run, dates=(day(-1), D))

    found: dict[str, tuple[str, list[str]]] = {}
    write = SparkStep.write_slice

    def watch(step: SparkStep, table: str, frame: DataFrame, **options):
        found[table] = frame._jdf.queryExecution().executedPlan().toString(), frame.inputFiles()
        return write(step, table, frame, **options)

    monkeypatch.setattr(SparkStep, "write_slice", watch)
    with spark_conf(spark, PRODUCTION):
        lake.run("ingest", ingest.run, force=True)
        lake.run("samples", samples.run)
        lake.run("sequences", sequences.run)
        lake.run("anchor_requests", anchor_requests.run)
        row = {"user_id": "u1", "sequence_hash": lake.rows("anchor_requests", "sequence_hash")[0][0], "anchor_count": 2,
               "anchor_sids": [0, 0, 0, 1, 0, 0], "log_prob": [-1.0, -2.0],
               "prefixes": [1, -1, -1], "prefix_log_probs": [-0.5], "sid_version": tokenizer}  # fmt: skip
        lake.answers([row], model)
        lake.run("score_requests", score_requests.run)

    # What is shuffled: by item to find it (both sides), then by key; one more than named here needs a reason.
    most = {
        "quarantine": 11, "impressions": 2, "candidates": 2, "interactions": 3, "exposed_samples": 0,
        "unexposed_samples": 3, "user_sequences": 3, "item_stats": 2, "user_stats": 1, "anchor_requests": 3,
        "score_requests": 7,
    }  # fmt: skip
    # Withdrawn items, a bounded number, are broadcast: nothing else is, at a threshold that lets Spark choose nothing.
    few = ("unexposed_samples", "anchor_requests", "score_requests")
    raw = set()
    for table, (plan, files) in found.items():
        for never in ("CartesianProduct", "Python", "Scan ExistingRDD"):
            assert never not in plan, (table, never)
        # One row, the total of positives, is broadcast to every item.
        assert ("BroadcastNestedLoopJoin" in plan) == (table == "item_stats"), table
        assert ("BroadcastHashJoin" in plan) == (table in few), (table, plan)
        assert plan.count("Exchange hashpartitioning") <= most[table], (table, plan)
        dated = [f for f in files if "/dt=" in f and "/raw_" in f]
        assert all(f"/dt={D.isoformat()}/" in f for f in dated)
        raw |= {table} if dated else set()
    assert len(found) == 11
    assert raw >= {"quarantine", "impressions", "candidates", "interactions"}
    past = [f for f in found["user_sequences"][1] if "/interactions/" in f]
    assert past
    assert not any(f"/dt={D.isoformat()}/" in f for f in past)
