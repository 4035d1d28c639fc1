"""`gpl repair`: remove duplicate keys that overlapping runs of earlier releases have left.

Only tables that workers append to can hold a key twice; a slice that is replaced as a whole cannot. For each key, the
row in the newest file is kept. The step that wrote the table stays done; steps that read it by slice become stale.
"""

import argparse
import sys
from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from gpl_core.commands.command import Command
from gpl_core.config import Config
from gpl_core.contracts.contract import load_contract
from gpl_core.lakehouse.files import DataFile, rows_in
from gpl_core.lakehouse.key_hashes import hash_keys, members
from gpl_core.lakehouse.lake import Lake
from gpl_core.lakehouse.rewrite import Mask, Removal, all_but, remove_rows
from gpl_core.lakehouse.snapshot import Snapshot

TABLES = ("item_embeddings", "item_sids", "interest_anchors")
_KEYS_AT_A_TIME = 32_000_000  # hashes in memory: 256 MB


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--table", action="append", choices=TABLES, help="repeatable; default: all three")
    parser.add_argument("--dry-run", action="store_true", help="only count the rows")


def run(args: argparse.Namespace, config: Config) -> int:
    lake = Lake.of(config.lakehouse)
    for table in args.table or TABLES:
        found = repair(lake, table, dry_run=args.dry_run) if lake.exists(table) else ()
        verb = "would be removed" if args.dry_run else "removed"
        print(f"{table}: {sum(r.rows for r in found):,} repeated rows of {len(found):,} files {verb}", file=sys.stderr)
    return 0


def repair(lake: Lake, table: str, *, dry_run: bool = False) -> Sequence[Removal]:
    """Remove the repeated rows of `table` in one commit, none when there are none; returns what was removed."""
    return remove_rows(lake, load_contract(table), repeated, "repair", dry_run=dry_run)


def repeated(snapshot: Snapshot) -> list[Removal]:
    """The rows of `snapshot` whose key occurs in a newer file, or earlier in the same one.

    Memory: _KEYS_AT_A_TIME hashes, and a byte per row of the partitions that share a key.
    """
    key = snapshot.contract.primary_key
    shared: dict[tuple[str, ...], list[DataFile]] = {}
    for file in snapshot.files:  # a key is in files with the same values of its partition columns
        shared.setdefault(tuple(file.partition[c] for c in key if c in file.partition), []).append(file)
    removals = []
    for files in shared.values():
        newest_first = sorted(files, key=lambda f: (f.modified, f.path), reverse=True)
        for file, gone in zip(newest_first, _repeated(snapshot, newest_first), strict=True):
            if gone.any():
                removals.append(Removal(file, int(gone.sum()), None if gone.all() else all_but(_rows_at(gone))))
    return removals


def _repeated(snapshot: Snapshot, files: Sequence[DataFile]) -> list[np.ndarray]:
    """For each file, which of its rows have a key that occurs before, in the order of `files`."""
    found = [np.zeros(f.rows, dtype=bool) for f in files]
    passes = -(-rows_in(files) // _KEYS_AT_A_TIME)
    for part in range(passes):
        seen = np.empty(0, dtype=np.uint64)
        for file, gone in zip(files, found, strict=True):
            hashes = _hashes(snapshot, file)
            own = np.flatnonzero(hashes % np.uint64(passes) == part)
            keys, first = np.unique(hashes[own], return_index=True)
            is_first = np.zeros(len(own), dtype=bool)
            is_first[first] = True
            gone[own] = ~is_first | members(hashes[own], seen)
            seen = np.union1d(seen, keys)
    return found


def _hashes(snapshot: Snapshot, file: DataFile) -> np.ndarray:
    columns = [c for c in snapshot.contract.primary_key if c not in file.partition]
    nothing = np.empty(0, dtype=np.uint64)
    groups = snapshot.row_groups([file], columns)
    return np.concatenate([nothing, *(hash_keys(*(map(str, rows[c].to_pylist()) for c in columns)) for rows in groups)])


def _rows_at(gone: np.ndarray) -> Mask:
    """A mask for the row groups of one file, which come in their order."""
    start = 0

    def mask(rows: pa.Table) -> pa.Array:
        nonlocal start
        start += len(rows)
        return pa.array(gone[start - len(rows) : start])

    return mask


COMMAND = Command(
    "repair", "remove duplicate keys left behind by overlapping runs of earlier releases", run,
    add_arguments, in_shadow=False,
    examples=("--config shop.yaml --dry-run",),
)  # fmt: skip
