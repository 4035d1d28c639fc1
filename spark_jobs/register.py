"""Job: asks Spark's catalog for the locations of raw tables that `lakehouse.tables` names, and registers ours in it.

Launch: gpl register --config CONFIG, or spark-submit … spark_jobs/register.py --config CONFIG

The locations go to `<root>/catalog.json`, where every process reads them: workers and `gpl` have no catalog. With
`lakehouse.database` our tables and the views are registered in it (`publish_views.py`). It is not a step of the graph.
"""

from __future__ import annotations

import json

from pyspark.sql import SparkSession

from gpl_core.conf.sections import CATALOG, Lakehouse
from gpl_core.lakehouse.lake import LOCATIONS, Lake
from gpl_core.lakehouse.storage import write_whole
from spark_jobs.catalog import located
from spark_jobs.publish_views import catalog_main, publish


def locate(spark: SparkSession, settings: Lakehouse) -> dict[str, str]:
    """catalog://name -> location of each raw table that is named this way; written whole or not at all.

    Raises:
        MissingInputError, ContractError: the catalog has no such table, or no Delta table of that name.
    """
    names = [name for name in settings.tables.values() if name.startswith(CATALOG)]
    found = {name: located(spark, name.removeprefix(CATALOG)) for name in names}
    write_whole(Lake.of(settings).path(LOCATIONS), json.dumps(found, indent=1, sort_keys=True).encode())
    return found


def register(spark: SparkSession, settings: Lakehouse, database: str) -> dict[str, object]:
    """What was located, and with a `database` what `publish` returns about our tables and views."""
    done: dict[str, object] = {"located": locate(spark, settings)}
    return done | (publish(spark, Lake.of(settings), database) if database else {})


if __name__ == "__main__":
    catalog_main("register", register)
