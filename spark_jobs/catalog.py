"""Locations of tables: in Spark's catalog, and as Spark and delta-rs write them."""

import re

from pyspark.errors import AnalysisException
from pyspark.sql import SparkSession

from gpl_core.conf.sections import CATALOG
from gpl_core.errors import ContractError, MissingInputError
from gpl_core.lakehouse.lake import Lake


def spark_path(uri: str) -> str:
    """`uri` in the spelling of Spark's file systems."""
    return "s3a://" + uri.removeprefix("s3://") if uri.startswith("s3://") else uri


def located(spark: SparkSession, name: str) -> str:
    """Location of the catalog's table `name`, in the spelling of delta-rs.

    MissingInputError when the catalog has no such table, ContractError when it is not a Delta table.
    """
    if not spark.catalog.tableExists(name):
        raise MissingInputError(
            f"Spark's catalog has no table {name}; correct lakehouse.tables, or the launcher's catalog"
        )
    if spark.catalog.getTable(name).tableType in ("VIEW", "TEMPORARY"):
        raise ContractError(
            f"{name} is a view, which has no log that says what changed, and no files to read without Spark; name the "
            "table that it is made of (lakehouse.columns maps its columns), or write its rows as a Delta table"
        )
    try:
        found = spark.sql(f"DESCRIBE DETAIL {name}").first()
    except AnalysisException:
        found = None
    if found is None or found["format"] != "delta":
        raise ContractError(f"{name} is not a Delta table; write it as one, or name another under lakehouse.tables")
    return re.sub("^file:/*", "/", re.sub("^s3a:", "s3:", found["location"])).rstrip("/")


def check_registered(spark: SparkSession, lake: Lake, table: str) -> None:
    """Refuse a raw table that moved in the catalog since `gpl register`: workers would still read the old one.

    The ContractError names both places.
    """
    name = lake.overrides.get(table, "")
    if name.startswith(CATALOG) and (now := located(spark, name.removeprefix(CATALOG))) != lake.uri(table):
        raise ContractError(
            f"table {table}: Spark's catalog has {name} at {now}, but gpl register found it at {lake.uri(table)}; "
            "run gpl register again"
        )
