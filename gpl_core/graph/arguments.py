"""Command-line arguments that `gpl` and the steps' entry points share, and the parser of the entry points."""

import argparse
import logging
import os
import sys
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime
from itertools import takewhile
from typing import Any, NoReturn

from gpl_core.conf.sections import FIRST_DATE, LAST_DATE
from gpl_core.config import Config, date_range, load_config
from gpl_core.errors import UsageError, did_you_mean
from gpl_core.graph.steps import find_step

LOG_LEVELS = ("debug", "info", "warning", "error")


class Parser(argparse.ArgumentParser):
    """A parser that raises UsageError where argparse would leave the process."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """What argparse leaves over is an error of the command that it was given to.

        A misspelled option is reported before a missing one, because usually they are the same option.
        """
        known = [option for action in self._actions for option in action.option_strings]
        given = list(sys.argv[1:] if args is None else args)
        mine = takewhile(lambda a: a.startswith("-") if self._subparsers else a != "--", given)
        options = [a.partition("=")[0] for a in mine if a.startswith("--") and " " not in a]
        found, extra = None, [option for option in options if option not in known]
        if not extra:
            found, extra = super().parse_known_args(given, namespace)
        if extra:
            place = f"; options come after the command: {self.prog} COMMAND {extra[0]}" if self._subparsers else ""
            self.error(f"unknown argument {extra[0]}{did_you_mean(extra[0], known) or place}")
        return found, extra

    def error(self, message: str) -> NoReturn:
        """Raise the message together with the usage line."""
        hint = "; the environment variable GPL_CONFIG stands in for --config" if "required: --config" in message else ""
        raise UsageError(f"{self.prog}: {message}{hint}\n{self.format_usage()}")


def add_configuration(parser: argparse.ArgumentParser) -> None:
    """`--config`, by default GPL_CONFIG of the environment, and `--set`: `args.config` and `args.overrides`."""
    given = os.environ.get("GPL_CONFIG") or None
    parser.add_argument(
        "--config", required=given is None, default=given,
        help="name of a shipped configuration, or a YAML file; default: the environment variable GPL_CONFIG",
    )  # fmt: skip
    parser.add_argument(
        "--set", action="append", default=[], metavar="SECTION.KEY=VALUE", dest="overrides",
        help="override one setting; repeatable",
    )  # fmt: skip


def add_dates(parser: argparse.ArgumentParser) -> None:
    """`--run-date`, or `--start-date` with `--end-date`: see `given_dates`."""
    parser.add_argument("--run-date", type=iso_date, metavar="D", help="one run date")
    parser.add_argument("--start-date", type=iso_date, metavar="D", help="first run date, with --end-date")
    parser.add_argument("--end-date", type=iso_date, metavar="D", help="last run date, with --start-date")


def given_dates(args: argparse.Namespace) -> tuple[date, ...]:
    """The run dates that the arguments of `add_dates` name, maybe none; UsageError when they contradict each other."""
    if args.run_date and (args.start_date or args.end_date):
        raise UsageError("give either --run-date or --start-date with --end-date")
    if args.run_date:
        return (args.run_date,)
    if bool(args.start_date) != bool(args.end_date):
        raise UsageError("--start-date and --end-date belong together")
    if not args.start_date:
        return ()
    if args.end_date < args.start_date:
        raise UsageError(f"--end-date {args.end_date} is before --start-date {args.start_date}")
    return tuple(date_range(args.start_date, args.end_date))


def iso_date(text: str) -> date:
    """A date in a command line."""
    try:
        found = date.fromisoformat(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{text}' is not a date; expected YYYY-MM-DD") from None
    if not FIRST_DATE <= found <= LAST_DATE:
        raise argparse.ArgumentTypeError(f"{text} is out of range; expected a date from {FIRST_DATE} to {LAST_DATE}")
    return found


def count(text: str) -> int:
    """A whole number of 0 or more in a command line."""
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f"'{text}' is not a number; expected 0 or more")
    return int(text)


def new_run_id() -> str:
    """A fresh run identity: time and a few random digits."""
    return f"{datetime.now(UTC):%Y%m%dT%H%M%S}-{uuid.uuid4().hex[:6]}"


@dataclass(frozen=True)
class StepArguments:
    """The common arguments of every entry point, parsed."""

    config: Config
    dates: tuple[date, ...]
    run_id: str
    dry_run: bool = False
    force: bool = False
    bulk_through: date | None = None
    steps: tuple[str, ...] = ()
    max_failures: int = 0


def parse_arguments(program: str, argv: Sequence[str] | None = None, *, several: bool = False) -> StepArguments:
    """Parse the common arguments of an entry point and set the level of the log.

    several: also take `--steps a,b,c` (spark_jobs/run.py, gpu_workers/run.py). Raises UsageError for unknown or
    contradictory arguments, and for an invalid configuration.
    """
    parser = Parser(prog=program, allow_abbrev=False)
    add_configuration(parser)
    add_dates(parser)
    parser.add_argument(
        "--skip-date", action="append", default=[], type=iso_date, metavar="D", help="leave out this date; repeatable"
    )
    parser.add_argument("--run-id", default="", help="identity of this run; generated by default")
    parser.add_argument("--dry-run", action="store_true", help="print what would be read and written")
    parser.add_argument("--force", action="store_true", help="run even what is done")
    parser.add_argument("--log-level", choices=LOG_LEVELS, default="info", help="of the messages on stderr")
    parser.add_argument(
        "--bulk-through", type=iso_date, metavar="D",
        help="ingest: commit the dates up to this one together, once per table; later dates one by one",
    )  # fmt: skip
    parser.add_argument(
        "--max-failures", type=count, default=0, metavar="N", help="continue with other dates after up to N failures"
    )
    parser.add_argument("--local_rank", "--local-rank", type=int, default=0, help=argparse.SUPPRESS)
    if several:
        parser.add_argument("--steps", required=True, help="steps to run in one process, comma-separated")
    args = parser.parse_args(argv)
    config = load_config(args.config, args.overrides)
    dates = given_dates(args)
    if not dates:
        parser.error("--run-date, or --start-date with --end-date, is required: steps never assume today")
    logging.getLogger().setLevel(args.log_level.upper())
    return StepArguments(
        config,
        tuple(d for d in dates if d not in args.skip_date),
        run_id=args.run_id or new_run_id(),
        dry_run=args.dry_run,
        force=args.force,
        bulk_through=args.bulk_through,
        steps=tuple(find_step(s.strip()).name for s in args.steps.split(",")) if several else (),
        max_failures=args.max_failures,
    )
