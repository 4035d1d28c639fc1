"""Row checks of raw tables: cast to the contract's types, name every check a row fails, find duplicate keys.

A checked frame has the contract's typed columns and `_raw`, the row as it came (a struct). A bad row also has
`_failed`: an array of struct<name, message, columns>, one per check that it fails. A check is named after what must
hold: `user_id_is_not_null`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce

from pyspark.sql import Column, DataFrame, Window
from pyspark.sql import functions as F
from pyspark.sql import types as T

from gpl_core.contracts.contract import Contract, load_contract
from gpl_core.errors import ContractError
from spark_jobs.common.columns import broadcast_if_few
from spark_jobs.step import schema_drift, spark_schema

RAW, BAD, HASH, FAILED, KEY = "_raw", "_bad", "_hash", "_failed", "_key"
_CASTS: tuple[tuple[type[T.DataType], tuple[type[T.DataType], ...]], ...] = (
    (T.StringType, (T.NumericType, T.BooleanType)),
    (T.NumericType, (T.NumericType, T.StringType, T.BooleanType)),
    (T.BooleanType, (T.IntegralType, T.StringType)),
    (T.TimestampType, (T.StringType, T.DateType, T.TimestampNTZType)),
)
KNOWN_ITEM = "item_id_is_known"
_IDS = ("request_id", "item_id", "user_id", "channel", "kind")
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
    """Typed rows and their checks. `rows` has `_raw`, `_bad` (some check fails) and `_hash` (of the whole row).

    `bare` are the same rows without columns of other tables. Messages are built only for rows that go to quarantine:
    good rows cost only the conditions.
    """

    rows: DataFrame
    checks: tuple[Check, ...]
    bare: DataFrame

    @staticmethod
    def of(typed: DataFrame, checks: Sequence[Check], bare: DataFrame | None = None) -> Checked:
        """Evaluate `checks` on `typed`."""
        bad = reduce(lambda a, b: a | b, [F.coalesce(c.bad, F.lit(False)) for c in checks])
        rows = typed.withColumns({BAD: bad, HASH: F.xxhash64(RAW)})
        return Checked(rows, tuple(checks), typed if bare is None else bare)


def typed_rows(raw: DataFrame, contract: Contract) -> tuple[DataFrame, list[Check]]:
    """(`raw` in the contract's types beside `_raw`, the checks that need no other table).

    A column of another, castable type is cast row by row; a row whose value does not survive the cast fails
    `<column>_has_valid_type`. Columns that the contract allows to be null may be missing. Values must also be legal in
    the table that ingest makes of this one, whose CHECK constraints would stop the whole date.

    Raises:
        ContractError: a column is missing, or its type cannot be cast; shows both types, column by column.
    """
    if problems := schema_drift(contract, raw.schema, castable):
        raise ContractError(
            f"table {contract.name}: its schema drifted from contract version {contract.version}, nothing was written; "
            "repair the table or declare a new contract version:\n  " + "\n  ".join(problems)
        )
    typed: list[Column] = []
    checks: list[Check] = []

    def check(bad: Column, rule: str, message: Column | str) -> None:
        text = F.lit(f"{field.name} {message}") if isinstance(message, str) else message
        checks.append(Check(bad, f"{field.name}_{rule}", text, (field.name,)))

    written = load_contract(contract.name.removeprefix("raw_"))
    for field in spark_schema(contract):
        column = contract.column(field.name)
        if field.name not in raw.columns:
            typed.append(F.lit(None).cast(field.dataType).alias(field.name))
            continue
        have = raw.schema[field.name].dataType
        source = F.col(f"{RAW}.`{field.name}`")
        if have == field.dataType:
            typed.append(source.alias(field.name))
        else:
            typed.append(_cast(source, have, field.dataType).alias(field.name))
            lost = F.col(field.name).isNull() & source.isNotNull()
            message = F.concat(F.lit("'"), _excerpt(source), F.lit(f"' is not a {column.type}"))
            check(lost, "has_valid_type", message)
        if not column.nullable:
            check(source.isNull(), "is_not_null", "is null")
        if isinstance(have, T.StringType) and have == field.dataType:
            check(~F.is_valid_utf8(field.name), "is_valid_text", "is not text in UTF-8")
        if field.name in _IDS and isinstance(field.dataType, T.StringType):
            check(F.col(field.name) == "", "is_not_empty", "is empty")
        if isinstance(field.dataType, T.FractionalType):
            check(F.isnan(field.name) | (F.abs(field.name) == float("inf")), "is_finite", "is not a finite number")
        for expected in dict.fromkeys((column.check_sql(), _written_check(written, field))):
            if expected and column.max_length is not None:
                size = F.length(field.name).cast("string")
                message = F.concat(F.lit(f"{field.name} has the length "), size, F.lit(f", expected {expected}"))
                check(~F.expr(expected), "is_short_enough", message)
            elif expected:
                value = _excerpt(F.col(field.name))
                message = F.concat(F.lit(f"{field.name} is "), value, F.lit(f", expected {expected}"))
                check(~F.expr(expected), "is_in_list" if column.allowed else "is_in_range", message)
    wide = raw.select(F.struct(*[F.col(f"`{c}`") for c in raw.columns]).alias(RAW))
    return wide.select(*typed, RAW), checks


def _written_check(written: Contract, field: T.StructField) -> str:
    """What the table that is written asks of a raw column: times are written as microseconds."""
    if field.name not in written.column_names:
        return ""
    column = written.column(field.name)
    is_micros = column.type == "long" and isinstance(field.dataType, T.TimestampType)
    return column.check_sql(f"unix_micros({field.name})" if is_micros else "")


def _excerpt(value: Column) -> Column:
    """The start of a value as text that every reader of Parquet takes."""
    return F.make_valid_utf8(F.substring(value.cast("string"), 1, _EXCERPT))


def castable(have: T.DataType, wanted: T.DataType) -> bool:
    """Whether values of `have` can mean `wanted` without guessing (a number as a time would be a guess)."""
    if isinstance(wanted, T.ArrayType):
        elements = (have.elementType, wanted.elementType) if isinstance(have, T.ArrayType) else ()
        return bool(elements) and all(isinstance(e, T.NumericType) for e in elements)
    return any(isinstance(wanted, to) and isinstance(have, sources) for to, sources in _CASTS)


def _cast(source: Column, have: T.DataType, wanted: T.DataType) -> Column:
    cast = source.try_cast(wanted)
    if isinstance(wanted, T.IntegralType) and isinstance(have, T.NumericType):
        return F.when(cast.cast("double") == source.cast("double"), cast)  # 0.5 is not a 0
    if isinstance(wanted, T.BooleanType) and isinstance(have, T.IntegralType):
        return F.when(source.isin(0, 1), cast)
    return cast


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
    failed = F.array_compact(F.array(*[c.failure for c in checked.checks]))
    bad = checked.rows.where(BAD).select(RAW, "dt", failed.alias(FAILED))
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
