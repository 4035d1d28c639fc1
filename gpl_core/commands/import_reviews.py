"""`gpl import-reviews`: raw tables from real purchases, with dates and places from the configuration."""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import TYPE_CHECKING

from gpl_core.commands.command import Command
from gpl_core.commands.simulate import LEAD_DAYS, print_outcome
from gpl_core.config import Config
from gpl_core.errors import UsageError
from gpl_core.lakehouse.lake import Lake

if TYPE_CHECKING:  # the simulation takes long to import
    from gpl_core.simulation.reviews import ImportSettings


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--items", required=True, metavar="FILE", help="items.jsonl.gz")
    parser.add_argument("--sequences", required=True, metavar="FILE", help="sequences.jsonl.gz")
    parser.add_argument("--seed", type=int, metavar="N", help="random seed")
    parser.add_argument("--force", action="store_true", help="replace raw tables created from different input")


def run(args: argparse.Namespace, config: Config) -> int:
    """Import for the run dates and the day after, which evaluates the last one."""
    from gpl_core.simulation.reviews import PROVENANCE, import_reviews

    settings = import_settings(config, args.seed)
    outcome = import_reviews(args.items, args.sequences, Lake.of(config.lakehouse), settings, force=args.force)
    print_outcome(PROVENANCE, outcome, config)
    return 0


def import_settings(config: Config, seed: int | None = None) -> ImportSettings:
    """Feed days are the run dates; requests begin two days earlier, around the last events of the valid split."""
    from gpl_core.simulation.reviews import ImportSettings

    run = config.run
    settings = ImportSettings(
        start_date=run.start_date, lead_days=LEAD_DAYS, feed_days=(run.end_date - run.start_date).days + 1,
        seed=run.seed if seed is None else seed,
    )  # fmt: skip
    if run.history_start is None:
        return settings
    history = (run.start_date - run.history_start).days
    if history <= settings.valid_days:
        raise UsageError(
            f"run.history_start={run.history_start}: expected more than {settings.valid_days} days before "
            f"run.start_date={run.start_date}; the valid split takes the last {settings.valid_days}"
        )
    return replace(settings, train_days=history - settings.valid_days)


COMMAND = Command(
    "import-reviews", "create raw tables from real purchases; requests and exposure are simulated", run,
    add_arguments, in_shadow=False,
    examples=("--config amazon --items items.jsonl.gz --sequences sequences.jsonl.gz",),
)  # fmt: skip
