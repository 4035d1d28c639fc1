"""Job: asks Spark's catalog where the raw tables lie that `lakehouse.tables` names there, and names ours in it.

Launch: gpl register --config CONFIG, or spark-submit … spark_jobs/register.py --config CONFIG

The answers go to `<root>/catalog.json`, where every process reads them: workers and `gpl` have no catalog to ask. With
`lakehouse.database` our tables and the views are registered there (`publish_views.py`). No step of the graph.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence

from pyspark.sql import SparkSession

from gpl_core.conf.sections import CATALOG, Lakehouse
from gpl_core.config import load_config
from gpl_core.graph.step_run import exit_with, setup_logging
from gpl_core.lakehouse.lake import LOCATIONS, Lake
from spark_jobs.common.whole_files import write_whole
from spark_jobs.publish_views import publish
from spark_jobs.session import located, start_session


def locate(spark: SparkSession, settings: Lakehouse) -> dict[str, str]:
    """catalog://name -> location of each raw table that is named so; written whole or not at all.

    Raises:
        MissingInputError, ContractError: the catalog has no such table, or no Delta table of that name.
    """
    names = [name for name in settings.tables.values() if name.startswith(CATALOG)]
    found = {name: located(spark, name.removeprefix(CATALOG)) for name in names}
    write_whole(Lake.of(settings).path(LOCATIONS), json.dumps(found, indent=1, sort_keys=True).encode())
    return found


def register(spark: SparkSession, settings: Lakehouse) -> dict[str, object]:
    """What was located, and with `lakehouse.database` what `publish` says of our tables and views."""
    done: dict[str, object] = {"located": locate(spark, settings)}
    return done | (publish(spark, Lake.of(settings), settings.database) if settings.database else {})


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point."""
    setup_logging()
    parser = argparse.ArgumentParser(prog="register.py", allow_abbrev=False)
    parser.add_argument("--config", required=True)
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", dest="overrides")
    args = parser.parse_args(argv)
    spark, code = None, 0
    try:
        settings = load_config(args.config, args.overrides).lakehouse
        spark = start_session("register")
        print(json.dumps(register(spark, settings)), flush=True)
    except Exception as error:
        code = exit_with(error)
    finally:
        if spark is not None:
            spark.stop()
    sys.exit(code)


if __name__ == "__main__":
    main()
