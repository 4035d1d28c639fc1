"""Raw tables as other platforms lay them out, which docs/own-tables.md shows: their rows, and what makes them stale."""

from __future__ import annotations

import json
from datetime import date
from pathlib import Path

import pytest
from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from gpl_core.cli import main
from gpl_core.commands.check_raw import check_raw
from gpl_core.config import load_config
from gpl_core.graph.planner import Planner, StepState
from gpl_core.graph.steps import find_step
from spark_jobs import ingest
from tests.layouts import LAYOUTS, Layout
from tests.spark_jobs.tiny_lake import D, TinyLake, at, day

pytestmark = pytest.mark.spark

TABLES = ("raw_items", "raw_impressions", "raw_candidates")


@pytest.fixture(scope="module")
def usual(tmp_path_factory, spark) -> TinyLake:
    """Raw tables as this project likes them; ids are numbers, as text."""
    made = TinyLake(tmp_path_factory.mktemp("usual"), spark)
    made.items({"item_id": "1"}, {"item_id": "2", "description": "second"}, {"item_id": "30000001"})
    made.impressions(("r1", "10", "1", 1, 0.0), ("r2", "20", "2", 0, 23.99))
    made.impressions(("r9", "10", "1", 1), dt=day(1))
    made.candidates(("r1", "10", "1", "popular", 0.25), ("r1", "10", "30000001"), ("r2", "20", "2", "popular", None))
    made.candidates(("r9", "10", "2"), dt=day(1))
    return made


def moved(usual: TinyLake, layout: Layout, root: Path) -> TinyLake:
    """The same rows in another layout, a commit per date."""
    layout.create(usual.spark, root)
    for table in TABLES:
        rows = usual.spark.read.format("delta").load(usual.lake.uri(table))
        for part in [rows.where(F.col("dt") == F.lit(d)) for d in (D, day(1))] if "dt" in rows.columns else [rows]:
            layout.append(root, table, part)
    return TinyLake(root / "lake", usual.spark, "labels.calibrator.target_rate=0.1", *layout.overrides(root))


def impression(usual: TinyLake, request: str, **values: object) -> DataFrame:
    """An impression of D with other values."""
    rows = usual.spark.read.format("delta").load(usual.lake.uri("raw_impressions")).where("request_id = 'r1'")
    types = {field.name: field.dataType for field in rows.schema}
    values |= {"request_id": request}
    return rows.withColumns({name: F.lit(value).cast(types[name]) for name, value in values.items()})


def state(lake: TinyLake, on: date) -> StepState:
    return Planner(lake.config()).state(find_step("ingest"), on)


def proposed(root: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, object]:
    """What `gpl init --yes` makes of the tables under `root`, once `gpl check-raw` has passed with it."""
    out = root / "shop.yaml"
    assert main(["init", str(root), "--out", str(out), "--yes"]) == 0
    assert f"gpl check-raw --config {out}" in capsys.readouterr().out
    assert main(["check-raw", "--config", str(out)]) == 0, capsys.readouterr().out
    config = load_config(str(out))
    assert (config.run.start_date, config.run.end_date) == (day(1), day(1)), "the day before has clicks"
    return {"tables": config.lakehouse.tables, "columns": config.lakehouse.columns}


@pytest.mark.parametrize(
    "layout",
    [pytest.param(layout, id=name, marks=pytest.mark.slow if name != "Hive partitions" else ())
     for name, layout in LAYOUTS.items()],
)  # fmt: skip
def test_a_layout_of_the_documentation_is_ingested_and_only_its_dates_turn_stale(usual, layout, tmp_path, capsys):
    """To the rows of D and D + 1 come a late one, one of D + 1 and one without a date, in one commit."""
    lake = moved(usual, layout, tmp_path)
    assert [f.text for f in check_raw(lake.config(), [D], 100) if f.table != "raw_interactions"] == []
    assert proposed(tmp_path, capsys) == layout.placed(tmp_path)
    before = {d: state(lake, d).fingerprint for d in (D, day(1), day(2))}
    dates = (
        {"dt": None} if (text := "ds" in layout.ddl) else {"dt": None, "event_time": None}
    )  # which are its times' days
    late, undated = impression(usual, "late"), impression(usual, "undated", **dates)
    today = impression(usual, "new", event_time=at(1), dt=day(1))
    layout.append(tmp_path, "raw_impressions", late.union(today).union(undated).coalesce(1))
    changed = [d for d in before if state(lake, d).fingerprint != before[d]]
    assert changed == ([*before] if text else [D, day(1)]), "a text in place of a time says nothing of a file's dates"

    assert lake.run("ingest", ingest.run) == "done"
    assert lake.rows("impressions", "request_id", "item_id", "user_id", "event_time", "clicked", "is_random") == [
        ("late", "1", "10", at(0, 0.0), 1, False), ("r1", "1", "10", at(0, 0.0), 1, False),
        ("r2", "2", "20", at(0, 23.99), 0, False),
    ]  # fmt: skip
    assert lake.rows("candidates", "request_id", "item_id", "user_id", "channel", "recall_score") == [
        ("r1", "1", "10", "popular", 0.25), ("r1", "30000001", "10", "two_tower", 0.5),
        ("r2", "2", "20", "popular", 0.0),
    ]  # fmt: skip
    assert lake.rows("items", "item_id", "item_index", "text") == [
        ("1", 0, "title of 1"), ("2", 1, "title of 2. second"), ("30000001", 2, "title of 30000001"),
    ]  # fmt: skip
    ((failed, row),) = lake.rows("quarantine", "failed_checks", "row_json")
    assert [dict(check)["name"] for check in failed] == (
        ["dt_is_not_null"] if text else ["event_time_is_not_null", "dt_is_not_null"]
    )
    assert json.loads(row)["request_id"] == "undated"


@pytest.mark.slow
def test_a_delete_and_a_compaction_of_a_clustered_table(usual, tmp_path, spark):
    """The delete concerns the dates of its rows, the compaction none, though other dates were written in between."""
    layout = LAYOUTS["Clustered, with deletion vectors"]
    lake = moved(usual, layout, tmp_path)
    impressions = f"delta.`{layout.location(tmp_path, 'raw_impressions')}`"
    assert lake.run("ingest", ingest.run) == "done"
    layout.append(tmp_path, "raw_impressions", impression(usual, "later", event_time=at(2), dt=day(2)))
    spark.sql(f"OPTIMIZE {impressions}")
    assert "no rows changed" in state(lake, D).reason
    spark.sql(f"DELETE FROM {impressions} WHERE request_id = 'r2'")
    assert state(lake, D).status == "stale"
    assert lake.run("ingest", ingest.run) == "done"
    assert [request for (request,) in lake.rows("impressions", "request_id")] == ["r1"]
