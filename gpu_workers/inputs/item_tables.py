"""Lookups by item: content vectors as of the run date, and semantic IDs in force."""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import numpy as np

from gpl_core.contracts.raw_values import midnight
from gpl_core.errors import MissingInputError
from gpl_core.graph.step_run import StepContext
from gpl_core.lakehouse.snapshot import Snapshot
from gpl_core.sids.content_table import ContentTable
from gpu_workers.inputs.embeddings import item_vectors
from gpu_workers.inputs.feed import read_batches
from gpu_workers.ranks import Ranks


@contextmanager
def content_table(context: StepContext, ranks: Ranks) -> Iterator[ContentTable]:
    """Item vectors of the encoder that the tokenizer in force was trained on, as of the run date, memory-mapped.

    Content that is newer than the run date is not used, however late the step runs.
    """
    with ranks.together():
        encoder_version = context.artifact("tokenizer").lineage["encoder_version"]
        snapshot = context.snapshot("item_embeddings")
    with item_vectors(snapshot, encoder_version, ranks, before=midnight(context.run_date + timedelta(days=1))) as found:
        with ranks.together():
            table = ContentTable.of(found.item_index, found.vectors)
        yield table


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
