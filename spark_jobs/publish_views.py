"""Job: registers the tables of a lakehouse in Spark's catalog and creates the views of `schemas/views/` on them.

Launch: spark-submit … spark_jobs/publish_views.py --config CONFIG [--database gpl]

It is not a step of the graph: it writes no data. A catalog that outlives the session (Hive, Unity, Glue) comes from the
launcher's settings.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable

from pyspark.sql import SparkSession
from sqlglot import parse_one
from sqlglot.expressions import Table, to_table

from gpl_core.conf.sections import Lakehouse
from gpl_core.config import load_config
from gpl_core.contracts.contract import all_contracts
from gpl_core.errors import ContractError, UsageError
from gpl_core.graph.arguments import Parser, add_configuration
from gpl_core.lakehouse.lake import Lake
from gpl_core.lakehouse.statements import quoted
from gpl_core.lakehouse.views import View, all_views
from spark_jobs.catalog import located, spark_path
from spark_jobs.session import exit_after, start_session


def publish(spark: SparkSession, lake: Lake, database: str) -> dict[str, list[str]]:
    """Create what is missing and replace the views; returns `tables`, `views`, and the views `left_out`.

    Raises:
        ContractError: the database has a table of that name at another location.
    """
    if not re.fullmatch(r"\w+(\.\w+)?", database):
        raise UsageError(f"--database {database}: expected a name, or catalog.name")
    spark.sql(f"CREATE DATABASE IF NOT EXISTS {database}")
    tables = [name for name in all_contracts() if lake.exists(name)]
    for name in tables:
        location = lake.uri(name)
        if not spark.catalog.tableExists(f"{database}.{name}"):
            spark.sql(f"CREATE TABLE {database}.{name} USING DELTA LOCATION {quoted(spark_path(location), 'spark')}")
        elif (found := located(spark, f"{database}.{name}")) != location:
            raise ContractError(
                f"{database}.{name} is at {found}, this lakehouse has it at {location}; choose another --database, or "
                "drop that table from the catalog"
            )
    done: dict[str, list[str]] = {"tables": tables, "views": [], "left_out": []}
    for view in all_views().values():
        readable = set(view.reads) <= {*tables, *done["views"]}
        if readable:
            spark.sql(create_view(view, database))
        done["views" if readable else "left_out"].append(view.name)
    return done


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


def catalog_main(name: str, work: Callable[[SparkSession, Lakehouse, str], object], database: str = "") -> None:
    """Parse the arguments, run `work` on the catalog and print what it returns as JSON; exits with the exit code.

    Args:
        database: default of --database; without one, `lakehouse.database` names it.
    """

    def run() -> int:
        parser = Parser(prog=f"{name}.py", allow_abbrev=False)
        add_configuration(parser)
        if database:
            parser.add_argument("--database", default=database)
        args = parser.parse_args()
        settings = load_config(args.config, args.overrides).lakehouse
        done = work(start_session(name), settings, args.database if database else settings.database)
        print(json.dumps(done), flush=True)
        return 0

    exit_after(run)


if __name__ == "__main__":
    catalog_main("publish_views", lambda spark, settings, name: publish(spark, Lake.of(settings), name), "gpl")
