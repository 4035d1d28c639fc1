"""The `gpl` command: collects the commands, parses, loads the configuration and turns errors into exit codes."""

import argparse
import os
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Mapping, Sequence
from importlib import import_module, resources
from typing import NoReturn

import shtab

from gpl_core import __version__
from gpl_core.commands.command import Command
from gpl_core.config import load_config
from gpl_core.errors import GplError, UsageError, did_you_mean
from gpl_core.graph.arguments import Parser, add_configuration
from gpl_core.graph.step_run import exit_with, leave

# The modules of commands/ in the order of `gpl --help`.
_MODULES: Mapping[str, Sequence[str]] = {
    "Start": ("init", "check_raw", "simulate", "import_reviews", "import_checkpoint"),
    "Run": ("run", "status", "plan", "decide", "shadow", "compare"),
    "Results": ("summary", "evaluate", "judge", "explain", "sql", "score"),
    "Upkeep": ("register", "quarantine", "optimize", "vacuum", "migrate", "forget", "evict", "repair"),
    "Reference": ("settings", "tables", "capacity"),
}
_EXAMPLES = """
examples:
  gpl simulate --config quickstart     a simulated marketplace to try it on
  gpl run --config quickstart          run every step that is not done yet
  gpl summary --config quickstart      rows, coverage, evaluation
  gpl run --help                       arguments and examples of one command

Set GPL_CONFIG to omit --config. Tab completion: gpl --print-completion bash, zsh or fish (docs/getting-started.md).
"""


def _commands_of(module: str) -> list[Command]:
    return [c for c in vars(import_module(f"gpl_core.commands.{module}")).values() if isinstance(c, Command)]


GROUPS: dict[str, list[Command]] = {g: [c for m in modules for c in _commands_of(m)] for g, modules in _MODULES.items()}
COMMANDS: dict[str, Command] = {command.name: command for group in GROUPS.values() for command in group}


class _TopParser(Parser):
    """The parser of `gpl` itself: its help groups the commands by purpose."""

    def format_help(self) -> str:
        """The overview, as wide as the terminal."""
        width = max(40, min(shutil.get_terminal_size().columns, 120))
        indent = " " * 20
        lines = [f"gpl: {self.description}", "", "usage: gpl COMMAND [--config CONFIG] …", ""]
        for title, commands in GROUPS.items():
            lines.append(f"{title}:")
            for command in commands:
                text = f"  {command.name:<18}{command.help}"
                lines += textwrap.wrap(text, width, subsequent_indent=indent, break_on_hyphens=False)
            lines.append("")
        return "\n".join(lines).rstrip() + "\n" + _EXAMPLES


class _Version(argparse.Action):
    """Prints the version when it is asked for: git is not started for any other command."""

    def __call__(self, parser: argparse.ArgumentParser, *given: object, **named: object) -> NoReturn:
        """Print and leave."""
        print(f"gpl {__version__} ({_commit()})")
        parser.exit()


def _commit() -> str:
    """The commit of this code: in a wheel from the file that `make dist` puts there, in a checkout from git."""
    package = resources.files("gpl_core")
    if (baked := package / "commit.txt").is_file():
        return f"commit {baked.read_text(encoding='utf-8').strip()}"
    asked = ["git", "-C", str(package), "describe", "--always", "--dirty", "--exclude=*"]
    try:
        return "commit " + subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "commit unknown"


def make_parser() -> Parser:
    """The parser of the whole command line; raises UsageError on invalid arguments."""
    parser = _TopParser(prog="gpl", description="Generative Pseudo-Labeling for pre-ranking", allow_abbrev=False)
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version and the commit")
    shtab.add_argument_to(parser, help="print the tab completion of a shell")
    names = parser.add_subparsers(dest="command", metavar="COMMAND", required=True, parser_class=Parser)
    for command in COMMANDS.values():
        examples = "".join(f"\n  gpl {command.name} {example}" for example in command.examples)
        sub = names.add_parser(
            command.name, help=command.help, description=command.help, allow_abbrev=False,
            epilog=f"examples:{examples}" if examples else None, formatter_class=argparse.RawDescriptionHelpFormatter,
        )  # fmt: skip
        if command.needs_config:
            add_configuration(sub)
        command.add_arguments(sub)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code (see `errors.py`)."""
    given = list(sys.argv[1:] if argv is None else argv)
    try:
        parser = make_parser()
        if not given:
            print(parser.format_help())
            return 2
        if not given[0].startswith("-") and given[0] not in COMMANDS:
            raise UsageError(f"gpl has no command '{given[0]}'{did_you_mean(given[0], COMMANDS) or ': see gpl --help'}")
        code = _run(parser.parse_args(given))
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # the reader of our output (head, less) has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt as interrupt:
        print(str(interrupt) or "interrupted: committed results are kept, nothing else was written", file=sys.stderr)
        return 130
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
    try:
        return command.run(args, config)
    except GplError:
        if lost := config.lakehouse.lost():
            print(lost, file=sys.stderr)
        raise


def entry() -> NoReturn:
    """The command `gpl`: `main`, and the end of the process."""
    try:
        code = main()
    except SystemExit as left:  # --help, or a scheduler has ended a run
        code = int(left.code or 0)
    leave(code)


if __name__ == "__main__":
    entry()
