"""Job: users of the date's pairs whose anchors the cache lacks -> anchor_requests.

spark-submit … spark_jobs/anchor_requests.py --config CONFIG --run-date D
"""

from pyspark.sql import functions as F

from spark_jobs.common.columns import only_row
from spark_jobs.common.histories import cached_anchors, read_latest_sequences, read_scored_pairs
from spark_jobs.run import job_main
from spark_jobs.step import SparkStep


def run(step: SparkStep) -> None:
    """Write the run date's slice; users without history, or who opted out, are left out and counted."""
    sid_version, model_version = step.context.sid_and_model_versions()
    users = read_scored_pairs(step).select("user_id").distinct()
    sequences = read_latest_sequences(step)
    wanted = sequences.where(~F.col("opted_out")).join(users, "user_id", "left_semi")
    cache = cached_anchors(step, model_version)
    requests = wanted.join(cache, ["user_id", "sequence_hash"], "left_anti").select(
        "user_id", "sid", "item_index", "length", "sequence_hash", F.lit(sid_version).alias("sid_version"),
        F.lit(model_version).alias("model_version"), F.lit(step.run_date).alias("dt"),
    )  # fmt: skip
    # The worker reads only what was added to the cache since this version.
    known = step.context.state.version("interest_anchors") if step.context.has("interest_anchors") else -1
    commit = step.write_slice("anchor_requests", step.spread(requests, "user_id"), details={"cache_version": known})
    found = users.join(sequences.select("user_id", "opted_out"), "user_id", "left")
    total, with_history, without_consent = only_row(
        found.agg(F.count(F.lit(1)), F.count("opted_out"), F.count_if("opted_out"))
    )
    counts = step.context.counts
    counts.rows_in, counts.rows_dropped = total, total - commit.rows
    counts.details = {
        "users": total, "without_history": total - with_history, "opted_out": without_consent,
        "cached": with_history - without_consent - commit.rows,
        "model_version": model_version,
    }  # fmt: skip


if __name__ == "__main__":
    job_main("anchor_requests", run)
