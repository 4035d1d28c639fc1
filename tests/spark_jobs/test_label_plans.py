"""Physical plans of labeling and feed, as they would be where nothing is small enough to broadcast."""

from __future__ import annotations

import pytest
from pyspark.sql import DataFrame

from spark_jobs import pseudo_labels, training_feed
from spark_jobs.step import SparkStep
from tests.spark_jobs.label_lake import FeedLake, score
from tests.spark_jobs.tiny_lake import PRODUCTION, D, day
from tests.support import spark_conf

pytestmark = pytest.mark.spark


@pytest.fixture
def plans(tmp_path, spark, monkeypatch) -> dict[str, tuple[str, list[str]]]:
    """Table -> physical plan and input files of the frame that its job writes; there are slices of D - 1 too."""
    lake = FeedLake(tmp_path, spark)
    lake.items_table("i0", "i1", "i2")
    lake.sids((0, 0, (1, 1, 1), 0), (2, 0, (2, 2, 2), 0))
    lake.stats()
    lake.platt()
    lake.exposed(("r1", "u1", 0, 1))
    lake.unexposed(("r1", "u1", 2), ("r1", "u1", 1))
    for offset in (-1, 0):
        lake.scores(score("u1", 2, 0.5), dt=day(offset))
    found: dict[str, tuple[str, list[str]]] = {}
    write = SparkStep.write_slice

    def watch(step: SparkStep, table: str, frame: DataFrame, **options):
        found[table] = frame._jdf.queryExecution().executedPlan().toString(), frame.inputFiles()
        return write(step, table, frame, **options)

    monkeypatch.setattr(SparkStep, "write_slice", watch)
    with spark_conf(spark, PRODUCTION):
        lake.run("pseudo_labels", pseudo_labels.run)
        lake.run("training_feed", training_feed.run)
    return found


def test_plans(plans):
    # labels: pairs meet the users' counts by user, where they are ranked too, and items by item_index; feed: unexposed
    # rows and labels by (user, item),
    # SIDs by item, and the shuffle into files
    for table, exchanges in (("pseudo_labels", 4), ("training_feed", 4)):
        plan, files = plans[table]
        for never in ("CartesianProduct", "BroadcastNestedLoopJoin", "Python", "Collect"):
            assert never not in plan, (table, never)
        assert plan.count("Exchange hashpartitioning") <= exchanges, plan
        assert "Exchange rangepartitioning" not in plan
        dated = [f for f in files if "/dt=" in f]
        assert dated
        assert all(f"/dt={D.isoformat()}/" in f for f in dated)
