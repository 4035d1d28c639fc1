"""A thousand short commands in a row: does the interpreter abort after the work is done?

Threads of Arrow's pool that outlive the interpreter end the process with signal 6 (exit code 134) now and then, after a
command that has succeeded. `gpl` leaves by itself once its output is written; the yardstick is the same command with
Python's own end.

Each command is a fork of a process that has imported the command line and has started no pool yet, so that it costs a
tenth of a start; with --fresh each is an interpreter of its own.

    python -m tests.bench.short_commands [--commands 1000] [--yardstick 300] [--fresh] [--seconds S] --work FOLDER

The folder keeps each outcome: the same command again continues; --seconds stops it early.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

from gpl_core import cli
from tests.bench.harness import Figure, at_most, report
from tests.gpl_core.analyst_lake import AnalystLake
from tests.support import put

COMMANDS = (
    ["status"], ["summary"], ["sql", "SELECT * FROM label_quality"], ["sql", "--json", "SELECT * FROM user_anchors"],
)  # fmt: skip
ENDS = {"gpl": "cli.entry()", "python": "sys.exit(cli.main())"}


def forked(end: str, arguments: list[str]) -> int:
    """The exit code of `gpl` with `arguments` in a child of this process, which comes to the end that `end` says."""
    child = os.fork()
    if child == 0:
        quiet = os.open(os.devnull, os.O_RDWR)
        for stream in (0, 1, 2):
            os.dup2(quiet, stream)
        sys.argv = ["gpl", *arguments]
        exec(ENDS[end], {"cli": cli, "sys": sys})
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def fresh(end: str, arguments: list[str]) -> int:
    """The same in an interpreter of its own."""
    code = f"import sys; from gpl_core import cli; {ENDS[end]}"
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, check=False).returncode


def main() -> None:
    """Runs what is missing in the folder, and reports."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--commands", type=int, default=1000)
    parser.add_argument("--yardstick", type=int, default=300)
    parser.add_argument("--fresh", action="store_true")
    parser.add_argument("--seconds", type=float, default=1e9)
    parser.add_argument("--work", type=Path, required=True)
    args = parser.parse_args()
    outcomes = args.work / f"outcomes{'.fresh' * args.fresh}.jsonl"
    if not outcomes.parent.is_dir():
        making = os.fork()  # this process must not start Arrow's threads
        if making == 0:
            put(AnalystLake(args.work).lake, "job_runs", 5)  # read by summary with Arrow's own threads
            os._exit(0)
        os.waitpid(making, 0)
        outcomes.touch()
    done = [json.loads(line) for line in outcomes.read_text().splitlines()] if outcomes.is_file() else []
    run, clock = fresh if args.fresh else forked, time.monotonic()
    with outcomes.open("a", encoding="utf-8") as sink:
        for end, wanted in (("gpl", args.commands), ("python", args.yardstick)):
            for number in range(sum(row["end"] == end for row in done), wanted):
                if time.monotonic() - clock > args.seconds:
                    print(f"stopped at command {number} of {wanted} that end like {end}; the same command continues")
                    return
                command, *rest = COMMANDS[number % len(COMMANDS)]
                code = run(end, [command, "--config", str(args.work / "test.yaml"), *rest])
                done.append({"end": end, "command": command, "code": code})
                print(json.dumps(done[-1]), file=sink, flush=True)
    counts = Counter((row["end"], "aborted" if row["code"] in (-6, 134) else row["code"]) for row in done)
    others = sum(n for (end, code), n in counts.items() if end == "gpl" and code not in (0, "aborted"))
    figures = {
        "commands": Figure(args.commands, "commands"),
        "aborted": at_most(counts["gpl", "aborted"], 0, "commands"),
        "other_exit_codes": at_most(others, 0, "commands"),
        "yardstick_commands": Figure(args.yardstick, "commands"),
        "yardstick_aborted": Figure(counts["python", "aborted"], "commands"),
    }
    title = "Short commands in a row that end in an abort of the interpreter; yardstick: Python's own end"
    option = f"--commands {args.commands} --yardstick {args.yardstick}{' --fresh' * args.fresh}"
    report("short_commands", figures, False, title, module=f"short_commands {option}")


if __name__ == "__main__":
    main()
