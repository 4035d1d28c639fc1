"""Which files belong to a slice of a raw table that is laid out in its own way: never too few."""

from __future__ import annotations

from datetime import date, timedelta

import pyarrow as pa
import pytest
from deltalake import DeltaTable, write_deltalake
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gpl_core.contracts.contract import load_contract
from gpl_core.contracts.raw_values import cast, day_of
from gpl_core.lakehouse.snapshot import Snapshot

DAY = date(2026, 1, 3)
FIRST = date(2026, 1, 1)
_EPOCH = date(1970, 1, 1)
MICROS = 86_400_000_000
# Days since 1970, those outside the years 0001 to 9999 too.
_numbers = st.one_of(
    st.integers((DAY - _EPOCH).days - 3, (DAY - _EPOCH).days + 3), st.sampled_from([0, -719_163, 2_932_897]), st.none()
)
_CONTRACT = load_contract("raw_interactions")


def table(kind: str, rows: list[tuple[int | None, int | None]]) -> pa.Table:
    """Rows (day of `dt`, day of `event_time`) with a `dt` of the type `kind`."""
    days, times = ([row[at] for row in rows] for at in (0, 1))
    if kind == "text":
        texts = [None if d is None else (_EPOCH + timedelta(days=d)).strftime("%Y%m%d") if 0 < d < 10**6 else "x"
                 for d in days]  # fmt: skip
        dates = pa.array(texts, pa.string())
    elif kind == "date":
        dates = pa.array(days, pa.int32()).cast(pa.date32())
    else:
        dates = _times(days, None if kind == "timestamp_ntz" else "UTC")
    return pa.table({
        "user_id": ["u"] * len(rows), "item_id": ["i"] * len(rows), "kind": ["cart"] * len(rows),
        "day": dates, "event_time": _times(times, "UTC"),
    })  # fmt: skip


def _times(days: list[int | None], zone: str | None) -> pa.Array:
    return pa.array([None if d is None else d * MICROS + 5 for d in days], pa.int64()).cast(pa.timestamp("us", zone))


def slice_of(kind: str, row: tuple[int | None, int | None]) -> str:
    """The slice of a row, by the rules of a row alone."""
    values = table(kind, [row])
    dt = values["day"].cast(pa.string() if kind in ("text", "date") else pa.int64()).to_pylist()[0]
    name = {"text": "string"}.get(kind, kind)
    time = values["event_time"].cast(pa.int64()).to_pylist()[0]
    return day_of(cast(dt, name, "date"), time, FIRST)


@pytest.mark.parametrize("kind", ["date", "timestamp", "timestamp_ntz", "text", "text partition"])
@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(files=st.lists(st.lists(st.tuples(_numbers, _numbers), min_size=1, max_size=4), min_size=1, max_size=3))
def test_no_slice_misses_a_file_that_has_rows_of_it(tmp_path_factory, kind, files):
    uri = str(tmp_path_factory.mktemp("raw"))
    kind, partition = kind.split()[0], ["day"] if "partition" in kind else None
    for rows in files:
        write_deltalake(uri, table(kind, rows), mode="append", partition_by=partition)
    snapshot = Snapshot(uri, _CONTRACT, None, {"dt": "day"})
    rows = [row for written in files for row in written]
    for on in (FIRST, DAY, DAY + timedelta(days=1)):
        chosen = snapshot.select(start=on, end=on, undated=on <= FIRST)
        wanted = [row for row in rows if slice_of(kind, row) == on.isoformat()]
        assert sum(f.rows for f in chosen) >= len(wanted)
        if all(f.is_within(on, on) for f in chosen):
            assert sum(f.rows for f in chosen) == len(wanted), "the log counts the rows"
        for number, written in enumerate(files):
            if not partition and any(slice_of(kind, row) == on.isoformat() for row in written):
                assert {f.path for f in chosen} & added(uri, number), "a file with rows of the date"


def added(uri: str, version: int) -> set[str]:
    """Paths of the files that a commit has added."""
    before = set(DeltaTable(uri, version=version - 1).file_uris()) if version else set()
    return {path.rsplit("/", 1)[-1] for path in set(DeltaTable(uri, version=version).file_uris()) - before}


def test_files_of_one_day_are_told_apart_and_a_change_names_its_days(tmp_path):
    """Files of 3 January, of 3 and 4 January, of 5 January."""
    uri, day = str(tmp_path), (DAY - _EPOCH).days
    for rows in ([(day, day)], [(day, day), (day + 1, day + 1)], [(day + 2, day + 2)]):
        write_deltalake(uri, table("timestamp", rows), mode="append")
    first = Snapshot(uri, _CONTRACT, None, {"dt": "day"})
    counts = [len(first.select(start=DAY + timedelta(days=n), end=DAY + timedelta(days=n))) for n in range(4)]
    assert counts == [2, 1, 1, 0]
    assert [d.isoformat() for d in first.slices()] == ["2026-01-03", "2026-01-04", "2026-01-05"]
    write_deltalake(uri, table("timestamp", [(day + 2, day + 2)]), mode="append")
    DeltaTable(uri).optimize.compact()
    later = Snapshot(uri, _CONTRACT, None, {"dt": "day"})
    assert set(later.changes_since(first.version)) == {"2026-01-05"}, "a compaction changes no rows"
    DeltaTable(uri).delete("user_id = 'u'")
    assert set(Snapshot(uri, _CONTRACT, None, {"dt": "day"}).changes_since(later.version)) == {
        "2026-01-03", "2026-01-04", "2026-01-05",
    }  # fmt: skip


def test_rows_without_a_date_change_the_day_of_their_time_and_without_that_any(tmp_path):
    uri, day = str(tmp_path), (DAY - _EPOCH).days
    for row in [(day + 1, day + 1), (None, day), (None, None)]:
        write_deltalake(uri, table("date", [row]), mode="append", partition_by=["day"])
    changes = [set(Snapshot(uri, _CONTRACT, v, {"dt": "day"}).changes_since(v - 1)) for v in (1, 2)]
    assert changes == [{"2026-01-03"}, {"*"}]


def test_names_are_compared_as_spark_does_and_the_date_may_be_the_times(tmp_path):
    day = (DAY - _EPOCH).days
    rows = table("date", [(day + 9, day)]).rename_columns(["USER_ID", "Item_Id", "kind", "ds", "Event_Time"])
    write_deltalake(str(tmp_path), rows)
    snapshot = Snapshot(str(tmp_path), _CONTRACT, None, {"dt": "EVENT_TIME"})
    snapshot.check_contract()
    assert snapshot.types.keys() == {"user_id", "item_id", "kind", "dt", "event_time"}
    assert snapshot.columns["dt"] == snapshot.columns["event_time"] == "Event_Time"
    assert snapshot.slices() == (DAY,)
