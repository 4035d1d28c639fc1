"""What workers write: the parts of all ranks in one commit, rejected rows, checkpoints on the local disk."""

import fcntl
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from gpl_core.contracts.contract import Contract
from gpl_core.errors import ConflictError
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
    known = {"dt": context.run_date.isoformat(), "step": context.step.name}
    partition = {name: known[name] for name in contract.partition_by}
    with ranks.together(), context.lake.writer(contract, partition, dims={}, rank=ranks.rank) as writer:
        writer.write_rows(rows)
    commit_parts(context, ranks, table, writer.parts, mode="overwrite", partition=partition)


def reject(key: str, reason: str, detail: str = "") -> dict[str, str]:
    """A row of `worker_rejects`."""
    return {"key": key, "reason": reason, "detail": detail}


@contextmanager
def alone_in(folder: Path, ranks: Ranks) -> Iterator[None]:
    """Lock ``folder`` for this run, because two runs would mix up their checkpoints; the lock ends with the process.

    ConflictError when another run on this machine holds it.
    """
    with ExitStack() as stack:
        with ranks.together():
            if int(os.environ.get("LOCAL_RANK", "0")) == 0:  # one process per machine
                folder.parent.mkdir(parents=True, exist_ok=True)
                lock = stack.enter_context(open(f"{folder}.lock", "ab"))
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    raise ConflictError(
                        f"{folder}: another run of this work is in progress here; run the step again when it has ended"
                    ) from None
        yield


def table_of(contract: Contract, columns: Mapping[str, np.ndarray]) -> pa.Table:
    """Rows of `contract`, without its partition columns, from arrays [n], or [n x k] for a column of arrays."""
    arrays = {}
    for field in contract.arrow_schema(partitions=False):
        values = columns[field.name]
        if pa.types.is_list(field.type):
            offsets = pa.array(np.arange(len(values) + 1, dtype=np.int32) * values.shape[1])
            flat = pa.array(np.ascontiguousarray(values).reshape(-1), field.type.value_type)
            arrays[field.name] = pa.ListArray.from_arrays(offsets, flat)
        else:
            arrays[field.name] = pa.array(values, field.type)
    return pa.table(arrays)
