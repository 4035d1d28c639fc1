"""How a table's columns and dates map to ours, and which dates a data file may contain according to the log."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import date
from functools import cached_property, lru_cache
from typing import Any

from gpl_core.config import date_range
from gpl_core.contracts.contract import Contract
from gpl_core.contracts.raw_values import cast, castable

EARLIEST, LATEST = "", "~"  # before and after every ISO date
Days = tuple[str, str]  # first and last
_ANY = (EARLIEST, LATEST)
SORTED = ("date", "timestamp", "timestamp_ntz")  # text does not sort as its dates do
_MOST_DAYS = 1000


@dataclass(frozen=True)
class TableLayout:
    """A contract on a table: which of its columns are ours, and how its log dates the rows.

    What the log says of a file is here a mapping of `partition.x`, `min.x`, `max.x`, `null_count.x` and `num_records`,
    with times in microseconds since 1970 and dates as ISO text.
    """

    contract: Contract
    kinds: Mapping[str, Any]  # type of each column of the table, as Delta's JSON has it
    mapped: Mapping[str, str]  # our column -> the platform's name (raw tables)
    logical: Mapping[str, str]  # a column's name in the log -> in the table (column mapping)

    @cached_property
    def columns(self) -> dict[str, str]:
        """Our column -> its name in the table, where the two differ; as in Spark, case does not matter."""
        if self.contract.owner != "platform":
            return {}
        names = {name.lower(): name for name in self.kinds}
        wanted = {our: self.mapped.get(our, our) for our in self.contract.column_names}
        found = {our: names.get(theirs.lower(), theirs) for our, theirs in wanted.items()}
        return {our: theirs for our, theirs in found.items() if our != theirs}

    @cached_property
    def types(self) -> dict[str, Any]:
        """Type of each column of the contract that the table has, as Delta's JSON has it."""
        theirs = {our: self.columns.get(our, our) for our in self.contract.column_names}
        return {our: self.kinds[name] for our, name in theirs.items() if name in self.kinds}

    def minima(self, file: Mapping[str, Any]) -> dict[str, Any]:
        """Smallest values under our names; of a partition its day, if it is one. A column with nulls has none."""
        names = {name: name for name in self.kinds} | {our: self.columns.get(our, our) for our in self.types}
        found = {our: file.get(f"min.{name}") for our, name in names.items() if not file.get(f"null_count.{name}")}
        for our, kind in self.types.items():
            partition = f"partition.{self.columns.get(our, our)}"
            if partition in file:
                found[our] = cast(file[partition], kind, "date") if castable(kind, "date") else None
            elif kind == "string" and self.contract.column(our).type == "timestamp":
                found[our] = None
        return {our: value for our, value in found.items() if value is not None}

    def days(self, file: Mapping[str, Any]) -> tuple[Days, bool]:
        """(first and last day, whether some row may have neither a date nor a time) of a file's rows."""
        if "dt" not in self.contract.partition_by:
            return _ANY, False
        dt, time = (self.columns.get(name, name) for name in ("dt", "event_time"))
        if (partition := f"partition.{dt}") in file:
            day = _day_of(file[partition], self.kinds[dt])
            return ((day, day), False) if day else self._days_in(file, time)
        (first, last), undated = self._days_in(file, dt)
        if not undated or dt == time:
            return (first, last), undated
        # A row without a date belongs to the day of its time.
        (earliest, latest), undated = self._days_in(file, time)
        return (min(first, earliest), max(last, latest)), undated

    def _days_in(self, file: Mapping[str, Any], column: str) -> tuple[Days, bool]:
        kind, nulls = self.kinds.get(column), file.get(f"null_count.{column}")
        low, high = file.get(f"min.{column}"), file.get(f"max.{column}")
        if nulls is not None and nulls == file.get("num_records"):
            return (LATEST, EARLIEST), True
        if kind not in SORTED or low is None or high is None:
            return _ANY, True
        first, last = cast(low, kind, "date"), cast(high, kind, "date")
        return (first or EARLIEST, last or LATEST), nulls != 0 or not (first and last)

    def changed_days(self, actions: Iterable[Mapping[str, Any]], known: Mapping[str, Days]) -> set[str]:
        """The days whose rows the `add` and `remove` actions of a log may have changed; `LATEST` for any.

        A row with neither a date nor a time may be of any day.

        known: path of a file that was live before -> its days; a removal says nothing of them.
        """
        days, found = dict(known), set[str]()
        for action in actions:
            path, (span, undated) = action["path"], self.days(self._as_file(action))
            if span != _ANY or path not in days:
                days[path] = _ANY if undated else span
            found |= _each_day(*days[path])
        return found

    def _as_file(self, action: Mapping[str, Any]) -> dict[str, Any]:
        stats = json.loads(action.get("stats") or "{}")
        file = {"num_records": stats.get("numRecords")}
        for kind, key in (("min", "minValues"), ("max", "maxValues"), ("null_count", "nullCount")):
            for physical, value in stats.get(key, {}).items():
                name = self.logical.get(physical, physical)
                is_time = kind != "null_count" and self.kinds.get(name) in ("timestamp", "timestamp_ntz")
                file[f"{kind}.{name}"] = cast(value, "string", "timestamp") if is_time else value
        partition = (action.get("partitionValues") or {}).items()
        return file | {f"partition.{self.logical.get(k, k)}": v for k, v in partition}


@lru_cache(maxsize=10_000)
def _day_of(partition: Any, kind: str) -> str | None:
    day: str | None = cast(partition, kind, "date")
    return day


def _each_day(first: str, last: str) -> set[str]:
    if first == EARLIEST or last == LATEST:
        return {LATEST}
    start, end = date.fromisoformat(first), date.fromisoformat(last)
    if (end - start).days > _MOST_DAYS:
        return {LATEST}
    return {day.isoformat() for day in date_range(start, end)}
