"""Column expressions that several jobs share. Nothing here runs Python on an executor."""

from pyspark.sql import Column, DataFrame, Row
from pyspark.sql import functions as F

from gpl_core.config import Config

_NEUTRAL = {"int": "0", "long": "0L", "float": "0.0F", "double": "0.0D", "string": "''", "boolean": "false"}
_MOST_BROADCAST = 500_000  # numbers or user ids: a hash table of 16 to 50 MB


def broadcast_if_few(keys: DataFrame, rows: int) -> DataFrame:
    """`keys`, which has `rows` rows, broadcast if they are few, so that a join does not shuffle the large table."""
    return F.broadcast(keys) if rows <= _MOST_BROADCAST else keys


def only_row(frame: DataFrame) -> Row:
    """The row of `frame`, an aggregation without groups."""
    (row,) = frame.collect()
    return row


def unit_hash(*columns: Column) -> Column:
    """Hash of `columns` as a double in [0, 1): the top 24 bits of xxhash64, so that a float holds it exactly."""
    return F.shiftrightunsigned(F.xxhash64(*columns), 40).cast("double") / F.lit(float(2**24))


def padded(array: Column, length: int, fill: Column) -> Column:
    """`array` (at most `length` long) with `fill` at its end up to `length`."""
    return F.concat(array, F.array_repeat(fill, F.lit(length) - F.size(array)))


def sids_in_force(item_sids: DataFrame, sid_version: str) -> DataFrame:
    """item_index, sid: the latest issue of each item under `sid_version` that is not retired."""
    live = item_sids.where((F.col("sid_version") == sid_version) & (F.col("retired_at") == 0))
    return live.groupBy("item_index").agg(F.max_by("sid", "issue").alias("sid"))


def passthrough_of(frame: DataFrame, config: Config) -> list[Column]:
    """The columns of `feed.passthrough` in `frame`, neutral (0, false, empty) where missing or null."""
    found = []
    for name, kind in config.feed.passthrough.items():
        neutral = F.expr(_NEUTRAL[kind])
        value = F.coalesce(F.col(name), neutral) if name in frame.columns else neutral
        found.append(value.alias(name))
    return found
