"""Job: ingests a date again when rows of its quarantine would be accepted now. `gpl quarantine retry` starts it.

    spark-submit … spark_jobs/retry_quarantine.py --config CONFIG --run-date D

`gpl run` ingests a raw slice again if it changed. This job covers what no raw slice of D shows: items that arrived
later. The rows go through ingest like any others; only tables that gain rows are written, so nothing else gets stale.
"""

from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from spark_jobs import ingest
from spark_jobs.common.raw_checks import KNOWN_ITEM
from spark_jobs.run import run_jobs
from spark_jobs.step import SparkStep

# Source of a quarantined row -> what ingest makes of it. A click is an interaction too.
_OUTPUTS = {
    "raw_impressions": ("impressions", "interactions"),
    "raw_candidates": ("candidates",),
    "raw_interactions": ("interactions",),
}


def repaired(quarantine: DataFrame, items: DataFrame) -> dict[str, int]:
    """Source table -> rows that failed only because their item was unknown, and is known now."""
    alone = F.forall("failed_checks", lambda check: check["name"] == KNOWN_ITEM)
    text = F.get_json_object("row_json", "$.item_id")
    number = F.when(~F.col("row_json").rlike('"item_id":"'), text.try_cast("decimal(38,0)"))  # 1.2345701E7 is 12345701
    asked = quarantine.where(alone).withColumn("item_id", F.coalesce(number.cast("string"), text))
    found = asked.join(items.select("item_id"), "item_id", "left_semi")
    sums = found.groupBy("source_table").agg(F.sum("occurrences").alias("rows")).collect()  # one row per raw table
    return {r["source_table"]: r["rows"] for r in sums}


def run(step: SparkStep) -> None:
    """Ingest again if some row would pass now, or if the step is due anyway."""
    context, pinned = step.context, step.context.state.outputs
    if context.state.status != "done":
        ingest.run(step)
        return
    quarantine = step.read_version("quarantine", pinned["quarantine"])
    items = step.read_version("items", pinned["items"])
    rows = repaired(quarantine.where(F.col("dt") == F.lit(step.run_date)), items)
    if rows:
        context.force, context.rewrite = False, frozenset(t for source in rows for t in _OUTPUTS[source])
        ingest.run(step)
    context.counts.details["retried"] = rows


if __name__ == "__main__":
    # Forced: the inputs of ingest are unchanged, so the planner calls it done.
    run_jobs("retry_quarantine", {"ingest": run}, force=True)
