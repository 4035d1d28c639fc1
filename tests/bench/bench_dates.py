"""Many dates of a small platform: seconds of Spark's steps, date by date, from raw tables to feed and report.

The real pipeline over a simulated marketplace of some 10^4 impressions a day, as `gpl run` launches it: a JVM per
launch, each launch over all dates. Seconds are those that steps wrote into job_runs, without the start of their
processes. The pre-ranker is left out: nothing of Spark follows it but the report's own reading of it.

    python -m tests.bench.bench_dates [--dates 20] [--quick] [--work FOLDER]
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections import defaultdict
from datetime import date, timedelta
from pathlib import Path

import gpl_core as gpl
from gpl_core.graph.steps import STEPS
from tests.bench.harness import Figure, at_most, report

FIRST = date(2026, 1, 3)
SECONDS_PER_DATE = 15.0  # five minutes for twenty dates
LEFT_OUT = ("train_preranker", "evaluate_truth")


def main() -> None:
    """Simulate, run, read job_runs."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--dates", type=int, default=20)
    parser.add_argument("--quick", action="store_true", help="four dates")
    parser.add_argument("--work", type=Path, help="keep the lakehouse in this folder, and go on from what is done")
    args = parser.parse_args()
    count = 4 if args.quick else args.dates
    with tempfile.TemporaryDirectory() as name:
        root = (args.work or Path(name)) / "lakehouse"
        settings = [
            f"lakehouse.root={root}", f"run.start_date={FIRST}", f"run.end_date={FIRST + timedelta(days=count - 1)}",
            "tokenizer.refresh_days=365", "interest.refresh_days=365",
            "launch.spark_submit=[--master, 'local[2]', --driver-memory, 8g]",  # what `gpl init` writes on two cores
        ]  # fmt: skip
        given = [a for s in settings for a in ("--set", s)]
        gpl_(["simulate", "--config", "quickstart", *given, "--users", "1000"])
        only = [a for s in STEPS if not s.command and s.name not in LEFT_OUT for a in ("--only", s.name)]
        gpl_(["run", "--config", "quickstart", *given, *only])
        figures = measured(root, settings, count)
    report("dates", figures, args.quick, f"{count} dates of a small platform, Spark on two cores")


def gpl_(arguments: list[str]) -> None:
    """A command in a process of its own, as its user starts it."""
    subprocess.run([sys.executable, "-m", "gpl_core.cli", *arguments], check=True)


def measured(root: Path, settings: list[str], count: int) -> dict[str, Figure]:
    """Seconds of Spark over the run dates, all and by step: of all dates, the first, and the last five's mean."""
    lake = gpl.open_lakehouse("quickstart", settings)
    runs = lake.sql("SELECT step, run_date, seconds FROM job_runs WHERE status = 'done' ORDER BY run_date").to_pylist()
    spark = {s.name for s in STEPS if s.launcher == "spark"}
    last = FIRST + timedelta(days=count - 1)
    seconds: dict[str, list[float]] = defaultdict(list)
    for row in runs:
        if row["step"] in spark and FIRST <= row["run_date"] <= last:
            seconds[row["step"]].append(row["seconds"])
    labels = sum(sum(s) for name, s in seconds.items() if name != "report")
    shown = lake.sql(f"SELECT count(*) AS n FROM impressions WHERE dt >= DATE '{FIRST}'").to_pylist()[0]["n"]
    figures = {
        "impressions a day": Figure(shown / (count + 1), "rows"),
        "Spark, raw tables to feed": at_most(labels, SECONDS_PER_DATE * count, "s"),
        "report": Figure(sum(seconds["report"]), "s"),
    }
    for name, each in seconds.items():
        figures[f"{name}: all dates"] = Figure(sum(each), "s")
        figures[f"{name}: first date"] = Figure(each[0], "s")
        figures[f"{name}: a date, mean of the last five"] = Figure(sum(each[-5:]) / len(each[-5:]), "s")
    return figures


if __name__ == "__main__":
    main()
