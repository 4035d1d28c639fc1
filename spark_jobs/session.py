"""The Spark session: its start, and the settings that the jobs rely on (settings.yaml)."""

import logging
import os
import sys
from collections.abc import Callable, Mapping
from importlib import resources
from typing import Any, NoReturn

import yaml
from pyspark import SparkConf, SparkContext
from pyspark.errors import AnalysisException
from pyspark.sql import SparkSession

from gpl_core.errors import UsageError
from gpl_core.graph.step_run import exit_with, leave, setup_logging

_log = logging.getLogger(__name__)

_CATALOG = "spark.sql.catalog.spark_catalog"
_EXTENSIONS = "spark.sql.extensions"
_DELTA = {
    _EXTENSIONS: "io.delta.sql.DeltaSparkSessionExtension",
    _CATALOG: "org.apache.spark.sql.delta.catalog.DeltaCatalog",
}
_SETTINGS = yaml.safe_load((resources.files("spark_jobs") / "settings.yaml").read_bytes())
_SETTLED: dict[str, str] = _SETTINGS["settled"]
_NOT_OURS = tuple(_SETTINGS["taken_back"])
# No progress bar in a log file.
_DEFAULTS = {**_SETTINGS["defaults"], "spark.ui.showConsoleProgress": str(sys.stderr.isatty()).lower()}
_LOCAL_DEFAULTS: dict[str, str] = _SETTINGS["local_defaults"]


def start_session(name: str) -> SparkSession:
    """The Spark session. Master and packages are never set here; of other settings the launcher's win, unless results
    depend on them.

    UsageError when Delta's jars are not on the class path, or the launcher sets what cannot be put right.
    """
    builder = SparkSession.builder.appName(f"gpl-{name}")
    given = _launcher_settings()
    local = given.get("spark.master", "").startswith("local")
    for key, value in {**_DEFAULTS, **(_LOCAL_DEFAULTS if local else {}), **_object_store()}.items():
        if key not in given:
            builder = builder.config(key, value)
    for key, value in _with_delta(given).items():
        builder = builder.config(key, value)
    spark = builder.getOrCreate()
    _settle(spark)
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


def _with_delta(given: Mapping[str, str]) -> dict[str, str]:
    """Delta's extension beside the launcher's own, and Delta's catalog; UsageError for another in its place."""
    if (catalog := given.get(_CATALOG, _DELTA[_CATALOG])) != _DELTA[_CATALOG]:
        raise UsageError(
            f"the launcher sets {_CATALOG}={catalog}, expected {_DELTA[_CATALOG]}: leave it out, and give another "
            "catalog a name of its own (spark.sql.catalog.NAME)"
        )
    extensions = [e.strip() for e in given.get(_EXTENSIONS, "").split(",") if e.strip()]
    if _DELTA[_EXTENSIONS] not in extensions:
        extensions.append(_DELTA[_EXTENSIONS])
    return {_CATALOG: catalog, _EXTENSIONS: ",".join(extensions)}


def _settle(spark: SparkSession) -> None:
    """Enforce the settings that results depend on, and log the launcher's values that they replace."""
    for key, given in sorted(spark.conf.getAll.items()):
        if key.startswith(_NOT_OURS):
            _log.warning("%s=%s, which the launcher sets, is left out: results must not depend on it", key, given)
            try:
                spark.conf.unset(key)
            except AnalysisException:  # fixed when Spark starts
                raise UsageError(f"the launcher sets {key}={given}: leave it out, results depend on it") from None
        elif key in _SETTLED and given.lower() != _SETTLED[key].lower():
            _log.warning("%s is %s here, not %s as the launcher has it", key, _SETTLED[key], given)
    for key, value in _SETTLED.items():
        spark.conf.set(key, value)


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
