"""The only module that uses Petastorm: bounded batches of a pinned list of Delta data files.

Petastorm reads the file list of a snapshot, never a directory, which may hold deleted files. We assign files to ranks
ourselves, balanced by rows and reshuffled by (seed, epoch), because Petastorm's own sharding is static and uneven.
"""

import random
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from gpl_core.contracts.arrow_checks import schema_differences
from gpl_core.errors import ContractError, LineageError, counted
from gpl_core.lakehouse.files import DataFile, rows_in
from gpl_core.lakehouse.snapshot import Snapshot
from gpl_core.lakehouse.storage import filesystem


def assign_files(files: Sequence[DataFile], ranks: int, *, seed: int = 0, epoch: int = 0) -> list[tuple[DataFile, ...]]:
    """Row-balanced files per rank: shuffled by (seed, epoch), each assigned to the rank with the fewest rows so far.

    Every file goes to exactly one rank; within a rank the order is shuffled.
    """
    order = sorted(files, key=lambda f: f.path)
    random.Random(f"{seed}:{epoch}").shuffle(order)
    order.sort(key=lambda f: -f.rows)  # stable: largest first, ties stay shuffled
    shares: list[list[DataFile]] = [[] for _ in range(ranks)]
    rows = [0] * ranks
    for f in order:
        target = rows.index(min(rows))
        shares[target].append(f)
        rows[target] += max(f.rows, 0)
    for share in shares:
        random.Random(f"{seed}:{epoch}:order").shuffle(share)
    return [tuple(share) for share in shares]


def read_batches(
    snapshot: Snapshot, files: Sequence[DataFile], columns: Sequence[str], *, queue_size: int = 4
) -> Iterator[dict[str, np.ndarray]]:
    """Stream `columns` of `files`, one row group at a time, as numpy arrays: text as objects, arrays [rows x length].

    Rows come in file order. Memory: `queue_size` row groups. ContractError when the table has deletion vectors, column
    mapping or type widening, a file is gone or has another schema, arrays differ in length, or rows are missing.
    """
    files = [f for f in files if f.rows != 0]
    if not files:
        return
    snapshot.check_plain()
    uris = snapshot.uris(files)
    _check_footers(snapshot, uris, columns)
    promised = rows_in(files)
    seen = 0
    with warnings.catch_warnings():
        # Petastorm 0.12 uses pyarrow's old filesystem and dataset API: a screenful of FutureWarnings per reader.
        warnings.simplefilter("ignore", FutureWarning)
        from petastorm import make_batch_reader
        from pyarrow.filesystem import S3FSWrapper

        # Petastorm 0.12 only accepts pyarrow's old file systems; this one wraps any fsspec file system.
        fs, _ = filesystem(snapshot.uri)
        store = {} if "file" in fs.protocol else {"filesystem": S3FSWrapper(fs)}
        # Row groups arrive in order only with one worker: the order must not depend on timing.
        with make_batch_reader(
            # Not as_uri(): it escapes "=", and Petastorm does not unescape.
            [u if "://" in u else f"file://{u}" for u in uris],
            schema_fields=[f"^{c}$" for c in columns],
            reader_pool_type="thread",
            workers_count=1,
            results_queue_size=queue_size,
            num_epochs=1,
            shuffle_row_groups=False,
            **store,
        ) as reader:
            reader._results_queue_reader = _ArrowResults()
            try:
                for row_group in reader:
                    batch = {c: _as_numpy(row_group.column(c), f"{snapshot.contract.name}.{c}") for c in columns}
                    seen += len(batch[columns[0]])
                    yield batch
            except FileNotFoundError as error:
                raise ContractError(
                    f"table {snapshot.contract.name}: a file of version {snapshot.version} is gone ({error}): it was "
                    "vacuumed while being read; run the step again, and keep the retention longer than any run"
                ) from error
    if promised >= 0 and seen != promised:
        raise ContractError(
            f"table {snapshot.contract.name}: version {snapshot.version} promises {promised} rows, {seen} were read; "
            f"write its slice again, with {snapshot.contract.owner} and --force"
        )


def _check_footers(snapshot: Snapshot, uris: Sequence[str], columns: Sequence[str]) -> None:
    """Compare every file's schema: Petastorm takes the first file's for all and drops what it cannot map."""
    wanted = snapshot.contract.arrow_schema(partitions=False)
    missing = [c for c in columns if c not in wanted.names]
    if missing:
        raise ContractError(
            f"table {snapshot.contract.name}: {missing} are not data columns of it; it has {', '.join(wanted.names)}"
        )
    # A timestamp's unit is the writer's choice: timestamps are not compared.
    wanted = pa.schema([(f.name, _unnamed(f.type)) for f in wanted if not pa.types.is_timestamp(f.type)])
    for uri in uris:
        with snapshot.reading(uri), fsspec.open(uri, "rb") as handle:
            found = pq.read_schema(handle)
        found = pa.schema([(f.name, _unnamed(f.type)) for f in found if f.name in wanted.names])
        if problems := schema_differences(wanted, found):
            raise ContractError(
                f"table {snapshot.contract.name}: file {uri}: {'; '.join(problems)}; run "
                f"{snapshot.contract.owner} for its date again, with --force"
            )


def _unnamed(kind: pa.DataType) -> pa.DataType:
    """A list type without the name of its elements: Spark calls them "element", pyarrow "item"."""
    return pa.list_(kind.value_type) if hasattr(kind, "value_type") else kind


class _ArrowResults:
    """Row groups as Petastorm's worker has read them.

    Petastorm would turn text into numpy's fixed-width strings, each row as wide as the longest: 83 rows with one string
    of 10 MB took 3.2 GB, and characters NUL at the end of an id were lost.
    """

    batched_output = True

    def read_next(self, pool: Any, schema: Any, ngram: Any) -> pa.Table:
        """The next row group; StopIteration after the last."""
        from petastorm.workers_pool import EmptyResultError

        try:
            return pool.get_results()
        except EmptyResultError:
            raise StopIteration from None


def _as_numpy(column: pa.ChunkedArray, name: str) -> np.ndarray:
    """The column `name`; an array column as one [rows x length] array."""
    if not pa.types.is_list(column.type):
        return column.to_numpy()
    lengths = pc.min_max(pc.fill_null(pc.list_value_length(column), -1))
    shortest, longest = lengths["min"].as_py(), lengths["max"].as_py()
    if shortest != longest:
        raise ContractError(
            f"column {name}: arrays of {shortest} to {longest} elements (-1: null), expected one length; correct the "
            "rows or run the step that wrote them again"
        )
    flat = pc.list_flatten(column).to_numpy()
    return flat.reshape(len(column), longest or 0).copy()


def rebatch(batches: Iterator[dict[str, np.ndarray]], rows: int) -> Iterator[dict[str, np.ndarray]]:
    """Batches of exactly `rows` rows from a stream of batches; the last one may be shorter."""
    held: dict[str, np.ndarray] | None = None
    for batch in batches:
        held = batch if held is None else {c: np.concatenate([held[c], batch[c]]) for c in batch}
        while len(next(iter(held.values()))) >= rows:
            yield {c: v[:rows] for c, v in held.items()}
            held = {c: v[rows:] for c, v in held.items()}
    if held is not None and len(next(iter(held.values()))):
        yield held


def require_versions(batch: Mapping[str, np.ndarray], table: str, **versions: str) -> None:
    """Refuse rows of another version than the artifact in force: LineageError with table, column and both versions."""
    for column, expected in versions.items():
        strange = batch[column] != expected
        if strange.any():
            raise LineageError(
                f"table {table}: {counted(int(strange.sum()), 'row')} with {column} {batch[column][strange][0]}, in "
                f"force is {expected}; run {table} for this date again"
            )
