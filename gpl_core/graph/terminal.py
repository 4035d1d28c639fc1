"""The console that `gpl` prints on."""

import sys
from typing import TextIO

from rich.console import Console

_WIDTH = 200  # of tables that go to a file or a pipe


def console(out: TextIO | None = None) -> Console:
    """A console on `out`, by default standard output: as wide as a terminal; elsewhere no sentence is broken."""
    tty = (out or sys.stdout).isatty()
    return Console(file=out, highlight=False, width=None if tty else _WIDTH, soft_wrap=not tty)
