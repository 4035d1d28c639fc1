"""The Spark session: the settings that the jobs rely on, and its start."""

import os
import sys
from collections.abc import Callable
from typing import Any, NoReturn

from pyspark import SparkConf, SparkContext
from pyspark.sql import SparkSession

from gpl_core.errors import UsageError
from gpl_core.graph.step_run import exit_with, leave, setup_logging

# What this project relies on. Each is set only where the launcher does not set it.
_DEFAULTS = {
    "spark.sql.extensions": "io.delta.sql.DeltaSparkSessionExtension",
    "spark.sql.catalog.spark_catalog": "org.apache.spark.sql.delta.catalog.DeltaCatalog",
    "spark.sql.session.timeZone": "UTC",
    "spark.sql.ansi.enabled": "true",
    "spark.sql.adaptive.enabled": "true",
    "spark.sql.parquet.outputTimestampType": "TIMESTAMP_MICROS",
    # Row groups small enough that every rank of a trainer gets some; Delta's writer ignores the per-write option.
    "spark.hadoop.parquet.block.size": str(64 * 2**20),
    "spark.databricks.delta.replaceWhere.constraintCheck.enabled": "true",
    # No progress bar in a log file.
    "spark.ui.showConsoleProgress": str(sys.stderr.isatty()).lower(),
    "spark.log.level": "ERROR",
    # Otherwise PySpark walks the stack and calls the JVM twice more per column expression: a fifth of a short job.
    "spark.python.sql.dataFrameDebugging.enabled": "false",
}
# On one machine nobody else has to reach the driver, and Delta's default of 50 log partitions, and 200 shuffle
# partitions, are most of the run time.
_LOCAL_DEFAULTS = {
    "spark.driver.host": "127.0.0.1",
    "spark.driver.bindAddress": "127.0.0.1",
    "spark.databricks.delta.snapshotPartitions": "2",
    "spark.sql.shuffle.partitions": "4",
    "spark.ui.enabled": "false",
}


def start_session(name: str) -> SparkSession:
    """The Spark session. The launcher's settings win; master and packages are never set here.

    UsageError when Delta's jars are not on the class path.
    """
    builder = SparkSession.builder.appName(f"gpl-{name}")
    given = _launcher_settings()
    local = given.get("spark.master", "").startswith("local")
    for key, value in {**_DEFAULTS, **(_LOCAL_DEFAULTS if local else {}), **_object_store()}.items():
        if key not in given:
            builder = builder.config(key, value)
    spark = builder.getOrCreate()
    spark.sparkContext.setLogLevel(given.get("spark.log.level", _DEFAULTS["spark.log.level"]))
    jvm: Any = spark._jvm
    loader = jvm.java.lang.Thread.currentThread().getContextClassLoader()
    try:
        jvm.java.lang.Class.forName("io.delta.sql.DeltaSparkSessionExtension", False, loader)
    except Exception:
        spark.stop()
        raise UsageError(
            "Delta's jars are not on the class path: start with "
            "spark-submit --packages io.delta:delta-spark_4.0_2.13:4.2.0, or --jars with delta-spark and delta-storage"
        ) from None
    return spark


def exit_after(work: Callable[[], int]) -> NoReturn:
    """Run `work`, stop the session, and exit the process with the code that `work` returns or that its error has."""
    setup_logging()
    try:
        code = work()
    except Exception as error:
        code = exit_with(error)
    finally:
        if (spark := SparkSession.getActiveSession()) is not None:
            spark.stop()
    leave(code)


def _object_store() -> dict[str, str]:
    """What s3a needs besides endpoint and credentials, which Spark reads from the environment itself."""
    found = {}
    if "AWS_ENDPOINT_URL" in os.environ:  # a private store, whose buckets rarely have DNS names
        found["spark.hadoop.fs.s3a.path.style.access"] = "true"
    if region := os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION"):
        found["spark.hadoop.fs.s3a.endpoint.region"] = region
    return found


def _launcher_settings() -> dict[str, str]:
    """What spark-submit (or an existing session) has set."""
    active = SparkSession.getActiveSession()
    if active is not None:
        return dict(active.sparkContext.getConf().getAll())
    # SparkConf reads the launcher's properties only once a JVM runs; under spark-submit PySpark has started it.
    if "PYSPARK_GATEWAY_PORT" in os.environ:
        SparkContext._ensure_initialized()
    return dict(SparkConf().getAll())
