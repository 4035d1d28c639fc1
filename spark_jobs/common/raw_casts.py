"""The casts of raw columns as Spark expressions: what `gpl_core.contracts.raw_values` says, by its patterns.

A value that a cast would change becomes null.
"""

from collections.abc import Mapping, Sequence
from datetime import date, timedelta
from typing import Any

from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F

from gpl_core.contracts.contract import Contract
from gpl_core.contracts.raw_values import (
    COMPACT_DAY,
    LIMITS,
    MERGES_FROM,
    NO,
    NUMBER_TEXT,
    TIME_TEXT,
    WHOLE_KINDS,
    WHOLE_TEXT,
    YES,
    bare_type,
)
from gpl_core.contracts.types import arrow_type, spark_type

_YEARS = ("DATE'0001-01-01'", "DATE'9999-12-31'")


def types_of(frame: DataFrame) -> dict[str, Any]:
    """The type of each column, as Delta's JSON has it."""
    return {field.name: field.dataType.jsonValue() for field in frame.schema}


def cast_column(source: Column, have: Any, wanted: str) -> Column:
    """`source` of the type `have` as the contract type `wanted`."""
    kind = bare_type(have)
    if wanted == "date":
        return _day(source, kind)
    if have == spark_type(arrow_type(wanted)) or not kind:
        return source if kind else source.try_cast(wanted)  # arrays of other numbers
    text = F.trim(source) if kind == "string" else source.cast("string")
    if wanted == "string":
        return text if kind in (*WHOLE_KINDS, "boolean") else _whole(source, kind, text).cast("string")
    if wanted in LIMITS:
        return source.try_cast(wanted) if kind == "boolean" else _whole(source, kind, text, wanted)
    if wanted == "boolean":
        if kind != "string":
            return F.when(source == 1, True).when(source == 0, False)
        return F.when(F.lower(text).isin(*YES), True).when(F.lower(text).isin(*NO), False)
    if wanted == "timestamp":
        return _time(source, kind)
    return F.when(_matches(text, NUMBER_TEXT), text.try_cast(wanted)) if kind == "string" else source.try_cast(wanted)


def _matches(text: Column, pattern: str) -> Column:
    return text.rlike(rf"\A(?:{pattern})\z")


def _whole(source: Column, kind: str, text: Column, wanted: str = "") -> Column:
    """A whole number, as text unless `wanted` names a type."""
    if kind in MERGES_FROM:
        number = source.try_cast("long")
        below = F.abs(source) < float(LIMITS[wanted] if wanted else MERGES_FROM[kind])
        is_whole = below & (number.cast("double") == source.cast("double"))
        return F.when(is_whole, number.try_cast(wanted) if wanted else number)
    digits = F.when(_matches(text, WHOLE_TEXT), F.regexp_replace(text, r"\..*", ""))
    return digits.try_cast(wanted) if wanted else digits


def _time(source: Column, kind: str) -> Column:
    if kind == "string":
        text = F.regexp_replace(F.trim(source), rf"\A{COMPACT_DAY}\z", "$1-$2-$3")
        return F.when(_matches(text, TIME_TEXT), text.try_cast("timestamp"))
    return (_within_years(source) if kind == "date" else source).cast("timestamp")


def _day(source: Column, kind: str) -> Column:
    if kind == "string" or kind in WHOLE_KINDS:
        source = _time(source.cast("string"), "string")
    return _within_years(F.to_date(source))


def _within_years(day: Column) -> Column:
    return F.when(day.between(*map(F.expr, _YEARS)), day)


def slice_day(dt: Column, event_time: Column, types: Mapping[str, Any], first: date) -> Column:
    """The slice that a raw row belongs to; see `gpl_core.contracts.raw_values.day_of`."""
    time = cast_column(event_time, types["event_time"], "timestamp")
    return F.coalesce(cast_column(dt, types["dt"], "date"), _day(time, "timestamp"), F.lit(first))


def rows_of(raw: DataFrame, contract: Contract, dates: Sequence[date], first: date) -> DataFrame:
    """The rows of `raw`, as they are, that belong to the slices `dates`; without a date see `slice_day`."""
    types, dt = types_of(raw), F.col("dt")
    kind, start, end = types["dt"], F.lit(dates[0]), F.lit(dates[-1] + timedelta(days=1))
    if kind in ("date", "timestamp", "timestamp_ntz"):  # as Delta compares it with the statistics of a file
        near = (dt >= start.cast(kind)) & (dt < end.cast(kind))
        near = near | dt.isNull() | (dt < F.expr(_YEARS[0]).cast(kind)) | (dt >= F.expr(_YEARS[1]).cast(kind))
    else:  # where it is a partition, this alone decides which are read
        day = cast_column(dt, kind, "date")
        near = ((day >= start) & (day < end)) | day.isNull()
    day = slice_day(dt, F.col("event_time"), types, first)
    return raw.where(near).where((day >= start) & (day < end))
