"""Who and what is left out of labeling, as of the run date: users who opted out, and withdrawn items."""

from datetime import datetime, timedelta

from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from gpl_core.graph.steps import start_of
from spark_jobs.common.columns import broadcast_if_few
from spark_jobs.step import SparkStep


def opted_out(step: SparkStep) -> DataFrame | None:
    """Distinct user_id of opt-outs before the end of the run date, or without a time; None without the table."""
    if not step.context.has("raw_opt_outs"):
        return None
    rows = step.read("raw_opt_outs")
    if "opted_out_at" in rows.columns:
        rows = rows.where(F.col("opted_out_at").isNull() | (F.col("opted_out_at") < F.lit(_end(step))))
    return rows.select("user_id").distinct()


def withdrawn_items(step: SparkStep) -> DataFrame | None:
    """item_index of items withdrawn before the end of the run date, by their newest rows; None where there are none."""
    if not step.context.has("items"):
        return None
    end = int(_end(step).timestamp() * 1_000_000)
    gone = step.read("items").where(F.col("withdrawn_at").between(0, end - 1)).select("item_index")
    count = gone.count()
    return broadcast_if_few(gone, count) if count else None


def flagged(frame: DataFrame, keys: DataFrame | None, key: str, flag: str, unknown: bool = False) -> DataFrame:
    """`frame` with the boolean `flag`: whether its `key` is among the distinct `keys`; `unknown` without them."""
    if keys is None:
        return frame.withColumn(flag, F.lit(unknown))
    marked = frame.join(keys.select(key, F.lit(True).alias(flag)), key, "left")
    return marked.withColumn(flag, F.coalesce(flag, F.lit(False)))


def _end(step: SparkStep) -> datetime:
    return start_of(step.run_date + timedelta(days=1))
