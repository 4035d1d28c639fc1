"""Job: the date's pairs, their users' anchors and histories -> score_requests.

spark-submit … spark_jobs/score_requests.py --config CONFIG --run-date D
"""

from __future__ import annotations

from pyspark.sql import DataFrame, Observation, Window
from pyspark.sql import functions as F

from gpl_core.errors import ContractError
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
    """Write the run date's slice; users without anchors, or who opted out, are left out and counted."""
    sid_version, model_version = require_model_of(step)
    pairs = read_scored_pairs(step)
    sequences = read_latest_sequences(step).select(
        "user_id", "sequence_hash", F.col("item_index").alias("history"), "opted_out"
    )
    anchors = (
        sequences.where(~F.col("opted_out"))
        .join(cached_anchors(step, model_version), ["user_id", "sequence_hash"])
        .drop("sequence_hash", "opted_out")
    )
    requests = with_anchors(candidate_blocks(pairs, step.config.labels.block_size), anchors).select(
        "user_id", "source", "block", "anchor_sids", "log_prob", "prefixes", "prefix_log_probs", "history",
        "candidates", F.lit(sid_version).alias("sid_version"), F.lit(model_version).alias("model_version"),
        F.lit(step.run_date).alias("dt"),
    )  # fmt: skip
    observed = Observation(f"score_requests_{step.run_date}_{step.context.run_id}")
    wanted = F.size(F.filter("candidates", lambda c: c >= 0))
    # As many files as shuffle partitions, so that every rank gets some.
    parts = int(step.spark.conf.get("spark.sql.shuffle.partitions"))
    spread = requests.repartition(parts, "user_id", "source", "block")
    counted = F.coalesce(F.sum(wanted), F.lit(0)).alias("scored")
    step.write_slice("score_requests", spread.observe(observed, counted))
    scored = observed.get["scored"]
    users = pairs.groupBy("user_id").agg(F.count(F.lit(1)).alias("pairs"))
    known = users.join(sequences.select("user_id", "opted_out"), "user_id", "left").join(
        anchors.select("user_id", F.lit(1).alias("known")), "user_id", "left"
    )
    total = known.agg(
        F.coalesce(F.sum("pairs"), F.lit(0)).alias("pairs"),
        F.count(F.lit(1)).alias("users"),
        F.count("known").alias("known"),
        F.count_if("opted_out").alias("opted_out"),
        F.coalesce(F.sum(F.when(F.col("known").isNotNull(), F.col("pairs"))), F.lit(0)).alias("of_known"),
    ).first()
    if scored != total["of_known"]:
        raise ContractError(
            f"table score_requests: {scored} pairs in blocks, but users with anchors want {total['of_known']}. "
            "This is a defect of score_requests, report it"
        )
    counts = step.context.counts
    counts.rows_in, counts.rows_dropped = total["pairs"], total["pairs"] - scored
    counts.details = {
        "pairs": total["pairs"], "pairs_scored": scored, "users": total["users"],
        "users_opted_out": total["opted_out"],
        "users_without_anchors": total["users"] - total["opted_out"] - total["known"], "model_version": model_version,
    }  # fmt: skip


def main() -> None:
    """Entry point."""
    job_main("score_requests", run)


if __name__ == "__main__":
    main()
