"""Job: the date's pairs, their users' anchors and histories -> score_requests.

spark-submit … spark_jobs/score_requests.py --config CONFIG --run-date D
"""

from __future__ import annotations

from pyspark.sql import DataFrame, Window
from pyspark.sql import functions as F

from spark_jobs.columns import padded
from spark_jobs.histories import cached_anchors, read_latest_sequences, read_scored_pairs, require_model_of
from spark_jobs.session import SparkStep, job_main


def candidate_blocks(pairs: DataFrame, size: int) -> DataFrame:
    """`pairs` (distinct user_id, item_index, source) as blocks of at most `size` items, -1 padded.

    A user with many candidates becomes many rows, so that no row, and no rank, grows with the hottest user.
    """
    order = Window.partitionBy("user_id", "source").orderBy("item_index")
    placed = pairs.withColumn("block", F.floor((F.row_number().over(order) - 1) / size).cast("int"))
    items = F.sort_array(F.collect_list("item_index"))
    return placed.groupBy("user_id", "source", "block").agg(padded(items, size, F.lit(-1)).alias("candidates"))


def with_anchors(blocks: DataFrame, anchors: DataFrame) -> DataFrame:
    """`blocks` of users that have anchors, with their anchors and history."""
    return blocks.join(anchors, "user_id")


def run(step: SparkStep) -> None:
    """Write the run date's slice; users without anchors are left out and counted."""
    sid_version, model_version = require_model_of(step)
    pairs = read_scored_pairs(step).persist()
    sequences = read_latest_sequences(step).select("user_id", "sequence_hash", F.col("item_index").alias("history"))
    anchors = sequences.join(cached_anchors(step, model_version), ["user_id", "sequence_hash"]).drop("sequence_hash")
    requests = with_anchors(candidate_blocks(pairs, step.config.labels.block_size), anchors).select(
        "user_id", "source", "block", "anchor_sids", "log_prob", "history", "candidates",
        F.lit(sid_version).alias("sid_version"), F.lit(model_version).alias("model_version"),
        F.lit(step.run_date).alias("dt"),
    )  # fmt: skip
    parts = int(step.spark.conf.get("spark.sql.shuffle.partitions"))
    step.write_slice("score_requests", requests.repartition(parts, "user_id", "source", "block"))
    total = pairs.count()
    served = pairs.join(anchors, "user_id", "left_semi")
    scored, users = served.count(), pairs.select("user_id").distinct().count()
    with_anchor = served.select("user_id").distinct().count()
    pairs.unpersist()
    counts = step.context.counts
    counts.rows_in, counts.rows_dropped = total, total - scored
    counts.details = {
        "pairs": total, "pairs_scored": scored, "users": users, "users_without_anchors": users - with_anchor,
        "model_version": model_version,
    }  # fmt: skip


def main() -> None:
    """Entry point."""
    job_main("score_requests", run)


if __name__ == "__main__":
    main()
