"""`gpl plan`: the launcher commands of a run, for a shell or a scheduler."""

import argparse

from gpl_core.commands.command import Command, run_dates, source
from gpl_core.config import Config
from gpl_core.graph.arguments import add_dates
from gpl_core.graph.launches import plan
from gpl_core.graph.planner import Planner
from gpl_core.graph.schedulers import FORMATS, render


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_selection(parser)
    parser.add_argument("--format", dest="form", choices=FORMATS, default="shell", help="airflow: a DAG file")


def add_selection(parser: argparse.ArgumentParser) -> None:
    """The dates and steps of a run; `gpl run` takes the same."""
    add_dates(parser)
    parser.add_argument("--from", dest="first", metavar="STEP", help="start with this step")
    parser.add_argument("--only", action="append", default=[], metavar="STEP", help="only this step; repeatable")
    parser.add_argument("--isolated", action="store_true", help="start every step in a separate launch")
    parser.add_argument("--force", action="store_true", help="also run steps that are already done")


def run(args: argparse.Namespace, config: Config) -> int:
    """Print the plan; nothing is started or written."""
    dates = run_dates(args, config)
    launches = plan(Planner(config), dates, first=args.first, only=args.only, isolated=args.isolated)
    print(render(args.form, launches, source(args), config, force=args.force))
    return 0


COMMAND = Command(
    "plan", "print the launcher commands of a run, for a shell or a scheduler", run, add_arguments,
    examples=("--config shop.yaml", "--config shop.yaml --format airflow",),
)  # fmt: skip
