"""Runs planned launches one after another: commands, logs, progress and failures."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from datetime import date
from itertools import islice
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from gpl_core.config import Config
from gpl_core.errors import ContractError, MissingInputError, UsageError, counted
from gpl_core.graph.arguments import new_run_id
from gpl_core.graph.hints import hints
from gpl_core.graph.launches import Launch, Source, command, environment, pending, shell, with_free_port
from gpl_core.graph.planner import Planner
from gpl_core.graph.prerequisites import problems
from gpl_core.graph.supervisor import supervised
from gpl_core.graph.terminal import console
from gpl_core.lakehouse.storage import log_folder

_MOST_REASONS = 3  # lines per launch


def run_launches(
    launches: Sequence[Launch], source: Source, config: Config, *, force: bool = False, verbose: bool = False,
    log_level: str = "", max_failures: int = 0, fail_on_alarm: bool = False,
) -> int:  # fmt: skip
    """Start the pending launches in order; returns the exit code of the first failure, or 0.

    A failure ends the run, except that up to `max_failures` dates may fail on their own; later launches leave them out.
    The launches' logs are under the lakehouse (object storage: in the working directory); `verbose` prints them too.
    What the steps warned of is listed at the end; with `fail_on_alarm` the code is then 3. A launch of which nothing
    can run is not started: MissingInputError.
    """
    out = console()
    run_id = new_run_id()
    started = first_code = 0
    failed: set[date] = set()
    warnings: list[str] = []
    for launch in launches:
        planner = Planner(config)
        todo = tuple(d for d in pending(planner, launch, force) if d not in failed)
        if not todo:
            out.print(f"[dim]done already   {launch.label}: {_span(launch.dates)}[/dim]")
            continue
        _refuse_blocked(planner, launch, todo, force)
        arguments = command(
            launch, todo, source, config, run_id=run_id, force=force, log_level=log_level,
            max_failures=max_failures - len(failed), without=failed,
        )  # fmt: skip
        out.print(f"[dim]$ {escape(shell(arguments, environment(config)))}[/dim]", soft_wrap=True)
        for reason in () if force else islice(_stale(planner, launch, todo), _MOST_REASONS):
            out.print(f"[dim]  {escape(reason)}[/dim]", soft_wrap=True)
        started += 1
        log = log_folder(config.lakehouse.root) / run_id / f"{started:02d}-{launch.steps[0].name}.log"
        clock = time.monotonic()
        code, lines = _run_with_progress(out, launch, len(todo), with_free_port(arguments), config, log, verbose)
        seconds = time.monotonic() - clock
        warnings += [f"{line['step']} {line['run_date']}: {text}" for line in lines for text in _warnings(line)]
        if not code:
            out.print(f"[green]finished[/green] {launch.label}: {_span(todo)} in {seconds:.0f} s")
            continue
        where = f"{launch.label}; log: {escape(str(log))}"
        out.print(f"[red]failed[/red] with exit code {code} after {seconds:.0f} s: {where}")
        if not verbose:
            print(_tail(log), file=sys.stderr)
        for hint in (*hints(log), *(f"missing: {p}" for p in problems())) if code not in (2, 3, 4) else ():
            print(hint, file=sys.stderr)
        reached = {date.fromisoformat(line["run_date"]) for line in lines}
        bad = {date.fromisoformat(line["run_date"]) for line in lines if line["status"] == "failed"}
        single = {d for d in todo if launch.bulk_through is None or d > launch.bulk_through}
        failed |= bad
        # Not tolerable: a failure in the history, or an end before every date was tried.
        if len(failed) > max_failures or not bad or not bad <= single <= reached:
            return code
        first_code = first_code or code
        out.print(f"continuing without {', '.join(map(str, sorted(failed)))}: up to {max_failures} may fail")
    if not started:
        out.print("nothing to do: everything is up to date")
    if warnings:
        out.print(f"[yellow]{len(warnings)} warning{'s' * (len(warnings) > 1)}:[/yellow]")
        for warning in warnings:
            out.print(f"  {escape(warning)}")
    return first_code or (ContractError.exit_code if warnings and fail_on_alarm else 0)


def _refuse_blocked(planner: Planner, launch: Launch, dates: Sequence[date], force: bool) -> None:
    """MissingInputError when the first step of `launch` has no input for any date: no launcher is started for that."""
    reasons = []
    for day in dates:
        state = planner.state(launch.steps[0], day)
        if state.may_run(force=force):
            return
        reasons.append(state.reason)
    raise MissingInputError(reasons[0])


def _stale(planner: Planner, launch: Launch, dates: Sequence[date]) -> Iterator[str]:
    """Why steps that were done once run again; of the first dates: those after them most often say the same."""
    for day in dates[:_MOST_REASONS]:
        for step in launch.steps:
            if (state := planner.state(step, day)).status == "stale":
                yield f"{step.name} {day}: {state.reason}"


def _run_with_progress(
    console: Console, launch: Launch, dates: int, arguments: Sequence[str], config: Config, log: Path, verbose: bool
) -> tuple[int, list[dict[str, Any]]]:
    """Run one launch under a progress bar (on a terminal) and print each step's result; returns exit code and lines."""
    lines: list[dict[str, Any]] = []
    with Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
        console=console, transient=True, disable=verbose or not console.is_terminal,
    ) as bar:  # fmt: skip
        task = bar.add_task(escape(launch.label), total=dates * len(launch.steps))

        def on_line(line: dict[str, Any]) -> None:
            lines.append(line)
            _print_result(console, line)
            bar.advance(task)

        return _launch(arguments, config, log, verbose, on_line), lines


def _launch(
    arguments: Sequence[str], config: Config, log: Path, verbose: bool, on_line: Callable[[dict[str, Any]], None]
) -> int:
    """Run one command; its output goes to `log`, each step's JSON line to `on_line`; returns the exit code.

    verbose: stderr goes to the terminal, and not to `log`.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    env = {**os.environ, **environment(config)}
    if shutil.which(arguments[0]) is None:
        raise UsageError(
            f"{arguments[0]} is not on PATH: pip install the project with its extras spark and gpu, or run gpl in an "
            "environment that has them"
        )
    ended: list[int] = []
    process: subprocess.Popen[str] | None = None

    def end(number: int, frame: object) -> None:
        """The launcher, and what it has started, must end too; it raises nothing, which Python might swallow."""
        ended.append(number)
        if process is not None:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM if len(ended) == 1 else signal.SIGKILL)

    handlers = {number: signal.signal(number, end) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with log.open("w", encoding="utf-8") as sink:
            process = supervised(arguments, env=env, stdout=subprocess.PIPE, stderr=None if verbose else sink)
            try:
                if ended:  # before there was a process to end
                    os.killpg(process.pid, signal.SIGTERM)
                assert process.stdout is not None
                for line in process.stdout:
                    sink.write(line)
                    sink.flush()
                    if verbose:
                        print(line, end="")
                    if (report := _step_line(line)) is not None:
                        on_line(report)
                code = process.wait()
            except BaseException:
                os.killpg(process.pid, signal.SIGTERM)
                process.wait()
                raise
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler or signal.SIG_DFL)
    if signal.SIGINT in ended:
        raise KeyboardInterrupt(
            "interrupted: committed results are kept, and partial results are never read; run the same command to "
            f"continue; log: {log}"
        )
    if ended:
        sys.exit(128 + ended[0])
    return code


def _step_line(line: str) -> dict[str, Any] | None:
    """The JSON line of a step (see `JobRun.end`), None for anything else that a launcher or library prints."""
    try:
        body = json.loads(line) if line.startswith("{") else None
    except ValueError:
        return None
    return body if isinstance(body, dict) and {"step", "run_date", "status", "seconds"} <= body.keys() else None


def _print_result(console: Console, line: dict[str, Any]) -> None:
    parts = [f"  {line['step']} {line['run_date']}: {line['status']}"]
    if line["status"] == "done":
        parts.append(counted(line["rows_out"], "row"))
        parts += [f"{line['rows_quarantined']:,} quarantined"] if line["rows_quarantined"] else []
        parts.append(f"{line['seconds']:.1f} s")
    if line["status"] == "failed":
        parts.append(f"{line['error_class']}")
    console.print(", ".join(parts))
    for warning in _warnings(line):
        console.print(f"    [yellow]warning[/yellow] {escape(warning)}")


def _warnings(line: dict[str, Any]) -> list[str]:
    """What a step's JSON line warns of; the monitors' warnings are among it."""
    return list(line.get("details", {}).get("warnings", ()))


def _span(dates: Sequence[date]) -> str:
    return str(dates[0]) if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"


def _tail(log: Path, lines: int = 40) -> str:
    """The errors that the steps told, each with the indented lines below it; without one the last lines."""
    text = log.read_text(encoding="utf-8", errors="replace")
    errors = re.findall(r"^error:.*(?:\n[ \t].*)*", text, re.MULTILINE)
    return "\n".join(errors or text.splitlines()[-lines:])
