"""`gpl status`: the state of every step for every run date."""

import argparse
import sys
from pathlib import Path

from rich.markup import escape
from rich.table import Table

from gpl_core.commands.command import Command, run_dates
from gpl_core.config import Config
from gpl_core.graph.arguments import add_dates
from gpl_core.graph.planner import Planner
from gpl_core.graph.steps import STEPS
from gpl_core.graph.terminal import console

_STYLES = {"done": "green", "stale": "yellow", "absent": "cyan", "blocked": "dim"}


def run(args: argparse.Namespace, config: Config) -> int:
    """Print one row per run date and step; nothing is written."""
    planner = Planner(config)
    root = config.lakehouse.root
    if "://" not in root and not Path(root).is_dir():
        print(config.lakehouse.lost() or f"note: lakehouse.root {root} does not exist yet", file=sys.stderr)
    table = Table("run date", "step", "state", "reason / versions")
    for run_date in run_dates(args, config):
        for step in STEPS:
            state = planner.state(step, run_date)
            shown = f"[{_STYLES[state.status]}]{state.status}[/]"
            table.add_row(run_date.isoformat(), step.name, shown, escape(state.reason))
    console().print(table)
    return 0


COMMAND = Command(
    "status", "show which steps are done, stale, absent or blocked, per run date, and why", run, add_dates,
    examples=("--config shop.yaml", "--config shop.yaml --run-date 2026-03-04",),
)  # fmt: skip
