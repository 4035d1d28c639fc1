"""Peak memory of a run of encode_items on 83 items in which one string has 10 MB, over a run without that string.

It lies in the table, past ingest, which would have refused the row. Texts are as long as ingest writes them. The larger
of two columns counts: `text`, which is encoded, and `image_uri`, which is not.

    python -m tests.bench.bench_encode_memory [--quick]
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from gpl_core.contracts.contract import load_contract
from gpl_core.graph.launches import script_path
from gpl_core.graph.planner import Planner
from tests.bench.harness import Figure, at_most, is_quick, report
from tests.support import DAY, config_file, legal_rows, put, small_config


def peak_memory(root: Path, column: str = "") -> float:
    """Peak MB of the process; the first item has 10 MB in `column`."""
    body = {"encoder": {"parts": [{"name": "minilm"}, {"name": "hog_color"}]}}
    lake = Planner(small_config(root, body)).lake
    rows = legal_rows(load_contract("items"), 83)
    put(lake, "items", [{**row, "text": "long " * 400, "image": b"", "image_uri": ""} for row in rows])
    if column:
        snapshot = lake.open("items")
        (path,) = snapshot.uris(snapshot.files)
        table = pq.ParquetFile(path).read()
        texts = ["long " * 2_000_000, *table.column(column).to_pylist()[1:]]
        pq.write_table(table.set_column(table.schema.get_field_index(column), column, pa.array(texts)), path)
    arguments = [script_path("gpu_workers/encode_items.py"), "--config", str(config_file(root, body))]
    environment = {**os.environ, "DS_ACCELERATOR": "cpu"}
    process = os.posix_spawn(sys.executable, [sys.executable, *arguments, "--run-date", str(DAY)], environment)
    _, status, used = os.wait4(process, 0)
    if status:
        raise RuntimeError(f"encode_items ended with status {status}")
    return used.ru_maxrss / 1024


def main() -> None:
    """Measure, print, write."""
    quick = is_quick()
    with tempfile.TemporaryDirectory() as folder:
        peaks = {c: peak_memory(Path(folder, c or "without"), c) for c in ("", "text", "image_uri")}
    figures = {
        "peak_with_a_10_mb_string": at_most(max(peaks.values()) / peaks[""], 1.2, "x"),
        "peak_without": Figure(peaks[""], "MB"),
        "peak_with_it_in_text": Figure(peaks["text"], "MB"),
        "peak_with_it_in_image_uri": Figure(peaks["image_uri"], "MB"),
    }
    report("encode_memory", figures, quick, "encode_items on 83 items, MiniLM and hog_color")


if __name__ == "__main__":
    main()
