"""Job: joins the small files of one date, in every table that Spark writes. `gpl optimize` starts it.

    spark-submit … spark_jobs/optimize.py --config CONFIG --run-date D

Tables without dates are compacted as a whole. Delta marks such a commit as changing no data: nothing turns stale.
"""

from delta.tables import DeltaTable

from gpl_core.graph.compaction import compactable
from gpl_core.lakehouse.marks import SliceMark
from spark_jobs.catalog import spark_path
from spark_jobs.common.columns import only_row
from spark_jobs.run import job_main
from spark_jobs.step import SparkStep, conflicts_told, settings_for


def run(step: SparkStep) -> None:
    """One commit per table that has small files to join."""
    sizes = str(step.config.lakehouse.file_mb * 2**20)
    settings = {
        "spark.databricks.delta.optimize.minFileSize": sizes,
        "spark.databricks.delta.optimize.maxFileSize": sizes,
        "spark.databricks.delta.commitInfo.userMetadata": SliceMark("optimize", {}, step.context.run_id).to_json(),
    }
    with settings_for(step.spark, settings):
        for contract in compactable(step.context.lake, "spark"):
            builder = DeltaTable.forPath(step.spark, spark_path(step.context.lake.uri(contract.name))).optimize()
            if "dt" in contract.partition_by:
                builder = builder.where(f"dt = DATE '{step.run_date.isoformat()}'")
            with conflicts_told(contract, "was written", "gpl optimize"):
                found = builder.executeCompaction().select("metrics.numFilesRemoved", "metrics.numFilesAdded")
            removed, added = only_row(found)
            step.context.counts.details[contract.name] = {"files_before": removed, "files_after": added}


if __name__ == "__main__":
    job_main("optimize", run)
