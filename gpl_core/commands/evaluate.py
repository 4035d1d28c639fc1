"""`gpl evaluate`: exposed-only against GPL on the day after a run date, on the least biased slice there is."""

import argparse
import math
import statistics
from collections.abc import Sequence
from datetime import date, timedelta
from typing import Any

from rich.console import Console
from rich.table import Table

from gpl_core.commands.command import Command, console, figures_table, run_dates, source
from gpl_core.config import Config
from gpl_core.errors import MissingInputError
from gpl_core.graph.arguments import add_dates
from gpl_core.graph.launch_runner import run_launches
from gpl_core.graph.launches import Launch
from gpl_core.graph.planner import Planner
from gpl_core.graph.steps import find_step

BASELINE, OURS = "exposed_only", "gpl"
# Two-sided 95% quantiles of Student's t for 1 to 9 degrees of freedom; after that, the normal one.
T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)

Rows = Sequence[dict[str, Any]]


def run(args: argparse.Namespace, config: Config) -> int:
    """Bring the evaluation of every run date up to date and print it."""
    for run_date in run_dates(args, config):
        # Late impressions of the day after are a reason to judge again; nothing is trained twice.
        if code := run_launches([Launch((find_step("train_preranker"),), (run_date,))], source(args), config):
            return code
        print_evaluation(config, run_date, console())
    return 0


def print_evaluation(config: Config, run_date: date, console: Console) -> None:
    """Print what table evaluations holds for `run_date`.

    Raises:
        MissingInputError: it holds nothing, for example because the impressions of the day after are not there.
    """
    following = run_date + timedelta(days=1)
    found = Planner(config).snapshot("evaluations")
    rows = found.read(found.select(start=run_date, end=run_date)).to_pylist() if found else []
    if not rows:
        raise MissingInputError(
            f"table evaluations: nothing for {run_date}, which is judged on the impressions of {following}; ingest "
            f"them, then run gpl evaluate --run-date {run_date} again"
        )
    chosen, caveat = judged_slice(rows)
    console.print(f"pre-ranker trained through {run_date}, judged on {following}, slice {chosen}")
    if caveat:
        console.print(caveat)
    mine = [row for row in rows if row["slice"] == chosen]
    seeds = sorted({row["seed"] for row in mine})
    if len(seeds) == 1:
        console.print(
            f"One training seed ({seeds[0]}): the difference has no interval; list several seeds under prerank.seeds."
        )
    console.print(comparison_table(mine))
    for other in sorted({row["model"] for row in mine} - {BASELINE, OURS}):
        console.print(comparison_table(mine, other))
    if not any(row["metric"] == "snips_auc" for row in rows):
        console.print("No off-policy estimate: prerank.propensity names no logged propensities.")


def judged_slice(rows: Rows) -> tuple[str, str]:
    """(slice, caveat): `uniform` without a caveat if its AUC is defined, otherwise `exposed` with the reason."""
    uniform = [row for row in rows if (row["slice"], row["metric"]) == ("uniform", "auc")]
    if any(row["value"] is not None for row in uniform):
        return "uniform", ""
    why = uniform[0]["note"] if uniform else "no such slice"
    return "exposed", (
        f"Caveat: that day has no uniformly exposed traffic to judge on ({why}). The figures below cover only "
        "exposed pairs, which the serving policy chose; they say nothing about unexposed ones, which get pseudo-labels."
    )


def comparison_table(rows: Rows, ours: str = OURS) -> Table:
    """One line per metric: both variants' means over seeds and their paired difference; absent figures say why."""
    table = figures_table(["metric"], [BASELINE, ours, f"{ours} - {BASELINE}", "candidates", "rows"])
    for metric in dict.fromkeys(row["metric"] for row in rows):
        mine = [row for row in rows if row["metric"] == metric]
        base, own = (
            {row["seed"]: row["value"] for row in mine if row["model"] == model and row["value"] is not None}
            for model in (BASELINE, ours)
        )
        cells = [f"{statistics.fmean(v.values()):.4f}" if v else f"absent: {mine[0]['note']}" for v in (base, own)]
        text = paired_difference([own[seed] - base[seed] for seed in sorted(base.keys() & own.keys())])
        size = mine[0]["candidate_set_size"]
        table.add_row(metric, *cells, text, "-" if size is None else f"{size:.1f}", f"{mine[0]['rows']:,}")
    return table


def paired_difference(differences: Sequence[float]) -> str:
    """Mean of paired differences, with the half-width of its 95% interval if there are several."""
    n = len(differences)
    if not n:
        return "-"
    mean = statistics.fmean(differences)
    if n == 1:
        return f"{mean:+.4f}"
    t = T95[n - 2] if n - 2 < len(T95) else 1.96
    return f"{mean:+.4f} ± {t * statistics.stdev(differences) / math.sqrt(n):.4f}"


COMMAND = Command(
    "evaluate", "your own tables: the pre-ranker with and without pseudo-labels on the day after", run, add_dates
)
