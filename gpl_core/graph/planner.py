"""What the tables say about the graph: which step is done, absent, stale or blocked for a date.

A step's *fingerprint* hashes what its output depends on: the live files of the input slices, the versions of the
artifacts in force, the configuration sections that shape it and the contracts it writes. Commits carry it; a slice
whose newest commit carries the current fingerprint is done.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import date
from typing import Literal

from gpl_core.config import Config
from gpl_core.contracts.contract import load_contract
from gpl_core.errors import MissingInputError
from gpl_core.graph.steps import ONE_DAY, Read, Step, owner_step, start_of
from gpl_core.lakehouse.artifacts import ArtifactStore, Manifest, artifact_version
from gpl_core.lakehouse.files import DataFile, digest_of
from gpl_core.lakehouse.lake import Lake
from gpl_core.lakehouse.marks import WHOLE
from gpl_core.lakehouse.snapshot import Snapshot
from gpl_core.lakehouse.storage import filesystem

Status = Literal["done", "absent", "stale", "blocked"]


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
        if step.writes_page:
            status, reason = self._report_state(run_date, fingerprint)
        elif not step.writes:
            status, reason = "stale", "runs whenever it is asked for"
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
            if not read.when(self.config):
                continue
            snapshot = self.snapshot(read.table)
            if read.may_lack(self.config) and run_date.isoformat() not in self._table_marks(read.table):
                continue  # the step goes on without; when the slice comes, so does its digest, and the step is stale
            owner = owner_step(read.table)
            # A cache may lack this date's rows only where its step had nothing to do; else its reader would silently
            # find nothing.
            idle_without = owner.idle_without if owner and not read.optional else ""
            idle = bool(idle_without) and self._is_empty(idle_without, run_date)
            if snapshot is None:
                # Whoever names its place means it: a typing error must not let opt-outs go unseen.
                named = read.table in self.config.lakehouse.tables
                if (read.optional and not named) or idle:
                    continue
                raise MissingInputError(
                    f"step {step.name} needs table {read.table}, which does not exist at {self.lake.uri(read.table)}; "
                    + (f"run the step {owner.name} first" if owner else "it is the platform's input")
                )
            entry = inputs.setdefault(read.table, {"version": snapshot.version})
            if read.scope != "lookup":
                files = self.files(snapshot, read, run_date)
                digest = snapshot.identity(files) if owner else digest_of(files)
                entry["digest"] = f"{entry['digest']}+{digest}" if "digest" in entry else digest
            if (read.scope == "slice" and owner) or (idle_without and not idle):
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
        if read.scope == "as_of":
            return snapshot.select(before=(read.column, start_of(run_date + ONE_DAY)))
        start, end = read.span(self.config, run_date)
        return snapshot.select(start=start, end=end)

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
            "config": step.config_hash(self.config),
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
        made = artifact_version(step.trained_through(run_date), fingerprint)
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
        if manifest.config_hash != step.config_hash(self.config):
            return "stale", f"{step.publishes} {manifest.version} was made under other settings"
        if (unlike := self._unlike(step, manifest, run_date)) is not None:
            return "stale", unlike
        age = (step.trained_through(run_date) - manifest.trained_through).days
        if age == 0 and step.retrains_on_new_data and manifest.fingerprint != fingerprint:
            return "stale", f"{step.publishes} {manifest.version} was made from other inputs"
        if age >= (refresh := step.refresh(self.config)):
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
        return step.trained_through(run_date) + ONE_DAY

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
