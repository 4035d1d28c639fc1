"""Job: the date's pairs, their users' anchors and histories -> score_requests.

spark-submit … spark_jobs/score_requests.py --config CONFIG --run-date D
"""

from pyspark.sql import DataFrame, Observation, Window
from pyspark.sql import functions as F

from spark_jobs.common.columns import padded
from spark_jobs.common.histories import cached_anchors, read_latest_sequences, read_scored_pairs
from spark_jobs.run import job_main
from spark_jobs.step import SparkStep


def candidate_blocks(pairs: DataFrame, size: int) -> DataFrame:
    """The distinct (user_id, item_index, source) of `pairs` as blocks of at most `size` items, padded with -1.

    A user with many candidates becomes many rows, so that neither a row nor a rank grows with the most active user.
    One block of each user has `is_first`.
    """
    by_source = Window.partitionBy("user_id").orderBy("source", "item_index")
    within = Window.partitionBy("user_id", "source").orderBy("item_index")
    # One exchange and one sort serve everything below.
    distinct = pairs.repartition("user_id").distinct()
    placed = distinct.withColumn("is_first", F.row_number().over(by_source) == 1).withColumn(
        "block", F.floor((F.row_number().over(within) - 1) / size).cast("int")
    )
    items = padded(F.sort_array(F.collect_list("item_index")), size, F.lit(-1))
    return placed.groupBy("user_id", "source", "block").agg(
        items.alias("candidates"), F.max("is_first").alias("is_first")
    )


def run(step: SparkStep) -> None:
    """Write the run date's slice; users without anchors, or who opted out, are left out and counted."""
    sid_version, model_version = step.context.sid_and_model_versions()
    sequences = read_latest_sequences(step).select(
        "user_id", "sequence_hash", F.col("item_index").alias("history"), "opted_out"
    )
    has_anchors = F.col("log_prob").isNotNull() & ~F.col("opted_out")
    users = sequences.join(cached_anchors(step, model_version), ["user_id", "sequence_hash"], "left").withColumn(
        "is_known", has_anchors
    )
    blocks = candidate_blocks(read_scored_pairs(step), step.config.labels.block_size)
    spread = step.spread(blocks.join(users, "user_id", "left"), "user_id", "source", "block")
    observed = Observation(f"score_requests_{step.run_date}_{step.context.run_id}")
    wanted = F.size(F.filter("candidates", lambda c: c >= 0))
    counted = {
        "pairs": F.sum(wanted), "pairs_scored": F.sum(F.when(F.col("is_known"), wanted)),
        "users": F.count_if("is_first"), "known": F.count_if(F.col("is_first") & F.col("is_known")),
        "users_opted_out": F.count_if(F.col("is_first") & F.col("opted_out")),
    }  # fmt: skip
    # After the last exchange: tasks before it are repeated when an executor is lost, and would count twice.
    seen = spread.observe(observed, *[F.coalesce(c, F.lit(0)).alias(name) for name, c in counted.items()])
    requests = seen.where("is_known").select(
        "user_id", "source", "block", "anchor_sids", "log_prob", "prefixes", "prefix_log_probs", "history",
        "candidates", F.lit(sid_version).alias("sid_version"), F.lit(model_version).alias("model_version"),
        F.lit(step.run_date).alias("dt"),
    )  # fmt: skip
    step.write_slice("score_requests", requests)
    found = dict(observed.get)
    counts = step.context.counts
    counts.rows_in, counts.rows_dropped = found["pairs"], found["pairs"] - found["pairs_scored"]
    without = found["users"] - found["users_opted_out"] - found.pop("known")
    counts.details = {**found, "users_without_anchors": without, "model_version": model_version}


if __name__ == "__main__":
    job_main("score_requests", run)
