"""Spark: the slice at the manifest's table version.

python docs/examples/spark_delta.py lakehouse/quickstart/manifests/training_feed/2026-01-03.json
"""

import json
import sys
from pathlib import Path

from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

DELTA = {
    "spark.jars.packages": "io.delta:delta-spark_4.0_2.13:4.2.0",
    "spark.sql.extensions": "io.delta.sql.DeltaSparkSessionExtension",
    "spark.sql.catalog.spark_catalog": "org.apache.spark.sql.delta.catalog.DeltaCatalog",
}


def feed(manifest: dict) -> DataFrame:
    """The slice; later commits to the table are not seen."""
    spark = SparkSession.getActiveSession() or SparkSession.builder.config(map=DELTA).getOrCreate()
    table = spark.read.format("delta").option("versionAsOf", manifest["table_version"]).load(manifest["location"])
    return table.where(F.col("dt") == F.lit(manifest["dt"]).cast("date"))


def totals(manifest: dict) -> dict:
    """Rows and sums, to compare with the manifest."""
    rows = feed(manifest)  # starts Spark, without which there is no column
    sums = [F.sum(F.col(c).cast("double")) for c in ("label", "pseudo_label", "sample_weight")]
    row = rows.agg(F.count(F.lit(1)), *sums).first()
    return dict(zip(("rows", "label_sum", "pseudo_label_sum", "weight_sum"), row))


if __name__ == "__main__":
    print(totals(json.loads(Path(sys.argv[1]).read_text())))
