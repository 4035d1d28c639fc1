"""Job: registers the tables of a lakehouse in Spark's catalog and creates the views of `schemas/views/` on them.

Launch: spark-submit … spark_jobs/publish_views.py --config CONFIG [--database gpl]

No step of the graph: it writes no data. A catalog that outlives the session (Hive, Unity, Glue) comes from the
launcher's settings.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence

from pyspark.sql import SparkSession
from sqlglot import parse_one
from sqlglot.expressions import Table, to_table

from gpl_core.config import load_config
from gpl_core.contracts.contract import all_contracts
from gpl_core.errors import ContractError, UsageError
from gpl_core.graph.step_run import exit_with, setup_logging
from gpl_core.lakehouse.lake import Lake
from gpl_core.lakehouse.sql import quoted
from gpl_core.lakehouse.views import View, all_views
from spark_jobs.session import spark_path, start_session


def publish(spark: SparkSession, lake: Lake, database: str) -> dict[str, list[str]]:
    """Create what is missing and replace the views; returns `tables`, `views`, and the views `left_out` for a table.

    Raises:
        ContractError: the database has a table of that name at another location.
    """
    if not re.fullmatch(r"\w+(\.\w+)?", database):
        raise UsageError(f"--database {database}: expected a name, or catalog.name")
    spark.sql(f"CREATE DATABASE IF NOT EXISTS {database}")
    tables = [name for name in all_contracts() if lake.exists(name)]
    for name in tables:
        location = spark_path(lake.uri(name))
        if not spark.catalog.tableExists(f"{database}.{name}"):
            spark.sql(f"CREATE TABLE {database}.{name} USING DELTA LOCATION {quoted(location, 'spark')}")
            continue
        (found,) = spark.sql(f"DESCRIBE DETAIL {database}.{name}").select("location").collect()[0]
        if _path(found) != _path(location):
            raise ContractError(
                f"{database}.{name} lies at {found}, this lakehouse has it at {location}; choose another --database, "
                "or drop that table from the catalog"
            )
    made: list[str] = []
    left_out: list[str] = []
    for view in all_views().values():
        if set(view.reads) <= {*tables, *made}:
            spark.sql(create_view(view, database))
            made.append(view.name)
        else:
            left_out.append(view.name)
    return {"tables": tables, "views": made, "left_out": left_out}


def create_view(view: View, database: str) -> str:
    """`CREATE OR REPLACE VIEW` with its comments, every table and view it reads named with the database."""
    tree = parse_one(view.sql, dialect="spark")
    place = to_table(f"{database}.any")
    for table in tree.find_all(Table):
        if table.name in view.reads:
            table.set("db", place.args["db"])
            table.set("catalog", place.args.get("catalog"))
    columns = ", ".join(f"{name} COMMENT {quoted(meaning, 'spark')}" for name, meaning in view.columns)
    return (
        f"CREATE OR REPLACE VIEW {database}.{view.name} ({columns}) COMMENT {quoted(view.description, 'spark')} "
        f"AS {tree.sql('spark')}"
    )


def _path(location: str) -> str:
    return re.sub(r"^file:/*", "/", location).rstrip("/")


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point."""
    setup_logging()
    parser = argparse.ArgumentParser(prog="publish_views.py", allow_abbrev=False)
    parser.add_argument("--config", required=True)
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", dest="overrides")
    parser.add_argument("--database", default="gpl")
    args = parser.parse_args(argv)
    spark, code = None, 0
    try:
        config = load_config(args.config, args.overrides)
        spark = start_session("publish_views")
        lake = Lake.of(config.lakehouse)
        print(json.dumps(publish(spark, lake, args.database)), flush=True)
    except Exception as error:
        code = exit_with(error)
    finally:
        if spark is not None:
            spark.stop()
    sys.exit(code)


if __name__ == "__main__":
    main()
