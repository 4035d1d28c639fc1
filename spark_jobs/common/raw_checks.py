"""Row checks of raw tables: cast to the contract's types, name every check a row fails, find duplicate keys.

A checked frame has the contract's typed columns, `_raw` (the row as it came, a struct) and `_hash` of the whole row. A
bad row also has `_failed`: an array of struct<name, message, columns>, one per check that it fails. A check is named
after what must hold: `user_id_is_not_null`.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from functools import reduce
from typing import Any, Self

from pyspark.sql import Column, DataFrame, Window
from pyspark.sql import functions as F

from gpl_core.contracts.contract import Contract
from gpl_core.contracts.raw_values import RowRule, drift, rules_of, type_text
from gpl_core.errors import ContractError
from spark_jobs.common.columns import broadcast_if_few
from spark_jobs.common.raw_casts import cast_column, slice_day, types_of
from spark_jobs.step import column_named

RAW, BAD, HASH, FAILED, KEY = "_raw", "_bad", "_hash", "_failed", "_key"
KNOWN_ITEM = "item_id_is_known"
_EXCERPT = 100  # characters of a bad value that a message repeats


@dataclass(frozen=True)
class Check:
    """One row check: rows where `bad` holds fail `name`; null counts as not bad."""

    bad: Column
    name: str
    message: Column
    columns: tuple[str, ...]

    @property
    def failure(self) -> Column:
        """The failed check as a struct, null for rows that pass."""
        return F.when(F.coalesce(self.bad, F.lit(False)), _failure(self.name, self.message, self.columns))


def _failure(name: str, message: Column, columns: Sequence[str]) -> Column:
    return F.struct(F.lit(name).alias("name"), message.alias("message"), F.array(*map(F.lit, columns)).alias("columns"))


@dataclass(frozen=True)
class Checked:
    """Typed rows and their checks. `rows` has `_raw`, `_hash` and `_bad` (some check fails).

    `bare` are the same rows without columns of other tables. Messages are built only for rows that go to quarantine:
    good rows cost only the conditions.
    """

    rows: DataFrame
    checks: tuple[Check, ...]
    bare: DataFrame

    @classmethod
    def of(cls, typed: DataFrame, checks: Sequence[Check], bare: DataFrame | None = None) -> Self:
        """Evaluate `checks` on `typed`."""
        bad = reduce(lambda a, b: a | b, [F.coalesce(c.bad, F.lit(False)) for c in checks])
        return cls(typed.withColumn(BAD, bad), tuple(checks), typed if bare is None else bare)


def typed_rows(raw: DataFrame, contract: Contract, first: date | None = None) -> tuple[DataFrame, list[Check]]:
    """(`raw` in the contract's types beside `_raw`, the checks that need no other table).

    A column of another type is cast row by row (`gpl_core.contracts.raw_values`); a row whose value does not survive
    fails `<column>_has_valid_type`. Columns that the contract allows to be null may be missing. A table with dates gets
    in `dt` the slice of the row: without a usable date that of its time, or `first`.

    ContractError when a column is missing or cannot be cast; it shows both types, column by column.
    """
    have = types_of(raw)
    if problems := drift(contract, have):
        raise ContractError(
            f"table {contract.name}: its schema drifted from contract version {contract.version}, nothing was written; "
            "repair the table or declare a new contract version:\n  " + "\n  ".join(problems)
        )
    typed = []
    for column in contract.columns:
        name = column.name
        value = F.lit(None).cast(column.type)
        if name == "dt" and first is not None:
            value = slice_day(_source(name), _source("event_time"), have, first)
        elif name in have:
            value = cast_column(_source(name), have[name], column.type)
        typed.append(value.alias(name))
    checks = [_check(rule, have[rule.column.name]) for rule in rules_of(contract, have)]
    # Hashes of maps and variants are not defined.
    plain = not re.search(r"map|variant", raw.schema.simpleString())
    whole = F.struct(*[column_named(c) for c in raw.columns])
    wide = raw.select(whole.alias(RAW), F.xxhash64(whole if plain else F.to_json(whole)).alias(HASH))
    return wide.select(*typed, RAW, HASH), checks


def _source(column: str) -> Column:
    return F.col(f"{RAW}.`{column}`")


def _check(rule: RowRule, have: Any) -> Check:
    column, name = rule.column, rule.column.name
    source, value = _source(name), F.col(name)
    bad, words = source.isNull(), F.lit(f"{name} is null")
    if rule.rule == "has_valid_type":
        # `dt` holds the row's slice.
        bad = (cast_column(source, have, column.type) if name == "dt" else value).isNull() & source.isNotNull()
        words = _message(f"{name} '", source, f"' ({type_text(have)}) cannot be a {column.type} without loss")
    elif rule.rule == "is_valid_text":
        bad, words = ~F.is_valid_utf8(value), F.lit(f"{name} is not text in UTF-8")
    elif rule.rule == "is_not_empty":
        bad, words = value == "", F.lit(f"{name} is empty")
    elif rule.rule == "is_finite":
        bad, words = F.isnan(value) | (F.abs(value) == float("inf")), F.lit(f"{name} is not a finite number")
    elif rule.rule == "is_short_enough":
        words = _message(f"{name} has the length ", F.length(value), f", expected {rule.expected}")
    elif rule.bounds is not None:
        words = _message(f"{name} is ", value, f", expected {rule.expected}")
    return Check(~F.expr(rule.expected) if rule.expected else bad, rule.name, words, (name,))


def _message(before: str, value: Column, after: str) -> Column:
    return F.concat(F.lit(before), _excerpt(value), F.lit(after))


def _excerpt(value: Column) -> Column:
    """The start of a value as text that every reader of Parquet takes."""
    return F.make_valid_utf8(F.substring(value.cast("string"), 1, _EXCERPT))


def inside_slice() -> Check:
    """Events happened on their own dt (UTC)."""
    before = F.col("event_time") < F.col("dt").cast("timestamp")
    after = F.col("event_time") >= F.date_add("dt", 1).cast("timestamp")
    time, dt = F.col("event_time").cast("string"), F.col("dt").cast("string")
    message = F.concat(F.lit("event_time "), time, F.lit(" is not within dt "), dt)
    return Check(before | after, "event_time_is_within_dt", message, ("event_time",))


def known_item() -> Check:
    """The item is in table items: `item_index` was joined."""
    unknown = F.col("item_index").isNull() & (F.col("item_id") != "")
    message = F.concat(F.lit("no item "), _excerpt(F.col("item_id")), F.lit(" in table items"))
    return Check(unknown, KNOWN_ITEM, message, ("item_id",))


def split(checked: Checked, key: Sequence[str], order: Sequence[str | Column]) -> tuple[DataFrame, DataFrame]:
    """(good rows, bad rows with `_failed`) of checked rows; of rows with the same `key` the first by `order` stays.

    Ties in `order` are broken by a hash of the whole row, so that neither file layout nor partition number decides.
    Only rows whose key occurs twice are shuffled. They are found by counting hashes of the key, which moves eight bytes
    a row; different keys with the same hash are then told apart.
    """
    hashed = key_hash(key).alias(KEY)
    twice = checked.bare.select(hashed).groupBy(KEY).count().where("count > 1").select(KEY).persist()
    number = twice.count()
    bad = failed_rows(checked)
    good = checked.rows.where(~F.col(BAD))
    if number:
        few, keyed = broadcast_if_few(twice, number), good.select("*", hashed)
        first = Window.partitionBy(*key).orderBy(*order, HASH)
        ranked = keyed.join(few, KEY, "left_semi").withColumn("_rank", F.row_number().over(first)).persist()
        single = keyed.join(few, KEY, "left_anti")
        good = single.unionByName(ranked.where("_rank = 1").drop("_rank")).drop(KEY)
        names = [k for k in key if k != "dt"]
        quoted = [k for k in names if k != "user_id"]  # messages stand in job_runs and logs too
        text = F.concat_ws(", ", *[F.concat(F.lit(f"{k} = "), F.col(k).cast("string")) for k in quoted])
        again = _failure("key_is_unique", F.concat(F.lit("another row has the key "), text), names)
        bad = bad.union(ranked.where("_rank > 1").select(RAW, "dt", F.array(again).alias(FAILED)))
    return good.drop(RAW, BAD, HASH), bad


def failed_rows(checked: Checked) -> DataFrame:
    """The rows that fail a check: `_raw`, dt and `_failed`."""
    failed = F.array_compact(F.array(*[c.failure for c in checked.checks]))
    return checked.rows.where(BAD).select(RAW, "dt", failed.alias(FAILED))


def key_hash(key: Sequence[str]) -> Column:
    """64 bits that are equal for equal keys, and hardly ever for different ones."""
    return F.xxhash64(*key)


def quarantine_rows(bad: DataFrame, source_table: str, run_id: str) -> DataFrame:
    """Rows of table `quarantine` from the bad rows of `split`: one per distinct row, with how often it came."""
    row = F.to_json(RAW, {"ignoreNullFields": "false"}).alias("row_json")
    # A good row that came twice fails as the second copy only, so the checks are part of the key.
    rows = bad.select(row, F.col(FAILED).alias("failed_checks"), "dt").groupBy("dt", "row_json", "failed_checks")
    return rows.agg(F.count(F.lit(1)).alias("occurrences")).withColumns({
        "source_table": F.lit(source_table),
        "row_hash": F.sha2("row_json", 256).substr(1, 32),
        "run_id": F.lit(run_id),
    })  # fmt: skip
