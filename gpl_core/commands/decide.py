"""`gpl promote` and `gpl rollback`: which published artifact is in force."""

import argparse
from datetime import date

from gpl_core.commands.command import Command
from gpl_core.config import Config
from gpl_core.graph.arguments import iso_date
from gpl_core.graph.planner import Planner
from gpl_core.lakehouse.artifacts import KINDS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("artifact", choices=KINDS, help="kind of artifact")
    parser.add_argument("version", help="name of the version, as in lakehouse.root/artifacts/ARTIFACT/")
    parser.add_argument("--reason", default="", help="recorded in the table artifact_decisions")


def _add_rollback_arguments(parser: argparse.ArgumentParser) -> None:
    add_arguments(parser)
    parser.add_argument("--from-date", type=iso_date, metavar="D", help="run dates before D continue to use it")


def run(args: argparse.Namespace, config: Config) -> int:
    """Record the decision, and say what is in force now."""
    artifacts, from_date = Planner(config).artifacts, getattr(args, "from_date", None)
    made = artifacts.decide(args.artifact, args.version, args.command, from_date=from_date, reason=args.reason)
    said = f"{args.command} recorded" if made else "already in that state, nothing recorded"
    print(f"{args.artifact} {args.version}: {said}")
    if (newest := artifacts.in_force_or_none(args.artifact, date.max)) is None:
        print(f"no {args.artifact} is in force for later dates: the next gpl run trains one")
    else:
        print(f"in force after {newest.trained_through}: {newest.version}")
    print("gpl status shows what is stale now")
    return 0


PROMOTE = Command(
    "promote", "put a published artifact back in force", run, add_arguments, in_shadow=False,
    examples=("--config shop.yaml calibrator 2026-03-04-0a1b2c3d4e",),
)  # fmt: skip
ROLLBACK = Command(
    "rollback", "take a published artifact out of force", run, _add_rollback_arguments, in_shadow=False,
    examples=('--config shop.yaml calibrator 2026-03-04-0a1b2c3d4e --reason "labels twice too high"',),
)  # fmt: skip
