"""The graph as data, and what the tables say about it: which step is done, absent or stale for a date.

A step's *fingerprint* hashes what its output depends on: the live files of the input slices, the versions of the
artifacts in force, the configuration sections that shape it and the contracts it writes. Commits carry it; a slice
whose newest commit carries the current fingerprint is done.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, time, timedelta
from typing import Literal

from gpl_core.config import Config
from gpl_core.contracts.contract import load_contract
from gpl_core.errors import MissingInputError, UsageError
from gpl_core.lakehouse.artifacts import ArtifactStore, Manifest, artifact_version
from gpl_core.lakehouse.files import DataFile, digest_of
from gpl_core.lakehouse.lake import Lake
from gpl_core.lakehouse.marks import WHOLE
from gpl_core.lakehouse.snapshot import Snapshot
from gpl_core.lakehouse.storage import filesystem

Scope = Literal["slice", "next", "before", "through", "window", "as_of", "whole", "lookup"]
Status = Literal["done", "absent", "stale", "blocked"]


@dataclass(frozen=True)
class Read:
    """One input of a step.

    Scopes, for run date D: `slice` dt = D · `next` dt = D + 1 · `before` the `days` dates before D · `through` every
    slice up to D · `window` the `days` dates up to D · `as_of` files with something before D + 1 by `column` ·
    `whole` all of it · `lookup` read by key, never a reason to run again.
    A table may be read in two scopes: either change makes the step stale.
    """

    table: str
    scope: Scope
    days: str = ""  # configuration key that holds the number of days
    column: str = ""
    optional: bool = False
    when: tuple[str, tuple[str, ...]] = ("", ())  # configuration key and the values for which this is read at all
    may_lack: tuple[str, str] = ("", "")  # configuration key and the value for which the slice need not be there


@dataclass(frozen=True)
class Step:
    """One step of the graph.

    Attributes:
        launcher: what starts it.
        uses: artifacts in force for the run date that it needs.
        writes: tables whose slice it replaces or appends to; the first one's commit decides whether it is done.
        also_writes: tables merged or appended to beside it, committed before.
        publishes: artifact that it trains.
        sections: configuration sections that shape its result.
        follows: upstream artifact -> lineage key that must match for the published artifact to stay in force.
        shaped_by: output -> the inputs that shape it, where that is not all of them: a re-run leaves an output alone
            whose own inputs are the same, so that what is built on it does not turn stale.
        idle_without: an input slice; when it is empty there is nothing to do and nothing to commit.
    """

    name: str
    launcher: Literal["spark", "deepspeed"]
    reads: tuple[Read, ...]
    writes: tuple[str, ...] = ()
    also_writes: tuple[str, ...] = ()
    uses: tuple[str, ...] = ()
    publishes: str = ""
    sections: tuple[str, ...] = ()
    follows: Mapping[str, str] = field(default_factory=dict)
    refresh: str = ""  # configuration key: days after which the artifact is trained anew
    idle_without: str = ""
    shaped_by: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def script(self) -> str:
        """Its entry point, relative to the project root."""
        return f"{'spark_jobs' if self.launcher == 'spark' else 'gpu_workers'}/{self.name}.py"


FITTED_ON_CLICKS = ("labels.calibrator.kind", ("platt", "isotonic", "logistic"))
COUNTS = ("labels.calibrator.kind", ("logistic",))
# Why an unexposed pair has no label: looked up, never a reason to build the feed again.
FOR_REASONS = ("user_sequences", "score_requests", "worker_rejects")
# Thresholds are judged when the feed is built; what they look at is no reason to build it again.
FOR_MONITORS = ("quarantine", "impressions", "candidates", "interactions")
FOR_REPORT = (
    "monitors", "impressions", "candidates", "interactions", "exposed_samples", "unexposed_samples", "user_sequences",
    "anchor_requests", "interest_anchors", "score_requests", "pair_scores", "item_stats", "user_stats",
    "item_sids", "items", "job_runs",
)  # fmt: skip

# Whose pairs are not labelled, and which items are no longer candidates: see spark_jobs/common/exclusions.py.
# A withdrawal reaches a date through its candidates, which `ingest` writes again.
EXCLUDED = (
    Read("raw_opt_outs", "as_of", column="opted_out_at", optional=True), Read("items", "lookup", optional=True)
)  # fmt: skip

STEPS: tuple[Step, ...] = (
    Step(
        "ingest", "spark",
        reads=(Read("raw_impressions", "slice"), Read("raw_candidates", "slice"),
               Read("raw_interactions", "slice", optional=True), Read("raw_items", "as_of", column="updated_at")),
        writes=("quarantine", "impressions", "candidates", "interactions"), also_writes=("items",),
        sections=("ingest", "feed.passthrough", "lakehouse.columns"),
        shaped_by={"impressions": ("raw_impressions", "raw_items"), "candidates": ("raw_candidates", "raw_items"),
                   "interactions": ("raw_interactions", "raw_impressions", "raw_items")},
    ),
    Step(
        "encode_items", "deepspeed",
        reads=(Read("items", "whole"),),
        writes=("item_embeddings",), also_writes=("worker_rejects",), sections=("encoder",),
    ),
    Step(
        "train_tokenizer", "deepspeed",
        reads=(Read("item_embeddings", "lookup"),),
        publishes="tokenizer", sections=("tokenizer", "run.seed", "encoder"), refresh="tokenizer.refresh_days",
    ),
    Step(
        "assign_sids", "deepspeed",
        reads=(Read("item_embeddings", "whole"),), uses=("tokenizer",),
        writes=("item_sids",), also_writes=("worker_rejects",),
    ),
    Step(
        "samples", "spark",
        reads=(Read("impressions", "window", days="samples.exposure_window_days"), Read("candidates", "slice"),
               *EXCLUDED),
        writes=("unexposed_samples", "exposed_samples"), sections=("samples", "run.seed", "feed.passthrough"),
    ),
    Step(
        "sequences", "spark",
        reads=(Read("interactions", "before", days="sequences.history_days"),
               Read("impressions", "before", days="sequences.stats_days"), Read("item_sids", "lookup")),
        uses=("tokenizer",), writes=("user_sequences", "item_stats", "user_stats"),
        sections=("sequences", "run.seed"),
    ),
    Step(
        "train_interest_model", "deepspeed",
        reads=(Read("user_sequences", "through"), Read("item_stats", "slice"), Read("item_sids", "lookup"),
               Read("item_embeddings", "lookup"), Read("items", "lookup", optional=True)),
        uses=("tokenizer",), publishes="interest_model", sections=("interest", "run.seed"),
        follows={"tokenizer": "sid_version"}, refresh="interest.refresh_days",
    ),
    Step(
        "anchor_requests", "spark",
        reads=(Read("exposed_samples", "slice"), Read("unexposed_samples", "slice"),
               Read("user_sequences", "through"), Read("interest_anchors", "lookup", optional=True), *EXCLUDED),
        uses=("tokenizer", "interest_model"), writes=("anchor_requests",),
        sections=("samples.scored_exposed_share", "anchors.count", "anchors.prefixes", "run.seed"),
    ),
    Step(
        "generate_anchors", "deepspeed",
        reads=(Read("anchor_requests", "slice"), Read("item_sids", "lookup"), Read("item_embeddings", "lookup"),
               Read("interest_anchors", "lookup", optional=True)),
        uses=("tokenizer", "interest_model"), writes=("interest_anchors",), also_writes=("worker_rejects",),
        sections=("anchors.count", "anchors.prefixes"), idle_without="anchor_requests",
    ),
    Step(
        "score_requests", "spark",
        reads=(Read("exposed_samples", "slice"), Read("unexposed_samples", "slice"), Read("anchor_requests", "slice"),
               Read("user_sequences", "through"), Read("interest_anchors", "lookup"), *EXCLUDED),
        uses=("tokenizer", "interest_model"), writes=("score_requests",),
        sections=("samples.scored_exposed_share", "labels.block_size", "anchors.count", "anchors.prefixes", "run.seed"),
    ),
    Step(
        "score_candidates", "deepspeed",
        reads=(Read("score_requests", "slice"), Read("item_embeddings", "lookup"), Read("item_sids", "lookup")),
        uses=("tokenizer", "interest_model"), writes=("pair_scores",), also_writes=("worker_rejects",),
        sections=("labels.item_vectors",),
    ),
    Step(
        "fit_calibrator", "spark",
        reads=(Read("pair_scores", "slice"),
               Read("pair_scores", "before", days="labels.calibrator.window_days", when=FITTED_ON_CLICKS),
               Read("impressions", "before", days="labels.calibrator.window_days", optional=True),
               Read("item_stats", "lookup", when=COUNTS), Read("user_stats", "lookup", when=COUNTS)),
        uses=("interest_model",), publishes="calibrator", sections=("labels.calibrator",),
        follows={"interest_model": "model_version"},
    ),
    Step(
        "pseudo_labels", "spark",
        reads=(Read("pair_scores", "slice"), Read("item_stats", "slice"), Read("user_stats", "slice"),
               Read("items", "lookup")),
        uses=("interest_model", "calibrator"), writes=("pseudo_labels",), sections=("labels.weights",),
    ),
    Step(
        "training_feed", "spark",
        reads=(Read("exposed_samples", "slice"), Read("unexposed_samples", "slice"),
               Read("pseudo_labels", "slice", may_lack=("feed.publish", "exposed_only_on_failure")),
               Read("item_sids", "lookup"), *(Read(t, "lookup", optional=True) for t in (*FOR_REASONS, *FOR_MONITORS))),
        uses=("tokenizer",), writes=("training_feed",), also_writes=("monitors",), sections=("feed",),
    ),
    Step(
        "train_preranker", "deepspeed",
        reads=(Read("training_feed", "window", days="prerank.train_days"),
               Read("impressions", "next", optional=True), Read("item_embeddings", "lookup"),
               Read("item_sids", "lookup")),
        uses=("tokenizer",), writes=("evaluations",), publishes="preranker", sections=("prerank",),
    ),
    Step(
        "report", "spark",
        reads=(Read("training_feed", "slice"), Read("pseudo_labels", "slice"), Read("quarantine", "slice"),
               Read("evaluations", "slice"), *(Read(t, "lookup", optional=True) for t in FOR_REPORT)),
        uses=("calibrator",),
    ),
)  # fmt: skip

RAW_TABLES = tuple(dict.fromkeys(r.table for s in STEPS for r in s.reads if load_contract(r.table).owner == "platform"))

# Beside the graph: judges a simulated marketplace. No step of the graph reads what it reads or writes.
JUDGE = Step(
    "evaluate_truth", "deepspeed",
    reads=(Read("truth", "slice"), Read("item_embeddings", "lookup"), Read("items", "lookup"),
           Read("item_sids", "lookup")),
    uses=("preranker",), writes=("truth_metrics",),
)  # fmt: skip

# Beside the graph too, done whenever they are asked for: compacts what Spark writes; runs ingest for repaired rows.
OPTIMIZE = Step("optimize", "spark", reads=())
RETRY = Step("retry_quarantine", "spark", reads=())

_BY_NAME = {step.name: step for step in (*STEPS, JUDGE, OPTIMIZE, RETRY)}

# Small tables of Spark steps whose rows the driver commits without Spark.
_WITHOUT_SPARK = ("monitors",)


def engine_of(table: str) -> Literal["spark", "delta-rs"]:
    """The one engine that commits to the log of our table `table`: the two do not agree about locks."""
    owner = _BY_NAME.get(load_contract(table).owner)
    by_spark = owner is not None and owner.launcher == "spark" and table not in _WITHOUT_SPARK
    return "spark" if by_spark else "delta-rs"


def find_step(name: str) -> Step:
    """The step called `name`; UsageError when there is none."""
    if name not in _BY_NAME:
        raise UsageError(f"no step '{name}'; the steps are {', '.join(_BY_NAME)}")
    return _BY_NAME[name]


@dataclass(frozen=True)
class StepState:
    """What the tables say about one step and date.

    Attributes:
        fingerprint: of the current inputs; empty when blocked.
        inputs: table -> {"version", "digest"} and artifact -> {"version"}.
        artifact_fingerprint: of what shapes the published artifact (without the day after).
        table_fingerprints: of outputs that not all inputs shape (`Step.shaped_by`).
        reason: one line for people.
    """

    status: Status
    reason: str
    fingerprint: str = ""
    inputs: Mapping[str, Mapping[str, str | int]] = field(default_factory=dict)
    artifact_fingerprint: str = ""
    table_fingerprints: Mapping[str, str] = field(default_factory=dict)

    def fingerprint_of(self, table: str) -> str:
        """What a commit to the output `table` carries: the step's fingerprint unless the table has one of its own."""
        return self.table_fingerprints.get(table, self.fingerprint)

    def may_run(self, *, force: bool) -> bool:
        """Whether the inputs are there; `force` also trains beside an artifact that was rolled back."""
        return self.status != "blocked" or (force and bool(self.fingerprint))

    def to_json(self) -> str:
        """As JSON text: what rank 0 sends to the other ranks."""
        return json.dumps(self.__dict__, sort_keys=True)

    @staticmethod
    def from_json(text: str) -> StepState:
        """The reverse of `to_json`."""
        return StepState(**json.loads(text))

    def version(self, name: str) -> int:
        """Pinned version of the input table `name`."""
        return int(self.inputs[name]["version"])


class Planner:
    """Evaluates steps against one lakehouse; pins each table once, so that one planner sees one state."""

    def __init__(self, config: Config):
        self.config = config
        self.lake = Lake.of(config.lakehouse)
        self.artifacts = ArtifactStore(config.lakehouse.root, self.lake, config.lakehouse.shadow)
        self._snapshots: dict[str, Snapshot | None] = {}
        self._marks: dict[str, dict[str, list[tuple[int, str]]]] = {}

    def snapshot(self, table: str) -> Snapshot | None:
        """The pinned snapshot of `table`, None when it does not exist."""
        if table not in self._snapshots:
            self._snapshots[table] = self.lake.open(table) if self.lake.exists(table) else None
        return self._snapshots[table]

    def borrowed(self, step: Step) -> list[str]:
        """Which outputs of `step` a shadow run only reads."""
        shadow = self.config.lakehouse.shadow
        return sorted({*shadow.tables, *shadow.artifacts} & {*step.writes, *step.also_writes, step.publishes})

    def state(self, step: Step, run_date: date) -> StepState:
        """Whether `step` is done for `run_date`, and from which inputs it would run."""
        if theirs := self.borrowed(step):
            return StepState("done", f"{', '.join(theirs)}: read from {self.config.lakehouse.shadow.of}")
        try:
            inputs = self._inputs(step, run_date, with_next=True)
        except MissingInputError as error:
            return StepState("blocked", str(error))
        fingerprint = self._hash(step, inputs)
        own_prints = {
            table: self._hash(step, {k: v for k, v in inputs.items() if k in shaping})
            for table, shaping in step.shaped_by.items()
        }
        artifact_fingerprint = ""
        if step.publishes:
            own = self._inputs(step, run_date, with_next=False)
            artifact_fingerprint = self._hash(step, own, run_date)
            status, reason = self._artifact_state(step, run_date, artifact_fingerprint)
            if status != "done" or not step.writes:
                return StepState(status, reason, fingerprint, inputs, artifact_fingerprint)
        if step in (OPTIMIZE, RETRY):
            status, reason = "stale", "done whenever it is asked for"
        elif step.name == "report":
            status, reason = self._report_state(run_date, fingerprint)
        elif step.idle_without and self._is_empty(step.idle_without, run_date):
            status, reason = "done", f"{step.idle_without} has no rows for {run_date}: nothing to do"
        else:
            status, reason = self._table_state(step, run_date, {t: own_prints.get(t, fingerprint) for t in step.writes})
            if status == "stale" and self._only_compacted(step, run_date, inputs):
                status, reason = "done", "the platform's tables were compacted since, no data changed"
        return StepState(status, reason, fingerprint, inputs, artifact_fingerprint, own_prints)

    # ---- inputs ------------------------------------------------------------------------------------------------

    def _inputs(self, step: Step, run_date: date, *, with_next: bool) -> dict[str, dict[str, str | int]]:
        inputs: dict[str, dict[str, str | int]] = {}
        for read in step.reads:
            if read.scope == "next" and not with_next:
                continue
            if read.when[0] and self._value(read.when[0]) not in read.when[1]:
                continue
            snapshot = self.snapshot(read.table)
            may_lack = bool(read.may_lack[0]) and self._value(read.may_lack[0]) == read.may_lack[1]
            if may_lack and run_date.isoformat() not in self._table_marks(read.table):
                continue  # the step goes on without; when the slice comes, so does its digest, and the step is stale
            owner_step = _BY_NAME.get(load_contract(read.table).owner)
            # A cache may lack this date's rows only where its step had nothing to do; else its reader would silently
            # find nothing.
            idle_without = owner_step.idle_without if owner_step and not read.optional else ""
            idle = bool(idle_without) and self._is_empty(idle_without, run_date)
            if snapshot is None:
                # Whoever names its place means it: a typing error must not let opt-outs go unseen.
                named = read.table in self.config.lakehouse.tables
                if (read.optional and not named) or idle:
                    continue
                owner = load_contract(read.table).owner
                raise MissingInputError(
                    f"step {step.name} needs table {read.table}, which does not exist at {self.lake.uri(read.table)}; "
                    + ("it is the platform's input" if owner == "platform" else f"run the step {owner} first")
                )
            entry = inputs.setdefault(read.table, {"version": snapshot.version})
            if read.scope != "lookup":
                files = self.files(snapshot, read, run_date)
                owned = owner_step is not None
                digest = snapshot.identity(files) if owned else digest_of(files)
                entry["digest"] = f"{entry['digest']}+{digest}" if "digest" in entry else digest
            if (read.scope == "slice" and owner_step is not None) or (idle_without and not idle):
                self._require_slice(step, snapshot, run_date)
        for kind in step.uses:
            inputs[f"artifact:{kind}"] = {"version": self.artifacts.in_force(kind, run_date).version}
        return inputs

    def _require_slice(self, step: Step, snapshot: Snapshot, run_date: date) -> None:
        name = snapshot.contract.name
        if run_date.isoformat() not in self._table_marks(name):
            raise MissingInputError(
                f"step {step.name} needs the slice dt={run_date} of {name}, which step {snapshot.contract.owner} "
                f"has not written; run {snapshot.contract.owner} for {run_date} first"
            )

    def files(self, snapshot: Snapshot, read: Read, run_date: date) -> tuple[DataFile, ...]:
        """The live files that `read` covers for `run_date`."""
        one = timedelta(days=1)
        if read.scope == "slice":
            return snapshot.select(start=run_date, end=run_date)
        if read.scope == "next":
            return snapshot.select(start=run_date + one, end=run_date + one)
        if read.scope == "before":
            return snapshot.select(start=run_date - self._days(read), end=run_date - one)
        if read.scope == "through":
            return snapshot.select(end=run_date)
        if read.scope == "window":
            return snapshot.select(start=run_date - self._days(read) + one, end=run_date)
        if read.scope == "as_of":
            return snapshot.select(before=(read.column, start_of(run_date + one)))
        return snapshot.files

    def _days(self, read: Read) -> timedelta:
        return timedelta(days=int(self._setting(read.days)))

    def _setting(self, key: str) -> int:
        value = self._value(key)
        assert isinstance(value, int)
        return value

    def _value(self, key: str) -> object:
        value: object = self.config
        for part in key.split("."):
            value = getattr(value, part)
        return value

    def _hash(self, step: Step, inputs: Mapping[str, Mapping[str, str | int]], run_date: date | None = None) -> str:
        nothing = digest_of(())
        body = {
            "step": step.name,
            # A look-up is never a reason to run again, nor is a table that comes to exist without rows in the scope.
            "inputs": {
                k: v["digest"] if "digest" in v else v["version"]
                for k, v in inputs.items()
                if k.startswith("artifact:") or v.get("digest", nothing) != nothing
            },
            "config": self.config.hash_of(*step.sections),
            "contracts": {t: load_contract(t).version for t in step.writes + step.also_writes},
            "run_date": run_date.isoformat() if run_date else "",
        }
        return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()[:24]

    # ---- outputs -----------------------------------------------------------------------------------------------

    def _table_marks(self, table: str) -> dict[str, list[tuple[int, str]]]:
        """slice -> (version, fingerprint) of the commits that wrote it, newest first."""
        if table not in self._marks:
            snapshot = self.snapshot(table)
            found: dict[str, list[tuple[int, str]]] = {}
            for version, mark in snapshot.marks() if snapshot else ():
                for name, fingerprint in mark.slices.items():
                    found.setdefault(name, []).append((version, fingerprint))
            self._marks[table] = found
        return self._marks[table]

    def is_current(self, table: str, run_date: date, fingerprint: str) -> bool:
        """Whether the newest commit to `table`'s slice of `run_date` carries `fingerprint`."""
        return [f for _, f in self._table_marks(table).get(run_date.isoformat(), [])][:1] == [fingerprint]

    def _table_state(self, step: Step, run_date: date, fingerprints: Mapping[str, str]) -> tuple[Status, str]:
        for table, fingerprint in fingerprints.items():
            dated = "dt" in load_contract(table).partition_by
            found = self._table_marks(table).get(run_date.isoformat() if dated else WHOLE)
            if not found:
                return "absent", f"{table} has no slice for {run_date}"
            # Tables without dates only grow: what an older commit added for these inputs is still there, though a
            # newer one (another date's tokenizer) came after it.
            if fingerprint not in {f for _, f in (found[:1] if dated else found)}:
                return "stale", f"{table}@{found[0][0]} was made from other inputs or settings"
        return "done", ", ".join(f"{t}@{s.version}" for t in step.writes if (s := self.snapshot(t)))

    def _only_compacted(
        self, step: Step, run_date: date, inputs: Mapping[str, Mapping[str, str | int]]
    ) -> bool:  # fmt: skip
        """Whether every output is current but for the platform's having regrouped its rows since it was read."""
        for table in step.writes:
            snapshot, name = self.snapshot(table), run_date.isoformat()
            newest = snapshot.mark(name) if snapshot is not None else None
            if newest is None:
                return False
            then = {k: v for k, v in inputs.items() if k in step.shaped_by.get(table, inputs)}
            for read in step.reads:
                since = newest[1].details.get("raw", {}).get(read.table)
                raw = self.snapshot(read.table)
                if read.table not in then or since is None or raw is None or since == raw.version:
                    continue
                if (before := raw.uncompacted(since)) is None:
                    return False
                digest = digest_of(self.files(before, read, run_date))
                then[read.table] = {**then[read.table], "digest": digest}
            if newest[1].slices[name] != self._hash(step, then):
                return False
        return True

    def _artifact_state(self, step: Step, run_date: date, fingerprint: str) -> tuple[Status, str]:
        manifest = self._own_artifact(step, run_date)
        made = artifact_version(trained_through(step, run_date), fingerprint)
        if self.artifacts.passed_by(step.publishes, made, self._limit(step, run_date)):
            # To run again would make that very version: an operator has decided to do without it.
            if manifest is not None and self._unlike(step, manifest, run_date) is None:
                return "done", f"{step.publishes} {manifest.version}; {made} was rolled back"
            return "blocked", (
                f"{step.publishes} {made}, which these inputs make, was rolled back and no other serves {run_date}; "
                "gpl promote one, change the settings, or run with --force"
            )
        if manifest is None:
            return "absent", f"no {step.publishes} was trained through a date before {self._limit(step, run_date)}"
        if manifest.config_hash != self.config.hash_of(*step.sections):
            return "stale", f"{step.publishes} {manifest.version} was made under other settings"
        if (unlike := self._unlike(step, manifest, run_date)) is not None:
            return "stale", unlike
        age = (trained_through(step, run_date) - manifest.trained_through).days
        if age == 0 and step.refresh != "tokenizer.refresh_days" and manifest.fingerprint != fingerprint:
            return "stale", f"{step.publishes} {manifest.version} was made from other inputs"
        refresh = self._setting(step.refresh) if step.refresh else 1
        if age >= refresh:
            return "stale", f"{step.publishes} {manifest.version} is {age} days old, refreshed every {refresh}"
        return "done", f"{step.publishes} {manifest.version}"

    def _unlike(self, step: Step, manifest: Manifest, run_date: date) -> str | None:
        """Which artifact in force `manifest` was not built on; None when all are its own."""
        for kind, key in step.follows.items():
            current = self.artifacts.in_force(kind, run_date).version
            if manifest.lineage.get(key) != current:
                return f"{step.publishes} {manifest.version} is of {key} {manifest.lineage.get(key)}, not {current}"
        return None

    def _own_artifact(self, step: Step, run_date: date) -> Manifest | None:
        return self.artifacts.in_force_or_none(step.publishes, self._limit(step, run_date))

    def _limit(self, step: Step, run_date: date) -> date:
        return trained_through(step, run_date) + timedelta(days=1)

    def _is_empty(self, table: str, run_date: date) -> bool:
        snapshot = self.snapshot(table)
        return snapshot is not None and not snapshot.select(start=run_date, end=run_date)

    def report_path(self, run_date: date) -> str:
        """Where the report of `run_date` lies."""
        return self.lake.path("reports", f"{run_date.isoformat()}.html")

    def _report_state(self, run_date: date, fingerprint: str) -> tuple[Status, str]:
        path = self.report_path(run_date)
        fs, local = filesystem(path)
        if not fs.exists(local):
            return "absent", f"no report at {path}"
        head = fs.cat_file(local, start=0, end=2000).decode(errors="replace")
        if f'name="gpl-fingerprint" content="{fingerprint}"' not in head:
            return "stale", f"{path} was made from other inputs"
        return "done", path


def trained_through(step: Step, run_date: date) -> date:
    """Last date whose events an artifact trained for `run_date` has seen.

    The pre-ranker trains on the feed of the run date itself; all others see only what lies before it.
    """
    return run_date if step.publishes == "preranker" else run_date - timedelta(days=1)


def start_of(day: date) -> datetime:
    """Midnight UTC at the start of `day`."""
    return datetime.combine(day, time(), UTC)
