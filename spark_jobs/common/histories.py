"""Users' latest sequences, the pairs to score, and the cached anchors: what two jobs must agree on."""

from datetime import date, timedelta
from functools import reduce

from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from gpl_core.contracts.raw_values import midnight
from gpl_core.lakehouse.marks import SliceMark
from gpl_core.lakehouse.snapshot import Snapshot
from spark_jobs.common.columns import unit_hash
from spark_jobs.common.exclusions import flagged, opted_out, withdrawn_items
from spark_jobs.step import SparkStep


def slice_marks(table: Snapshot | None) -> dict[date, SliceMark]:
    """Date -> mark of the newest commit that wrote its slice, without slices that their own run refused.

    Empty without the table.
    """
    if table is None:
        return {}
    marks = {name: mark for _, mark in reversed(table.marks()) for name in mark.slices}
    return {date.fromisoformat(n): mark for n, mark in marks.items() if n not in table.history.refused}


def newest_snapshot(table: Snapshot, until: date, sid_version: str) -> date | None:
    """The last date up to `until` whose slice holds every user's sequence of `sid_version`, by the commits' marks."""
    marks = {d: m.details for d, m in slice_marks(table).items() if d <= until}
    whole = [d for d, details in marks.items() if details.get("snapshot") and details.get("sid_version") == sid_version]
    return max(whole, default=None)


def latest_sequences(slices: DataFrame, sid_version: str, run_date: date, history_days: int) -> DataFrame:
    """Each user's latest row of user_sequences up to `run_date`, of the SIDs in force.

    A user whose newest event is older than the history window no longer has a sequence. Nothing rewrites such a row,
    so readers leave it out.
    """
    rows = F.struct("sid", "item_index", "length", "last_event_time", "sequence_hash", "sid_version")
    oldest = midnight(run_date - timedelta(days=history_days))
    return (
        slices.where((F.col("dt") <= F.lit(run_date)) & (F.col("sid_version") == sid_version))
        .groupBy("user_id")
        .agg(F.max_by(rows, "dt").alias("row"))
        .select("user_id", "row.*")
        .where(F.col("last_event_time") >= oldest)
    )


def read_latest_sequences(step: SparkStep) -> DataFrame:
    """`latest_sequences` of the run date, reading no slice before the newest snapshot, with the flag `opted_out`.

    The flag is added here because these rows are already partitioned by user. A user who opted out gets neither anchors
    nor scores.
    """
    snapshot = step.context.snapshot("user_sequences")
    version = step.context.artifact("tokenizer").version
    start = newest_snapshot(snapshot, step.run_date, version) or min(snapshot.slices(), default=step.run_date)
    slices = step.read_dates("user_sequences", start, step.run_date)
    latest = latest_sequences(slices, version, step.run_date, step.config.sequences.history_days)
    return flagged(latest, opted_out(step), "user_id", "opted_out")


def scored_pairs(unexposed: DataFrame, exposed: DataFrame, share: float, seed: int) -> DataFrame:
    """(user_id, item_index, source) of all unexposed pairs, a hashed share of the exposed ones and all uniform ones.

    A pair is repeated as often as the samples hold it.
    """
    chance = unit_hash(F.col("request_id"), F.col("item_id"), F.lit(seed))
    chosen = exposed.where(~F.col("is_random") & (chance < share))
    parts = {"unexposed": unexposed, "exposed": chosen, "uniform": exposed.where("is_random")}
    return reduce(
        DataFrame.union, [f.select("user_id", "item_index", F.lit(s).alias("source")) for s, f in parts.items()]
    )


def read_scored_pairs(step: SparkStep) -> DataFrame:
    """`scored_pairs` of the run date, without withdrawn items."""
    exposed, gone = step.read_slice("exposed_samples"), withdrawn_items(step)
    if gone is not None:  # unexposed ones were left out by `samples`
        exposed = exposed.join(gone, "item_index", "left_anti")
    share, seed = step.config.samples.scored_exposed_share, step.config.run.seed
    return scored_pairs(step.read_slice("unexposed_samples"), exposed, share, seed)


def cached_anchors(step: SparkStep, model_version: str) -> DataFrame:
    """One model's rows of the anchor cache with the configured numbers of anchors and prefixes.

    The newest row per (user_id, sequence_hash).
    """
    table = step.read("interest_anchors") if step.context.has("interest_anchors") else step.empty("interest_anchors")
    rows = F.struct("anchor_sids", "log_prob", "prefixes", "prefix_log_probs")
    return (
        table.where(F.col("model_version") == model_version)
        .where(F.size("log_prob") == step.config.anchors.count)
        .where(F.size("prefix_log_probs") == step.config.anchors.prefixes)
        .groupBy("user_id", "sequence_hash")
        .agg(F.max_by(rows, "dt").alias("row"))
        .select("user_id", "sequence_hash", "row.*")
    )
