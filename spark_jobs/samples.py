"""Job: impressions and candidates -> exposed_samples, unexposed_samples.

    spark-submit … spark_jobs/samples.py --config CONFIG --run-date D

A pair that was exposed to the user within the exposure window, also later on D, is never an unexposed sample; nor is
one of an item withdrawn by the end of D, or of a user who had opted out by then. Exposed samples stay: they happened.
"""

from datetime import timedelta

from pyspark.sql import Column, DataFrame, Observation, Window
from pyspark.sql import functions as F

from gpl_core.config import with_passthrough
from gpl_core.errors import ContractError
from spark_jobs.common.columns import only_row, passthrough_of
from spark_jobs.common.exclusions import flagged, opted_out, withdrawn_items
from spark_jobs.run import job_main
from spark_jobs.step import SparkStep

_PAIR = ("user_id", "item_index")


def never_exposed(candidates: DataFrame, shown: DataFrame) -> DataFrame:
    """Candidates whose (user, item) pair does not occur in `shown`."""
    # By user: where the pairs are too many to broadcast, Spark moves the candidates the same way, and they stay there.
    pairs = shown.select(*_PAIR).repartition("user_id").distinct()
    return candidates.join(pairs, list(_PAIR), "left_anti")


def sample_unexposed(candidates: DataFrame, per_request: int, seed: int, many: bool = True) -> DataFrame:
    """At most `per_request` candidates of each request, chosen by hash and stratified by channel.

    Every channel gets the same number; what a small channel cannot use goes to the larger ones. How many each gets
    depends on the channels' sizes alone, never on the hash, so sampling_probability = taken / available of the stratum
    is exact, and the sum of 1 / probability over a request is its number of candidates. A request with more channels
    than `per_request` is one stratum; otherwise some channels could never be drawn. Which rows are drawn is a function
    of (request, item, seed): neither file layout nor partition number decides.

    Args:
        many: whether some request may have more channels than `per_request`; finding them takes another sort.
    """
    request = Window.partitionBy("user_id", "request_id")  # a request has one user; partitioned by user it stays put
    stratum = Window.partitionBy("user_id", "request_id", "_stratum")
    by_hash = stratum.orderBy("_hash", "item_id")
    every = by_hash.rowsBetween(Window.unboundedPreceding, Window.unboundedFollowing)  # ordered: one pass gives both
    # One sort, that of `by_hash`, serves every window below.
    rows = candidates.withColumn("_stratum", F.col("channel"))
    if many:
        channels = F.size(F.collect_set("channel").over(request))
        rows = rows.withColumn("_stratum", F.when(channels > per_request, F.lit("")).otherwise(F.col("channel")))
    size = F.struct(F.col("_available").alias("size"), F.col("_stratum").alias("name"))
    return (
        rows.withColumn("_hash", F.xxhash64(F.col("request_id"), F.col("item_id"), F.lit(seed)))
        .withColumn("_round", F.row_number().over(by_hash))
        .withColumn("_available", F.count(F.lit(1)).over(every))
        .where(F.col("_round") <= per_request)
        .withColumn("_strata", F.collect_list(F.when(F.col("_round") == 1, size)).over(request))
        .where(_place() <= per_request)
        .withColumn("_taken", F.count(F.lit(1)).over(stratum))
        .withColumn("sampling_probability", F.col("_taken").cast("double") / F.col("_available"))
        .drop("_hash", "_stratum", "_round", "_available", "_strata", "_taken")
    )


def _place() -> Column:
    """When a row is dealt: round r deals the r-th row of every stratum, largest stratum first."""
    turn = F.col("_round")

    def dealt_before_or_now(sum_: Column, stratum: Column) -> Column:
        size, name = stratum["size"], stratum["name"]
        first = (size > F.col("_available")) | ((size == F.col("_available")) & (name <= F.col("_stratum")))
        return sum_ + F.least(size, turn - 1) + F.when((size >= turn) & first, 1).otherwise(0)

    return F.aggregate("_strata", F.lit(0).cast("long"), dealt_before_or_now)


def run(step: SparkStep) -> None:
    """Write both slices of the run date."""
    config, context = step.config, step.context
    impressions = step.read("impressions", with_passthrough("impressions", config))
    today = impressions.where(F.col("dt") == F.lit(step.run_date))
    exposed = today.select(
        "request_id", "item_id", "user_id", "item_index", F.col("clicked").alias("label"), "position", "is_random",
        "event_time", "dt", *passthrough_of(today, config),
    )  # fmt: skip
    commit = step.write_slice("exposed_samples", exposed, contract=with_passthrough("exposed_samples", config))

    start = step.run_date - timedelta(days=config.samples.exposure_window_days - 1)
    window = impressions.where(F.col("dt").between(F.lit(start), F.lit(step.run_date)))
    offered = step.read_slice("candidates", with_passthrough("candidates", config))
    most = config.samples.unexposed_per_request
    # Counted before any join: this reads one column.
    many = only_row(offered.agg(F.count_distinct("channel")))[0] > most
    withdrawn = every = 0
    if (gone := withdrawn_items(step)) is not None:
        both = offered.select("item_index", F.lit(1).alias("n")).union(today.select("item_index", F.lit(0).alias("n")))
        sums = F.coalesce(F.sum("n"), F.lit(0)), F.count("n")
        withdrawn, every = only_row(both.join(gone, "item_index", "left_semi").agg(*sums))
        offered = offered.join(gone, "item_index", "left_anti")
    drawn = sample_unexposed(never_exposed(offered, window), most, config.run.seed, many)
    # A request belongs to one user: leaving users out after the draw affects no other request, and joins fewer rows.
    chosen = flagged(drawn, opted_out(step), "user_id", "opted_out")
    rows = chosen.select(
        "request_id", "item_id", "user_id", "item_index", "channel", "sampling_probability", "event_time", "dt",
        *passthrough_of(chosen, config), "opted_out",
    )  # fmt: skip
    observed = Observation(f"samples_{step.run_date}_{context.run_id}")
    stands_for = 1 / F.col("sampling_probability")
    rows = rows.observe(
        observed,
        F.coalesce(F.sum(stands_for), F.lit(0.0)).alias("population"),
        F.coalesce(F.sum(F.when(F.col("opted_out"), stands_for)), F.lit(0.0)).alias("opted_out"),
    )
    rows = rows.where(~F.col("opted_out")).drop("opted_out")
    written = step.write_slice("unexposed_samples", rows, contract=with_passthrough("unexposed_samples", config))
    recalled = step.slice_rows("candidates")
    unexposed, without_consent = round(observed.get["population"]), round(observed.get["opted_out"])
    if not written.rows <= unexposed - without_consent <= recalled - withdrawn:
        raise ContractError(
            f"table unexposed_samples: {written.rows} rows drawn stand for {unexposed} of {recalled} candidates, which "
            "is impossible. This is a bug in the step samples; please report it"
        )
    counts = context.counts
    counts.rows_in = recalled + commit.rows
    counts.rows_dropped = recalled - written.rows
    counts.details = {
        "exposed": commit.rows, "exposed_withdrawn": every - withdrawn,
        "candidates": recalled, "candidates_withdrawn": withdrawn,
        "candidates_exposed_in_window": recalled - withdrawn - unexposed, "candidates_unexposed": unexposed,
        "candidates_opted_out": without_consent, "not_drawn": unexposed - without_consent - written.rows,
        "unexposed_sampled": written.rows,
    }  # fmt: skip


if __name__ == "__main__":
    job_main("samples", run)
