"""`gpl judge`: variants of the pre-ranker against the true click probabilities of a simulation."""

import argparse
from datetime import timedelta

from gpl_core.commands.command import Command, run_dates, source
from gpl_core.config import Config
from gpl_core.graph.arguments import add_dates
from gpl_core.graph.launch_runner import run_launches
from gpl_core.graph.launches import Launch
from gpl_core.graph.steps import JUDGE


def run(args: argparse.Namespace, config: Config) -> int:
    """Judge what was trained through the last run date on the day after it."""
    last = run_dates(args, config)[-1]
    return run_launches([Launch((JUDGE,), (last + timedelta(days=1),))], source(args), config)


COMMAND = Command(
    "judge", "simulation only: evaluate pre-ranker variants against true click probabilities", run, add_dates,
    examples=("--config quickstart",),
)  # fmt: skip
