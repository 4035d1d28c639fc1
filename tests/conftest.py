"""Fixtures of the whole test suite. The Spark session starts when the first test asks for it."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

import pytest

from gpl_core.graph.launches import DELTA_PACKAGE
from tests.support import JVM

os.environ.setdefault("PYSPARK_PYTHON", sys.executable)  # by which spark-submit finds its home


@pytest.fixture(scope="session")
def spark(tmp_path_factory: pytest.TempPathFactory) -> Iterator:
    """A local Spark with Delta, sized for tables of a few rows."""
    pyspark_sql = pytest.importorskip("pyspark.sql")
    from spark_jobs.session import start_session

    os.environ.setdefault("SPARK_LOCAL_IP", "127.0.0.1")
    session = (
        pyspark_sql.SparkSession.builder.master("local[2]")
        .config("spark.jars.packages", DELTA_PACKAGE)
        .config("spark.sql.extensions", "io.delta.sql.DeltaSparkSessionExtension")
        .config("spark.sql.catalog.spark_catalog", "org.apache.spark.sql.delta.catalog.DeltaCatalog")
        .config("spark.driver.memory", "1g")
        .config("spark.driver.extraJavaOptions", JVM)
        .config("spark.ui.enabled", "false")
        .config("spark.ui.showConsoleProgress", "false")
        # Tables of ten rows: more tasks, and plans made again while they run, only cost time.
        .config("spark.sql.adaptive.enabled", "false")
        .config("spark.sql.shuffle.partitions", "1")
        .config("spark.default.parallelism", "1")
        .config("spark.databricks.delta.snapshotPartitions", "1")
        .config("spark.python.sql.dataFrameDebugging.enabled", "false")
        # Code generation costs more than it saves here.
        .config("spark.sql.codegen.wholeStage", "false")
        .config("spark.sql.codegen.factoryMode", "NO_CODEGEN")
        .config("spark.sql.warehouse.dir", str(tmp_path_factory.mktemp("warehouse")))
        .getOrCreate()
    )
    yield start_session("tests")
    session.stop()


LONG = ("pipeline", "spark", "deepspeed")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest first: xdist hands out files in this order. A process that has a Spark session keeps it."""
    items.sort(key=lambda item: next((n for n, mark in enumerate(LONG) if mark in item.keywords), len(LONG)))
