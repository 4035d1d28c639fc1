"""`gpl summary`: what a run left behind, from the logs of the tables and the two small evaluation tables."""

import argparse
from collections import defaultdict
from collections.abc import Sequence
from datetime import date
from statistics import fmean
from typing import Any

from rich.table import Table

from gpl_core.commands.command import Command, figures_table, run_dates
from gpl_core.config import Config
from gpl_core.contracts.contract import all_contracts
from gpl_core.errors import MissingInputError
from gpl_core.graph.arguments import add_dates
from gpl_core.graph.job_runs import newest_done
from gpl_core.graph.planner import Planner
from gpl_core.graph.steps import ONE_DAY
from gpl_core.graph.terminal import console
from gpl_core.lakehouse.files import rows_in
from gpl_core.lakehouse.snapshot import Snapshot
from gpl_core.prerank.comparison import absences, too_small
from gpl_core.simulation.raw_tables import provenance

SHOWN = ("auc", "gauc")  # the rest is in table evaluations and in the report


def run(args: argparse.Namespace, config: Config) -> int:
    """Print rows per table, coverage and evaluations of the run dates; says so if the raw data are not real."""
    planner, dates, out = Planner(config), run_dates(args, config), console()
    if not any(planner.snapshot(name) for name in all_contracts()):
        raise MissingInputError(f"{config.lakehouse.root} has no tables yet; gpl run creates them")
    if kind := provenance(planner.lake):
        out.print(f"Every figure below is {kind.split(' ')[0]}: the raw tables say '{kind}'.")
    out.print(_rows_table(planner, dates))
    for line in coverage(planner, dates):
        out.print(line)
    judged = _evaluations(planner, dates[-1])
    out.print(_evaluation_table(judged, dates[-1]))
    for line in absences(judged):
        out.print(line)
    out.print(f"lakehouse: {config.lakehouse.root}", soft_wrap=True)
    out.print(f"report:    {planner.lake.path('reports', 'index.html')}", soft_wrap=True)
    return 0


def _rows_of(snapshot: Snapshot, dates: Sequence[date]) -> int:
    dated = "dt" in snapshot.contract.partition_by
    return rows_in(snapshot.select(start=dates[0], end=dates[-1]) if dated else snapshot.files)


def _rows_table(planner: Planner, dates: Sequence[date]) -> Table:
    table = figures_table(["table", "written by"], ["rows", "version"], title=f"rows, {dates[0]} to {dates[-1]}")
    for name, contract in all_contracts().items():
        if name == "truth_metrics":  # of the days after; its figures stand below
            continue
        if snapshot := planner.snapshot(name):
            rows = _rows_of(snapshot, dates)
            table.add_row(name, contract.owner, f"{rows:,}" if rows >= 0 else "unknown", str(snapshot.version))
    return table


def coverage(planner: Planner, dates: Sequence[date]) -> list[str]:
    """One line each: quarantined rows, users with anchors, share of unexposed pairs labeled, alarms of monitors."""
    tables = ("quarantine", "unexposed_samples", "exposed_samples", "training_feed")
    rows = {t: _rows_of(snapshot, dates) for t in tables if (snapshot := planner.snapshot(t))}
    lines = [f"quarantined rows: {rows.get('quarantine', 0):,} distinct"]
    for day in dates:
        run = newest_done(planner.lake, "score_requests", day)
        if run and "users" in (details := run["details"]):
            served = details["users"] - details["users_without_anchors"]
            lines.append(f"users with anchors, {day}: {served:,} of {details['users']:,} with pairs to score")
    if rows.keys() >= {"exposed_samples", "training_feed"} and (unexposed := rows.get("unexposed_samples")):
        labeled = rows["training_feed"] - rows["exposed_samples"]
        lines.append(f"unexposed pairs labeled: {labeled:,} of {unexposed:,} ({labeled / unexposed:.1%})")
    published, monitors = planner.snapshot("training_feed"), planner.snapshot("monitors")
    for day in dates:
        marked = published.mark(day.isoformat(), "training_feed") if published else None
        completeness = marked[1].details.get("completeness", {}) if marked else {}
        if because := completeness.get("because"):
            lines.append(f"training_feed, {day}: {completeness['rows']}: {because}")
        files = monitors.select(start=day, end=day) if monitors else ()
        found = monitors.read(files, ["status", "reason"]).to_pylist() if monitors else []
        lines += [f"monitor, {day}: {r['status']}: {r['reason']}" for r in found if r["status"] in ("warn", "fail")]
    return lines


def _evaluations(planner: Planner, last: date) -> list[dict[str, Any]]:
    """Figures of the reference pre-ranker, and by the simulated truth if it was judged by that."""
    found: list[dict[str, Any]] = []
    for name, day, suffix in (("evaluations", last, ""), ("truth_metrics", last + ONE_DAY, " (simulated truth)")):
        snapshot = planner.snapshot(name)
        rows = snapshot.read(snapshot.select(start=day, end=day)).to_pylist() if snapshot else []
        shown = [row for row in rows if row["metric"] in SHOWN and not row.get("against")]
        found += [{**row, "slice": row["slice"] + suffix} for row in shown]
    return found


def _evaluation_table(rows: Sequence[dict[str, Any]], last: date) -> Table:
    """Variants side by side."""
    found: defaultdict[tuple[str, str, str], list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        found[row["slice"], row["metric"], row["model"]].append(row)
    models = sorted({model for *_, model in found})
    table = figures_table(["slice", "metric"], models, f"pre-ranker trained through {last}, judged on {last + ONE_DAY}")
    small = {part: too_small([r for (p, *_), rows in found.items() if p == part for r in rows]) for part, *_ in found}
    for part, metric in sorted({key[:2] for key in found}, key=lambda key: (bool(small[key[0]]), key)):
        name = f"{part} ({small[part]})" if small[part] else part
        table.add_row(name, metric, *(_cell(found.get((part, metric, model), [])) for model in models))
    return table


def _cell(rows: Sequence[dict[str, Any]]) -> str:
    """The mean over seeds."""
    values = [row["value"] for row in rows if row["value"] is not None]
    return f"{fmean(values):.4f}" if values else "absent" if rows else "-"


COMMAND = Command(
    "summary", "show rows per table, coverage and evaluation of the run dates", run, add_dates,
    examples=("--config shop.yaml",),
)  # fmt: skip
