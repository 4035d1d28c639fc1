"""Parquet as workers write it."""

from __future__ import annotations

import io

import pyarrow as pa
import pyarrow.parquet as pq

from gpl_core.lakehouse.writer import parquet_writer


def test_dictionaries_are_for_what_comes_again() -> None:
    """Text and counts, also in lists of text; not scores, nor lists of numbers, however their reader has typed them."""
    rows = {
        "text": pa.array(["a"] * 99), "texts": pa.array([["x", "y"]] * 99), "count": pa.array([1] * 99, pa.int32()),
        "score": pa.array([0.5] * 99, pa.float32()), "vector": pa.array([[0.5, 0.5]] * 99, pa.list_(pa.float32())),
        "codes": pa.array([[1, 2]] * 99, pa.large_list(pa.int32())),
    }  # fmt: skip
    table, sink = pa.table(rows), io.BytesIO()
    with parquet_writer(sink, table.schema) as writer:
        writer.write_table(table)
    file = pq.ParquetFile(sink)
    group = file.metadata.row_group(0)
    columns = [group.column(n) for n in range(group.num_columns)]
    coded = {c.path_in_schema for c in columns if "RLE_DICTIONARY" in c.encodings}
    assert coded == {"text", "texts.list.element", "count"}
    assert {c.compression for c in columns} == {"ZSTD"}
    assert file.read().equals(table)
