"""The console that `gpl` prints on."""

import sys

from rich.console import Console

_WIDTH = 200  # of tables that go to a file or a pipe


def console() -> Console:
    """A console on standard output: as wide as a terminal if it is one; elsewhere no sentence is broken."""
    tty = sys.stdout.isatty()
    return Console(highlight=False, width=None if tty else _WIDTH, soft_wrap=not tty)
