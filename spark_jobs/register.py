"""Job: asks Spark's catalog for the locations of raw tables that `lakehouse.tables` names, and registers ours in it.

Launch: gpl register --config CONFIG, or spark-submit … spark_jobs/register.py --config CONFIG

The locations go to `<root>/catalog.json`, where every process reads them: workers and `gpl` have no catalog. With
`lakehouse.database` our tables are registered in it, and the views of `schemas/views/` created on them. It is not a
step of the graph. A catalog that outlives the session (Hive, Unity, Glue) comes from the launcher's settings.
"""

import json
import re

from pyspark.sql import SparkSession
from sqlglot import parse_one
from sqlglot.expressions import Table, to_table

from gpl_core.conf.sections import CATALOG, Lakehouse
from gpl_core.config import load_config
from gpl_core.contracts.contract import all_contracts
from gpl_core.errors import ContractError, UsageError
from gpl_core.graph.arguments import Parser, add_configuration
from gpl_core.lakehouse.lake import LOCATIONS, Lake
from gpl_core.lakehouse.statements import quoted
from gpl_core.lakehouse.storage import write_whole
from gpl_core.lakehouse.views import View, all_views
from spark_jobs.catalog import located, spark_path
from spark_jobs.session import exit_after, start_session


def locate(spark: SparkSession, settings: Lakehouse) -> dict[str, str]:
    """catalog://name -> location of each raw table named this way (see `located`); written whole or not at all."""
    names = [name for name in settings.tables.values() if name.startswith(CATALOG)]
    found = {name: located(spark, name.removeprefix(CATALOG)) for name in names}
    write_whole(Lake.of(settings).path(LOCATIONS), json.dumps(found, indent=1, sort_keys=True).encode())
    return found


def publish(spark: SparkSession, lake: Lake, database: str) -> dict[str, list[str]]:
    """Create what is missing and replace the views; returns `tables`, `views`, and the views `left_out`.

    ContractError when the database has a table of that name at another location.
    """
    if not re.fullmatch(r"\w+(\.\w+)?", database):
        raise UsageError(f"lakehouse.database: '{database}', expected a name, or catalog.name")
    spark.sql(f"CREATE DATABASE IF NOT EXISTS {database}")
    tables = [name for name in all_contracts() if lake.exists(name)]
    for name in tables:
        location = lake.uri(name)
        if not spark.catalog.tableExists(f"{database}.{name}"):
            place = quoted(spark_path(location), "spark")
            spark.sql(f"CREATE TABLE IF NOT EXISTS {database}.{name} USING DELTA LOCATION {place}")
        elif (found := located(spark, f"{database}.{name}")) != location:
            raise ContractError(
                f"{database}.{name} is at {found}, this lakehouse has it at {location}; choose another "
                "lakehouse.database, or drop that table from the catalog"
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


def register(spark: SparkSession, settings: Lakehouse) -> dict[str, object]:
    """What was located, and with `lakehouse.database` what `publish` returns about our tables and views."""
    done: dict[str, object] = {"located": locate(spark, settings)}
    return done | (publish(spark, Lake.of(settings), settings.database) if settings.database else {})


def main() -> int:
    """Print what `register` returns, as JSON."""
    parser = Parser(prog="register.py", allow_abbrev=False)
    add_configuration(parser)
    args = parser.parse_args()
    settings = load_config(args.config, args.overrides).lakehouse
    print(json.dumps(register(start_session("register"), settings)), flush=True)
    return 0


if __name__ == "__main__":
    exit_after(main)
