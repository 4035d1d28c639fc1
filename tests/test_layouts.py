"""A layout of docs/own-tables.md from its raw tables to labels: every step in this process, on its own engine.

The others differ in what `ingest` reads: tests/spark_jobs/test_layouts.py.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from pyspark.sql import functions as F

from gpl_core.cli import main
from gpl_core.config import load_config
from gpl_core.graph.planner import Planner
from gpl_core.graph.steps import STEPS
from tests.in_process import run_graph
from tests.layouts import LAYOUTS
from tests.test_pipeline import FIRST, SIZE, SMALL

pytestmark = [pytest.mark.pipeline, pytest.mark.spark, pytest.mark.deepspeed, pytest.mark.slow]

RAW = ("raw_items", "raw_impressions", "raw_candidates")
ONE_DATE = {**SMALL, "run": {**SMALL["run"], "end_date": SMALL["run"]["start_date"]}}


def configured(folder: Path, lakehouse: dict[str, object]) -> str:
    """The file of a configuration over the lakehouse in `folder`."""
    path = folder / "layout.yaml"
    body = {**ONE_DATE, "lakehouse": {"root": str(folder / "lake"), **lakehouse}}
    path.write_text(yaml.safe_dump(body), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def simulated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A marketplace's raw tables in the layout of this project."""
    folder = tmp_path_factory.mktemp("simulated")
    assert main(["simulate", "--config", configured(folder, {}), *SIZE]) == 0
    return folder / "lake" / "tables"


def test_a_layout_gets_labels_from_its_raw_tables(simulated, tmp_path, spark, one_rank):
    layout = LAYOUTS["Clustered, with deletion vectors"]
    layout.create(spark, tmp_path)
    for table in (*RAW, "raw_interactions"):
        rows = spark.read.format("delta").load(str(simulated / table))
        numbers = {name: F.regexp_replace(name, "[^0-9]", "").cast("long") for name in ("item_id", "user_id")}
        rows = rows.withColumns({name: n.cast("string") for name, n in numbers.items() if name in rows.columns})
        if table in RAW:
            layout.append(tmp_path, table, rows)
        else:  # the page shows no history beside the impressions
            rows.write.format("delta").partitionBy("dt").save(str(tmp_path / "lake" / "tables" / table))
    config = configured(tmp_path, layout.placed(tmp_path))
    assert main(["check-raw", "--config", config]) == 0
    steps = STEPS[: 1 + [s.name for s in STEPS].index("pseudo_labels")]
    run_graph(load_config(config), spark, one_rank, [FIRST], [s.name for s in steps])
    planner = Planner(load_config(config))
    assert {planner.state(step, FIRST).status for step in steps} == {"done"}
    rows = {t: planner.lake.open(t) for t in ("candidates", "quarantine", "unexposed_samples", "pseudo_labels")}
    counts = {t: sum(f.rows for f in s.select(start=FIRST, end=FIRST)) for t, s in rows.items()}
    assert counts["quarantine"] == 0
    pairs = rows["unexposed_samples"].read(columns=["user_id", "item_id", "dt"]).to_pylist()
    wanted = {(p["user_id"], p["item_id"]) for p in pairs if p["dt"] == FIRST}
    labels = rows["pseudo_labels"].read(columns=["user_id", "item_id", "dt"]).to_pylist()
    labeled = {(p["user_id"], p["item_id"]) for p in labels if p["dt"] == FIRST}
    assert len(wanted & labeled) > 0.9 * len(wanted) > 0
