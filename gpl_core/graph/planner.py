"""Derives the state of the graph from the tables: which step is done, absent, stale or blocked for a date.

A step's *fingerprint* hashes what its output depends on: the versions that last changed its input slices, the versions
of the artifacts in force, the settings that shape it and the contracts it writes. Commits carry it; a slice whose
newest commit carries the current fingerprint is done.
"""

import hashlib
import html
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import date
from functools import partial
from typing import Literal, Self

from deltalake.exceptions import DeltaError

from gpl_core.config import Config, hash_of
from gpl_core.contracts.contract import load_contract
from gpl_core.errors import GplError, MissingInputError
from gpl_core.graph.origins import Inputs, Origin, changes, identities, origin_of, shaping_inputs
from gpl_core.graph.steps import ONE_DAY, Read, Step, owner_step, start_of
from gpl_core.lakehouse.artifacts import ArtifactStore, Manifest, artifact_version
from gpl_core.lakehouse.files import DataFile, digest_of
from gpl_core.lakehouse.lake import Lake
from gpl_core.lakehouse.marks import WHOLE, SliceMark
from gpl_core.lakehouse.snapshot import Snapshot, absence, in_span
from gpl_core.lakehouse.storage import filesystem

Status = Literal["done", "absent", "stale", "blocked"]


@dataclass(frozen=True)
class StepState:
    """What the tables say about one step and date."""

    status: Status
    reason: str  # one line for people
    fingerprint: str = ""  # of the current inputs; empty when blocked
    inputs: Inputs = field(default_factory=dict)  # table -> {"version", "digest"} and artifact -> {"version"}
    artifact_fingerprint: str = ""  # of what shapes the published artifact (without the day after)
    table_fingerprints: Mapping[str, str] = field(default_factory=dict)  # of outputs shaped by some (`Step.shaped_by`)
    outputs: Mapping[str, int] = field(default_factory=dict)  # table it writes -> version this was decided on; -1: none
    saw: str = ""  # what `Step.sees` of the tables is known by, of a step that may keep its artifact

    def fingerprint_of(self, table: str) -> str:
        """What a commit to the output `table` carries: the step's fingerprint unless the table has one of its own."""
        return self.table_fingerprints.get(table, self.fingerprint)

    def may_run(self, *, force: bool) -> bool:
        """Whether the inputs are there; `force` also trains next to an artifact that was rolled back."""
        return self.status != "blocked" or (force and bool(self.fingerprint))

    def to_json(self) -> str:
        """As JSON text: what rank 0 sends to the other ranks."""
        return json.dumps(self.__dict__, sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """The reverse of `to_json`."""
        return cls(**json.loads(text))

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

    def snapshot(self, table: str) -> Snapshot | None:
        """The pinned snapshot of `table`, None when it does not exist."""
        if table not in self._snapshots:
            self._snapshots[table] = self.lake.find(table)
        return self._snapshots[table]

    def read_only_outputs(self, step: Step) -> list[str]:
        """Which outputs of `step` a shadow run reads from another lakehouse, and never writes."""
        shadow = self.config.lakehouse.shadow
        return sorted({*shadow.tables, *shadow.artifacts} & {*step.writes, *step.also_writes, step.publishes})

    def index_outputs(self, step: Step) -> None:
        """Bring the indexes of what `step` writes up to date: a killed run, or another engine, has not done it."""
        if not self.read_only_outputs(step):
            for table in (*step.writes, *step.also_writes):
                if (snapshot := self.snapshot(table)) is not None:
                    snapshot.index()

    def state(self, step: Step, run_date: date) -> StepState:
        """Whether `step` is done for `run_date`, and from which inputs it would run."""
        if theirs := self.read_only_outputs(step):
            return StepState("done", f"{', '.join(theirs)}: read from {self.config.lakehouse.shadow.of}")
        # Pinned before anything is decided: a run commits only on top of what it decided on.
        pinned = {table: self.snapshot(table) for table in (*step.writes, *step.also_writes)}
        try:
            inputs = self._inputs(step, run_date)
        except MissingInputError as error:
            return StepState("blocked", str(error))
        state = StepState(
            "stale", "runs whenever it is asked for", self._hash(step, inputs), inputs,
            outputs={table: snapshot.version if snapshot else -1 for table, snapshot in pinned.items()},
            table_fingerprints={
                table: self._hash(step, shaping_inputs(step, inputs, table)) for table in step.shaped_by
            },
        )  # fmt: skip
        if step.publishes:
            own = shaping_inputs(step, inputs, step.publishes)
            state = replace(
                state, artifact_fingerprint=self._hash(step, own, run_date), saw=self._sight(step, run_date)
            )
            status, reason = self._artifact_state(step, run_date, state)
            if status != "done" or not step.writes:
                return replace(state, status=status, reason=reason)
        if step.writes_page:
            status, reason = self._report_state(step, run_date, state)
        elif step.idle_without and self._is_empty(step.idle_without, run_date):
            status, reason = "done", f"{step.idle_without} has no rows for {run_date}: nothing to do"
        elif step.writes:
            status, reason = self._table_state(step, run_date, state)
        else:
            return state
        return replace(state, status=status, reason=reason)

    # ---- inputs ------------------------------------------------------------------------------------------------

    def _inputs(self, step: Step, run_date: date) -> dict[str, dict[str, str | int]]:
        inputs: dict[str, dict[str, str | int]] = {}
        for read in step.reads:
            if not read.when(self.config):
                continue
            snapshot, written = self.snapshot(read.table), partial(self._is_written, read.table, run_date)
            if read.may_lack(self.config) and not written():
                continue  # the step goes on without; when the slice comes, so does its digest, and the step is stale
            owner = owner_step(read.table)
            # A cache may lack this date's rows only where its step had nothing to do; otherwise its reader would
            # silently find nothing.
            cached = bool(owner and owner.idle_without and not read.optional)
            idle = cached and owner is not None and self._is_empty(owner.idle_without, run_date)
            if snapshot is None:
                # A location that is configured is meant: a typo must not let opt-outs go unseen.
                named = read.table in self.config.lakehouse.tables
                if (read.optional and not named) or idle:
                    continue
                missing = absence(load_contract(read.table), self.lake.uri(read.table))
                raise MissingInputError(f"step {step.name} needs table {read.table}, but {missing}")
            entry = inputs.setdefault(read.table, {"version": snapshot.version})
            if read.scope != "lookup":
                digest = self._digest(read, snapshot, run_date)
                entry["digest"] = "+".join(filter(None, (str(entry.get("digest", "")), digest)))
            if owner and (refused := in_span(snapshot.history.refused, *read.span(self.config, run_date))):
                raise MissingInputError(
                    f"step {step.name} reads the slice dt={min(refused)} of {read.table}, which the run of step "
                    f"{owner.name} that wrote it has refused; run {owner.name} for {min(refused)} first"
                )
            if owner and (read.scope == "slice" or (cached and not idle)) and not written():
                raise MissingInputError(
                    f"step {step.name} needs the slice dt={run_date} of {read.table}, which step {owner.name} has not "
                    f"written; run {owner.name} for {run_date} first"
                )
            # The cache is no part of the fingerprint: what it lacks now would be missing for good.
            if owner and cached and not idle and (found := self.state(owner, run_date)).status != "done":
                raise MissingInputError(
                    f"step {step.name} needs what step {owner.name} generates for {run_date}: {found.reason}; run "
                    f"{owner.name} for {run_date} first"
                )
        for kind in step.uses:
            inputs[f"artifact:{kind}"] = {"version": self.artifacts.in_force(kind, run_date).version}
        return inputs

    def _digest(self, read: Read, snapshot: Snapshot, run_date: date) -> str:
        """What the rows in the scope of `read` are known by; "" when there are none.

        Our tables: by the newest commits that changed them. The platform's, whose logs may be of any length: by their
        live files, see `_before_compaction`.
        """
        if owner_step(read.table):
            return snapshot.identity(*read.span(self.config, run_date))
        return digest_of(self.files(snapshot, read, run_date))

    def files(self, snapshot: Snapshot, read: Read, run_date: date) -> tuple[DataFile, ...]:
        """The live files that `read` covers for `run_date`."""
        if read.scope == "as_of":
            return snapshot.select(before=(read.column, start_of(run_date + ONE_DAY)))
        start, end = read.span(self.config, run_date)
        return snapshot.select(start=start, end=end, undated=run_date <= self.config.run.first_date)

    def _hash(self, step: Step, inputs: Inputs, run_date: date | None = None) -> str:
        body = {
            "step": step.name,
            "inputs": identities(inputs),
            "config": step.config_hash(self.config),
            "contracts": {t: load_contract(t).version for t in step.writes + step.also_writes},
            "run_date": run_date.isoformat() if run_date else "",
        }
        return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()[:24]

    def _sight(self, step: Step, run_date: date) -> str:
        """What training for `run_date` sees is known by; "" when that is not comparable."""
        if not step.sees:
            return ""
        made_from: dict[str, object] = {}
        if table := step.sees_made_from:
            snapshot = self.snapshot(table)
            newest = snapshot.mark(run_date.isoformat()) if snapshot else None
            if newest is None or not newest[1].details.keys() >= {"events", "settings", "sid_version"}:
                return ""
            made_from = {name: newest[1].details[name] for name in ("settings", "sid_version")}
            made_from["events"] = {day: rows for day, rows in newest[1].details["events"].items() if rows}
        seen = {name: found.identity() for name in step.sees if (found := self.snapshot(name))}
        return hash_of([seen, made_from])

    def _is_empty(self, table: str, run_date: date) -> bool:
        snapshot = self.snapshot(table)
        return snapshot is not None and not snapshot.select(start=run_date, end=run_date)

    # ---- outputs -----------------------------------------------------------------------------------------------

    def _is_written(self, table: str, run_date: date) -> bool:
        """Whether the slice was written, and stands: what its own run refused does not."""
        snapshot = self.snapshot(table)
        if snapshot is None or run_date.isoformat() in snapshot.history.refused:
            return False
        return bool(snapshot.history.fingerprints(run_date.isoformat()))

    def _slice_marks(self, table: str, run_date: date) -> list[tuple[int, str]]:
        """(version, fingerprint) of the commits that wrote the slice of `run_date`, newest first.

        Of a dated table the newest alone counts. A table without dates only grows: what an older commit added for its
        inputs is still there, though a newer one (another date's tokenizer) came after it.
        """
        dated, snapshot = "dt" in load_contract(table).partition_by, self.snapshot(table)
        found = snapshot.history.fingerprints(run_date.isoformat() if dated else WHOLE) if snapshot else []
        return found[:1] if dated else found

    def is_current(self, table: str, run_date: date, fingerprint: str) -> bool:
        """Whether `table`'s slice of `run_date` has been made from the inputs with `fingerprint`."""
        return fingerprint in {f for _, f in self._slice_marks(table, run_date)}

    def _table_state(self, step: Step, run_date: date, state: StepState) -> tuple[Status, str]:
        compacted = ""
        for table in step.writes:
            found = self._slice_marks(table, run_date)
            if not found:
                return "absent", f"{table} has no slice for {run_date}"
            if self.is_current(table, run_date, state.fingerprint_of(table)):
                continue
            mark = self._newest_mark(table, run_date)
            if why := mark.details.get("refused"):
                return "stale", f"{table}@{found[0][0]} was refused by run {mark.run_id} ({why}): see job_runs"
            inputs = self._before_compaction(step, table, run_date, state.inputs, mark.details.get("raw", {}))
            (name,) = mark.slices.keys() & {run_date.isoformat(), WHOLE}
            if mark.slices[name] != self._hash(step, inputs):
                then = dict(mark.details.get("origin", {}))  # none of an earlier release
                if then:
                    then["inputs"] = then["inputs"][name]
                return "stale", f"{table}@{found[0][0]} {_because(then, origin_of(step, self.config, inputs, table))}"
            compacted = "; the platform's tables were compacted since, no rows changed"
        return "done", ", ".join(f"{t}@{s.version}" for t in step.writes if (s := self.snapshot(t))) + compacted

    def _newest_mark(self, table: str, run_date: date) -> SliceMark:
        snapshot, dated = self.snapshot(table), "dt" in load_contract(table).partition_by
        newest = snapshot.mark(run_date.isoformat() if dated else WHOLE) if snapshot is not None else None
        assert newest is not None, f"{table} has no slice for {run_date}"
        return newest[1]

    def _before_compaction(
        self, step: Step, table: str, run_date: date, inputs: Inputs, versions: Mapping[str, int]
    ) -> dict[str, dict[str, str | int]]:
        """The inputs of `table`, those of the platform that it has only compacted as they were when they were read.

        versions: raw table -> version that was read.
        """
        then = {k: dict(v) for k, v in shaping_inputs(step, inputs, table).items()}
        for read in step.reads:
            version, raw = versions.get(read.table), self.snapshot(read.table)
            if version is None or raw is None or read.scope == "lookup" or read.table not in then:
                continue
            try:
                if in_span(raw.changes_since(version), *read.span(self.config, run_date)):
                    continue
                then[read.table]["digest"] = self._digest(read, self.lake.open(read.table, version), run_date)
            except (GplError, DeltaError, OSError):
                continue  # its log has been cleaned of that version
        return then

    def _artifact_state(self, step: Step, run_date: date, state: StepState) -> tuple[Status, str]:
        through, kind = step.trained_through(run_date), step.publishes
        fingerprint, limit = state.artifact_fingerprint, through + ONE_DAY
        manifest = self.artifacts.in_force_or_none(kind, limit)
        mismatch = _mismatch(step, manifest, state.inputs) if manifest else ""
        made = artifact_version(through, fingerprint)
        if self.artifacts.rolled_back(kind, made, limit):
            # To run again would make that very version: an operator has decided to do without it.
            if manifest is not None and not mismatch:
                return "done", f"{kind} {manifest.version}; {made} was rolled back"
            return "blocked", (
                f"{kind} {made}, which these inputs make, was rolled back and no other serves {run_date}; "
                "gpl promote one, change the settings, or run with --force"
            )
        if manifest is None:
            return "absent", f"no {kind} was trained through a date before {limit}"
        if manifest.config_hash != step.config_hash(self.config):
            now = origin_of(step, self.config, state.inputs, kind)
            return "stale", f"{kind} {manifest.version} {_because(manifest.origin, now, 'settings')}"
        if mismatch:
            return "stale", mismatch
        age = (through - manifest.trained_through).days
        if age == 0 and step.retrains_on_new_data and manifest.fingerprint != fingerprint:
            now = origin_of(step, self.config, state.inputs, kind)
            return "stale", f"{kind} {manifest.version} {_because(manifest.origin, now)}"
        if age >= (refresh := step.refresh(self.config)):
            if manifest.saw and manifest.saw == state.saw:
                seen = ", ".join(filter(None, (*step.sees, step.sees_made_from and "events")))
                return "done", f"{kind} {manifest.version}, kept after {age} days: it would see the same {seen}"
            return "stale", f"{kind} {manifest.version} is {age} days old, refreshed every {refresh}"
        return "done", f"{kind} {manifest.version}"

    def report_path(self, run_date: date) -> str:
        """Where the report of `run_date` lies."""
        return self.lake.path("reports", f"{run_date.isoformat()}.html")

    def _report_state(self, step: Step, run_date: date, state: StepState) -> tuple[Status, str]:
        path = self.report_path(run_date)
        fs, local = filesystem(path)
        if not fs.exists(local):
            return "absent", f"no report at {path}"
        head = fs.cat_file(local, start=0, end=2000).decode(errors="replace")
        if f'name="gpl-fingerprint" content="{state.fingerprint}"' not in head:
            kept = re.search(r'name="gpl-origin" content="([^"]*)"', head)
            then = json.loads(html.unescape(kept[1])) if kept else None
            return "stale", f"{path} {_because(then, origin_of(step, self.config, state.inputs, ''))}"
        return "done", path


def _because(then: Origin | None, now: Origin, *parts: str) -> str:
    """What has changed since something was made of `then`."""
    if not then:  # of an earlier release
        return "was made from other inputs or settings"
    what = changes(then, now, *(parts or ("inputs", "settings")))
    return f"is out of date: {what or 'a contract of its step has another version'}"


def _mismatch(step: Step, manifest: Manifest, inputs: Inputs) -> str:
    """Which artifact of `inputs` the artifact `manifest` was not built on; "" when it was built on all of them."""
    for kind, key in step.follows.items():
        current = inputs[f"artifact:{kind}"]["version"]
        if manifest.lineage.get(key) != current:
            return f"{step.publishes} {manifest.version} is of {key} {manifest.lineage.get(key)}, not {current}"
    return ""
