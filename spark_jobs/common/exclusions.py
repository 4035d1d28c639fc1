"""Users and items excluded from labeling, as of the run date: users who opted out, and withdrawn items."""

from datetime import date, timedelta

from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from gpl_core.contracts.contract import load_contract
from gpl_core.contracts.raw_values import midnight
from gpl_core.graph.steps import start_of
from spark_jobs.common.columns import broadcast_if_few
from spark_jobs.common.raw_checks import Checked, typed_rows
from spark_jobs.step import SparkStep


def opted_out(step: SparkStep) -> DataFrame | None:
    """Distinct user_id of opt-outs before the end of the run date, or without a time; None without the table.

    A row whose time cannot be read counts as one without: the user is left out.
    """
    if not step.context.has("raw_opt_outs"):
        return None
    rows, _ = typed_rows(step.read("raw_opt_outs"), load_contract("raw_opt_outs"))
    end = start_of(step.run_date + timedelta(days=1))
    rows = rows.where(F.col("opted_out_at").isNull() | (F.col("opted_out_at") < F.lit(end)))
    return rows.select("user_id").where("user_id IS NOT NULL").distinct()


def checked_opt_outs(step: SparkStep, until: date, first: date) -> Checked | None:
    """raw_opt_outs before the end of `until`, checked; dt is the day of the opt-out, at least `first`."""
    if not step.context.has("raw_opt_outs"):
        return None
    frame, checks = typed_rows(step.read("raw_opt_outs"), load_contract("raw_opt_outs"))
    day = F.to_date("opted_out_at")
    frame = frame.where(day.isNull() | (day <= F.lit(until))).withColumn("dt", F.greatest(day, F.lit(first)))
    return Checked.of(frame, checks)


def withdrawn_items(step: SparkStep) -> DataFrame | None:
    """item_index of items withdrawn before the end of the run date, by their newest rows; None where there are none."""
    if not step.context.has("items"):
        return None
    end = midnight(step.run_date + timedelta(days=1))
    gone = step.read("items").where(F.col("withdrawn_at").between(0, end - 1)).select("item_index")
    count = gone.count()
    return broadcast_if_few(gone, count) if count else None


def flagged(frame: DataFrame, keys: DataFrame | None, key: str, flag: str, unknown: bool = False) -> DataFrame:
    """`frame` with the boolean `flag`: whether its `key` is among the distinct `keys`; `unknown` without them."""
    if keys is None:
        return frame.withColumn(flag, F.lit(unknown))
    marked = frame.join(keys.select(key, F.lit(True).alias(flag)), key, "left")
    return marked.withColumn(flag, F.coalesce(flag, F.lit(False)))
