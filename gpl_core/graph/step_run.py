"""One run of one step for one date: its life cycle, JSON line and `job_runs` row.

Spark jobs and GPU workers share this life cycle: evaluate the state, return a recorded no-op when the tables say done,
else note that it runs, run the body, then record what happened, failures too. A run that was killed leaves its note.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, date, datetime
from typing import Any

import pyarrow as pa

from gpl_core import __version__
from gpl_core.config import Config
from gpl_core.contracts.contract import Contract, load_contract
from gpl_core.errors import ConflictError, GplError, MissingInputError, UsageError, exit_code_of, told
from gpl_core.graph.arguments import StepArguments
from gpl_core.graph.dry_run import print_dry_run
from gpl_core.graph.planner import Planner, StepState
from gpl_core.graph.steps import RAW_TABLES, Read, find_step
from gpl_core.lakehouse.artifacts import ArtifactStore, Manifest
from gpl_core.lakehouse.lake import Commit, Lake
from gpl_core.lakehouse.marks import WHOLE, SliceMark
from gpl_core.lakehouse.snapshot import Snapshot

log = logging.getLogger("gpl")

_RECORD_TRIES = 20


class Failures:
    """Run dates that failed and were passed by: `--max-failures` of them.

    A date that failed is left out of the steps that follow; the others are done, one commit per date, and the process
    leaves with the first failure's exit code.
    """

    def __init__(self, allowed: int):
        self.allowed = allowed
        self.by_date: dict[date, Exception] = {}

    def note(self, run_date: date, error: Exception) -> None:
        """Count the failure of `run_date` and tell it; raises `error` when it is one too many."""
        self.by_date[run_date] = error
        if len(self.by_date) > self.allowed:
            raise error
        exit_with(error)
        log.info("%s failed: %d of %d failures allowed", run_date, len(self.by_date), self.allowed)

    @property
    def code(self) -> int:
        """Exit code of the first failure, 0 when there was none."""
        return next((exit_code_of(e) for e in self.by_date.values()), 0)


@dataclass
class Counts:
    """What a run reports: rows in = rows out + quarantined + dropped holds wherever rows_in is counted.

    Attributes:
        core_seconds: what it kept busy: run time of Spark's tasks, or CPU time of all ranks; None when not measured.
        gpu_seconds: GPUs held, times wall time.
        bytes_in: read by Spark's tasks, or of a worker's input files in scope by the tables' logs.
    """

    rows_in: int = -1
    rows_out: int = 0
    rows_quarantined: int = 0
    rows_dropped: int = 0
    bytes_out: int = 0
    outputs: dict[str, Any] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)
    core_seconds: float | None = None
    gpu_seconds: float = 0.0
    bytes_in: int | None = None


class StepContext:
    """What a step's body works with: pinned inputs, artifacts in force, and where its report goes."""

    def __init__(self, planner: Planner, step_name: str, run_date: date, state: StepState, run_id: str, *,
                 force: bool = False, bulk_dates: tuple[date, ...] = ()):  # fmt: skip
        self.step = find_step(step_name)
        self.run_date = run_date
        self.state = state
        self.run_id = run_id
        self.force = force
        self.rewrite: frozenset[str] = frozenset()  # outputs to write though they are current
        self.bulk_dates = bulk_dates or (run_date,)
        self.bulk_states: dict[date, StepState] = {}
        self.config: Config = planner.config
        self.lake: Lake = planner.lake
        self.artifacts: ArtifactStore = planner.artifacts
        self.counts = Counts()
        self._planner = planner

    @property
    def fingerprint(self) -> str:
        """Fingerprint of the inputs; a forced run of an artifact gets a version of its own through `run_id`."""
        return self.state.fingerprint

    @property
    def artifact_fingerprint(self) -> str:
        """Fingerprint of the artifact this step publishes."""
        if not self.force:
            return self.state.artifact_fingerprint
        import hashlib

        return hashlib.sha256(f"{self.state.artifact_fingerprint}:{self.run_id}".encode()).hexdigest()[:24]

    def snapshot(self, table: str) -> Snapshot:
        """The input table at the version that the state pinned.

        Raises:
            MissingInputError: the step's optional input does not exist.
        """
        if table not in self.state.inputs:
            raise MissingInputError(f"step {self.step.name}: table {table} does not exist at {self.lake.uri(table)}")
        return self.lake.open(table, self.state.version(table))

    def has(self, table: str) -> bool:
        """Whether the (optional) input table exists."""
        return table in self.state.inputs

    @property
    def input_bytes(self) -> int:
        """Bytes of the live files in the scope of every input, by the tables' logs; look-ups count whole."""
        pinned = [(self._planner.snapshot(r.table), r) for r in self.step.reads if self.has(r.table)]
        return sum(f.size for s, r in pinned if s is not None for f in self._planner.files(s, r, self.run_date))

    def read(self, table: str) -> Read:
        """How this step reads `table`."""
        return next(r for r in self.step.reads if r.table == table)

    def input_files(self, table: str) -> list[str]:
        """Locations of the live files of `table` that the step's scope covers, at the pinned version."""
        snapshot = self.snapshot(table)
        return snapshot.uris(self._planner.files(snapshot, self.read(table), self.run_date))

    def artifact(self, kind: str) -> Manifest:
        """The artifact in force for the run date, as the state pinned it."""
        version = str(self.state.inputs[f"artifact:{kind}"]["version"])
        manifest = self.artifacts.find(kind, version)
        if manifest is None:
            raise MissingInputError(f"artifact {kind} {version} vanished while step {self.step.name} ran")
        return manifest

    def contract(self, table: str) -> Contract:
        """The contract of `table`."""
        return load_contract(table)

    def mark(self, table: str, details: Mapping[str, Any] | None = None) -> SliceMark:
        """The mark that a commit to `table` must carry."""
        slices = {WHOLE: self.fingerprint}
        if "dt" in load_contract(table).partition_by:
            slices = {d.isoformat(): s.fingerprint_of(table) for d, s in self._states().items()}
        raw = {t: self.state.version(t) for t in RAW_TABLES if self.has(t)}
        return SliceMark(self.step.name, slices, self.run_id, {**(details or {}), **({"raw": raw} if raw else {})})

    def _states(self) -> dict[date, StepState]:
        return self.bulk_states or {self.run_date: self.state}

    def is_current(self, table: str) -> bool:
        """Whether the output `table` was made from just these inputs already, for every date of this run."""
        states = self._states().items()
        return (
            not self.force
            and table not in self.rewrite
            and all(self._planner.is_current(table, d, s.fingerprint_of(table)) for d, s in states)
        )

    def committed(self, table: str, commit: Commit) -> None:
        """Note a finished commit for the report."""
        self.counts.outputs[table] = {
            "before": commit.version_before, "after": commit.version_after, "rows": commit.rows
        }  # fmt: skip
        self.counts.rows_out += commit.rows
        self.counts.bytes_out += commit.size


Body = Callable[[StepContext], None]


def run_step(planner: Planner, name: str, run_date: date, args: StepArguments, body: Body) -> str:
    """Run one step for one date in this process; returns `done`, `noop` or `planned` (dry run).

    Records a `job_runs` row and prints the JSON line whatever happens, and lets the error through.
    """
    step = find_step(name)
    started, clock = datetime.now(UTC), time.monotonic()
    state = StepState("blocked", "not evaluated")
    context: StepContext | None = None
    begun: Begun | None = None
    status, error = "failed", None
    try:
        if args.force and (theirs := planner.borrowed(step)):
            raise UsageError(
                f"step {name} writes {', '.join(theirs)}, which this shadow run only reads from "
                f"{planner.config.lakehouse.shadow.of}: give --from with a later step"
            )
        state = planner.state(step, run_date)
        if args.dry_run:
            print_dry_run(planner, name, run_date, state, force=args.force)
            return "planned"
        if not state.may_run(force=args.force):
            raise MissingInputError(state.reason)
        if state.status == "done" and not args.force:
            status = "noop"
            return status
        context = StepContext(planner, name, run_date, state, args.run_id, force=args.force)
        begun = begin(planner.lake, name, run_date, args.run_id, state, started)
        body(context)
        status = "done"
        return status
    except BaseException as caught:
        error = caught
        raise
    finally:
        if not args.dry_run:
            counts = context.counts if context else Counts()
            record(planner.lake, name, run_date, args.run_id, state, status, counts, error, started, clock, begun)


@dataclass(frozen=True)
class Begun:
    """The row of job_runs that says a run is under way: its attempt, and the file that the final row replaces."""

    attempt: int
    part: Mapping[str, Any]


def begin(
    lake: Lake, step: str, run_date: date, run_id: str, state: StepState, started: datetime
) -> Begun | None:  # fmt: skip
    """Note in job_runs that a run begins, so that `gpl vacuum` keeps what it reads; None when that was not possible."""
    try:
        row = _row(step, run_date, run_id, state, "running", Counts(), None, started, 0.0)
        return _append(lake, row)
    except Exception as failure:  # the step may still do its work; its record at the end says it if this lasts
        log.error("job_runs: the start of %s %s could not be noted: %s", step, run_date, failure)
        return None


def record(
    lake: Lake,
    step: str,
    run_date: date,
    run_id: str,
    state: StepState,
    status: str,
    counts: Counts,
    error: BaseException | None,
    started: datetime,
    clock: float,
    begun: Begun | None = None,
) -> None:
    """Append the `job_runs` row, in place of the one of `begin`, and print it as one JSON line to stdout."""
    row = _row(step, run_date, run_id, state, status, counts, error, started, time.monotonic() - clock)
    try:
        _append(lake, row, begun)
    except Exception as failure:  # the log must not hide the error of the step itself
        log.error("job_runs: the row of %s %s could not be written: %s", step, run_date, failure)
        if error is None:
            raise
    line = {**row, "inputs": state.inputs, "outputs": counts.outputs, "details": counts.details}
    print(json.dumps(line, default=str, sort_keys=True), flush=True)


def _row(
    step: str, run_date: date, run_id: str, state: StepState, status: str, counts: Counts,
    error: BaseException | None, started: datetime, seconds: float,
) -> dict[str, Any]:  # fmt: skip
    return {
        "run_id": run_id,
        "step": step,
        "run_date": run_date,
        "attempt": 1,
        "status": status,
        "fingerprint": state.fingerprint,
        "code_version": __version__,
        "inputs": json.dumps(state.inputs, sort_keys=True),
        "outputs": json.dumps(counts.outputs, sort_keys=True),
        "rows_in": counts.rows_in,
        "rows_out": counts.rows_out,
        "rows_quarantined": counts.rows_quarantined,
        "rows_dropped": counts.rows_dropped,
        "bytes_out": counts.bytes_out,
        "seconds": seconds,
        "details": json.dumps(counts.details, sort_keys=True, default=str),
        "error_class": type(error).__name__ if error else "",
        "error_message": str(error)[:4000] if error else "",
        "started_at": started,
        "core_seconds": counts.core_seconds,
        "gpu_seconds": counts.gpu_seconds,
        "bytes_in": counts.bytes_in,
    }


def _append(lake: Lake, row: dict[str, Any], begun: Begun | None = None) -> Begun:
    """Commit `row` under the next attempt number of its step and date, or in place of `begun` under that one's."""
    contract = load_contract("job_runs")
    numbered = f"job_runs:{row['step']}:{row['run_date']}"
    mark = SliceMark("job_runs", {}, row["run_id"])
    for remaining in reversed(range(_RECORD_TRIES)):
        if begun is None:
            last = lake.create(contract).transaction_version(numbered)
            app_id, row["attempt"] = numbered, last + 2
        else:
            app_id, last, row["attempt"] = f"{numbered}:{begun.attempt}", -1, begun.attempt
        with lake.writer(contract, {}, dims={}) as writer:
            writer.write(pa.Table.from_pylist([row], schema=contract.arrow_schema()))
        try:
            lake.commit(
                contract, writer.parts, mark=mark, mode="append", app_id=app_id, last=last,
                replaces=[begun.part] if begun else [],
            )  # fmt: skip
            return Begun(row["attempt"], writer.parts[0])
        except ConflictError:  # another run of this step and date took the number: take the next one
            if not remaining:
                raise
    raise AssertionError("unreachable: the last try returns or raises")


def setup_logging() -> None:
    """Human lines to stderr; stdout belongs to the JSON lines."""
    logging.basicConfig(
        stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(name)s %(message)s", datefmt="%H:%M:%S", force=True
    )
    for noisy in ("py4j", "fsspec", "matplotlib", "petastorm", "urllib3"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


def exit_with(error: BaseException) -> int:
    """Print what went wrong for people; returns the exit code."""
    error = told(error)
    if isinstance(error, GplError):
        print(f"error: {error}", file=sys.stderr)
    else:
        log.exception("unexpected failure", exc_info=error)
    return exit_code_of(error)
