"""Fixtures of the whole test suite. The Spark session starts when the first test asks for it."""

from __future__ import annotations

import os
import re
import sys
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import hypothesis
import pytest

from gpl_core.graph.launches import DELTA_PACKAGE
from tests.support import JVM

ROOT = Path(__file__).parents[1]
os.environ.setdefault("PYSPARK_PYTHON", sys.executable)  # by which spark-submit finds its home
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as in a launch: idle threads take the cores otherwise
hypothesis.settings.register_profile("house", deadline=None)  # on a busy machine a slow case is no failure
hypothesis.settings.load_profile("house")


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
    from tests.in_process import ONE_RANK

    with pytest.MonkeyPatch.context() as patch:
        for name, value in ONE_RANK.items():
            patch.setenv(name, value)
        yield start_ranks()


@pytest.fixture(autouse=True)
def _nothing_stays_cached() -> Iterator[None]:
    """A job leaves what it has cached to the end of its process, which here comes after hundreds of tests."""
    yield
    if (sql := sys.modules.get("pyspark.sql")) and (session := sql.SparkSession.getActiveSession()):
        session.catalog.clearCache()


@pytest.hookimpl(trylast=True)  # of the selected ones
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """By file: first what shares the Spark session, the longest before; last what is launched, the longest after."""
    sizes = Counter(_file(item.nodeid) for item in items)
    launched, graph = ({_file(i.nodeid) for i in items if mark in i.keywords} for mark in ("deepspeed", "pipeline"))

    def place(item: pytest.Item) -> tuple[int, bool, int]:
        file = _file(item.nodeid)
        if _shares_the_session(file):
            return 0, file not in graph, -sizes[file]
        return 1, file in graph, sizes[file] + 1000 * (file in launched)

    items.sort(key=place)


def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> object:
    """Whole files, for the first worker from the front, for the other from the back.

    So one Spark session is enough (a JVM costs 15 CPU seconds) unless the other worker has run all that needs none.
    Then it starts a second one and takes what is left.
    """
    from xdist.scheduler import LoadScopeScheduling

    class FromBothEnds(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return _file(nodeid)

        def _assign_work_unit(self, node: object) -> None:
            if node is not self.nodes[0]:
                self.workqueue.move_to_end(next(reversed(self.workqueue)), last=False)
            super()._assign_work_unit(node)

    return FromBothEnds(config, log)


def _file(nodeid: str) -> str:
    return nodeid.partition("::")[0]


@cache
def _shares_the_session(file: str) -> bool:
    return bool(re.search(r"^def \w+\([^)]*\bspark\b", (ROOT / file).read_text(encoding="utf-8"), re.M))
