"""What it costs to decide what is done after years of daily runs: objects read and time, against ten days.

Every table has that many commits, every kind of artifact that many versions, and the logs were never cleaned. Ours is
`Planner.state` of all steps (what `gpl status`, `gpl plan` and each step begin with), two dates of it; its yardstick is
the same of a lakehouse of ten commits per table. On a local disk the kernel counts what is opened, and the time is that
of the command `gpl status`; on moto's S3 server, whose log counts what is fetched, it is that of the planner. Then how
long queries over all of `job_runs` and `quarantine` take.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from gpl_core.commands.optimize import compact
from gpl_core.config import Config
from gpl_core.contracts.contract import load_contract
from gpl_core.graph.planner import Planner
from gpl_core.graph.steps import STEPS
from gpl_core.lakehouse.lake import Lake
from gpl_core.lakehouse.marks import SliceMark
from gpl_core.lakehouse.query import Query
from tests.bench.harness import Figure, at_most, interleaved, median_ratio, report
from tests.object_store import bucket
from tests.support import DAY, ONE, data_table, legal_rows, put, small_config
from tests.years import aged, opened

FEW = 10
AGES, QUICK_AGES = (1000, 3000), (300, 1000)


def decide(config: Config, dates: int) -> None:
    """What is done, of every step."""
    planner = Planner(config)
    for step in STEPS:
        for number in range(dates):
            planner.state(step, DAY + number * ONE)


def main() -> None:
    """Lakehouses of each age, on one kind of storage."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="the same comparison at a smaller size")
    parser.add_argument("--storage", choices=("disk", "s3"), default="disk")
    args = parser.parse_args()
    ages = QUICK_AGES if args.quick else AGES
    figures: dict[str, Figure] = {}
    (on_disk if args.storage == "disk" else on_s3)(figures, (FEW, *ages), 3 if args.quick else 9)
    title = f"deciding after {' and '.join(map(str, ages))} commits per table, against {FEW}; on {args.storage}"
    report("years", figures, args.quick, title, "" if args.storage == "disk" else "--storage s3")


def on_disk(figures: dict[str, Figure], ages: Sequence[int], repeats: int) -> None:
    """The planner and the command; then queries over all of job_runs and quarantine."""
    with tempfile.TemporaryDirectory() as name:
        configs = {age: small_config(Path(name, str(age))) for age in ages}

        def count(age: int) -> int:
            with opened(Path(name, str(age), "lake")) as found:
                decide(configs[age], 2)
            return len(found)

        measure(figures, configs, 2, count, repeats, status)
    read_back(figures, max(ages) // 3)


def on_s3(figures: dict[str, Figure], ages: Sequence[int], repeats: int) -> None:
    """The planner."""
    requests: list[str] = []
    with tempfile.TemporaryDirectory() as name, bucket(requests) as root:
        configs = {age: small_config(Path(name, str(age)), {"lakehouse": {"root": f"{root}/{age}"}}) for age in ages}

        def count(age: int) -> int:
            decide(configs[age], 2)  # what the server has not logged yet is of aging
            requests.clear()
            decide(configs[age], 2)
            return sum('"GET' in line and "list-type" not in line for line in requests)

        measure(figures, configs, 2, count, repeats)


def measure(
    figures: dict[str, Figure], configs: dict[int, Config], dates: int, count: Callable[[int], int],
    repeats: int, command: Callable[[Config, int], None] | None = None,
) -> None:  # fmt: skip
    """Ages the lakehouses of `configs` and adds the figures of one storage; the goal is of `command` where given."""
    for age, config in configs.items():
        aged(config, age)
    objects = {age: count(age) for age in configs}
    jobs = {"planner": decide, **({"gpl status": command} if command else {})}
    for name, job in jobs.items():
        seconds = interleaved({str(age): partial(job, config, dates) for age, config in configs.items()}, repeats)
        for age in configs:
            figures[f"{name}, {age} commits"] = Figure(statistics.median(seconds[str(age)]), "s")
            if age != FEW:
                ratio = median_ratio(seconds[str(age)], seconds[str(FEW)])
                judged = name == (*jobs,)[-1]
                figures[f"{name}, {age} / {FEW} commits"] = (
                    at_most(ratio, 1.5, "ratio") if judged else Figure(ratio, "ratio")
                )
    for age in configs:
        figures[f"objects, {age} commits"] = Figure(objects[age], "objects")
        if age != FEW:
            ratio = objects[age] / objects[FEW]
            figures[f"objects, {age} / {FEW} commits"] = at_most(ratio, 1.5, "ratio")


def status(config: Config, dates: int) -> None:
    """The command `gpl status` on the file of `config`."""
    last = DAY + (dates - 1) * ONE
    file = Path(config.lakehouse.root).parent / "test.yaml"
    command = [sys.executable, "-m", "gpl_core.cli", "status", "--config", str(file), "--start-date", str(DAY)]
    subprocess.run([*command, "--end-date", str(last)], check=True, stdout=subprocess.DEVNULL)


def read_back(figures: dict[str, Figure], days: int) -> None:
    """Times queries over all of job_runs and quarantine, a file per attempt and two per date, then compacted."""
    queries = {
        "job_runs": "SELECT step, count(*), max(seconds) FROM job_runs GROUP BY step",
        "quarantine": "SELECT dt, failed_checks, count(*) FROM quarantine GROUP BY dt, failed_checks",
    }
    with tempfile.TemporaryDirectory() as name:
        lake, runs, refused = Lake(name), load_contract("job_runs"), load_contract("quarantine")
        attempts = legal_rows(runs, days * len(STEPS))
        for row in attempts:
            row["status"] = "done"
        put(lake, "job_runs", attempts, mode="append", file_rows=1)
        parts = []
        for day in (DAY + number * ONE for number in range(days)):
            with lake.writer(refused, {"dt": day.isoformat()}, dims={}, file_rows=1) as writer:
                writer.write(data_table(refused, legal_rows(refused, 2, partition={"dt": day})))
            parts += writer.parts
        lake.commit(refused, parts, mark=SliceMark("ingest", {}, ""), mode="append")
        for table, query in queries.items():
            figures[f"{table}, {days} days, small files"] = Figure(timed(partial(Query(lake).rows, query)), "s")
        compacting = timed(partial(compact, lake, runs, [], 2**27))
        figures[f"job_runs, {days} days, first compaction"] = Figure(compacting, "s")
        figures[f"job_runs, {days} days, compacted"] = at_most(
            timed(partial(Query(lake).rows, queries["job_runs"])), 5, "s"
        )
        compact(lake, refused, [DAY + number * ONE for number in range(days)], 2**27)
        figures[f"quarantine, {days} days, compacted"] = at_most(
            timed(partial(Query(lake).rows, queries["quarantine"])), 5, "s"
        )


def timed(job: Callable[[], object]) -> float:
    """Seconds that `job` takes."""
    start = time.perf_counter()
    job()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
