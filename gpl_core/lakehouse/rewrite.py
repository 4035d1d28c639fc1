"""Replace files of a table in one commit, and remove or change rows by rewriting the files that hold them with pyarrow.

delta-rs' own DELETE is not an option: it writes string views, which the pyarrow under Petastorm cannot read.
"""

import uuid
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from deltalake import DeltaTable
from deltalake.exceptions import CommitFailedError

from gpl_core.contracts.contract import Contract
from gpl_core.errors import ConflictError
from gpl_core.lakehouse.commit import Part, now_ms, remove_action, transact
from gpl_core.lakehouse.files import DataFile
from gpl_core.lakehouse.lake import Lake
from gpl_core.lakehouse.marks import SliceMark
from gpl_core.lakehouse.snapshot import Snapshot
from gpl_core.lakehouse.storage import filesystem
from gpl_core.lakehouse.writer import parquet_writer

_TRIES = 5

Mask = Callable[[pa.Table], pa.Array]  # rows of a row group -> bool per row: True where the row is to be removed
Keep = Callable[[pa.Table], pa.Table]  # rows of a row group -> the rows that come in their place


@dataclass(frozen=True)
class Removal:
    """Rows to remove from one file, or to replace in it."""

    file: DataFile
    rows: int
    keep: Keep | None  # what stays; None removes the whole file without reading it


def all_but(mask: Mask) -> Keep:
    """Keeps the rows that `mask` does not name."""
    return lambda rows: rows.filter(pc.invert(mask(rows)))


def remove_rows(
    lake: Lake, contract: Contract, find: Callable[[Snapshot], Sequence[Removal]], step: str, *, dry_run: bool = False
) -> Sequence[Removal]:
    """Remove or replace the rows that `find` returns for the table's newest version; no commit when there are none.

    The commit marks no slice, so the step that wrote the table stays done. Steps that read it turn stale.
    ConflictError when the table was written at the same time, repeatedly.
    """
    for _ in range(_TRIES):
        snapshot = lake.open(contract.name)
        found = find(snapshot)
        if dry_run or not found:
            return found
        parts = [made for r in found if r.keep and (made := _rewritten(snapshot, r.file, r.keep)) is not None]
        if swap(snapshot, [r.file for r in found], parts, SliceMark(step, {}, step)):
            return found
    raise ConflictError(
        f"table {contract.name}: written by other runs {_TRIES} times in the meantime; run gpl {step} again"
    )


def swap(
    snapshot: Snapshot, old: Iterable[DataFile], new: Sequence[Part], mark: SliceMark, *, data_change: bool = True
) -> bool:
    """Commit the files `new` in place of `old`; False, with `new` deleted again, when another commit came in between.

    data_change=False says that the rows are the same, only grouped differently.
    """
    keys = snapshot.contract.partition_by
    removals = [remove_action(f.path, {k: f.partition[k] for k in keys}, f.size, data_change) for f in old]
    try:
        transact(DeltaTable(snapshot.uri, version=snapshot.version), mark, new, removals, data_change=data_change)
    except CommitFailedError:
        if has_committed(snapshot, new):
            return True
        fs, base = filesystem(snapshot.uri)
        if new:
            fs.rm([f"{base}/{part['path']}" for part in new])
        return False
    return True


def has_committed(snapshot: Snapshot, new: Sequence[Part]) -> bool:
    """Whether the table holds the files `new` after all: an object store's answer to a commit can be lost."""
    there = {file.path for file in Snapshot(snapshot.uri, snapshot.contract).files} if new else set()
    return bool(new) and new[0]["path"] in there


def _rewritten(snapshot: Snapshot, file: DataFile, keep: Keep) -> Part | None:
    """A copy of `file` with what `keep` leaves, written one row group at a time; None when no row is left."""
    (uri,) = snapshot.uris([file])
    folder = file.path.rpartition("/")[0]
    path = f"{folder}/part-{uuid.uuid4()}.parquet".lstrip("/")
    fs, base = filesystem(snapshot.uri)
    _, old = filesystem(uri)
    rows = 0
    with fs.open(old, "rb") as source, fs.open(f"{base}/{path}", "wb") as sink:
        reader = pq.ParquetFile(source)
        with parquet_writer(sink, reader.schema_arrow) as writer:
            for group in range(reader.num_row_groups):
                kept = keep(reader.read_row_group(group))
                if len(kept):
                    writer.write_table(kept, row_group_size=len(kept))
                    rows += len(kept)
    if not rows:
        fs.rm(f"{base}/{path}")
        return None
    partition = {k: file.partition[k] for k in snapshot.contract.partition_by}
    size = fs.size(f"{base}/{path}")
    return {"path": path, "partition": partition, "rows": rows, "size": size, "modified": now_ms()}
