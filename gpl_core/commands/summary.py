"""`gpl summary`: what a run left behind, from the tables' logs and the two small evaluation tables."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from datetime import date, timedelta
from typing import Any

import pyarrow as pa
from rich.console import Console
from rich.table import Table

from gpl_core.config import Config
from gpl_core.contracts.contract import all_contracts
from gpl_core.graph.planner import Planner
from gpl_core.lakehouse.files import rows_in
from gpl_core.lakehouse.lake import Lake

PROVENANCE = "gpl.provenance"
SHOWN = ("auc", "gauc")  # the rest is in table evaluations and in the report


def print_summary(config: Config, dates: Sequence[date], console: Console | None = None) -> None:
    """Print rows per table, coverage and evaluations of `dates`; figures from made-up data are named so."""
    console = console or Console(highlight=False, width=None if sys.stdout.isatty() else 120)
    planner = Planner(config)
    kind = provenance(planner.lake)
    if kind:
        console.print(f"Every figure below is {kind.split(' ')[0]}: the raw tables say '{kind}'.")
    console.print(_rows_table(planner, dates))
    for line in coverage(planner, dates):
        console.print(line)
    console.print(_evaluation_table(planner, dates[-1]))
    console.print(f"lakehouse: {config.lakehouse.root}", soft_wrap=True)
    console.print(f"report:    {planner.report_path(dates[-1])}", soft_wrap=True)


def provenance(lake: Lake) -> str:
    """What the raw tables say of their origin; empty when they are a platform's own."""
    if not lake.exists("raw_impressions"):
        return ""
    return lake.open("raw_impressions").properties.get(PROVENANCE, "")


def _slice_rows(planner: Planner, table: str, dates: Sequence[date]) -> int | None:
    snapshot = planner.snapshot(table)
    if snapshot is None:
        return None
    if "dt" not in snapshot.contract.partition_by:
        return rows_in(snapshot.files)
    return rows_in(snapshot.select(start=dates[0], end=dates[-1]))


def _rows_table(planner: Planner, dates: Sequence[date]) -> Table:
    table = Table("table", "written by", "rows", "version", title=f"rows, {dates[0]} to {dates[-1]}")
    for name, contract in all_contracts().items():
        rows = _slice_rows(planner, name, dates)
        snapshot = planner.snapshot(name)
        if rows is not None and snapshot is not None:
            table.add_row(name, contract.owner, f"{rows:,}", str(snapshot.version))
    for column in table.columns[2:]:
        column.justify = "right"
    return table


def coverage(planner: Planner, dates: Sequence[date]) -> list[str]:
    """One line each: quarantined rows, users with anchors, share of unexposed pairs labelled, alarms of monitors."""
    lines = [f"quarantined rows: {_slice_rows(planner, 'quarantine', dates) or 0:,} distinct"]
    for day in dates:
        found = _details(planner, "score_requests", day)
        if "users" in found:
            served = found["users"] - found["users_without_anchors"]
            lines.append(f"users with anchors, {day}: {served:,} of {found['users']:,} with pairs to score")
    unexposed = _slice_rows(planner, "unexposed_samples", dates)
    exposed = _slice_rows(planner, "exposed_samples", dates)
    feed = _slice_rows(planner, "training_feed", dates)
    if unexposed and exposed is not None and feed is not None:
        labelled = feed - exposed
        lines.append(f"unexposed pairs labelled: {labelled:,} of {unexposed:,} ({labelled / unexposed:.1%})")
    monitors = planner.snapshot("monitors")
    for day in dates:
        if monitors is None:
            break
        rows = monitors.read(monitors.select(start=day, end=day), ["status", "reason"]).to_pylist()
        lines += [f"monitor, {day}: {r['status']}: {r['reason']}" for r in rows if r["status"] in ("warn", "fail")]
    return lines


def _details(planner: Planner, step: str, day: date) -> dict[str, Any]:
    """What the newest finished run of `step` for `day` reported; empty when there is none."""
    snapshot = planner.snapshot("job_runs")
    if snapshot is None:
        return {}
    runs = snapshot.read(columns=["step", "run_date", "status", "started_at", "details"]).to_pylist()
    mine = [r for r in runs if (r["step"], r["run_date"], r["status"]) == (step, day, "done")]
    return json.loads(max(mine, key=lambda r: r["started_at"])["details"]) if mine else {}


def _evaluation_table(planner: Planner, last: date) -> Table:
    """Variants side by side: the reference pre-ranker's own evaluation, then the simulated truth when it was judged."""
    table = Table("slice", "metric", title=f"pre-ranker trained through {last}, judged on {last + timedelta(days=1)}")
    found: dict[tuple[str, str], dict[str, list[float]]] = {}
    notes: dict[tuple[str, str], dict[str, str]] = {}
    models: list[str] = []
    for name, day in (("evaluations", last), ("truth_metrics", last + timedelta(days=1))):
        snapshot = planner.snapshot(name)
        if snapshot is None:
            continue
        rows: pa.Table = snapshot.read(snapshot.select(start=day, end=day))
        for row in rows.to_pylist():
            if row["metric"] not in SHOWN:
                continue
            models += [row["model"]] if row["model"] not in models else []
            label = row["slice"] + (" (simulated truth)" if name == "truth_metrics" else "")
            key = (label, row["metric"])
            if row["value"] is not None:
                found.setdefault(key, {}).setdefault(row["model"], []).append(row["value"])
            else:
                found.setdefault(key, {})
                notes.setdefault(key, {})[row["model"]] = row["note"]
    for model in sorted(models):
        table.add_column(model, justify="right")
    for key in sorted(found):
        cells = []
        for model in sorted(models):
            values = found[key].get(model)
            note = notes.get(key, {}).get(model)
            cells.append(f"{sum(values) / len(values):.4f}" if values else f"absent: {note}" if note else "-")
        table.add_row(*key, *cells)
    return table
