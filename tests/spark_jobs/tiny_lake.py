"""A lakehouse of a few hand-made rows: raw tables as a platform writes them, and steps run in the shared session."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable, Sequence
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any, Self

import pyarrow as pa
from deltalake import write_deltalake
from pyspark.sql import SparkSession

from gpl_core.config import Config, load_config, with_passthrough
from gpl_core.contracts.contract import load_contract
from gpl_core.graph.arguments import StepArguments
from gpl_core.graph.planner import Planner
from gpl_core.graph.step_run import StepContext, run_step
from gpl_core.graph.steps import find_step
from gpl_core.lakehouse.artifacts import Manifest
from gpl_core.lakehouse.lake import Lake
from gpl_core.lakehouse.marks import SliceMark
from spark_jobs.run import run_body
from spark_jobs.step import SparkStep

D = date(2026, 1, 10)
SETTINGS = (
    "run.start_date=2026-01-10", "run.end_date=2026-01-12", "run.history_start=null", "sequences.max_length=4",
    "anchors.count=2", "anchors.prefixes=1",
    "labels.block_size=3", "samples.unexposed_per_request=4", "ingest.max_quarantine_share=1.0",
    "monitors.ignore=[label_drift, coverage, quarantine_share, anchors_per_user, calibration_error]",
)  # fmt: skip


# As in production, where nothing is small enough to broadcast: what a plan then looks like is tested.
PRODUCTION = {
    "spark.sql.autoBroadcastJoinThreshold": -1, "spark.sql.adaptive.enabled": True, "spark.sql.shuffle.partitions": 2,
}  # fmt: skip


def day(offset: int) -> date:
    """D + offset."""
    return D + timedelta(days=offset)


def at(offset: int, hour: float = 12.0) -> datetime:
    """A time on D + offset."""
    return datetime(D.year, D.month, D.day, tzinfo=UTC) + timedelta(days=offset, hours=hour)


class TinyLake:
    """The lakehouse at `root` with the quickstart's settings, made smaller."""

    def __init__(self, root: Path, spark: SparkSession, *overrides: str):
        self.root = root
        self.spark = spark
        self.lake = Lake(str(root))
        self.overrides = overrides

    def config(self, *overrides: str) -> Config:
        """The configuration in use."""
        return load_config("quickstart", [f"lakehouse.root={self.root}", *SETTINGS, *self.overrides, *overrides])

    def copied(self, root: Path) -> Self:
        """The same lakehouse under another root, as far as it has got: logs and fingerprints name no absolute path."""
        shutil.copytree(self.root, root, dirs_exist_ok=True)
        made = copy.copy(self)
        made.root, made.lake = root, Lake(str(root))
        return made

    # ---- writing ----

    def items(self, *rows: dict[str, Any]) -> None:
        """Append rows to raw_items; `updated_at` defaults to the day before D."""
        full = [{"updated_at": at(-1), "title": f"title of {r['item_id']}", **r} for r in rows]
        self.raw("raw_items", full)

    def impressions(self, *rows: tuple, dt: date = D) -> None:
        """Rows (request, user, item, clicked[, hour[, is_random]]) of raw_impressions."""
        full = []
        for position, row in enumerate(rows):
            request, user, item, clicked, hour, is_random = (*row, *(12.0, False)[len(row) - 4 :])
            full.append({
                "request_id": request, "item_id": item, "user_id": user, "event_time": at((dt - D).days, hour),
                "position": position, "clicked": clicked, "is_random": is_random, "dt": dt,
            })  # fmt: skip
        self.raw("raw_impressions", full, dt)

    def candidates(self, *rows: tuple, dt: date = D) -> None:
        """Rows (request, user, item[, channel[, score[, hour]]]) of raw_candidates."""
        full = []
        for row in rows:
            request, user, item, channel, score, hour = (*row, *("two_tower", 0.5, 12.0)[len(row) - 3 :])
            full.append({
                "request_id": request, "item_id": item, "user_id": user, "event_time": at((dt - D).days, hour),
                "channel": channel, "recall_score": score, "dt": dt,
            })  # fmt: skip
        self.raw("raw_candidates", full, dt)

    def interactions(self, *rows: tuple, dt: date = D) -> None:
        """Rows (user, item, hour[, kind]) of raw_interactions."""
        full = []
        for row in rows:
            user, item, hour, kind = (*row, *("purchase",)[len(row) - 3 :])
            full.append({
                "user_id": user, "item_id": item, "event_time": at((dt - D).days, hour), "kind": kind, "dt": dt,
            })  # fmt: skip
        self.raw("raw_interactions", full, dt)

    def opt_outs(self, *rows: tuple[str, datetime | None]) -> None:
        """Rows (user, time) of raw_opt_outs."""
        self.raw("raw_opt_outs", [{"user_id": user, "opted_out_at": time} for user, time in rows])

    def raw(
        self, table: str, rows: Sequence[dict[str, Any]], dt: date | None = None, schema: pa.Schema | None = None
    ) -> None:
        """Append to a raw table as a platform would: no contract, no checks, no properties."""
        schema = schema or load_contract(table).arrow_schema()
        schema = pa.schema([pa.field(f.name, f.type) for f in schema])
        data = pa.Table.from_pylist(list(rows), schema=schema)
        write_deltalake(
            self.lake.uri(table), data, mode="append", partition_by=None if dt is None else ["dt"]
        )  # fmt: skip

    def replace_raw(self, table: str, dt: date, rows: Sequence[dict[str, Any]]) -> None:
        """Replace one slice of a raw table."""
        schema = pa.schema([pa.field(f.name, f.type) for f in load_contract(table).arrow_schema()])
        data = pa.Table.from_pylist(list(rows), schema=schema)
        write_deltalake(
            self.lake.uri(table), data, mode="overwrite", partition_by=["dt"], predicate=f"dt = '{dt.isoformat()}'"
        )

    def table(self, name: str, rows: Sequence[dict[str, Any]], fingerprint: str = "", **partition: str) -> None:
        """Replace one partition of a table that another step owns, marked as that step would (fingerprint: as done)."""
        config = self.config()
        passes = name in ("exposed_samples", "unexposed_samples")
        contract = with_passthrough(name, config) if passes else load_contract(name)
        self.lake.create(contract)
        with self.lake.writer(contract, partition, dims=config.dims()) as writer:
            if rows:
                writer.write(pa.Table.from_pylist(list(rows), schema=contract.arrow_schema(partitions=False)))
        mark = SliceMark(contract.owner, {partition.get("dt", "*"): fingerprint or f"{len(rows)}"}, "test")
        self.lake.commit(contract, writer.parts, mark=mark, mode="overwrite", partition=partition)

    def answers(self, rows: Sequence[dict[str, Any]], model: str) -> None:
        """What generate_anchors adds to the cache for the requests of D, marked as done."""
        for name, partition in (("item_sids", {"sid_version": "v1"}), ("item_embeddings", {"encoder_version": "v1"})):
            if not self.lake.exists(name):
                self.table(name, [], **partition)
        state = Planner(self.config()).state(find_step("generate_anchors"), D)
        self.table("interest_anchors", rows, state.fingerprint, model_version=model, dt=D.isoformat())

    def artifact(self, kind: str, through: date, lineage: dict[str, str] | None = None, body: str = "{}") -> Manifest:
        """Publish a bundle of one JSON file."""
        folder = self.root / "made" / kind
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{kind}.json").write_text(body)
        return Planner(self.config()).artifacts.publish(
            kind, folder, trained_through=through, fingerprint=f"{kind}{json.dumps(lineage)}".encode().hex()[:24],
            config_hash="test", lineage=lineage or {},
        )  # fmt: skip

    # ---- running and reading ----

    def run(
        self, name: str, job: Callable[[SparkStep], None], on: date = D, *overrides: str, force: bool = False,
        dates: tuple[date, ...] = (),
    ) -> str:  # fmt: skip
        """Run one step as its entry point does; returns done or noop."""
        config = self.config(*overrides)
        args = StepArguments(config, dates or (on,), "test-run", force=force)

        def body(context: StepContext) -> None:
            self.context = context
            run_body(self.spark, context, job)

        return run_step(Planner(config), name, dates or on, args, body)

    def rows(self, table: str, *columns: str, dt: date | None = None) -> list[tuple]:
        """Rows of a table, sorted, lists as tuples."""
        snapshot = self.lake.open(table)
        files = snapshot.files if dt is None else snapshot.select(start=dt, end=dt)
        found = snapshot.read(files, list(columns) or None).to_pylist()
        plain = [tuple(_plain(row[c]) for c in (columns or row)) for row in found]
        return sorted(plain, key=repr)

    def version(self, table: str) -> int:
        """The table's version."""
        return self.lake.open(table).version


def _plain(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(_plain(v) for v in value)
    if isinstance(value, dict):
        return tuple((k, _plain(v)) for k, v in value.items())
    return value
