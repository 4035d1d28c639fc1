"""`gpl simulate` and `gpl import-reviews`: dates and places from the run's configuration, sizes from the options."""

import sys
from collections.abc import Mapping
from dataclasses import replace
from datetime import timedelta
from typing import Any

from gpl_core.config import Config
from gpl_core.errors import UsageError
from gpl_core.lakehouse.lake import Lake
from gpl_core.simulation.reviews import PROVENANCE, ImportSettings, import_reviews
from gpl_core.simulation.simulate import simulate
from gpl_core.simulation.simulation_settings import SimulationSettings
from gpl_core.simulation.tables import Outcome

# Requests begin this long before the first run date: calibrators and statistics of a date see earlier days only.
LEAD_DAYS = 2


def run_simulate(config: Config, given: Mapping[str, Any], *, force: bool = False) -> int:
    """Simulate the marketplace for the run's dates and the day after (evaluation); returns the exit code.

    given: fields of `SimulationSettings` that the command line sets; they win over what the configuration implies.
    """
    settings = simulation_settings(config, given)
    outcome = simulate(settings, _lake(config), force=force)
    _tell(f"simulated marketplace, world '{settings.world}', seed {settings.seed}", outcome, config)
    return 0


def run_import(
    config: Config, items_path: str, sequences_path: str, *, seed: int | None = None, force: bool = False
) -> int:
    """Import a review data set for the run's dates and the day after (evaluation); returns the exit code."""
    outcome = import_reviews(items_path, sequences_path, _lake(config), import_settings(config, seed), force=force)
    _tell(PROVENANCE, outcome, config)
    return 0


def simulation_settings(config: Config, given: Mapping[str, Any]) -> SimulationSettings:
    """The settings of `gpl simulate` under `config`: request days from two days before run.start_date to the day after
    run.end_date, warm-up from run.history_start.

    Raises:
        UsageError: run.history_start lies after the first request day.
    """
    run = config.run
    first = run.start_date - timedelta(days=LEAD_DAYS)
    implied: dict[str, Any] = {
        "start_date": first,
        "days": (run.end_date - first).days + 2,
        "seed": run.seed,
    }
    if run.history_start is not None:
        implied["warmup_days"] = (first - run.history_start).days
        if implied["warmup_days"] < 0:
            raise UsageError(
                f"run.history_start={run.history_start}: expected {first} or earlier, the first day with requests"
            )
    return SimulationSettings(**{**implied, **given})


def import_settings(config: Config, seed: int | None = None) -> ImportSettings:
    """The settings of `gpl import-reviews` under `config`: feed days are the run's dates, the day after evaluates.

    Requests begin two days before the first run date, around the last events of the valid split.

    Raises:
        UsageError: run.history_start leaves no day for the training split.
    """
    run = config.run
    settings = ImportSettings(
        start_date=run.start_date,
        lead_days=LEAD_DAYS,
        feed_days=(run.end_date - run.start_date).days + 1,
        seed=run.seed if seed is None else seed,
    )
    if run.history_start is None:
        return settings
    history = (run.start_date - run.history_start).days
    if history <= settings.valid_days:
        raise UsageError(
            f"run.history_start={run.history_start}: expected more than {settings.valid_days} days before "
            f"run.start_date={run.start_date}; the valid split takes the last {settings.valid_days}"
        )
    return replace(settings, train_days=history - settings.valid_days)


def _lake(config: Config) -> Lake:
    return Lake(config.lakehouse.root, config.lakehouse.tables)


def _tell(what: str, outcome: Outcome, config: Config) -> None:
    if outcome.did_nothing:
        print(f"{what}: already there under {config.lakehouse.root}, nothing to do", file=sys.stderr)
        return
    print(f"{what} -> {config.lakehouse.root}", file=sys.stderr)
    for table, rows in outcome.rows.items():
        print(f"  {table:<18}{rows:>12,} rows", file=sys.stderr)
    for table in outcome.unchanged:
        print(f"  {table:<18}{'unchanged':>17}", file=sys.stderr)
