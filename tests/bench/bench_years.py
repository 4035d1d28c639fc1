"""What it costs to decide what is done after years of daily runs: objects read and time, against ten days.

Every table has that many commits, every kind of artifact that many versions, and the logs were never cleaned. Ours is
`Planner.state` of all steps (what `gpl status`, `gpl plan` and each step begin with), two dates of it; its yardstick is
the same of a lakehouse of ten commits per table. On a local disk the kernel counts what is opened, and the time is that
of the command `gpl status`; on moto's S3 server, whose log counts what is fetched, it is that of the planner.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from gpl_core.config import Config
from gpl_core.graph.planner import Planner
from gpl_core.graph.steps import STEPS
from tests.bench.harness import Figure, at_most, interleaved, is_quick, median_ratio, report
from tests.object_store import SERVER, bucket
from tests.support import DAY, ONE, small_config
from tests.years import aged, opened

FEW = 10


def decide(config: Config, dates: int) -> None:
    planner = Planner(config)
    for step in STEPS:
        for number in range(dates):
            planner.state(step, DAY + number * ONE)


def main() -> None:
    """Lakehouses of each age on a disk, then on S3."""
    quick = is_quick()
    ages = (300, 1000) if quick else (1000, 3000)
    figures: dict[str, Figure] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        configs = {age: small_config(folder / str(age)) for age in (FEW, *ages)}

        def count_local(age: int) -> list[str]:
            with opened(folder / str(age) / "lake") as found:
                decide(configs[age], 2)
            return found

        measure(figures, "disk", configs, 2, count_local, 5 if quick else 15)
    if not SERVER.exists():
        print(f"no figures of S3: {SERVER} is not there")
    else:
        requests: list[str] = []
        with ExitStack() as stack:
            name = stack.enter_context(tempfile.TemporaryDirectory())
            root = stack.enter_context(bucket(requests))
            configs = {
                age: small_config(Path(name, str(age)), {"lakehouse": {"root": f"{root}/{age}"}})
                for age in (FEW, *ages)
            }

            def count_fetched(age: int) -> list[str]:
                decide(configs[age], 1)  # what the server has not logged yet is of aging
                requests.clear()
                decide(configs[age], 1)
                return [line.split('"')[1] for line in requests if '"GET' in line and "list-type" not in line]

            measure(figures, "S3", configs, 1, count_fetched, 3 if quick else 5)
    report("years", figures, quick, f"deciding after {' and '.join(map(str, ages))} commits per table, against {FEW}")


def measure(
    figures: dict[str, Figure], where: str, configs: dict[int, Config], dates: int, count: Callable[[int], list[str]],
    repeats: int,
) -> None:  # fmt: skip
    """Ages the lakehouses of `configs` and adds the figures of one storage."""
    for age, config in configs.items():
        aged(config, age)
    objects = {age: len(count(age)) for age in configs}
    seconds = interleaved({str(age): partial(decide, config, dates) for age, config in configs.items()}, repeats)
    for age in configs:
        figures[f"{where}: {age} commits, objects"] = Figure(objects[age], "objects")
        figures[f"{where}: {age} commits, time"] = Figure(statistics.median(seconds[str(age)]), "s")
        if age != FEW:
            ratio = objects[age] / objects[FEW]
            figures[f"{where}: objects, {age} / {FEW} commits"] = at_most(ratio, 1.5, "ratio")
            ratio = median_ratio(seconds[str(age)], seconds[str(FEW)])
            figures[f"{where}: time, {age} / {FEW} commits"] = at_most(ratio, 1.5, "ratio")


if __name__ == "__main__":
    main()
