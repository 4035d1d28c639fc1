"""The `gpl` command: collects the commands, parses, loads the configuration and turns errors into exit codes."""

import argparse
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import NoReturn

from gpl_core.commands.command import Command
from gpl_core.config import load_config
from gpl_core.errors import UsageError
from gpl_core.graph.arguments import Parser, add_configuration
from gpl_core.graph.step_run import exit_with, leave

# The modules of commands/ in the order of `gpl --help`.
_MODULES = (
    "simulate", "import_reviews",  # raw tables
    "plan", "run", "status", "shadow", "compare",  # runs
    "judge", "evaluate", "summary", "sql", "explain",  # results
    "check_raw", "decide", "register", "quarantine",  # operation
    "optimize", "vacuum", "migrate", "forget", "evict", "repair", "capacity",
    "settings", "tables",  # reference
)  # fmt: skip
COMMANDS: dict[str, Command] = {
    command.name: command
    for module in _MODULES
    for command in vars(import_module(f"gpl_core.commands.{module}")).values()
    if isinstance(command, Command)
}


def make_parser() -> Parser:
    """The parser of the whole command line; raises UsageError on invalid arguments."""
    parser = Parser(prog="gpl", description="Generative Pseudo-Labeling for pre-ranking", allow_abbrev=False)
    names = parser.add_subparsers(dest="command", metavar="command", required=True, parser_class=Parser)
    for command in COMMANDS.values():
        sub = names.add_parser(command.name, help=command.help, description=command.help, allow_abbrev=False)
        if command.needs_config:
            add_configuration(sub)
        command.add_arguments(sub)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code (see `errors.py`)."""
    try:
        code = _run(make_parser().parse_args(argv))
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # the reader of our output (head, less) has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        return exit_with(error)


def _run(args: argparse.Namespace) -> int:
    command = COMMANDS[args.command]
    if not command.needs_config:
        return command.run(args)
    config = load_config(args.config, args.overrides)
    if (shadow_of := config.lakehouse.shadow.of) and not command.in_shadow:
        raise UsageError(
            f"gpl {command.name} cannot be used on a shadow run, because it would change {shadow_of}: pass the "
            f"configuration of that lakehouse. To remove the shadow run, delete the folder {config.lakehouse.root}"
        )
    return command.run(args, config)


def entry() -> NoReturn:
    """The command `gpl`: `main`, and the end of the process."""
    try:
        code = main()
    except SystemExit as left:  # --help, or a scheduler has ended a run
        code = int(left.code or 0)
    leave(code)


if __name__ == "__main__":
    entry()
