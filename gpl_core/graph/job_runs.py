"""The table `job_runs`: one row per attempt at a step and date, written when it starts and replaced when it ends."""

import json
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, date, datetime
from typing import Any

from gpl_core import __version__
from gpl_core.contracts.contract import load_contract
from gpl_core.errors import ConflictError
from gpl_core.graph import alarms, lineage_events
from gpl_core.graph.planner import StepState
from gpl_core.lakehouse.lake import Lake
from gpl_core.lakehouse.marks import SliceMark

log = logging.getLogger("gpl")

_TRIES = 20


@dataclass
class Counts:
    """What a run reports; `rows_in` is -1 where nothing is counted."""

    rows_in: int = -1
    rows_out: int = 0
    rows_quarantined: int = 0
    rows_dropped: int = 0
    bytes_out: int = 0
    outputs: dict[str, Any] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)
    core_seconds: float | None = None  # run time of Spark's tasks, or CPU time of all ranks; None: not measured
    gpu_seconds: float = 0.0  # GPUs held, times wall time
    bytes_in: int | None = None  # read by Spark's tasks; of a worker the size of its input files in scope, by the logs


class JobRun:
    """One attempt at a step and date; its clock starts here."""

    def __init__(self, lake: Lake, step: str, run_date: date, run_id: str, started: datetime | None = None):
        self.state = StepState("blocked", "not evaluated")  # what the tables said when it started, once that is known
        self.run_date = run_date
        self._lake, self._step, self._run_id = lake, step, run_id
        self._started, self._clock = started or datetime.now(UTC), time.monotonic()
        self._running: tuple[int, Mapping[str, Any]] | None = None  # attempt, and the file with the row of `begin`

    def begin(self) -> None:
        """Append the row with status `running`, so that `gpl vacuum` keeps what the run reads.

        When that fails the step can still do its work; `end` fails too if the cause persists.
        """
        row = self._row("running", Counts(), None)
        try:
            self._running = self._append(row)
        except Exception as failure:
            log.error("job_runs: the start of %s %s could not be recorded: %s", self._step, self.run_date, failure)
        lineage_events.emit("START", self._line(row, Counts()), self._lake)

    def end(self, status: str, counts: Counts, error: BaseException | None = None) -> None:
        """Write the final row, in place of the one of `begin`, and print it as one JSON line to stdout."""
        row = self._row(status, counts, error)
        unwritten: Exception | None = None
        try:
            self._append(row)
        except Exception as failure:
            log.error("job_runs: the row of %s %s could not be written: %s", self._step, self.run_date, failure)
            if error is None:  # the log must not hide the error of the step itself
                unwritten, status = failure, "failed"
                row |= {**self._row(status, counts, failure), "attempt": row["attempt"]}
        line = self._line(row, counts)
        if status != "noop" or self._running is not None:  # else it has begun nothing
            lineage_events.emit("FAIL" if status == "failed" else "COMPLETE", line, self._lake)
        alarms.export(line, self._lake.root)
        print(json.dumps(line, default=str, sort_keys=True), flush=True)
        if unwritten is not None:
            raise unwritten

    def _line(self, row: Mapping[str, Any], counts: Counts) -> dict[str, Any]:
        return {**row, "inputs": self.state.inputs, "outputs": counts.outputs, "details": counts.details}

    def _row(self, status: str, counts: Counts, error: BaseException | None) -> dict[str, Any]:
        return {
            "run_id": self._run_id,
            "step": self._step,
            "run_date": self.run_date,
            "attempt": 1,
            "status": status,
            "fingerprint": self.state.fingerprint,
            "code_version": __version__,
            "inputs": json.dumps(self.state.inputs, sort_keys=True),
            **vars(counts),
            "outputs": json.dumps(counts.outputs, sort_keys=True),
            "details": json.dumps(counts.details, sort_keys=True, default=str),
            "seconds": 0.0 if status == "running" else time.monotonic() - self._clock,
            "error_class": type(error).__name__ if error else "",
            "error_message": str(error)[:4000] if error else "",
            "started_at": self._started,
        }

    def _append(self, row: dict[str, Any]) -> tuple[int, Mapping[str, Any]]:
        """Commit `row` under the next attempt number of its step and date, or in place of the running row."""
        contract = load_contract("job_runs")
        numbered = f"job_runs:{self._step}:{self.run_date}"
        mark = SliceMark("job_runs", {}, self._run_id)
        tried = 0
        while True:
            tried += 1
            if self._running is None:
                last = self._lake.create(contract).transaction_version(numbered)
                app_id, row["attempt"], replaces = numbered, last + 2, []
            else:
                row["attempt"], part = self._running
                app_id, last, replaces = f"{numbered}:{row['attempt']}", -1, [part]
            with self._lake.writer(contract, {}, dims={}) as writer:
                writer.write_rows([row])
            try:
                self._lake.commit(
                    contract, writer.parts, mark=mark, mode="append", app_id=app_id, last=last, replaces=replaces
                )
                return row["attempt"], writer.parts[0]
            except ConflictError:  # another run of this step and date took the number: take the next one
                if tried == _TRIES:
                    raise


def newest_done(lake: Lake, step: str, run_date: date) -> dict[str, Any] | None:
    """Inputs and details of the newest finished run of `step` for `run_date`; None if none is on record."""
    runs = lake.find("job_runs")
    if runs is None:
        return None
    rows = runs.read(columns=["step", "run_date", "status", "started_at", "inputs", "details"]).to_pylist()
    done = [r for r in rows if (r["step"], r["run_date"], r["status"]) == (step, run_date, "done")]
    newest = max(done, key=lambda r: r["started_at"], default=None)
    return newest and {name: json.loads(newest[name]) for name in ("inputs", "details")}
