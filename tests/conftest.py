"""Fixtures of the whole test suite. The Spark session starts when the first test asks for it."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from gpl_core.graph.launches import DELTA_PACKAGE
from tests.support import JVM

ROOT = Path(__file__).parents[1]
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
        .config("spark.driver.memory", "2g")
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
        # Plans of finished queries would fill the heap over hundreds of tests.
        .config("spark.sql.ui.retainedExecutions", "1")
        .config("spark.ui.retainedJobs", "1")
        .config("spark.ui.retainedStages", "1")
        .config("spark.ui.retainedTasks", "10")
        .config("spark.sql.warehouse.dir", str(tmp_path_factory.mktemp("warehouse")))
        .getOrCreate()
    )
    yield start_session("tests")
    session.stop()


@pytest.fixture(scope="session")
def one_rank() -> Iterator:
    """This process as the only rank. Never destroyed: DeepSpeed keeps a handle and cannot start a second one."""
    from gpu_workers.ranks import start_ranks

    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}.items():
            patch.setenv(name, value)
        patch.setenv("MASTER_PORT", "0")
        patch.setenv("DS_ACCELERATOR", "cpu")
        yield start_ranks()


@pytest.fixture(autouse=True)
def _nothing_stays_cached() -> Iterator[None]:
    """A job leaves what it has cached to the end of its process, which here comes after hundreds of tests."""
    yield
    if (sql := sys.modules.get("pyspark.sql")) and (session := sql.SparkSession.getActiveSession()):
        session.catalog.clearCache()


LONG = ("pipeline", "spark", "deepspeed")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest first: xdist hands out groups in this order."""
    items.sort(key=lambda item: next((n for n, mark in enumerate(LONG) if mark in item.keywords), len(LONG)))


def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> object:
    """One worker runs a whole group: all files that share the Spark session (a JVM costs 15 CPU seconds), or one file.

    xdist's own groups (mark `xdist_group`) have no effect with pytest 9.2: it no longer reads the id that they change.
    """
    from xdist.scheduler import LoadScopeScheduling

    class ByGroup(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return _group(nodeid.partition("::")[0])

    return ByGroup(config, log)


@cache
def _group(file: str) -> str:
    uses_the_session = re.search(r"^def \w+\([^)]*\bspark\b", (ROOT / file).read_text(encoding="utf-8"), re.M)
    return "spark" if uses_the_session else file
