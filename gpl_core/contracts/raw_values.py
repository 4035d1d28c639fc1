"""How the platform's values are converted to ours: the cast of raw columns, and the checks of a row.

`ingest` does the same in Spark (`spark_jobs/common/raw_checks.py`), using the types, patterns and rules of this module;
a test runs both on the same tables. Here a time is microseconds since 1970, a date is ISO text, a decimal is text and
an image is represented by its size, as the log and queries return them. Columns of types unknown to `castable` are
refused. docs/own-tables.md lists the casts, and which values are refused.
"""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import date, datetime, timedelta
from decimal import Decimal
from typing import Any

from gpl_core.contracts.contract import Column, Contract, all_contracts

IDS = ("request_id", "item_id", "user_id", "channel", "kind")
WHOLE_KINDS = ("byte", "short", "integer", "long")
_NUMBERS = (*WHOLE_KINDS, "float", "double", "decimal")
_TIMES = ("timestamp", "timestamp_ntz", "date", "string")
# contract type -> names in Delta (and in Spark's JSON) of the types that are cast to it
_FROM = {
    "string": ("string", *_NUMBERS, "boolean"),
    **dict.fromkeys(("int", "long", "float", "double", "boolean"), (*_NUMBERS, "string", "boolean")),
    "timestamp": _TIMES,
    "date": (*_TIMES, *WHOLE_KINDS),
    "binary": ("binary",),
}
# First whole number that the type can no longer tell from its neighbor.
MERGES_FROM = {"float": 2**24, "double": 2**53}
LIMITS = {"int": 2**31, "long": 2**63}
FLOAT_MAX = 3.4028234663852886e38
# Of text without the blanks around it; both regular expression dialects, Python's and Java's, read them alike.
WHOLE_TEXT = r"[+-]?[0-9]+(\.0*)?"
NUMBER_TEXT = r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?"
DAY_TEXT = r"(?!0000)[0-9]{4}-(0[1-9]|1[0-2])-(0[1-9]|[12][0-9]|3[01])"
COMPACT_DAY = r"([0-9]{4})([0-9]{2})([0-9]{2})"
_ZONE = r"( ?(Z|UTC|[+-]((0[0-9]|1[0-7]):[0-5][0-9]|18:00)))?"
# Spark takes a zone after seconds only.
TIME_TEXT = rf"{DAY_TEXT}([ T]([01][0-9]|2[0-3]):[0-5][0-9](:[0-5][0-9](\.[0-9]{{1,9}})?{_ZONE})?)?"
YES, NO = ("true", "t", "yes", "y", "1"), ("false", "f", "no", "n", "0")
_TIME_PARTS = re.compile(r"([0-9-]{10})(?:[ T]([0-9:]{5,8})(?:\.([0-9]+))? ?(.*))?")
_EPOCH, _MICROSECOND, _MINUTE = datetime(1970, 1, 1), timedelta(microseconds=1), 60_000_000


def midnight(day: date) -> int:
    """Start of `day` in UTC, in microseconds since 1970."""
    return (datetime(day.year, day.month, day.day) - _EPOCH) // _MICROSECOND


def castable(have: Any, wanted: str) -> bool:
    """Whether values of the type `have` (as in Delta's JSON) can mean `wanted` without guessing.

    A number as a time would be a guess.
    """
    if wanted.startswith("array<"):
        is_array = isinstance(have, dict) and have.get("type") == "array"
        return is_array and bare_type(have["elementType"]) in _NUMBERS
    return bare_type(have) in _FROM[wanted]


def drift(contract: Contract, have: Mapping[str, Any]) -> list[str]:
    """What keeps a raw table with the columns and types `have` from being read under `contract`, column by column."""
    problems = []
    for column in contract.columns:
        if column.name not in have:
            if not column.nullable:
                problems.append(f"column '{column.name}' ({column.type}) is missing")
        elif not castable(have[column.name], column.type):
            kind = type_text(have[column.name])
            problems.append(f"column '{column.name}' is {kind}, expected {column.type}, to which it cannot be cast")
    return problems


def type_text(kind: Any) -> str:
    """The type `kind` of Delta's JSON in words."""
    if isinstance(kind, dict):
        inner = kind.get("elementType")
        return f"array<{type_text(inner)}>" if inner else str(kind.get("type"))
    return str(kind)


def bare_type(kind: Any) -> str:
    """The type `kind` of Delta's JSON without its parameters; "" for a nested one."""
    return kind.partition("(")[0] if isinstance(kind, str) else ""


def cast(value: Any, have: Any, wanted: str) -> Any:
    """`value` of the type `have` as one of the contract type `wanted`; None where that loses something."""
    if value is None or wanted == "binary" or wanted.startswith("array<"):
        return value
    kind = bare_type(have)
    if kind == "decimal":
        value = Decimal(value)
    if wanted == "string":
        return _as_text(value, kind)
    if wanted in LIMITS:
        return _as_whole(value, LIMITS[wanted])
    if wanted in ("float", "double"):
        return _as_number(value, wanted)
    if wanted == "boolean":
        return _as_boolean(value)
    if wanted == "date":
        return _as_day(value, kind)
    return value if isinstance(value, int) else _as_micros(value)


def _as_text(value: Any, kind: str) -> str | None:
    if isinstance(value, (bool, str)):
        return value if isinstance(value, str) else str(value).lower()
    if not math.isfinite(value) or value != int(value) or abs(value) >= MERGES_FROM.get(kind, math.inf):
        return None
    return str(int(value))


def _as_whole(value: Any, limit: int) -> int | None:
    if isinstance(value, str):
        if not re.fullmatch(WHOLE_TEXT, value := value.strip(" ")):
            return None
        digits = value.partition(".")[0]
        value = int(digits) if len(digits) < 100 else limit  # int() refuses thousands of digits
    if not math.isfinite(value) or value != int(value) or not -limit <= value < limit:
        return None
    return int(value)


def _as_number(value: Any, wanted: str) -> float | None:
    if isinstance(value, str) and not re.fullmatch(NUMBER_TEXT, value := value.strip(" ")):
        return None
    number = float(value)
    # Values between the largest float and this one are rounded to it, not to infinity.
    return math.inf if wanted == "float" and abs(number) >= FLOAT_MAX * (1 + 2**-25) else number


def _as_boolean(value: Any) -> bool | None:
    if isinstance(value, str):
        word = value.strip(" ").lower()
        return True if word in YES else False if word in NO else None
    return bool(value) if value in (0, 1) else None


def _as_day(value: Any, kind: str) -> str | None:
    if kind in ("timestamp", "timestamp_ntz"):
        micros = value
    else:
        micros = _as_micros(str(value))
    try:
        return None if micros is None else (_EPOCH + timedelta(microseconds=micros)).date().isoformat()
    except OverflowError:
        return None


def _as_micros(text: str) -> int | None:
    text = text.strip(" ")
    if match := re.fullmatch(COMPACT_DAY, text):
        text = "-".join(match.groups())
    parts = _TIME_PARTS.fullmatch(text)
    if not parts or not re.fullmatch(TIME_TEXT, text):
        return None
    day, clock, fraction, zone = parts.groups(default="")
    try:
        found = datetime.fromisoformat(f"{day}T{clock}" if clock else day)
    except ValueError:  # 30 February
        return None
    micros = (found - _EPOCH) // _MICROSECOND + int(fraction[:6].ljust(6, "0"))
    if zone and zone[0] in "+-":
        minutes = int(zone[1:3]) * 60 + int(zone[4:6])
        micros -= (minutes if zone[0] == "+" else -minutes) * _MINUTE
    return micros


@dataclass(frozen=True)
class RowRule:
    """One check of one column of a raw row."""

    column: Column
    rule: str
    bounds: Column | None = None  # whose range, values or length must hold

    @property
    def name(self) -> str:
        """As quarantine names it."""
        return f"{self.column.name}_{self.rule}"

    @property
    def expected(self) -> str:
        """The CHECK expression of a rule with bounds."""
        if self.bounds is None:
            return ""
        is_micros = self.column.type == "timestamp" and self.bounds.type == "long"
        return self.bounds.check_sql(f"unix_micros({self.column.name})" if is_micros else self.column.name)

    def fails(self, raw: Any, value: Any) -> bool:
        """Whether a row with `raw` in the column, which is `value` as one of ours, breaks this rule."""
        if self.rule == "has_valid_type":
            return raw is not None and value is None
        if self.rule == "is_not_null":
            return raw is None
        if self.rule == "is_not_empty":
            return bool(value == "")
        if self.rule == "is_finite":
            return value is not None and not math.isfinite(value)
        return self.bounds is not None and value is not None and not _within(self.bounds, value)


def _within(bounds: Column, value: Any) -> bool:
    if bounds.allowed:
        return str(value) in bounds.allowed
    if bounds.max_length is not None:
        return bool((value if isinstance(value, int) else len(value)) <= bounds.max_length)
    return not (bounds.min is not None and value < bounds.min) and not (bounds.max is not None and value > bounds.max)


def rules_of(contract: Contract, have: Mapping[str, Any]) -> Iterator[RowRule]:
    """The checks of a raw table with the columns and types `have` that need no other row.

    Values must also be legal in the table that ingest makes of this one, whose CHECK constraints would stop the whole
    date.
    """
    written = all_contracts().get(contract.name.removeprefix("raw_"), contract)
    for column in (c for c in contract.columns if c.name in have):
        if have[column.name] != column.delta_type or column.type == "date":
            yield RowRule(column, "has_valid_type")
        if not column.nullable:
            yield RowRule(column, "is_not_null")
        if column.type == have[column.name] == "string":
            yield RowRule(column, "is_valid_text")
        if column.name in IDS and column.type == "string":
            yield RowRule(column, "is_not_empty")
        if column.type in ("float", "double"):
            yield RowRule(column, "is_finite")
        bounds = [column, written.column(column.name)] if column.name in written.column_names else [column]
        yield from {r.expected: r for b in bounds if (r := RowRule(column, _rule_of(b), b)).expected}.values()


def _rule_of(bounds: Column) -> str:
    if bounds.max_length is not None:
        return "is_short_enough"
    return "is_in_list" if bounds.allowed else "is_in_range"


def day_of(dt: Any, event_time: Any, first: date) -> str:
    """The slice of a row whose date and time are `dt` and `event_time` as `cast` gives them.

    A row without a usable date belongs to the day of its time, without either to the first date of all.
    """
    return dt or (None if event_time is None else _as_day(event_time, "timestamp")) or first.isoformat()
