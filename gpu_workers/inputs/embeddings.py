"""The current embedding of every item, streamed through Petastorm into one memory-mapped file per machine.

Memory per process: one row group, and 16 bytes per item_index for bookkeeping. Disk: N * d * 4 bytes of scratch.
"""

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from gpl_core.errors import MissingInputError
from gpl_core.lakehouse.files import DataFile
from gpl_core.lakehouse.marks import WHOLE
from gpl_core.lakehouse.scratch import scratch_array, scratch_folder, scratch_path
from gpl_core.lakehouse.snapshot import Snapshot
from gpu_workers.inputs.feed import read_batches
from gpu_workers.ranks import Ranks


@dataclass(frozen=True)
class ItemVectors:
    """Items in ascending item_index with their newest embedding."""

    item_index: np.ndarray  # int64 [N]
    content: np.ndarray  # uint64 [N]: a 64-bit digest of the content_hash that was encoded
    content_hash: np.ndarray  # str [N]
    vectors: np.ndarray  # float32 [N x d], a read-only memory map
    left_out: int  # rows that were too new


def encoder_version_of(snapshot: Snapshot) -> str:
    """The encoder_version of the newest run of encode_items. Raises MissingInputError when there is none."""
    found = snapshot.mark(WHOLE, "encode_items")
    if found is not None and "encoder_version" in found[1].details:
        return str(found[1].details["encoder_version"])
    versions = sorted({f.partition["encoder_version"] for f in snapshot.files})
    if len(versions) == 1:
        return versions[0]
    raise MissingInputError(
        f"table item_embeddings@{snapshot.version}: has the encoder versions {versions or 'none'}, and no commit of "
        "encode_items says which one is current; run encode_items"
    )


def digests(values: np.ndarray) -> np.ndarray:
    """uint64 [N]: a 64-bit digest of each string."""
    return pd.util.hash_array(np.asarray(values, dtype=object), categorize=False)


class NewestContent:
    """The newest row per item_index, by updated_at, then by digest; 16 bytes per item."""

    def __init__(self) -> None:
        self.time = np.empty(0, dtype=np.int64)
        self.content = np.empty(0, dtype=np.uint64)
        self.left_out = 0  # rows that were too new

    def add(self, item_index: np.ndarray, updated_at: np.ndarray, content: np.ndarray) -> None:
        """Take rows [B] into account, in any order."""
        top = int(item_index.max(initial=-1)) + 1
        if top > len(self.time):
            grow = max(top, 2 * len(self.time)) - len(self.time)
            self.time = np.concatenate([self.time, np.full(grow, np.iinfo(np.int64).min)])
            self.content = np.concatenate([self.content, np.zeros(grow, dtype=np.uint64)])
        order = np.lexsort((content, updated_at))  # of equal indices the last one wins the assignment
        index, time, hashed = item_index[order], updated_at[order], content[order]
        newer = (time > self.time[index]) | ((time == self.time[index]) & (hashed > self.content[index]))
        self.time[index[newer]] = time[newer]
        self.content[index[newer]] = hashed[newer]

    @property
    def items(self) -> np.ndarray:
        """int64, ascending: the items that have a row."""
        return np.flatnonzero(self.time > np.iinfo(np.int64).min)

    def holds(self, item_index: np.ndarray, content: np.ndarray) -> np.ndarray:
        """bool [B]: whether this content is the item's newest."""
        known = item_index < len(self.time)
        out = np.zeros(len(item_index), dtype=bool)
        index = item_index[known]
        out[known] = (self.time[index] > np.iinfo(np.int64).min) & (self.content[index] == content[known])
        return out


def newest_content(snapshot: Snapshot, files: tuple[DataFile, ...], before: int | None = None) -> NewestContent:
    """Read the newest content from ``files``, ignoring rows with updated_at >= ``before``."""
    newest = NewestContent()
    for batch in read_batches(snapshot, files, ["item_index", "content_hash", "updated_at"]):
        keep = np.ones(len(batch["item_index"]), dtype=bool) if before is None else batch["updated_at"] < before
        index = batch["item_index"][keep].astype(np.int64)
        newest.left_out += len(keep) - len(index)
        newest.add(index, batch["updated_at"][keep].astype(np.int64), digests(batch["content_hash"][keep]))
    return newest


@contextmanager
def item_vectors(
    snapshot: Snapshot, encoder_version: str, ranks: Ranks, *, before: int | None = None
) -> Iterator[ItemVectors]:
    """The newest embedding of each item as of ``before`` (microseconds; default: no limit), on every rank.

    One process per machine writes the scratch file, the others map it; it is removed at the end.
    Raises MissingInputError when there is no such row.
    """
    files = snapshot.select(where={"encoder_version": encoder_version})
    local_main = int(os.environ.get("LOCAL_RANK", "0")) == 0
    name = ranks.broadcast_text(os.urandom(8).hex())
    folder = scratch_path(name)
    with ExitStack() as held:
        with ranks.together():
            newest = newest_content(snapshot, files, before)
            if not len(newest.items):
                raise MissingInputError(
                    f"table item_embeddings@{snapshot.version}: no embeddings of encoder_version {encoder_version}"
                    f"{'' if before is None else ' from before the run date'}; run encode_items, or check updated_at "
                    "of raw_items"
                )
            if local_main:
                held.enter_context(scratch_folder(name))
                _write(folder, snapshot, files, newest)
        hashes, vectors = (
            np.load(folder / f"{file}.npy", mmap_mode="r", allow_pickle=False) for file in ("content_hash", "vectors")
        )
        yield ItemVectors(newest.items, newest.content[newest.items], hashes, vectors, newest.left_out)


def _write(folder: Path, snapshot: Snapshot, files: tuple[DataFile, ...], newest: NewestContent) -> None:
    items = newest.items
    arrays: tuple[np.memmap, ...] = ()
    for batch in read_batches(snapshot, files, ["item_index", "content_hash", "updated_at", "embedding"]):
        index = batch["item_index"].astype(np.int64)
        keep = newest.holds(index, digests(batch["content_hash"]))
        keep[keep] &= batch["updated_at"][keep] == newest.time[index[keep]]
        if not keep.any():
            continue
        embedding = np.asarray(batch["embedding"][keep], dtype=np.float32)
        if not arrays:
            width = snapshot.contract.column("content_hash").max_length
            arrays = (
                scratch_array(folder / "vectors.npy", np.float32, (len(items), embedding.shape[1])),
                scratch_array(folder / "content_hash.npy", f"<U{width}", (len(items),)),
            )
        vectors, hashes = arrays
        rows = np.searchsorted(items, index[keep])
        vectors[rows] = embedding
        hashes[rows] = batch["content_hash"][keep].astype(str)
    for array in arrays:
        array.flush()
