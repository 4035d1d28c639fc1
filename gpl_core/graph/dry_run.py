"""The output of a step's `--dry-run`: what it would read and write, with sizes from the tables' logs."""

import json
from collections.abc import Iterable
from datetime import date
from typing import Any

from gpl_core.contracts.contract import load_contract
from gpl_core.graph.compaction import compactable
from gpl_core.graph.planner import Planner, StepState
from gpl_core.graph.steps import Step
from gpl_core.lakehouse.artifacts import artifact_version
from gpl_core.lakehouse.files import DataFile, rows_in
from gpl_core.lakehouse.storage import filesystem


def print_dry_run(planner: Planner, step: Step, run_date: date, state: StepState, *, force: bool = False) -> None:
    """One JSON line to stdout: state, inputs and outputs of `step`; nothing is started or changed.

    `would_read`: version, files, rows and bytes of each table in the step's scope; one that is looked up by key, whole:
    how much of it is read depends on the rows. `would_write`: which rows of each table (`where`), `how`, and what is
    there: replaced (`replace`), added to (`merge`), rewritten in fewer files (`compact`) or left alone (`keep`). Rows
    that a log does not say are null.
    """
    tables = [*step.writes, *step.also_writes]
    if step.compacts:
        tables = [contract.name for contract in compactable(planner.lake, "spark")]
    writes = {table: _write(planner, step, table, run_date, state, force) for table in tables}
    if step.writes_page:
        path = planner.report_path(run_date)
        fs, local = filesystem(path)
        kept = state.status == "done" and not force
        writes[path] = {"how": "keep" if kept else "replace", "bytes": fs.size(local) if fs.exists(local) else 0}
    publishes = {}
    if step.publishes and state.artifact_fingerprint:
        made = artifact_version(step.trained_through(run_date), state.artifact_fingerprint)
        if force:
            publishes[step.publishes] = f"{made} with another hash: a forced run makes a version of its own"
        elif state.status != "done" and planner.artifacts.find(step.publishes, made) is None:
            publishes[step.publishes] = made
    body = {
        "step": step.name,
        "run_date": run_date.isoformat(),
        "state": state.status,
        "reason": state.reason,
        "would_read": _reads(planner, step, run_date, state),
        "would_write": writes,
        "would_publish": publishes,
    }
    print(json.dumps(body, sort_keys=True), flush=True)


def _reads(planner: Planner, step: Step, run_date: date, state: StepState) -> dict[str, dict[str, Any]]:
    inputs: dict[str, dict[str, Any]] = {name: dict(entry) for name, entry in state.inputs.items()}
    for read in step.reads:
        snapshot = planner.snapshot(read.table) if read.table in inputs else None
        if snapshot is not None:
            entry = inputs[read.table]
            for key, size in _sizes(planner.files(snapshot, read, run_date)).items():
                entry[key] = None if None in (before := entry.get(key, 0), size) else before + size
    return inputs


def _write(planner: Planner, step: Step, table: str, run_date: date, state: StepState, force: bool) -> dict[str, Any]:
    values = {"dt": run_date.isoformat(), "step": step.name}
    where = {column: values[column] for column in load_contract(table).partition_by if column in values}
    snapshot = planner.snapshot(table)
    files = snapshot.select(where=where) if snapshot else ()
    # A slice is replaced only where date and step name it whole.
    how = "replace" if where and set(where) == set(load_contract(table).partition_by) else "merge"
    if step.compacts:
        how = "compact" if len(files) > 1 else "keep"
    elif not force and (
        state.status == "done"
        or (table in step.shaped_by and planner.is_current(table, run_date, state.fingerprint_of(table)))
    ):
        how = "keep"
    return {
        "how": how,
        "where": " AND ".join(f"{column} = '{value}'" for column, value in where.items()) or "all rows",
        "version": snapshot.version if snapshot else None,
        **_sizes(files),
    }


def _sizes(files: Iterable[DataFile]) -> dict[str, int | None]:
    files = tuple(files)
    rows = rows_in(files)
    return {"files": len(files), "rows": rows if rows >= 0 else None, "bytes": sum(f.size for f in files)}
