"""Take rows out of a table: the files that hold them are written anew by pyarrow and swapped in one commit.

Not by delta-rs' own DELETE: it writes string views, which the pyarrow under Petastorm cannot read.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from deltalake import CommitProperties, DeltaTable
from deltalake.exceptions import CommitFailedError
from deltalake.transaction import AddAction, RemoveAction

from gpl_core.contracts import Contract
from gpl_core.errors import ConflictError
from gpl_core.lake import DataFile, Lake, SliceMark, Snapshot
from gpl_core.storage import filesystem

_TRIES = 5

Mask = Callable[[pa.Table], pa.Array]
"""Rows of a row group -> bool per row: True where it is to go."""


@dataclass(frozen=True)
class Removal:
    """Rows to take out of one file."""

    file: DataFile
    rows: int
    mask: Mask | None
    """Which ones; None: the whole file, which need not be read."""


def remove_rows(
    lake: Lake, contract: Contract, find: Callable[[Snapshot], Sequence[Removal]], step: str, *, dry_run: bool = False
) -> Sequence[Removal]:
    """Commit what `find` says of the newest version of the table; returns it. Nothing found: no commit.

    The commit marks no slice: what a step has done stays done. Its readers see new files, and are stale.

    Raises:
        ConflictError: the table was written at the same time, again and again.
    """
    for _ in range(_TRIES):
        snapshot = lake.open(contract.name)
        found = find(snapshot)
        if dry_run or not found:
            return found
        table = DeltaTable(snapshot.uri, version=snapshot.version)
        now = int(datetime.now(UTC).timestamp() * 1000)
        actions: list[AddAction | RemoveAction] = []
        for removal in found:
            file = removal.file
            partition: dict[str, str | None] = {k: v for k, v in file.partition.items() if k in contract.partition_by}
            actions.append(RemoveAction(file.path, True, now, file.size, partition))
            if removal.mask and (made := _without(snapshot, file, removal.mask, partition)) is not None:
                actions.append(made)
        try:
            table.create_write_transaction(
                actions, "append", table.schema(), list(contract.partition_by) or None,
                commit_properties=CommitProperties(
                    custom_metadata={"userMetadata": SliceMark(step, {}, step).to_json()}, max_commit_retries=0
                ),
            )  # fmt: skip
            return found
        except CommitFailedError:  # somebody else committed: look again; the new files are nobody's
            continue
    raise ConflictError(f"table {contract.name}: written by other runs {_TRIES} times meanwhile; run gpl {step} again")


def _without(snapshot: Snapshot, file: DataFile, mask: Mask, partition: dict[str, str | None]) -> AddAction | None:
    """`file` written anew without the rows of `mask`, row group by row group; None when nothing is left."""
    (uri,) = snapshot.uris([file])
    folder = file.path.rpartition("/")[0]
    path = f"{folder}/part-{uuid.uuid4()}.parquet".lstrip("/")
    fs, base = filesystem(snapshot.uri)
    _, old = filesystem(uri)
    rows = 0
    with fs.open(old, "rb") as source, fs.open(f"{base}/{path}", "wb") as sink:
        reader = pq.ParquetFile(source)
        with pq.ParquetWriter(sink, reader.schema_arrow, compression="zstd") as writer:
            for group in range(reader.num_row_groups):
                kept = reader.read_row_group(group)
                kept = kept.filter(pc.invert(mask(kept)))
                if len(kept):
                    writer.write_table(kept, row_group_size=len(kept))
                    rows += len(kept)
    if not rows:
        fs.rm(f"{base}/{path}")
        return None
    modified = int(datetime.now(UTC).timestamp() * 1000)
    return AddAction(path, fs.size(f"{base}/{path}"), partition, modified, True, json.dumps({"numRecords": rows}))
