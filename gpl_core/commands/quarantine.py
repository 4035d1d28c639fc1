"""`gpl quarantine retry`: accept the quarantined rows that pass the checks now."""

import argparse

from gpl_core.commands.command import Command, run_dates, source
from gpl_core.config import Config
from gpl_core.graph.arguments import add_dates
from gpl_core.graph.launch_runner import run_launches
from gpl_core.graph.launches import Launch
from gpl_core.graph.steps import RETRY


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_dates(parser)
    parser.add_argument("action", choices=("retry",), help="accept the rows that pass the checks now")


def run(args: argparse.Namespace, config: Config) -> int:
    return run_launches([Launch((RETRY,), run_dates(args, config))], source(args), config)


COMMAND = Command(
    "quarantine", "retry a date: accept the quarantined rows that pass the checks now", run, add_arguments,
    in_shadow=False,
    examples=("retry --config shop.yaml --run-date 2026-03-04",),
)  # fmt: skip
