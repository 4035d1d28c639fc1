"""`gpl simulate` and `gpl import-reviews`: dates from the run configuration, the rest from the command line."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import date, timedelta
from typing import Any

from gpl_core.config import Config
from gpl_core.errors import UsageError
from gpl_core.lake import Lake
from gpl_core.simulation.reviews import ImportSettings, import_reviews
from gpl_core.simulation.settings import SimulationSettings
from gpl_core.simulation.simulate import simulate
from gpl_core.simulation.tables import Outcome

# Requests begin this many days before the first run date: what is estimated from uniformly exposed pairs (the
# calibrator's target rate) needs some before the first label window.
LEAD_DAYS = 2


def request_dates(config: Config) -> tuple[date, int, int]:
    """First request day, number of request days (evaluation day included), days of history before them.

    Raises:
        UsageError: the configuration leaves no day of history.
    """
    first = config.run.start_date - timedelta(days=LEAD_DAYS)
    last = config.run.end_date + timedelta(days=1)
    history = config.run.history_start
    if history is None or history >= first:
        raise UsageError(
            f"run.history_start is {history}: expected a date before {first}, the first day of requests "
            f"({LEAD_DAYS} days before run.start_date)"
        )
    return first, (last - first).days + 1, (first - history).days


def run_simulate(config: Config, given: Mapping[str, Any], *, force: bool = False) -> int:
    """Write the simulated raw tables; `given` are SimulationSettings fields from the command line."""
    first, days, warmup = request_dates(config)
    settings = SimulationSettings(**{"start_date": first, "days": days, "warmup_days": warmup, **given})
    _say(simulate(settings, _lake(config), force=force), config, "simulated")
    return 0


def run_import(config: Config, items: str, sequences: str, *, seed: int | None = None, force: bool = False) -> int:
    """Write the raw tables from a review data set."""
    first, days, history = request_dates(config)
    valid_days = history // 3
    given: dict[str, Any] = {} if seed is None else {"seed": seed}
    settings = ImportSettings(
        start_date=first, train_days=history - valid_days, valid_days=valid_days, feed_days=days - 1, **given
    )
    _say(import_reviews(items, sequences, _lake(config), settings, force=force), config, "semi-synthetic")
    return 0


def _lake(config: Config) -> Lake:
    return Lake(config.lakehouse.root, config.lakehouse.tables)


def _say(outcome: Outcome, config: Config, kind: str) -> None:
    if outcome.did_nothing:
        print(f"raw tables are there already, made with the same settings ({outcome.fingerprint}): nothing to do")
        return
    for table, rows in outcome.rows.items():
        print(f"{table}: {rows:,} {kind} rows")
    print(f"in {config.lakehouse.root}/tables")
