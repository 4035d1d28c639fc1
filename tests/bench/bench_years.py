"""What it costs to decide what is done after years of daily runs: objects read and time, against ten days.

Every table has that many commits, every kind of artifact that many versions, and the logs were never cleaned. Ours is
`Planner.state` of all steps (what `gpl status`, `gpl plan` and each step begin with) and the command `gpl status`,
which the goal is about, two dates of each; the yardstick is the same in a lakehouse of ten commits per table. What is
read is counted by the kernel on a local disk, and by the server's log on moto's S3. On the disk, how long queries over
all of `job_runs` and `quarantine` take, too.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from urllib.request import urlopen

from gpl_core.commands.optimize import compact
from gpl_core.config import Config
from gpl_core.contracts.contract import load_contract
from gpl_core.graph.planner import Planner
from gpl_core.graph.steps import STEPS
from gpl_core.lakehouse.lake import Lake
from gpl_core.lakehouse.marks import SliceMark
from gpl_core.lakehouse.query import Query
from tests.bench.harness import Figure, at_most, interleaved, median_ratio, report
from tests.documented import ROOT
from tests.object_store import PROGRAMS, served
from tests.support import DAY, ONE, data_table, legal_rows, put, small_config
from tests.years import aged, opened, past, today

FEW = 10
AGES, QUICK_AGES = (1000, 3000), (300, 1000)


def decide(config: Config) -> None:
    """What is done, of every step, on two dates."""
    planner = Planner(config)
    for step in STEPS:
        for number in range(2):
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
    if args.storage == "s3":
        listings = [f"{figures[f'listings by themselves, {age} commits'].value:.2g}" for age in (FEW, *ages)]
        title += (
            f", where moto looks at all keys of a bucket for each listing: {', '.join(listings)} s of each `gpl status`"
        )
    report("years", figures, args.quick, title, "" if args.storage == "disk" else "--storage s3")


def on_disk(figures: dict[str, Figure], ages: Sequence[int], repeats: int) -> None:
    """The kernel counts; then queries over all of job_runs and quarantine."""
    with tempfile.TemporaryDirectory() as name:
        configs = {age: small_config(Path(name, str(age))) for age in ages}
        for age, config in configs.items():
            aged(config, age)

        def count(age: int) -> int:
            with opened(Path(name, str(age), "lake")) as found:
                decide(configs[age])
            return len(found)

        measure(figures, configs, Path(name), count, repeats)
    read_back(figures, max(ages) // 3)


def on_s3(figures: dict[str, Figure], ages: Sequence[int], repeats: int) -> None:
    """The server's log counts; then its listings by themselves, for each of which it looks at all keys of a bucket."""
    requests: list[str] = []
    with ExitStack() as stack:
        name = stack.enter_context(tempfile.TemporaryDirectory())
        for age in ages:
            past(f"{name}/buckets/lake-{age}", age)
        server = [PROGRAMS / "python", ROOT / "tests" / "filled_store.py", f"{name}/buckets"]
        address = stack.enter_context(served(server, requests))
        roots = {age: {"lakehouse": {"root": f"s3://lake-{age}"}} for age in ages}
        configs = {age: small_config(Path(name, str(age)), root) for age, root in roots.items()}
        for config in configs.values():
            today(config)
        listings: dict[int, list[str]] = {}

        def count(age: int) -> int:
            decide(configs[age])  # what the server has not logged yet is of aging
            requests.clear()
            decide(configs[age])
            read = [line.split('"GET ')[1].split()[0] for line in requests if '"GET' in line]
            listings[age] = [address + place for place in read if "list-type" in place]
            return len(read) - len(listings[age])

        measure(figures, configs, Path(name), count, repeats)
        for age, places in listings.items():
            alone = [timed(lambda places=places: [urlopen(place).read() for place in places]) for _ in range(repeats)]
            figures[f"listings, {age} commits"] = Figure(len(places), "requests")
            figures[f"listings by themselves, {age} commits"] = Figure(statistics.median(alone), "s")


def measure(
    figures: dict[str, Figure], configs: dict[int, Config], folder: Path, count: Callable[[int], int], repeats: int
) -> None:
    """Adds objects and times of one storage; the configuration files are in `folder`, in a folder for each age."""
    objects = {age: count(age) for age in configs}
    jobs: dict[str, dict[str, Callable[[], object]]] = {
        "planner": {str(age): partial(decide, config) for age, config in configs.items()},
        "gpl status": {str(age): partial(status, folder / str(age) / "test.yaml") for age in configs},
    }
    for name, by_age in jobs.items():
        seconds = interleaved(by_age, repeats)
        for age in configs:
            figures[f"{name}, {age} commits"] = Figure(statistics.median(seconds[str(age)]), "s")
            if age != FEW:
                ratio = median_ratio(seconds[str(age)], seconds[str(FEW)])
                figures[f"{name}, {age} / {FEW} commits"] = (
                    at_most(ratio, 1.5, "ratio") if name == "gpl status" else Figure(ratio, "ratio")
                )
    for age in configs:
        figures[f"objects, {age} commits"] = Figure(objects[age], "objects")
        if age != FEW:
            ratio = objects[age] / objects[FEW]
            figures[f"objects, {age} / {FEW} commits"] = at_most(ratio, 1.5, "ratio")


def status(file: Path) -> None:
    """The command `gpl status`, two dates."""
    command = [sys.executable, "-m", "gpl_core.cli", "status", "--config", str(file), "--start-date", str(DAY)]
    subprocess.run([*command, "--end-date", str(DAY + ONE)], check=True, stdout=subprocess.DEVNULL)


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
