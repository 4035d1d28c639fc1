"""One life cycle for every run of a step, shared by Spark jobs and GPU workers.

Evaluate the state; a dry run prints it; a blocked step fails; what is up to date is a recorded no-op; otherwise the
body runs. What happened is recorded in `job_runs`, failures too.
"""

import hashlib
import logging
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from datetime import date
from pathlib import Path
from typing import Any, NoReturn, Protocol

from gpl_core.config import Config
from gpl_core.contracts.contract import Contract, load_contract
from gpl_core.errors import (
    ConflictError,
    ContractError,
    GplError,
    LineageError,
    MissingInputError,
    QuarantineError,
    UsageError,
    classified,
    exit_code_of,
)
from gpl_core.graph.arguments import StepArguments
from gpl_core.graph.dry_run import print_dry_run
from gpl_core.graph.job_runs import Counts, JobRun
from gpl_core.graph.origins import origin_of
from gpl_core.graph.planner import Planner, StepState
from gpl_core.graph.steps import RAW_TABLES, Step, find_step
from gpl_core.lakehouse.artifacts import ArtifactStore, Manifest, artifact_version
from gpl_core.lakehouse.lake import Commit, Lake, SaveMark
from gpl_core.lakehouse.marks import WHOLE, SliceMark
from gpl_core.lakehouse.snapshot import Snapshot

log = logging.getLogger("gpl")


class StepContext:
    """The context of a step's body: pinned inputs, artifacts in force, and the counts and warnings it reports."""

    def __init__(
        self, planner: Planner, step_name: str, run_date: date, state: StepState, run_id: str, *, force: bool = False
    ):
        self.step = find_step(step_name)
        self.run_date = run_date
        self.state = state
        self.states: Mapping[date, StepState] = {run_date: state}  # of a bulk run: all its dates
        self.run_id = run_id
        self.force = force
        self.rewrite: frozenset[str] = frozenset()  # outputs to write even though they are current
        self.config: Config = planner.config
        self.lake: Lake = planner.lake
        self.artifacts: ArtifactStore = planner.artifacts
        self.save_mark: SaveMark | None = None  # where another engine writes the tables' logs
        self.counts = Counts()
        self._planner = planner

    @property
    def dates(self) -> tuple[date, ...]:
        """The run date; of a bulk run all its dates, ascending."""
        return tuple(self.states)

    @property
    def artifact_digest(self) -> str:
        """What names the artifact of this step: its fingerprint, of a forced run together with the `run_id`."""
        if not self.force:
            return self.state.artifact_fingerprint
        return hashlib.sha256(f"{self.state.artifact_fingerprint}:{self.run_id}".encode()).hexdigest()[:24]

    @property
    def artifact_version(self) -> str:
        """The version under which this run publishes."""
        return artifact_version(self.step.trained_through(self.run_date), self.artifact_digest)

    def snapshot(self, table: str) -> Snapshot:
        """The input table at the version the state pinned; MissingInputError for an optional one that is not there."""
        if table not in self.state.inputs:
            raise MissingInputError(f"step {self.step.name}: table {table} does not exist at {self.lake.uri(table)}")
        return self.lake.open(table, self.state.version(table))

    def output(self, table: str) -> Snapshot | None:
        """The table that this step writes, at the version the state was decided on; None when there was none."""
        version = self.state.outputs[table]
        return self.lake.open(table, version) if version >= 0 else None

    def has(self, table: str) -> bool:
        """Whether the (optional) input table exists."""
        return table in self.state.inputs

    def warn(self, text: str) -> None:
        """Log `text` and report it in the step's JSON line, at the end of the run, in job_runs and to exporters."""
        log.warning("%s %s: %s", self.step.name, self.run_date, text)
        self.counts.details.setdefault("warnings", []).append(text)

    @property
    def input_bytes(self) -> int:
        """Bytes of the live files in the scope of every input, from the tables' logs; look-ups count whole."""
        pinned = [(self._planner.snapshot(r.table), r) for r in self.step.reads if self.has(r.table)]
        return sum(f.size for s, r in pinned if s is not None for f in self._planner.files(s, r, self.run_date))

    def artifact(self, kind: str) -> Manifest:
        """The artifact in force for the run date, at the version the state pinned."""
        version = str(self.state.inputs[f"artifact:{kind}"]["version"])
        manifest = self.artifacts.find(kind, version)
        if manifest is None:
            raise MissingInputError(f"artifact {kind} {version} disappeared while step {self.step.name} ran")
        return manifest

    def sid_and_model_versions(self) -> tuple[str, str]:
        """(sid_version, model_version) in force; LineageError when the model was trained on other semantic IDs."""
        tokenizer, model = self.artifact("tokenizer"), self.artifact("interest_model")
        if model.lineage.get("sid_version") != tokenizer.version:
            raise LineageError(
                f"interest_model {model.version} was trained on sid_version {model.lineage.get('sid_version')}, but "
                f"the tokenizer in force for {self.run_date} is {tokenizer.version}; run train_interest_model for "
                "this date"
            )
        return tokenizer.version, model.version

    def publish(
        self, folder: Path, lineage: Mapping[str, str], metrics: Mapping[str, Any], *, saw_all: bool = True
    ) -> Manifest:
        """Publish the files of `folder` as the artifact that this step makes for the run date.

        saw_all: whether a later date would see no more of the same tables; only such an artifact may outlive its age.
        """
        manifest = self.artifacts.publish(
            self.step.publishes, folder, trained_through=self.step.trained_through(self.run_date),
            version=self.artifact_version, fingerprint=self.state.artifact_fingerprint,
            config_hash=self.step.config_hash(self.config), lineage=lineage, metrics=metrics,
            saw=self.state.saw if saw_all else "", origin=self.origin(self.step.publishes),
        )  # fmt: skip
        self.counts.outputs[f"artifact:{manifest.kind}"] = {"version": manifest.version}
        return manifest

    def origin(self, output: str = "", state: StepState | None = None) -> dict[str, dict[str, str]]:
        """What `output` (a table, an artifact, or the page) is made of: see `origins`."""
        return origin_of(self.step, self.config, (state or self.state).inputs, output)

    def contract(self, table: str) -> Contract:
        """The contract of `table`."""
        return load_contract(table)

    def mark(self, table: str, details: Mapping[str, Any] | None = None) -> SliceMark:
        """The mark a commit to `table` must carry."""
        slices, origins = {WHOLE: self.state.fingerprint}, {WHOLE: self.origin(table)}
        if "dt" in load_contract(table).partition_by:
            slices = {d.isoformat(): s.fingerprint_of(table) for d, s in self.states.items()}
            origins = {d.isoformat(): self.origin(table, s) for d, s in self.states.items()}
        settings = next(iter(origins.values()))["settings"]
        origin = {"settings": settings, "inputs": {name: o["inputs"] for name, o in origins.items()}}
        raw = {t: self.state.version(t) for t in RAW_TABLES if self.has(t)}
        also = {"origin": origin, **({"raw": raw} if raw else {})}
        return SliceMark(self.step.name, slices, self.run_id, {**(details or {}), **also})

    def is_current(self, table: str) -> bool:
        """Whether the output `table` has already been made from these very inputs, for every date of this run."""
        return (
            not self.force
            and table not in self.rewrite
            and all(self._planner.is_current(table, d, s.fingerprint_of(table)) for d, s in self.states.items())
        )

    def committed(self, table: str, commit: Commit) -> None:
        """Count a finished commit."""
        self.counts.outputs[table] = {
            "before": commit.version_before, "after": commit.version_after, "rows": commit.rows
        }  # fmt: skip
        self.counts.rows_out += commit.rows
        self.counts.bytes_out += commit.size


class Processes(Protocol):
    """The processes that run a step together; one of them records it. Alone for a Spark driver, else worker ranks."""

    @property
    def is_main(self) -> bool:
        """Whether this process evaluates the state and records the run."""

    def together(self) -> AbstractContextManager[None]:
        """A block that fails in all processes when it fails in one."""

    def broadcast_text(self, text: str) -> str:
        """The main process's `text`, in all."""


class Alone:
    """The only process of its step run."""

    is_main = True

    def together(self) -> AbstractContextManager[None]:
        """No other process has to learn of a failure."""
        return nullcontext()

    def broadcast_text(self, text: str) -> str:
        """`text`."""
        return text


Body = Callable[[StepContext], None]
ALONE = Alone()


def run_step(
    planner: Planner, name: str, dates: date | Sequence[date], args: StepArguments, body: Body,
    processes: Processes = ALONE,
) -> str:  # fmt: skip
    """Run one step for one date, or for several in one commit per table; returns `done`, `noop` or `planned` (dry run).

    Records a `job_runs` row, prints the JSON line whatever happens, and lets the error through. With several dates both
    are of the last one that is not done.
    """
    dates = (dates,) if isinstance(dates, date) else tuple(dates)
    step = find_step(name)
    run = JobRun(planner.lake, name, dates[-1], args.run_id)
    counts, status = Counts(), "failed"
    error: BaseException | None = None
    try:
        if len(dates) > 1 and step.reads and not step.takes_history:
            raise UsageError(f"--bulk-through: step {name} builds a date on earlier ones; run it date by date")
        states = {d: _agreed_state(planner, step, d, args.force, processes) for d in dates}
        due = [d for d, s in states.items() if s.status != "done" or args.force]
        run.run_date = run_date = due[-1] if due else dates[-1]
        run.state = states[run_date]
        if args.dry_run:
            if processes.is_main:
                print_dry_run(planner, step, run_date, run.state, force=args.force)
            status = "planned"
            return status
        with processes.together():
            if blocked := [s for s in states.values() if not s.may_run(force=args.force)]:
                raise MissingInputError(blocked[0].reason)
            if processes.is_main:
                planner.index_outputs(step)
        if not due:
            status = "noop"
            return status
        context = StepContext(planner, name, run_date, run.state, args.run_id, force=args.force)
        context.states, counts = states, context.counts
        if processes.is_main:
            run.begin()
        try:
            body(context)
            status = "done"
        except ConflictError:
            # What a forced run found was done before: only that does not show that another run has done it again.
            if args.force or not _done_meanwhile(context, processes):
                raise
            status = "noop"
        except QuarantineError:
            raise  # of the raw rows: what the run wrote of them stands
        except ContractError as refused:
            if processes.is_main:
                _mark_refused(context, refused)
            raise
        return status
    except BaseException as caught:
        error = classified(caught)
        raise
    finally:
        if processes.is_main and not args.dry_run:
            if planner.artifacts.damaged:
                counts.details["damaged"] = dict(planner.artifacts.damaged)
            run.end(status, counts, error)


def _done_meanwhile(context: StepContext, processes: Processes) -> bool:
    """Whether the run that this one met has done the same work: every slice carries this run's fingerprint."""
    text = ""
    with processes.together():
        if processes.is_main:
            now = Planner(context.config)
            done = context.step.writes and all(
                now.is_current(table, day, state.fingerprint_of(table))
                for table in context.step.writes
                for day, state in context.states.items()
            )
            text = "done" if done else ""
    if done_meanwhile := bool(processes.broadcast_text(text)):
        log.info("%s %s: another run has done this in the meantime", context.step.name, context.run_date)
    return done_meanwhile


def _mark_refused(context: StepContext, refused: ContractError) -> None:
    """Marks the slices that this run committed and then refused, so that the next run writes them again."""
    for table in context.step.writes:
        written = context.counts.outputs.get(table)
        if written is None or load_contract(table).partition_by != ("dt",):
            continue  # other tables only grow: what stands there is whole
        try:
            # The class alone: the message may quote rows, which `gpl forget` could not take out of a log.
            why, version = type(refused).__name__, int(written["after"])
            context.lake.refuse(table, context.run_id, version, why, context.save_mark)
        except Exception:  # the refusal is what the run must end with
            log.exception("%s %s: %s could not be marked as refused", context.step.name, context.run_date, table)


def _agreed_state(planner: Planner, step: Step, run_date: date, force: bool, processes: Processes) -> StepState:
    """The main process's view of the tables, in all processes: they read the same pinned versions."""
    text = ""
    with processes.together():
        if force and (theirs := planner.read_only_outputs(step)):
            raise UsageError(
                f"step {step.name} writes {', '.join(theirs)}, which this shadow run only reads from "
                f"{planner.config.lakehouse.shadow.of}: give --from with a later step"
            )
        if processes.is_main:
            text = planner.state(step, run_date).to_json()
    return StepState.from_json(processes.broadcast_text(text))


def run_steps(
    names: Sequence[str], args: StepArguments, run_one: Callable[[str, Sequence[date]], None],
    is_fatal: Callable[[Exception], bool] = lambda error: False,
) -> int:  # fmt: skip
    """Run the steps in order, each over all dates, through `run_one(name, dates)`; returns the exit code.

    Dates up to `args.bulk_through` go into one call; a failure there, or one that `is_fatal`, is raised at once. Of the
    others `args.max_failures` dates may fail: the steps that follow leave them out, and the code is that of the first.
    """
    failed: dict[date, Exception] = {}
    for name in names:
        through = None if args.dry_run else args.bulk_through  # a dry run prints a line per date
        history = [d for d in args.dates if through and d <= through]
        if history:
            run_one(name, history)
        for run_date in args.dates[len(history) :]:
            if run_date in failed:
                continue
            try:
                run_one(name, (run_date,))
            except Exception as error:
                failed[run_date] = error
                if is_fatal(error) or len(failed) > args.max_failures:
                    raise
                exit_with(error)
                log.info("%s failed: %d of %d failures allowed", run_date, len(failed), args.max_failures)
    return next(map(exit_code_of, failed.values()), 0)


def setup_logging() -> None:
    """Messages for people go to stderr; stdout belongs to the JSON lines."""
    logging.basicConfig(
        stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(name)s %(message)s", datefmt="%H:%M:%S", force=True
    )
    for noisy in ("py4j", "fsspec", "petastorm", "urllib3"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


def leave(code: int) -> NoReturn:
    """End the process, its output written: threads of Arrow and delta-rs that outlive the interpreter abort it."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def exit_with(error: BaseException) -> int:
    """Print what went wrong; returns the exit code."""
    error = classified(error)
    if isinstance(error, GplError):
        print(f"error: {error}", file=sys.stderr)
    else:
        log.exception("unexpected failure", exc_info=error)
    return exit_code_of(error)
