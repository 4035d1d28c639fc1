"""What a `gpl` command is, and what several commands share."""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path

from rich.table import Column, Table

from gpl_core.config import Config, date_range
from gpl_core.errors import UsageError
from gpl_core.graph.arguments import given_dates
from gpl_core.graph.launches import Source


@dataclass(frozen=True)
class Command:
    """One command of `gpl`."""

    name: str
    help: str  # one line
    run: Callable[..., int]  # takes the parsed arguments and the configuration; returns the exit code
    add_arguments: Callable[[argparse.ArgumentParser], None] = lambda parser: None  # besides --config and --set
    needs_config: bool = True  # False: it has no --config, and `run` takes the arguments alone
    in_shadow: bool = True  # False: it changes tables which a shadow run only reads
    examples: tuple[str, ...] = ()  # what `--help` shows: arguments, each as one line


def run_dates(args: argparse.Namespace, config: Config) -> tuple[date, ...]:
    """The run dates that the command line names, or those of the configuration."""
    return given_dates(args) or tuple(date_range(config.run.start_date, config.run.end_date))


def source(args: argparse.Namespace) -> Source:
    """Where the configuration comes from, in a form that works from any folder."""
    path = Path(args.config)
    return Source(str(path.absolute()) if path.is_file() else args.config, tuple(args.overrides))


def assignments(option: str, given: Sequence[str], example: str) -> dict[str, str]:
    """NAME=VALUE arguments of a repeatable option; UsageError for one of another form."""
    if wrong := [text for text in given if "=" not in text]:
        raise UsageError(f"{option} {wrong[0]}: expected {example}")
    return dict(text.split("=", 1) for text in given)


def figures_table(labels: Sequence[str], figures: Sequence[str], title: str | None = None) -> Table:
    """An empty table: columns of text on the left, columns of figures, aligned to the right, after them."""
    return Table(*labels, *(Column(name, justify="right") for name in figures), title=title)
