"""`gpl summary`: what a run left behind, from the logs of the tables and the two small evaluation tables."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from datetime import date, timedelta
from statistics import fmean

from rich.table import Table

from gpl_core.commands.command import Command, console, figures_table, run_dates
from gpl_core.config import Config
from gpl_core.contracts.contract import all_contracts
from gpl_core.graph.arguments import add_dates
from gpl_core.graph.job_runs import newest_done
from gpl_core.graph.planner import Planner
from gpl_core.lakehouse.files import rows_in
from gpl_core.simulation.raw_tables import provenance

SHOWN = ("auc", "gauc")  # the rest is in table evaluations and in the report


def run(args: argparse.Namespace, config: Config) -> int:
    """Print rows per table, coverage and evaluations of the run dates; says so if the raw data are not real."""
    planner, dates, out = Planner(config), run_dates(args, config), console()
    if kind := provenance(planner.lake):
        out.print(f"Every figure below is {kind.split(' ')[0]}: the raw tables say '{kind}'.")
    out.print(_rows_table(planner, dates))
    for line in coverage(planner, dates):
        out.print(line)
    out.print(_evaluation_table(planner, dates[-1]))
    out.print(f"lakehouse: {config.lakehouse.root}", soft_wrap=True)
    out.print(f"report:    {planner.report_path(dates[-1])}", soft_wrap=True)
    return 0


def _slice_rows(planner: Planner, table: str, dates: Sequence[date]) -> int | None:
    snapshot = planner.snapshot(table)
    if snapshot is None:
        return None
    if "dt" not in snapshot.contract.partition_by:
        return rows_in(snapshot.files)
    return rows_in(snapshot.select(start=dates[0], end=dates[-1]))


def _rows_table(planner: Planner, dates: Sequence[date]) -> Table:
    table = figures_table(["table", "written by"], ["rows", "version"], title=f"rows, {dates[0]} to {dates[-1]}")
    for name, contract in all_contracts().items():
        rows = _slice_rows(planner, name, dates)
        snapshot = planner.snapshot(name)
        if rows is not None and snapshot is not None:
            table.add_row(name, contract.owner, f"{rows:,}", str(snapshot.version))
    return table


def coverage(planner: Planner, dates: Sequence[date]) -> list[str]:
    """One line each: quarantined rows, users with anchors, share of unexposed pairs labeled, alarms of monitors."""
    lines = [f"quarantined rows: {_slice_rows(planner, 'quarantine', dates) or 0:,} distinct"]
    for day in dates:
        run = newest_done(planner.lake, "score_requests", day)
        if run and "users" in (found := run["details"]):
            served = found["users"] - found["users_without_anchors"]
            lines.append(f"users with anchors, {day}: {served:,} of {found['users']:,} with pairs to score")
    unexposed = _slice_rows(planner, "unexposed_samples", dates)
    exposed = _slice_rows(planner, "exposed_samples", dates)
    feed = _slice_rows(planner, "training_feed", dates)
    if unexposed and exposed is not None and feed is not None:
        labeled = feed - exposed
        lines.append(f"unexposed pairs labeled: {labeled:,} of {unexposed:,} ({labeled / unexposed:.1%})")
    monitors = planner.snapshot("monitors")
    for day in dates:
        if monitors is None:
            break
        rows = monitors.read(monitors.select(start=day, end=day), ["status", "reason"]).to_pylist()
        lines += [f"monitor, {day}: {r['status']}: {r['reason']}" for r in rows if r["status"] in ("warn", "fail")]
    return lines


def _evaluation_table(planner: Planner, last: date) -> Table:
    """Variants side by side: the evaluation of the reference pre-ranker, then the simulated truth if it was judged."""
    values: dict[tuple[str, str], dict[str, list[float]]] = {}
    notes: dict[tuple[str, str, str], str] = {}
    following = last + timedelta(days=1)
    for name, day, suffix in (("evaluations", last, ""), ("truth_metrics", following, " (simulated truth)")):
        snapshot = planner.snapshot(name)
        rows = snapshot.read(snapshot.select(start=day, end=day)).to_pylist() if snapshot else []
        for row in rows:
            if row["metric"] not in SHOWN:
                continue
            key = (row["slice"] + suffix, row["metric"])
            by_model = values.setdefault(key, {}).setdefault(row["model"], [])
            if row["value"] is not None:
                by_model.append(row["value"])
            else:
                notes[*key, row["model"]] = f"absent: {row['note']}"
    models = sorted({model for by_model in values.values() for model in by_model})
    title = f"pre-ranker trained through {last}, judged on {following}"
    table = figures_table(["slice", "metric"], models, title)
    for key in sorted(values):
        cells = []
        for model in models:
            found = values[key].get(model)
            cells.append(f"{fmean(found):.4f}" if found else notes.get((*key, model), "-"))
        table.add_row(*key, *cells)
    return table


COMMAND = Command("summary", "rows per table, coverage and evaluation of the run dates", run, add_dates)
