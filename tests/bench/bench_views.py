"""Seconds that each view takes in Spark and in `gpl sql`, on the quickstart's lakehouse: some 30,000 labels a date.

The session is an analyst's, as docs/deploy.md shows it: tables and views by name in a catalog, two threads. The first
time counts what Spark reads and compiles once; the second is what a person waits for from then on. The yardstick is
delta-rs' engine on the same files, behind `gpl sql`, each time from nothing.

    python -m tests.bench.bench_views --lake lakehouse/quickstart
"""

from __future__ import annotations

import argparse
import re
import shutil
import tempfile
import time
from pathlib import Path

from pyspark.sql import SparkSession

from gpl_core.graph.launches import DELTA_PACKAGE
from gpl_core.lakehouse.lake import Lake
from gpl_core.lakehouse.query import Query
from gpl_core.lakehouse.views import all_views
from spark_jobs.register import publish
from tests.bench.harness import Figure, at_most, report

GOAL = 10.0  # seconds
ROOT = Path(__file__).parents[2]


def documented() -> dict[str, str]:
    """The lines of `catalog.conf` in docs/deploy.md that are not about a place."""
    text = (ROOT / "docs/deploy.md").read_text(encoding="utf-8")
    block = re.search(r"```\n(spark\.sql\.catalogImplementation.*?)```", text, re.S)
    assert block, "docs/deploy.md shows catalog.conf"
    pairs = dict(line.split("#")[0].split() for line in block[1].strip().splitlines())
    places = ("spark.sql.warehouse", "spark.hadoop", "spark.sql.catalogImplementation", "spark.jars.packages")
    return {key: value for key, value in pairs.items() if not key.startswith(places)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lake", default="lakehouse/quickstart", help="a finished lakehouse; it is only read")
    parser.add_argument("--quick", action="store_true", help="the same: it takes some two minutes")
    args = parser.parse_args()
    lake = Lake(str(Path(args.lake).absolute()))
    if not lake.exists("pseudo_labels"):
        print(f"skipped: {lake.root} holds no labels; make quickstart")
        return
    warehouse = tempfile.mkdtemp()
    builder = SparkSession.builder.master("local[2]").config("spark.jars.packages", DELTA_PACKAGE)
    for key, value in {**documented(), "spark.sql.warehouse.dir": warehouse, "spark.ui.enabled": "false",
                       "spark.log.level": "ERROR"}.items():  # fmt: skip
        builder = builder.config(key, value)
    spark = builder.getOrCreate()
    made = publish(spark, lake, "analysts")["views"]
    figures: dict[str, Figure] = {"labels": Figure(lake.open("pseudo_labels").read(columns=["dt"]).num_rows, "rows")}
    for name in (n for n in all_views() if n in made):
        for when in ("first", "second"):
            start = time.perf_counter()
            rows = len(spark.table(f"analysts.{name}").collect())
            figures[f"{name}: {when} time"] = at_most(round(time.perf_counter() - start, 1), GOAL, "s")
        start = time.perf_counter()
        assert len(Query(lake).rows(f"SELECT * FROM {name}")) == rows, name
        figures[f"{name}: gpl sql"] = Figure(round(time.perf_counter() - start, 1), "s")
    report("views", figures, args.quick, "Views in Spark, two threads, and in gpl sql")
    spark.stop()
    shutil.rmtree(warehouse)


if __name__ == "__main__":
    main()
