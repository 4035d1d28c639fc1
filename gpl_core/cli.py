"""The `gpl` command: collects the commands, parses, loads the configuration and turns errors into exit codes."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from gpl_core.commands import (
    capacity,
    check_raw,
    compare,
    decide,
    evaluate,
    evict,
    explain,
    forget,
    import_reviews,
    judge,
    migrate,
    optimize,
    plan,
    quarantine,
    register,
    repair,
    run,
    settings,
    shadow,
    simulate,
    sql,
    status,
    summary,
    tables,
    vacuum,
)  # fmt: skip
from gpl_core.commands.command import Command
from gpl_core.config import load_config
from gpl_core.errors import GplError, UsageError, classified, exit_code_of
from gpl_core.graph.arguments import Parser, add_configuration

COMMANDS: dict[str, Command] = {
    command.name: command
    for command in (
        simulate.COMMAND, import_reviews.COMMAND,  # raw tables
        plan.COMMAND, run.COMMAND, status.COMMAND, shadow.COMMAND, compare.COMMAND,  # runs
        judge.COMMAND, evaluate.COMMAND, summary.COMMAND, sql.COMMAND, explain.COMMAND,  # results
        check_raw.COMMAND, decide.PROMOTE, decide.ROLLBACK, register.COMMAND, quarantine.COMMAND,  # operation
        optimize.COMMAND, vacuum.COMMAND, migrate.COMMAND, forget.COMMAND, evict.COMMAND, repair.COMMAND,
        capacity.COMMAND,
        settings.COMMAND, tables.COMMAND,  # reference
    )
}  # fmt: skip


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
        args = make_parser().parse_args(argv)
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
    except BrokenPipeError:  # the reader of our output (head, less) has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (GplError, OSError) as error:
        known = classified(error)
        if not isinstance(known, GplError):
            raise
        print(f"error: {known}", file=sys.stderr)
        return exit_code_of(known)


if __name__ == "__main__":
    sys.exit(main())
