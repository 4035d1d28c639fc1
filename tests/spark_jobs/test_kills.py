"""kill -9 between a job's data files and its commit: nobody sees the files, and the same job again does the work.

`tests/bench/kill_campaign.py` does this to every job, at many moments.
"""

from __future__ import annotations

import pytest

from gpl_core.graph.launches import script_path, tool
from gpl_core.graph.planner import Planner
from spark_jobs import ingest, samples
from tests.bench.kill_campaign import contents, differing, kill_at, orphans, written
from tests.spark_jobs.tiny_lake import SETTINGS, D, TinyLake
from tests.test_pipeline import SMALL

pytestmark = [pytest.mark.spark, pytest.mark.slow]


def test_a_job_killed_before_its_commit_is_run_again_as_if_nothing_had_been(tmp_path, spark):
    """Ingest dies with its items written, samples with one slice committed and the files of the other one written."""
    lake = TinyLake(tmp_path / "killed", spark)
    lake.items(*({"item_id": i} for i in "abcd"))
    lake.impressions(("r1", "u1", "a", 1), ("r2", "u2", "b", 0))
    lake.candidates(*(("r1", "u1", i) for i in "abcd"), ("r2", "u2", "c"))
    undisturbed = lake.copied(tmp_path / "undisturbed")
    settings = [a for s in (f"lakehouse.root={lake.root}", *SETTINGS) for a in ("--set", s)]
    for name, job, before, table in (
        ("ingest", ingest.run, "quarantine", "items"),
        ("samples", samples.run, "exposed_samples", "unexposed_samples"),
    ):
        command = [
            tool("spark-submit"), *SMALL["launch"]["spark_submit"],
            script_path(f"spark_jobs/{name}.py"), "--config", "quickstart", *settings, "--run-date", D.isoformat(),
        ]  # fmt: skip
        assert kill_at(written(table), command, lake.root, name) is None, "ended before it could be killed"
        assert orphans(lake.root, name)
        assert not contents(lake.root, name).get(table)
        assert Planner(lake.config()).snapshot(before).mark(D.isoformat(), name), "committed before the kill"

        assert lake.run(name, job) == undisturbed.run(name, job) == "done"
        assert differing(contents(lake.root, name), contents(undisturbed.root, name)) == 0
        assert contents(lake.root, name)[table]
        assert lake.run(name, job) == "noop"
