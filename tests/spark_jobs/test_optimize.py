"""Spark's compaction: fewer files, the same rows, and what was built on them stays done."""

from __future__ import annotations

import pyarrow.parquet as pq
import pytest

from gpl_core.graph.planner import Planner
from gpl_core.graph.steps import find_step
from spark_jobs import optimize, samples
from tests.spark_jobs.tiny_lake import D, TinyLake, day
from tests.support import put

pytestmark = pytest.mark.spark


def test_small_files_are_joined_and_nothing_turns_stale(tmp_path, spark):
    lake = TinyLake(tmp_path, spark)
    for table in ("impressions", "candidates"):
        for on in (D, day(1)):
            for seed in range(3):
                put(lake.lake, table, 4, day=on, mode="append", step="ingest", seed=seed)
    assert lake.run("samples", samples.run) == "done"
    before = lake.rows("candidates", dt=D)
    others = [f.path for f in lake.lake.open("candidates").select(start=day(1), end=day(1))]

    assert lake.run("optimize", optimize.run) == "done"
    snapshot = lake.lake.open("candidates")
    (joined,) = snapshot.select(start=D, end=D)
    assert lake.context.counts.details["candidates"] == {"files_before": 3, "files_after": 1}
    assert lake.rows("candidates", dt=D) == before
    assert [f.path for f in snapshot.select(start=day(1), end=day(1))] == others, "another date was not asked for"
    assert Planner(lake.config()).state(find_step("samples"), D).status == "done"
    groups = pq.ParquetFile(*snapshot.uris([joined])).metadata
    assert all(groups.row_group(i).total_byte_size <= 64 * 2**20 for i in range(groups.num_row_groups))

    version = lake.version("candidates")
    lake.run("optimize", optimize.run)
    assert lake.version("candidates") == version, "nothing to join: no commit"
    put(lake.lake, "candidates", 1, day=D, mode="append", step="ingest", seed=9)
    assert Planner(lake.config()).state(find_step("samples"), D).status == "stale"
