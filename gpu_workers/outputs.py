"""What workers write: the parts of all ranks in one commit, rejected rows, checkpoints on the local disk."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from gpl_core.graph.step_run import StepContext
from gpu_workers.ranks import Ranks


def commit_parts(
    context: StepContext,
    ranks: Ranks,
    table: str,
    parts: Sequence[Mapping[str, Any]],
    *,
    mode: str,
    partition: Mapping[str, str] | None = None,
    details: Mapping[str, Any] | None = None,
) -> None:
    """Rank 0 commits every rank's `parts` of `table` in one transaction; all ranks return after it."""
    everyone = [part for text in ranks.gather_text(json.dumps(list(parts))) for part in json.loads(text)]
    with ranks.together():
        if ranks.is_main:
            commit = context.lake.commit(
                context.contract(table), everyone, mark=context.mark(table, details), mode=mode, partition=partition,
                since=context.state.outputs.get(table),
            )  # fmt: skip
            context.committed(table, commit)


def commit_rows(context: StepContext, ranks: Ranks, table: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Replace the run date's slice of a small `table` by the `rows` of all ranks."""
    contract = context.contract(table)
    partition = {"dt": context.run_date.isoformat()}
    if "step" in contract.partition_by:
        partition["step"] = context.step.name
    with ranks.together(), context.lake.writer(contract, partition, dims={}, rank=ranks.rank) as writer:
        writer.write_rows(rows)
    commit_parts(context, ranks, table, writer.parts, mode="overwrite", partition=partition)


def reject(key: str, reason: str, detail: str = "") -> dict[str, str]:
    """A row of `worker_rejects`."""
    return {"key": key, "reason": reason, "detail": detail}


def list_array(values: np.ndarray, kind: pa.DataType) -> pa.ListArray:
    """An Arrow list column of `values` [n x k]."""
    offsets = np.arange(len(values) + 1, dtype=np.int32) * values.shape[1]
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(np.ascontiguousarray(values).reshape(-1), kind))
