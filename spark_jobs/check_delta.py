"""Starts Spark once with Delta: resolves the jars, writes a table and reads it back, fails with a message otherwise.

What it does is what the jobs do, so that an archive of the classes it loads (see the Makefile) serves them too.
"""

import tempfile

from pyspark.sql import SparkSession, Window
from pyspark.sql import functions as F

from spark_jobs.session import start_session


def check(spark: SparkSession, path: str) -> None:
    """Write a partitioned table, replace one slice, read it at a pinned version; RuntimeError for other rows."""
    rows = spark.range(100).select(
        F.col("id"), F.concat(F.lit("u"), F.col("id") % 7).alias("user"), F.array("id", "id").alias("pair"),
        (F.col("id") % 2).cast("int").alias("part"), F.current_timestamp().alias("time"),
    )  # fmt: skip
    columns = ", ".join(f"{name} {kind}" for name, kind in rows.dtypes)
    spark.sql(f"CREATE TABLE delta.`{path}` ({columns}) USING delta PARTITIONED BY (part)")
    spark.sql(f"ALTER TABLE delta.`{path}` ADD CONSTRAINT known CHECK (id >= 0)")
    rows.write.format("delta").mode("append").save(path)
    newest = Window.partitionBy("user").orderBy(F.desc("id"))
    one = rows.where("part = 1").withColumn("n", F.row_number().over(newest)).where("n <= 3").drop("n")
    one.write.format("delta").mode("overwrite").option("replaceWhere", "part = 1").save(path)
    found = spark.read.format("delta").option("versionAsOf", 3).load(path)
    users = found.groupBy("user").agg(F.count("*").alias("n"), F.collect_list("id").alias("ids"))
    counted = found.join(users, "user").where(F.size("ids") == F.col("n")).select(F.explode("pair")).count()
    if counted != 2 * (50 + 3 * 7):
        raise RuntimeError(f"table {path}: {counted} rows read back, expected {2 * (50 + 3 * 7)}")


if __name__ == "__main__":
    session = start_session("check-delta")
    try:
        with tempfile.TemporaryDirectory() as folder:
            check(session, f"{folder}/table")
    finally:
        session.stop()
