"""`gpl simulate`: the raw tables of a simulated marketplace, with dates and places from the configuration."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from gpl_core.commands.command import Command
from gpl_core.config import Config
from gpl_core.errors import UsageError
from gpl_core.lakehouse.lake import Lake

if TYPE_CHECKING:  # the simulation takes long to import
    from gpl_core.simulation.raw_tables import Outcome
    from gpl_core.simulation.simulation_settings import SimulationSettings

# Requests begin this long before the first run date: calibrators and statistics of a date see earlier days only.
LEAD_DAYS = 2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    for name, what in (("users", "number of users"), ("items", "number of items"), ("days", "days with requests")):
        parser.add_argument(f"--{name}", type=int, metavar="N", help=what)
    parser.add_argument(
        "--candidates", type=int, dest="candidates_per_request", metavar="N", help="items recalled per request"
    )
    parser.add_argument("--exposed", type=int, dest="exposed_per_request", metavar="N", help="items shown per request")
    parser.add_argument("--seed", type=int, metavar="N", help="random seed")
    worlds = ("plain", "popularity_bias", "fast_drift", "user_bias", "confounded")
    parser.add_argument("--world", choices=worlds, help="what exposure and clicks depend on besides relevance")
    parser.add_argument("--force", action="store_true", help="replace raw tables created with different settings")


def run(args: argparse.Namespace, config: Config) -> int:
    """Simulate the run dates and the day after, which evaluates the last one."""
    from gpl_core.simulation.marketplace import simulate

    names = ("users", "items", "days", "candidates_per_request", "exposed_per_request", "seed", "world")
    given = {name: value for name in names if (value := getattr(args, name)) is not None}
    settings = simulation_settings(config, given)
    outcome = simulate(settings, Lake.of(config.lakehouse), force=args.force)
    print_outcome(f"simulated marketplace, world '{settings.world}', seed {settings.seed}", outcome, config)
    return 0


def simulation_settings(config: Config, given: Mapping[str, Any]) -> SimulationSettings:
    """Request days from two days before run.start_date to the day after run.end_date, warm-up from run.history_start.

    given: fields of `SimulationSettings`; they override what the configuration implies.
    """
    from gpl_core.simulation.simulation_settings import SimulationSettings

    run = config.run
    first = run.start_date - timedelta(days=LEAD_DAYS)
    implied: dict[str, Any] = {"start_date": first, "days": (run.end_date - first).days + 2, "seed": run.seed}
    if run.history_start is not None:
        implied["warmup_days"] = (first - run.history_start).days
        if implied["warmup_days"] < 0:
            raise UsageError(
                f"run.history_start={run.history_start}: expected {first} or earlier, the first day with requests"
            )
    return SimulationSettings(**{**implied, **given})


def print_outcome(what: str, outcome: Outcome, config: Config) -> None:
    """Rows per raw table, to stderr."""
    if not outcome.rows:
        print(f"{what}: already in {config.lakehouse.root}, nothing to do", file=sys.stderr)
        return
    print(f"{what} -> {config.lakehouse.root}", file=sys.stderr)
    for table, rows in outcome.rows.items():
        print(f"  {table:<18}{rows:>12,} rows", file=sys.stderr)
    for table in outcome.unchanged:
        print(f"  {table:<18}{'unchanged':>17}", file=sys.stderr)


COMMAND = Command(
    "simulate", "create raw tables of a simulated marketplace with known click probabilities", run, add_arguments,
    in_shadow=False,
    examples=("--config quickstart", "--config quickstart --users 5000 --items 4000 --force",),
)  # fmt: skip
