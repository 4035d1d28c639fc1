"""The one form of a benchmark: measure ours and its yardstick in one run, print one table, write one JSON file.

`{name, about, device, commit, when, command, figures: {key: {value, unit, goal, holds}}}` in
`tests/bench/results/<name>.<device>.json`; a missed goal is written as missed.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Figure:
    """One figure of a benchmark.

    goal: text such as ">= 0.7", empty when there is none. holds: whether it was met, None without a goal.
    """

    value: float
    unit: str
    goal: str = ""
    holds: bool | None = None


def at_least(value: float, goal: float, unit: str) -> Figure:
    """A figure whose goal is a lower bound."""
    return Figure(value, unit, f">= {goal:g}", value >= goal)


def at_most(value: float, goal: float, unit: str) -> Figure:
    """A figure whose goal is an upper bound."""
    return Figure(value, unit, f"<= {goal:g}", value <= goal)


def is_quick(argv: Sequence[str] | None = None) -> bool:
    """Whether `--quick` was given; other arguments are refused."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="the same comparison at a smaller size")
    return bool(parser.parse_args(argv).quick)


def interleaved(
    jobs: Mapping[str, Callable[[], object]], repeats: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, list[float]]:
    """Seconds of each job, run in turns so that a busy machine disturbs all alike; one unmeasured turn first.

    clock: `time.process_time` for single-threaded jobs on a machine that others use too.
    """
    for job in jobs.values():
        job()
    seconds: dict[str, list[float]] = {name: [] for name in jobs}
    for _ in range(repeats):
        for name, job in jobs.items():
            start = clock()
            job()
            seconds[name].append(clock() - start)
    return seconds


def median_ratio(numerator: Sequence[float], denominator: Sequence[float]) -> float:
    """Median of the ratios of interleaved repeats."""
    return statistics.median(a / b for a, b in zip(numerator, denominator, strict=True))


def growth_exponent(sizes: Sequence[float], seconds: Sequence[float]) -> float:
    """Slope of log(seconds) over log(size): 1 is linear."""
    import numpy as np

    return float(np.polyfit(np.log(sizes), np.log(seconds), 1)[0])


def device() -> torch.device:
    """The accelerator where there is one (and DS_ACCELERATOR is not cpu), else the CPU."""
    import torch

    return torch.device("cuda" if torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu" else "cpu")


def clock() -> Callable[[], float]:
    """CPU seconds of this process; on an accelerator seconds, once its work is done."""
    if device().type == "cpu":
        return time.process_time

    def synchronized() -> float:
        import torch

        torch.cuda.synchronize()
        return time.perf_counter()

    return synchronized


def device_name() -> str:
    """`cpu-<cores>core`, or the accelerator's name."""
    import torch

    if device().type != "cpu":
        return torch.cuda.get_device_name().lower().replace(" ", "-")
    return f"cpu-{len(os.sched_getaffinity(0))}core"


def report(
    name: str, figures: Mapping[str, Figure], quick: bool, title: str, option: str = "", module: str = ""
) -> Path:  # fmt: skip
    """Prints the figures, beyond 40 only those with a goal, and writes the JSON file (see `write`)."""
    device = device_name()
    width = max(map(len, figures))
    print(f"{title} ({device}{', quick' if quick else ''})")
    for key, figure in figures.items():
        if len(figures) > 40 and figure.holds is None:
            continue
        verdict = {None: "", True: "holds", False: "MISSED"}[figure.holds]
        print(f"  {key:<{width}}  {figure.value:>14,.4g} {figure.unit:<12} {figure.goal:<10} {verdict}")
    path = write(name, figures, quick, title, option, module)
    print(f"written: {path}")
    return path


def write(
    name: str, figures: Mapping[str, Figure], quick: bool, title: str, option: str = "", module: str = ""
) -> Path:  # fmt: skip
    """Writes the JSON file; a quick run has a file of its own and never replaces a full one.

    option: `--option value` of the run, where each value has a file of its own. module: when not bench_<name>, with the
    arguments it needs.
    """
    body = {
        "name": name,
        "about": title,
        "device": device_name(),
        "commit": _commit(),
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": f"python -m tests.bench.{module or f'bench_{name}'}{' --quick' * quick}{option and ' ' + option}",
        "python": sys.version.split()[0],
        "load_at_end": os.getloadavg()[0],
        "figures": {key: figure.__dict__ for key, figure in figures.items()},
    }
    path = result_path(name, quick, option)
    path.write_text(json.dumps(body, indent=1) + "\n", encoding="utf-8")
    return path


def written(name: str, quick: bool, title: str) -> dict[str, Figure]:
    """The figures that a run of this commit, device and title has left: what `--resume` need not measure again."""
    path = result_path(name, quick)
    body = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if (body.get("commit"), body.get("about")) != (_commit(), title):
        return {}
    return {key: Figure(**figure) for key, figure in body["figures"].items()}


def result_path(name: str, quick: bool, option: str = "") -> Path:
    """Where the result of a benchmark on this device lies."""
    return RESULTS / f"{name}{option and '.' + option.split()[-1]}{'.quick' if quick else ''}.{device_name()}.json"


def _commit() -> str:
    found = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False, cwd=RESULTS
    )
    return found.stdout.strip() or "unknown"
