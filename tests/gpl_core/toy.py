"""The whole graph over one-row tables: commits and publishes as real steps would, real marks, nothing computed.

Lets a test change one thing and read from the tables which steps notice.
"""

from __future__ import annotations

import html
import json
import tempfile
from collections.abc import Iterable, Mapping
from datetime import date
from pathlib import Path
from typing import Any

from gpl_core.config import Config
from gpl_core.contracts.contract import load_contract
from gpl_core.graph.origins import origin_of
from gpl_core.graph.planner import Planner, StepState
from gpl_core.graph.steps import RAW_TABLES, STEPS, find_step
from gpl_core.lakehouse.storage import write_whole
from tests.support import ONE, put

RAW = ("raw_impressions", "raw_candidates", "raw_interactions")
States = dict[tuple[str, date], str]


class Toy:
    """One lakehouse and one configuration; see the module. Each write makes `files` files of one row."""

    def __init__(self, config: Config, files: int = 1):
        self.config = config
        self.files = files
        self.seed = 0

    @property
    def planner(self) -> Planner:
        """A fresh view of the tables."""
        return Planner(self.config)

    def raw(self, days: Iterable[date]) -> None:
        """The platform's tables for `days`."""
        for day in days:
            for table in RAW:
                self.write(table, day)
        self.write("raw_items", next(iter(days)))

    def write(
        self, table: str, day: date, rows: int | None = None, *, step: str | None = None, fingerprint: str = "x",
        details: Mapping[str, Any] | None = None,
    ) -> None:  # fmt: skip
        """Rewrite one slice of `table` (or add to a table without dates) with new rows."""
        self.seed += 1
        appended = table in ("item_embeddings", "item_sids") or not load_contract(table).partition_by
        partition = {"model_version": "m"} if table == "interest_anchors" else {}
        put(
            self.planner.lake, table, self.files if rows is None else rows, day=day, step=step, fingerprint=fingerprint,
            seed=self.seed, partition=partition, mode="append" if appended else "overwrite", file_rows=1,
            details=details,
        )  # fmt: skip

    def state(self, step: str, day: date) -> StepState:
        return self.planner.state(find_step(step), day)

    def states(self, days: Iterable[date], steps: Iterable[str] = tuple(s.name for s in STEPS)) -> States:
        planner = self.planner
        return {(s, d): planner.state(find_step(s), d).status for d in days for s in steps}

    def not_done(self, days: Iterable[date]) -> States:
        return {key: status for key, status in self.states(days).items() if status != "done"}

    def run(self, name: str, day: date) -> None:
        """Commit and publish what step `name` would for `day`."""
        step, state = find_step(name), self.state(name, day)
        assert state.status != "blocked", state.reason
        planner = self.planner
        raw = {t: state.version(t) for t in RAW_TABLES if t in state.inputs}
        for table in (*step.also_writes, *step.writes):
            # As ingest does: an output whose own inputs are the same is left alone.
            current = table in step.shaped_by and planner.is_current(table, day, state.fingerprint_of(table))
            current = current or (table == "items" and planner.lake.exists("items"))  # no item is new after the first
            if table != "worker_rejects" and not current:
                slice_name = day.isoformat() if "dt" in load_contract(table).partition_by else "*"
                made = origin_of(step, self.config, state.inputs, table)
                origin = {**made, "inputs": {slice_name: made["inputs"]}}
                print_, details = state.fingerprint_of(table), {"origin": origin, **({"raw": raw} if raw else {})}
                self.write(table, day, step=name, fingerprint=print_, details=details)
        if step.publishes:
            self.publish(name, day, state)
        if name == "report":
            origin = html.escape(json.dumps(origin_of(step, self.config, state.inputs, "")))
            metas = {"gpl-fingerprint": state.fingerprint, "gpl-origin": origin}
            page = "".join(f'<meta name="{name}" content="{value}">' for name, value in metas.items())
            write_whole(self.planner.report_path(day), page.encode())

    def publish(self, name: str, day: date, state: StepState) -> None:
        """Publish the artifact of step `name` for `day`."""
        step, store = find_step(name), self.planner.artifacts
        with tempfile.TemporaryDirectory() as folder:
            Path(folder, "weights.json").write_text(str(self.seed))
            store.publish(
                step.publishes, Path(folder), trained_through=step.trained_through(day),
                fingerprint=state.artifact_fingerprint, config_hash=step.config_hash(self.config),
                lineage={key: store.in_force(kind, day).version for kind, key in step.follows.items()},
                saw=state.saw, origin=origin_of(step, self.config, state.inputs, step.publishes),
            )  # fmt: skip

    def run_pending(self, days: Iterable[date]) -> list[tuple[str, date]]:
        """Run step by step, each over all of `days`, as `gpl run` does; what was not done, in order."""
        ran = []
        for step in STEPS:
            span = [*days, max(days) + ONE] if step.name == "ingest" else days
            for day in span:
                if self.state(step.name, day).status != "done":
                    self.run(step.name, day)
                    ran.append((step.name, day))
        return ran
