"""`gpl run`: everything that is not done yet, step by step."""

import argparse
import sys
from collections.abc import Sequence
from datetime import date

from gpl_core.commands.command import Command, run_dates, source
from gpl_core.commands.plan import add_selection
from gpl_core.config import Config
from gpl_core.errors import some
from gpl_core.graph.arguments import LOG_LEVELS, count
from gpl_core.graph.launch_runner import run_launches
from gpl_core.graph.launches import plan
from gpl_core.graph.planner import Planner


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_selection(parser)
    parser.add_argument(
        "--max-failures", type=count, default=0, metavar="N", help="tolerate up to N failed dates and go on"
    )
    parser.add_argument("--fail-on-alarm", action="store_true", help="exit with 3 if a step or a monitor warned")
    parser.add_argument("--verbose", action="store_true", help="show the output of the steps")
    parser.add_argument("--log-level", choices=LOG_LEVELS, default="", help="log level of the steps (default: info)")


def run(args: argparse.Namespace, config: Config) -> int:
    """Run the pending launches in order."""
    dates, planner = run_dates(args, config), Planner(config)
    launches = plan(planner, dates, first=args.first, only=args.only, isolated=args.isolated)
    _warn_of_empty_dates(planner, dates)
    return run_launches(
        launches, source(args), config, force=args.force, verbose=args.verbose, log_level=args.log_level,
        max_failures=args.max_failures, fail_on_alarm=args.fail_on_alarm,
    )  # fmt: skip


def _warn_of_empty_dates(planner: Planner, dates: Sequence[date]) -> None:
    """Warn of dates without raw rows: sometimes a day has no traffic, but usually a typo or late data is the cause."""
    for table in ("raw_impressions", "raw_candidates"):
        raw = planner.snapshot(table)
        present = raw.slices() if raw is not None else ()
        if raw and present and (missing := [d for d in dates if not raw.may_have(d)]):
            known = f"it has {present[0]} to {present[-1]}"
            print(f"warning: {table} has no rows for {some(missing)}; {known}", file=sys.stderr)


COMMAND = Command(
    "run", "run the graph, skipping the steps that are done", run, add_arguments,
    examples=(
        "--config shop.yaml",
        "--config shop.yaml --run-date 2026-03-04 --verbose",
        "--config shop.yaml --run-date 2026-03-04 --from pseudo_labels --force",
    ),
)  # fmt: skip
