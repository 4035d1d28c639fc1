"""Ends a launcher and everything it has started when its `gpl` process ends, whatever the cause, even kill -9.

    python supervisor.py COMMAND ...

`gpl` starts this in place of COMMAND, as the leader of a process group, and holds the other end of its standard input.
The kernel closes that end when `gpl` ends.
"""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from typing import Any


def supervised(arguments: Sequence[str], **options: Any) -> subprocess.Popen[str]:
    """Start the command `arguments`; the `options` are those of Popen. Its exit code is the command's."""
    command = [sys.executable, "-IS", __file__, *arguments]
    return subprocess.Popen(command, stdin=subprocess.PIPE, text=True, start_new_session=True, **options)


def _end_with_parent() -> None:
    os.read(sys.stdin.fileno(), 1)  # returns at the end of the file: nobody writes
    os.killpg(0, signal.SIGKILL)


def main() -> int:
    """Run the command; returns its exit code, 128 + n when signal n ended it."""
    # A SIGTERM to the group is for the command, whose end is waited for. To ignore it would be inherited.
    signal.signal(signal.SIGTERM, lambda number, frame: None)
    with subprocess.Popen(sys.argv[1:], stdin=subprocess.DEVNULL) as process:
        threading.Thread(target=_end_with_parent, daemon=True).start()
        code = process.wait()
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(main())
