"""Lookups by item for scoring and pre-ranking: sampled vectors, and semantic IDs in force."""

from datetime import date, timedelta

import numpy as np

from gpl_core.errors import MissingInputError
from gpl_core.graph.steps import start_of
from gpl_core.lakehouse.snapshot import Snapshot
from gpl_core.sids.content_table import ContentTable
from gpu_workers.inputs.feed import read_batches


def end_of(run_date: date) -> int:
    """The end of `run_date` in microseconds: later content must not be used, however late the step runs."""
    return int(start_of(run_date + timedelta(days=1)).timestamp() * 1_000_000)


def sample_vectors(items: ContentTable) -> np.ndarray:
    """Usable vectors [<= 20,000 x d], evenly spaced over the rows: the same on every rank and machine."""
    usable = items.row_of[items.row_of >= 0]
    chosen = usable[np.unique(np.linspace(0, len(usable) - 1, min(20_000, len(usable))).astype(np.int64))]
    return np.asarray(items.vectors[chosen], dtype=np.float32)


def sids_in_force(snapshot: Snapshot, sid_version: str) -> tuple[np.ndarray, np.ndarray]:
    """(item_index int64 [n], SIDs int32 [n x L]) in force under `sid_version`; MissingInputError without any."""
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
