"""DuckDB over the pinned file list: SQL on a laptop, no Delta extension (it would be a download at run time).

python docs/examples/duckdb_files.py lakehouse/quickstart/manifests/training_feed/2026-01-03.json
"""

import json
import sys
from pathlib import Path

import duckdb


def feed(manifest: dict) -> duckdb.DuckDBPyRelation:
    """The slice as a relation; `dt` is not in the files, `dt_copy` is."""
    files = [f"{manifest['location']}/{f['path']}" for f in manifest["files"]]
    return duckdb.read_parquet(files, hive_partitioning=False)


def totals(manifest: dict) -> dict:
    """Rows and sums, to compare with the manifest."""
    sums = "count(*), sum(label::DOUBLE), sum(pseudo_label::DOUBLE), sum(sample_weight::DOUBLE)"
    (row,) = feed(manifest).aggregate(sums).fetchall()
    return dict(zip(("rows", "label_sum", "pseudo_label_sum", "weight_sum"), row))


if __name__ == "__main__":
    manifest = json.loads(Path(sys.argv[1]).read_text())
    print(totals(manifest))
    print(feed(manifest).aggregate("channel, count(*), avg(pseudo_label), avg(sample_weight)", "channel"))
