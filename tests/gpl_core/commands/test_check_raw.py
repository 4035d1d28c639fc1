"""`gpl check-raw`: every fault planted in a platform's tables is named, all at once; good tables pass."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from deltalake import write_deltalake

from gpl_core.cli import main
from gpl_core.commands.check_raw import check_raw
from gpl_core.contracts.contract import load_contract
from gpl_core.errors import UsageError
from gpl_core.graph.planner import Planner
from tests.support import DAY, ONE, small_config

NOON = datetime(DAY.year, DAY.month, DAY.day, 12, tzinfo=UTC)


@pytest.fixture
def config(tmp_path):
    """Two dates; the label rate is given, so that no random exposure is needed."""
    return small_config(tmp_path, {"labels": {"calibrator": {"target_rate": 0.02}}})


def rows(table: str, *given: dict[str, Any], count: int = 3) -> pa.Table:
    """`count` good rows of a raw table the first of them changed by `given`."""
    base = {
        "raw_items": lambda n: {"item_id": f"i{n}", "updated_at": NOON - 2 * ONE, "title": f"t{n}"},
        "raw_impressions": lambda n: {"request_id": f"r{n}", "item_id": f"i{n}", "user_id": "u", "event_time": NOON,
                                      "position": n, "clicked": n % 2, "is_random": False, "dt": DAY},
        "raw_candidates": lambda n: {"request_id": f"r{n}", "item_id": f"i{n}", "user_id": "u", "event_time": NOON,
                                     "channel": "c", "dt": DAY},
        "raw_interactions": lambda n: {"user_id": "u", "item_id": f"i{n}", "event_time": NOON + timedelta(minutes=n),
                                       "kind": "click", "dt": DAY},
    }[table]  # fmt: skip
    made = [{**base(n), **(given[n] if n < len(given) else {})} for n in range(count)]
    schema = pa.schema([pa.field(f.name, f.type) for f in load_contract(table).arrow_schema()])
    return pa.Table.from_pylist(made, schema=schema)


def write(config, table: str, data: pa.Table, *, partition: bool = True) -> None:
    """Write a raw table as a platform would; event tables get the second run date too."""
    dated = partition and "dt" in data.column_names
    folder = f"{config.lakehouse.root}/tables/{table}"
    write_deltalake(folder, data, mode="append", partition_by=["dt"] if dated else None)
    if dated and "event_time" in data.column_names:
        index = data.column_names.index("dt")
        later = data.slice(0, 1).set_column(index, "dt", pa.array([DAY + ONE], pa.date32()))
        write_deltalake(folder, later, mode="append", partition_by=["dt"])


def good(config) -> None:
    """All four tables without a fault."""
    for table in ("raw_items", "raw_impressions", "raw_candidates", "raw_interactions"):
        write(config, table, rows(table))


def texts(config) -> list[str]:
    return [f"{f.level}: {f.table}: {f.text}" for f in check_raw(config, (DAY, DAY + ONE), 1000)]


def test_good_tables_pass(config, tmp_path, capsys):
    good(config)
    assert texts(config) == []
    assert main(["check-raw", "--config", str(tmp_path / "test.yaml")]) == 0
    assert "can be ingested" in capsys.readouterr().out


def test_every_fault_of_every_table_is_named_at_once(config, tmp_path, capsys):
    items = rows("raw_items", {"title": ""}, {"title": None})
    write(config, "raw_items", items.rename_columns(["item_id", "updated", *items.column_names[2:]]))
    write(config, "raw_impressions", rows(
        "raw_impressions", {"user_id": None}, {"clicked": 7}, {"request_id": "", "event_time": NOON + ONE}
    ))  # fmt: skip
    candidates = rows("raw_candidates")
    times = pa.array([1, 2, 3], pa.int64())
    write(config, "raw_candidates", candidates.set_column(3, "event_time", times), partition=False)
    assert main(["check-raw", "--config", str(tmp_path / "test.yaml")]) == 3
    said = capsys.readouterr().out
    for words in (
        "error: raw_items: column 'updated_at' (timestamp) is missing; if it is 'updated': "
        "lakehouse.columns.raw_items: {updated_at: updated}",
        "error: raw_impressions: user_id_is_not_null does not hold for 1 of 3 sampled rows",
        "error: raw_impressions: request_id_is_not_empty does not hold for 1 of 3 sampled rows",
        "error: raw_impressions: clicked_is_in_list does not hold for 1 of 3 sampled rows, e.g. '7'",
        "error: raw_impressions: event_time_is_within_dt does not hold for 1 of 3 sampled rows",
        "error: raw_impressions: 100.0% of the rows would be quarantined, but ingest.max_quarantine_share is 5.0%",
        "error: raw_candidates: column 'event_time' is long, expected timestamp, to which it cannot be cast",
        "note: raw_interactions: no table at",
        "7 errors, 0 warnings",
    ):
        assert words in said, words


def test_a_platforms_own_column_names_are_mapped(tmp_path):
    names = {
        "raw_items": {"item_id": "sku", "title": "item_id"},
        "raw_impressions": {"user_id": "Member", "clicked": "c"},
    }
    body = {"labels": {"calibrator": {"target_rate": 0.02}}, "lakehouse": {"columns": names}}
    config = small_config(tmp_path, body)
    for table in ("raw_items", "raw_impressions", "raw_candidates", "raw_interactions"):
        data = rows(table, {"clicked": 3}) if table == "raw_impressions" else rows(table)
        write(config, table, data.rename_columns([names.get(table, {}).get(n, n) for n in data.column_names]))
    assert texts(config) == [
        "error: raw_impressions: clicked_is_in_list does not hold for 1 of 3 sampled rows, e.g. '3'",
        "error: raw_impressions: 33.3% of the rows would be quarantined, but ingest.max_quarantine_share is 5.0%",
    ]
    snapshot = Planner(config).snapshot("raw_items")
    assert snapshot.read(columns=["item_id", "title"]).to_pylist()[0] == {"item_id": "i0", "title": "t0"}
    assert "updated_at" in snapshot.files[0].stats_min
    assert {"item_id", "title"} <= set(snapshot.files[0].stats_min)


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ({"items": {"item_id": "x"}}, "items is not a raw table"),
        ({"raw_items": {"sku": "item_id"}}, "raw_items.sku: no such column"),
        ({"raw_impressions": {"day": "dt"}}, "raw_impressions.day: no such column"),
        ({"raw_items": {"item_id": "x", "title": "x"}}, "two of our columns are mapped to one"),
    ],
)
def test_a_mapping_that_means_nothing_is_refused(tmp_path, columns, expected):
    with pytest.raises(UsageError, match=expected):
        small_config(tmp_path, {"lakehouse": {"columns": columns}})


def test_opt_outs_may_be_absent_and_are_looked_at_when_they_are_there(config):
    good(config)
    write(config, "raw_opt_outs", pa.table({"user_id": pa.array([None, "u", "u"], pa.string())}))
    assert texts(config) == [
        "error: raw_opt_outs: user_id_is_not_null does not hold for 1 of 3 sampled rows",
        "error: raw_opt_outs: 33.3% of the rows would be quarantined, but ingest.max_quarantine_share is 5.0%",
    ]
    config.lakehouse.tables["raw_opt_outs"] = f"{config.lakehouse.root}/elsewhere"
    assert texts(config) == [
        f"error: raw_opt_outs: there is no Delta table at {config.lakehouse.root}/elsewhere, where "
        "lakehouse.tables.raw_opt_outs places it: write it, or remove the setting"
    ]


def test_rows_that_do_not_belong_together_are_named(config):
    write(config, "raw_items", rows("raw_items", {"title": ""}, count=2))
    twice = {"request_id": "r0", "item_id": "i0"}
    write(config, "raw_impressions", rows("raw_impressions", twice, twice))
    write(config, "raw_candidates", rows("raw_candidates"))
    write(config, "raw_interactions", rows("raw_interactions", count=1))
    assert texts(config) == [
        "error: raw_items: item_has_content does not hold for 1 of 2 sampled rows",
        "error: raw_items: 50.0% of the rows would be quarantined, but ingest.max_quarantine_share is 5.0%",
        "error: raw_impressions: item_id_is_known does not hold for 1 of 3 sampled rows, e.g. 'i2'",
        "error: raw_impressions: key_is_unique does not hold for 1 of 3 sampled rows, e.g. 'r0, i0'",
        "error: raw_impressions: 66.7% of the rows would be quarantined, but ingest.max_quarantine_share is 5.0%",
        "error: raw_candidates: item_id_is_known does not hold for 1 of 3 sampled rows, e.g. 'i2'",
        "error: raw_candidates: 33.3% of the rows would be quarantined, but ingest.max_quarantine_share is 5.0%",
    ]


def test_tables_that_no_catalog_was_asked_for_are_all_named_and_the_others_looked_at(config):
    good(config)
    named = {t: f"catalog://shop.{t}" for t in ("raw_items", "raw_candidates")}
    lakehouse = config.lakehouse.model_copy(update={"tables": named})
    write(config, "raw_impressions", rows("raw_impressions", {"request_id": "late", "clicked": 7}))
    found = check_raw(config.model_copy(update={"lakehouse": lakehouse}), [DAY, DAY + ONE], 100)
    errors = {f.table: f.text for f in found if f.level == "error"}
    assert errors.keys() == {*named, "raw_impressions"}
    assert all(name in errors[t] and "gpl register" in errors[t] for t, name in named.items())


def test_missing_slices_history_and_random_exposure_are_named(tmp_path):
    history = {"history_start": (DAY - 3 * ONE).isoformat(), "end_date": (DAY + 2 * ONE).isoformat()}
    config = small_config(tmp_path, {"run": history})
    good(config)
    found = [f"{f.table}: {f.text}" for f in check_raw(config, (DAY, DAY + 2 * ONE), 1000)]
    last = (DAY + 2 * ONE).isoformat()
    assert f"raw_candidates: no slice for {last}; it has {DAY} to {DAY + ONE}" in found
    assert any("history since run.history_start" in f and (DAY - ONE).isoformat() in f for f in found)
    assert any(f.startswith(f"raw_impressions: no rows in the 14 days before {DAY}, so there is no") for f in found)
    later = [f"{f.table}: {f.text}" for f in check_raw(config, (DAY + ONE, DAY + ONE), 1000)]
    assert any("0 uniformly exposed rows" in f and "be 1 times the exposed click rate" in f for f in later)


def test_a_file_of_an_earlier_day_that_is_gone_hides_no_other_finding(tmp_path):
    config = small_config(tmp_path)
    for table in ("raw_items", "raw_impressions", "raw_interactions"):
        write(config, table, rows(table))
    data = rows("raw_impressions")
    data = data.set_column(data.column_names.index("dt"), "dt", pa.array([DAY - 2 * ONE] * len(data), pa.date32()))
    folder = Path(config.lakehouse.root, "tables", "raw_impressions")
    write_deltalake(str(folder), data, mode="append", partition_by=["dt"])
    for file in folder.glob(f"dt={DAY - 2 * ONE}/*.parquet"):
        file.unlink()
    found = texts(config)
    assert any(t.startswith("error: raw_impressions: rows cannot be read") for t in found)
    assert any(t.startswith("error: raw_candidates: there is no Delta table") for t in found)


def test_history_may_lie_in_other_positive_events_alone(tmp_path):
    config = small_config(tmp_path, {"run": {"history_start": (DAY - 2 * ONE).isoformat()}})
    good(config)

    def lacking() -> list[str]:
        return [f"{f.table}: {f.text}" for f in check_raw(config, (DAY,), 1000) if "history since" in f.text]

    (said,) = lacking()
    assert said.startswith("raw_impressions and raw_interactions: the history since run.history_start")
    assert said.endswith(f"has no rows for {DAY - 2 * ONE}, {DAY - ONE}")
    for table, left in (("raw_impressions", [str(DAY - ONE)]), ("raw_interactions", [])):
        data = rows(table)
        earlier = [DAY - (1 + len(left)) * ONE] * len(data)
        data = data.set_column(data.column_names.index("dt"), "dt", pa.array(earlier, pa.date32()))
        write_deltalake(f"{config.lakehouse.root}/tables/{table}", data, mode="append", partition_by=["dt"])
        assert [text.rpartition("no rows for ")[2] for text in lacking()] == left


def test_a_table_that_is_no_delta_table_and_a_bad_sample_size(config, tmp_path, capsys):
    good(config)
    log = Path(config.lakehouse.root) / "tables" / "raw_items" / "_delta_log" / "00000000000000000000.json"
    log.write_text("not json\n")
    assert [t for t in texts(config) if "raw_items: the Delta table at" in t and "cannot be opened" in t]
    assert main(["check-raw", "--config", str(tmp_path / "test.yaml"), "--sample-rows", "0"]) == 2
    assert "--sample-rows 0" in capsys.readouterr().err
