"""raw_items -> items: the latest description of every item, and a dense index that never changes once given."""

from dataclasses import dataclass
from datetime import date
from itertools import accumulate

from pyspark.sql import Column, DataFrame, Window
from pyspark.sql import functions as F

from gpl_core.config import Config
from gpl_core.contracts.contract import load_contract
from spark_jobs.common.columns import only_row
from spark_jobs.common.raw_checks import Check, Checked, split, typed_rows

_IDS_PER_TASK = 1_000_000
_TEXT = ("title", "brand", "category", "description")


def clean(column: str) -> Column:
    """Text without leading, trailing and repeated white space; empty for null."""
    return F.trim(F.regexp_replace(F.coalesce(F.col(column), F.lit("")), r"\s+", " "))


def checked_items(raw: DataFrame, until: date, first: date, config: Config) -> Checked:
    """raw_items that became valid before the end of `until`, checked (see `checks`); dt is the day of the update.

    Updates older than the date `first`, and those without a time, belong to it, so that every bad row has one slice.
    """
    length = config.ingest.image_embedding_length
    frame, checks = typed_rows(raw, load_contract("raw_items"))
    frame = frame.where(F.col("updated_at").isNull() | (F.to_date("updated_at") <= F.lit(until)))
    frame = frame.withColumn("dt", F.greatest(F.to_date("updated_at"), F.lit(first)))  # greatest ignores null
    no_text = F.concat(clean("title"), clean("description"), clean("category")) == ""
    no_picture = (F.coalesce(F.length("image"), F.lit(0)) == 0) & (F.coalesce(F.trim("image_uri"), F.lit("")) == "")
    if length:
        no_picture = no_picture & F.col("image_embedding").isNull()
        message = F.concat(
            F.lit("image_embedding has "), F.size("image_embedding").cast("string"),
            F.lit(f" values, expected {length} (ingest.image_embedding_length)"),
        )  # fmt: skip
        bad = F.size("image_embedding") != length
        checks.append(Check(bad, "image_embedding_has_valid_length", message, ("image_embedding",)))
        strange = F.exists("image_embedding", lambda x: x.isNull() | F.isnan(x) | (F.abs(x) == float("inf")))
        message = F.lit("image_embedding holds null, NaN or infinity")
        checks.append(Check(strange, "image_embedding_is_finite", message, ("image_embedding",)))
    message = F.lit("title, description, category and picture are all empty: nothing to encode")
    columns = ("title", "description", "category", "image", "image_uri")
    return Checked.of(frame, [*checks, Check(no_text & no_picture, "item_has_content", message, columns)])


def latest_items(checked: Checked, config: Config) -> tuple[DataFrame, DataFrame]:
    """(latest good row per item without index, bad rows): two updates of one time are a duplicate key."""
    good, bad = split(checked, ["item_id", "updated_at"], ["title", "description", "category"])
    newest = Window.partitionBy("item_id").orderBy(F.col("updated_at").desc())
    good = good.withColumn("_age", F.row_number().over(newest)).where("_age = 1")
    text = F.concat_ws(". ", *[F.when(clean(c) != "", clean(c)) for c in _TEXT])
    length = config.ingest.image_embedding_length
    given = F.col("image_embedding") if length else F.lit(None)
    frame = good.select(
        "item_id",
        *[clean(c).alias(c) for c in _TEXT],
        F.substring(text, 1, load_contract("items").column("text").max_length or 0).alias("text"),
        F.coalesce("image", F.lit(b"")).alias("image"),
        F.coalesce(F.trim("image_uri"), F.lit("")).alias("image_uri"),
        F.coalesce(given, F.array_repeat(F.lit(0.0).cast("float"), max(1, length))).alias("image_embedding"),
        F.unix_micros("updated_at").alias("updated_at"),
        F.coalesce(F.unix_micros("withdrawn_at"), F.lit(-1)).cast("long").alias("withdrawn_at"),
    )
    digest = F.sha2(
        F.concat_ws("|", F.sha2("text", 256), F.sha2("image", 256), "image_uri", F.to_json("image_embedding")), 256
    )
    return frame.withColumn("content_hash", digest.substr(1, 32)), bad


@dataclass(frozen=True)
class ItemChanges:
    """What ingest found about items."""

    rows: DataFrame  # new and changed items, all columns of table items
    known: DataFrame  # item_id and item_index of every item after the changes
    new: int  # how many of them are new
    updated: int  # how many have changed


def item_changes(latest: DataFrame, items: DataFrame) -> ItemChanges:
    """Compare the latest descriptions with table items; new items get the next indices in item_id order.

    Only a newer update changes a row: a backfill of an old date never takes an item back. Persists what changed.
    """
    content = F.struct("content_hash", "title", "description", "category", "brand", "withdrawn_at")
    old = items.select("item_id", "item_index", F.col("updated_at").alias("_at"), content.alias("_content"))
    newer = (F.col("updated_at") > F.col("_at")) & (content != F.col("_content"))
    found = latest.join(old, "item_id", "left").where(F.col("item_index").isNull() | newer)
    changed = found.drop("_at", "_content").persist()
    new, updated = only_row(changed.agg(F.count_if(F.col("item_index").isNull()), F.count("item_index")))
    rows, known = changed, items.select("item_id", "item_index")
    if new:
        (top,) = only_row(items.agg(F.coalesce(F.max("item_index") + 1, F.lit(0))))
        numbered = number_ids(changed.where("item_index IS NULL").select("item_id"), new, top)
        given = numbered.withColumnRenamed("item_index", "_new")
        rows = changed.join(given, "item_id", "left").withColumn("item_index", F.coalesce("item_index", "_new"))
        known = known.union(numbered)
    return ItemChanges(rows.select(*load_contract("items").column_names), known, new, updated)


def number_ids(ids: DataFrame, count: int, first: int) -> DataFrame:
    """item_id, item_index = first, first + 1, … in item_id order, without one task that sorts them all.

    Ranges of ids are sorted in parallel; only the number of ids per range reaches the driver.
    """
    parts = -(-count // _IDS_PER_TASK)
    ranged = ids.repartitionByRange(parts, "item_id") if parts > 1 else ids.coalesce(1)
    # The low 33 bits of monotonically_increasing_id count the rows of a partition.
    row = F.monotonically_increasing_id().bitwiseAND(F.lit((1 << 33) - 1)).alias("_row")
    ordered = ranged.sortWithinPartitions("item_id")
    placed = ordered.select("item_id", F.spark_partition_id().alias("_part"), row).persist()
    sizes = {row["_part"]: row["n"] for row in placed.groupBy("_part").agg(F.count(F.lit(1)).alias("n")).collect()}
    counts = (sizes.get(part, 0) for part in range(max(sizes, default=-1) + 1))
    offsets = list(accumulate(counts, initial=first))
    start = F.element_at(F.array(*[F.lit(o) for o in offsets]), F.col("_part") + 1)
    return placed.select("item_id", (start + F.col("_row")).cast("int").alias("item_index"))
