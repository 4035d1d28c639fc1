"""Part files of one partition: rows are checked before a file is finished, and nothing is visible before a commit."""

import re
import uuid
from collections.abc import Iterable, Mapping
from contextlib import ExitStack, suppress
from typing import Any, Self

import pyarrow as pa
import pyarrow.parquet as pq

from gpl_core.contracts.arrow_checks import check_batch
from gpl_core.contracts.contract import Contract
from gpl_core.errors import ContractError
from gpl_core.lakehouse.commit import Part, now_ms
from gpl_core.lakehouse.storage import filesystem

_PARTITION_VALUE = re.compile("[A-Za-z0-9_=-]+")


def parquet_writer(sink: Any, schema: pa.Schema) -> pq.ParquetWriter:
    """A writer of Parquet to the open file `sink`, as all our files are that Spark has not written.

    Of the anchor cache, zstd at level 6 leaves 5 % less than at 3 for 30 us more a row (level 9: another 1 %, another
    20 us), and 11 % less without dictionaries for scores and arrays of numbers, few of which come again.
    """
    again = []
    for field in schema:
        if pa.types.is_list(field.type) or pa.types.is_large_list(field.type):
            if not pa.types.is_primitive(field.type.value_type):
                again.append(f"{field.name}.list.element")
        elif not pa.types.is_floating(field.type):
            again.append(field.name)
    return pq.ParquetWriter(sink, schema, compression="zstd", compression_level=6, use_dictionary=again)


class PartWriter:
    """Writes checked rows of one partition into Parquet part files; `Lake.commit` makes them visible.

    Rows that break the contract are refused before a file is finished. Use it as a context manager: leaving it on an
    error removes its files.
    """

    def __init__(
        self,
        uri: str,
        contract: Contract,
        partition: Mapping[str, str],
        dims: Mapping[str, int],
        *,
        rank: int = 0,
        row_group_rows: int = 16_384,
        file_rows: int = 1_000_000,
    ):
        if set(partition) != set(contract.partition_by):
            raise ContractError(
                f"table {contract.name} is partitioned by {contract.partition_by}, got values for {tuple(partition)}"
            )
        for column, value in partition.items():
            if not _PARTITION_VALUE.fullmatch(value):
                raise ContractError(
                    f"table {contract.name}: partition {column}='{value}' holds characters that engines "
                    "encode differently in paths; use letters, digits, '_', '=' and '-'"
                )
        self.contract = contract
        self.partition = dict(partition)
        self.parts: list[Part] = []  # after closing, one per file
        self._dims = dims
        self._rank = rank
        self._row_group_rows = row_group_rows
        self._file_rows = file_rows
        self._schema = contract.arrow_schema(partitions=False)
        self._fs, self._base = filesystem(uri)
        self._open: tuple[str, Any, pq.ParquetWriter] | None = None
        self._rows = 0

    def write(self, rows: pa.Table | pa.RecordBatch) -> None:
        """Check and write `rows` (data columns, any order).

        ContractError when a row breaks the contract: names the column, the number of rows, a value and the check.
        """
        if isinstance(rows, pa.RecordBatch):
            rows = pa.Table.from_batches([rows])
        violations = check_batch(self.contract, rows, self._dims)
        if violations:
            raise ContractError(f"table {self.contract.name}: " + "; ".join(violations))
        rows = rows.select(self._schema.names).cast(self._schema)
        while len(rows):
            head = rows.slice(0, self._file_rows - self._rows)
            rows = rows.slice(len(head))
            self._handle().write_table(head, row_group_size=self._row_group_rows)
            self._rows += len(head)
            if self._rows >= self._file_rows:
                self._finish()

    def write_rows(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Like `write`, of a few rows as column -> value."""
        self.write(pa.Table.from_pylist(list(rows), schema=self._schema))

    def _handle(self) -> pq.ParquetWriter:
        if self._open is None:
            folder = "/".join(f"{k}={v}" for k, v in self.partition.items())
            name = f"part-{self._rank:05d}-{uuid.uuid4()}.parquet"
            path = f"{folder}/{name}" if folder else name
            self._fs.makedirs(f"{self._base}/{folder}", exist_ok=True)
            sink = self._fs.open(f"{self._base}/{path}", "wb")
            self._open = (path, sink, parquet_writer(sink, self._schema))
        return self._open[2]

    def _finish(self) -> None:
        if self._open is None:
            return
        path, sink, writer = self._open
        writer.close()
        sink.close()
        self._open = None
        size = self._fs.size(f"{self._base}/{path}")
        self.parts.append(
            {"path": path, "partition": self.partition, "rows": self._rows, "size": size, "modified": now_ms()}
        )
        self._rows = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        with ExitStack() as on_error:
            on_error.callback(self._discard)
            if error is None:
                self._finish()
                on_error.pop_all()

    def _discard(self) -> None:
        """Remove what was written. On a full disk closing fails too, and must not hide the first error."""
        if self._open is not None:
            path, sink, writer = self._open
            for handle in (writer, sink):  # the writer first: its destructor would write a footer to the closed file
                with suppress(OSError, pa.ArrowInvalid):
                    handle.close()
            self._fs.rm(f"{self._base}/{path}")
        for part in self.parts:
            self._fs.rm(f"{self._base}/{part['path']}")
