"""Lookups by item for scoring and pre-ranking: rows of the memory-mapped embeddings, and semantic IDs in force."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import date, timedelta

import numpy as np

from gpl_core.errors import MissingInputError
from gpl_core.graph.steps import start_of
from gpl_core.lakehouse.snapshot import Snapshot
from gpu_workers.inputs.embeddings import ItemVectors
from gpu_workers.inputs.feed import read_batches

_ROWS = 65_536


def end_of(run_date: date) -> int:
    """The end of `run_date` in microseconds: later content must not be used, however late the step runs."""
    return int(start_of(run_date + timedelta(days=1)).timestamp() * 1_000_000)


@dataclass(frozen=True)
class ItemRows:
    """Embeddings with their row numbers: row = row_of[item_index]."""

    vectors: np.ndarray  # float32 [n x d], a read-only memory map
    finite: np.ndarray  # bool [n]: False where the vector holds NaN or infinity, or is 0
    row_of: np.ndarray  # int64 [largest item_index + 1], -1 where an item has no embedding

    @classmethod
    def of(cls, items: ItemVectors) -> ItemRows:
        """Row numbers of `items`; one pass over the vectors finds the unusable ones."""
        finite = np.zeros(len(items.vectors), dtype=bool)
        for start in range(0, len(finite), _ROWS):
            length = np.einsum("nd,nd->n", items.vectors[start : start + _ROWS], items.vectors[start : start + _ROWS])
            finite[start : start + _ROWS] = np.isfinite(length) & (length > 0)
        row_of = np.full(int(items.item_index[-1]) + 1, -1, dtype=np.int64)
        row_of[items.item_index] = np.arange(len(items.item_index))
        return cls(items.vectors, finite, row_of)

    def rows(self, item_index: np.ndarray) -> np.ndarray:
        """Row numbers int64, any shape; -1 for padding, for unknown items and for unusable vectors."""
        known = (item_index >= 0) & (item_index < len(self.row_of))
        row = np.where(known, self.row_of[np.where(known, item_index, 0)], -1)
        return np.where((row >= 0) & self.finite[row], row, -1)

    def content(self, item_index: np.ndarray) -> np.ndarray:
        """Embeddings float32 [... x d]; 0 where there is none."""
        row = self.rows(item_index)
        return np.where(row[..., None] >= 0, self.vectors[np.maximum(row, 0)], np.float32(0))


def sample_vectors(items: ItemRows) -> np.ndarray:
    """Usable vectors [<= 20,000 x d], evenly spaced over the rows: the same on every rank and machine."""
    usable = np.flatnonzero(items.finite)
    chosen = usable[np.unique(np.linspace(0, len(usable) - 1, min(20_000, len(usable))).astype(np.int64))]
    return np.asarray(items.vectors[chosen], dtype=np.float32)


def sids_in_force(snapshot: Snapshot, sid_version: str) -> tuple[np.ndarray, np.ndarray]:
    """(item_index int64 [n], sids int32 [n x L]) with retired_at = 0 under `sid_version`.

    Raises:
        MissingInputError: there are none.
    """
    files = snapshot.select(where={"sid_version": sid_version})
    index, sids = [], []
    for batch in read_batches(snapshot, files, ["item_index", "sid", "retired_at"]):
        kept = batch["retired_at"] == 0
        index.append(batch["item_index"][kept].astype(np.int64))
        sids.append(batch["sid"][kept].astype(np.int32))
    if not sum(map(len, index)):
        raise MissingInputError(
            f"table item_sids@{snapshot.version}: no SID in force of sid_version {sid_version}; run assign_sids first"
        )
    return np.concatenate(index), np.concatenate(sids)


def sid_table(item_index: np.ndarray, sids: np.ndarray, items: int) -> np.ndarray:
    """SIDs int32 [items x L] by item_index, -1 where an item has none."""
    out = np.full((items, sids.shape[1]), -1, dtype=np.int32)
    known = item_index < items
    out[item_index[known]] = sids[known]
    return out
