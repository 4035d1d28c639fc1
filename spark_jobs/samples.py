"""Job: impressions and candidates -> exposed_samples, unexposed_samples.

    spark-submit … spark_jobs/samples.py --config CONFIG --run-date D

A pair that was exposed to the user within the exposure window, also later on D, is never an unexposed sample.
"""

from __future__ import annotations

from pyspark.sql import DataFrame, Window
from pyspark.sql import functions as F

from gpl_core.config import Config
from spark_jobs.columns import passthrough_of, with_passthrough
from spark_jobs.session import SparkStep, job_main

_PAIR = ("user_id", "item_index")


def exposed_rows(impressions: DataFrame, config: Config) -> DataFrame:
    """The date's impressions as labelled samples."""
    return impressions.select(
        "request_id", "item_id", "user_id", "item_index", F.col("clicked").alias("label"), "position", "is_random",
        "event_time", "dt", *passthrough_of(impressions, config),
    )  # fmt: skip


def never_exposed(candidates: DataFrame, shown: DataFrame) -> DataFrame:
    """Candidates whose (user, item) pair does not occur in `shown`."""
    return candidates.join(shown.select(*_PAIR).distinct(), list(_PAIR), "left_anti")


def sample_unexposed(candidates: DataFrame, per_request: int, seed: int) -> DataFrame:
    """At most `per_request` candidates of each request, chosen by hash and stratified by channel.

    Strata get equal shares, what a small stratum leaves goes to the larger ones: ranks by hash within a channel are
    dealt out channel by channel. Every row carries sampling_probability = taken / available of its stratum, so that
    the sum of 1 / probability estimates (here: equals, per stratum) the population. The choice is a function of
    (request, item, seed) alone: neither file layout nor partition number decides.
    """
    chance = F.xxhash64(F.col("request_id"), F.col("item_id"), F.lit(seed))
    in_stratum = Window.partitionBy("request_id", "channel").orderBy("_hash", "item_id")
    stratum = Window.partitionBy("request_id", "channel")
    # Round r deals the r-th candidate of every channel; ties of a round are broken by hash.
    dealt = Window.partitionBy("request_id").orderBy("_round", "_hash", "item_id")
    return (
        candidates.withColumn("_hash", chance)
        .withColumn("_round", F.row_number().over(in_stratum))
        .withColumn("_place", F.row_number().over(dealt))
        .withColumn("_available", F.count(F.lit(1)).over(stratum))
        .withColumn("_taken", F.sum((F.col("_place") <= per_request).cast("int")).over(stratum))
        .where(F.col("_place") <= per_request)
        .withColumn("sampling_probability", F.col("_taken").cast("double") / F.col("_available"))
        .drop("_hash", "_round", "_place", "_available", "_taken")
    )


def run(step: SparkStep) -> None:
    """Write both slices of the run date."""
    config, context = step.config, step.context
    impressions_contract = with_passthrough("impressions", config)
    impressions = step.read("impressions", impressions_contract)
    today = impressions.where(F.col("dt") == F.lit(step.run_date))
    exposed_contract = with_passthrough("exposed_samples", config)
    commit = step.write_slice("exposed_samples", exposed_rows(today, config), contract=exposed_contract)

    days = config.samples.exposure_window_days
    window = impressions.where(
        F.col("dt").between(F.date_sub(F.lit(step.run_date), days - 1), F.lit(step.run_date))
    )  # fmt: skip
    candidates = step.read_slice("candidates", with_passthrough("candidates", config))
    chosen = sample_unexposed(
        never_exposed(candidates, window), config.samples.unexposed_per_request, config.run.seed
    )  # fmt: skip
    rows = chosen.select(
        "request_id", "item_id", "user_id", "item_index", "channel", "sampling_probability", "event_time", "dt",
        *passthrough_of(chosen, config),
    )  # fmt: skip
    written = step.write_slice("unexposed_samples", rows, contract=with_passthrough("unexposed_samples", config))
    snapshot = context.snapshot("candidates")
    recalled = snapshot.rows(snapshot.select(start=step.run_date, end=step.run_date))
    counts = context.counts
    counts.rows_in = recalled + commit.rows
    counts.rows_dropped = recalled - written.rows
    counts.details = {
        "exposed": commit.rows, "candidates": recalled, "unexposed_sampled": written.rows,
    }  # fmt: skip


def main() -> None:
    """Entry point."""
    job_main("samples", run)


if __name__ == "__main__":
    main()
