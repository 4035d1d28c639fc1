"""What each Spark job costs at 1x, 4x and 16x, against a floor job that only moves the same bytes.

16x is 21 million candidate rows on one date (`tests.bench.spark.marketplace`): Zipf users, one of them with 10^6
candidates. Per job: CPU seconds of the JVM (driver and executor are one, code compilation and garbage collection
count), seconds, bytes shuffled and spilled, the largest memory of a task, files and rows written, what came back to the
driver, and the slowest task's CPU seconds against the median one's, in stages of at least eight tasks and at least two
seconds for the slowest. All from Spark's own event log, but for the JVM's CPU seconds.

The floor of a job reads the same columns of the same slices, shuffles each row of what the job has to bring together
once, and writes the same output. It is given the output by reading it back, which is measured alone and taken off.

Then one date more, on which 1 % of the users changed: cost of `sequences` and `anchor_requests` above their fixed cost
(a marketplace of 1/64) as a share of the full job's.

    python -m tests.bench.bench_spark_scale [--quick] [--work FOLDER]

A full run takes some 30 minutes of one core's time and 10 GB of disk. `--quick`: sizes of 1/64, 1/16 and 1/4.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from gpl_core.graph.launches import DELTA_PACKAGE
from gpl_core.graph.steps import find_step
from spark_jobs.session import start_session
from tests.bench.harness import Figure, at_most, device_name, growth_exponent, report
from tests.bench.spark.marketplace import CANDIDATES, HISTORY, TWICE, WINDOW, D, Marketplace

REQUESTS = 12_500  # at 1x: 1.3 million candidate rows
FULL, QUICK = (1.0, 4.0, 16.0), (1 / 64, 1 / 16, 1 / 4)
TINY = 1 / 64
PARTITIONS = 32
CHANGED = 0.01


# ---- the floor -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Moved:
    """An input of a floor: columns of a table, over `days` dates up to D (0: all of it), shuffled by `by` or not."""

    table: str
    columns: tuple[str, ...]
    by: tuple[str, ...] = ()
    days: int = 1
    before: bool = False  # the dates before D, without D


_EVENT = ("request_id", "item_id", "user_id", "event_time")
_PAIR = ("user_id", "item_index")
_SCORED = (
    Moved("unexposed_samples", _PAIR, _PAIR), Moved("exposed_samples", (*_PAIR, "request_id", "item_id", "is_random")),
)  # fmt: skip
_SEQUENCE = ("user_id", "sid", "item_index", "length", "last_event_time", "sequence_hash", "sid_version")
# What each job reads, and what it has to bring together: a floor shuffles that once and nothing else.
FLOORS: Mapping[str, tuple[Moved, ...]] = {
    "ingest": (
        Moved("raw_candidates", (*_EVENT, "channel", "recall_score", "dt"), ("request_id", "item_id")),
        Moved("raw_impressions", (*_EVENT, "position", "clicked", "is_random", "dt"), ("request_id", "item_id")),
        Moved("raw_interactions", ("user_id", "item_id", "event_time", "kind", "dt"), ("user_id", "item_id")),
        Moved("raw_items", ("item_id", "title", "updated_at"), ("item_id",), days=0),
    ),
    "samples": (
        Moved("candidates", (*_EVENT, "item_index", "channel"), ("request_id",)),
        Moved("impressions", (*_EVENT, "item_index", "position", "clicked", "is_random")),
        Moved("impressions", _PAIR, _PAIR, days=WINDOW - 1, before=True),
    ),
    "sequences": (
        Moved("interactions", (*_PAIR, "item_id", "event_time", "kind"), ("user_id",), days=HISTORY, before=True),
        Moved("impressions", (*_PAIR, "clicked"), days=WINDOW, before=True),
        Moved("item_sids", ("item_index", "sid", "sid_version"), days=0),
    ),
    "anchor_requests": (*_SCORED, Moved("user_sequences", _SEQUENCE, ("user_id",))),
    "score_requests": (
        *_SCORED, Moved("user_sequences", _SEQUENCE, ("user_id",)),
        Moved("interest_anchors", ("user_id", "sequence_hash", "anchor_sids", "log_prob", "prefixes",
                                   "prefix_log_probs"), ("user_id",)),
    ),
    "fit_calibrator": (
        Moved("pair_scores", (*_PAIR, "source", "prefix_log_prob", "model_version"), ("user_id",)),
        Moved("user_stats", ("user_id", "impressions", "clicks"), ("user_id",)),
        Moved("unexposed_samples", _PAIR, _PAIR),
    ),
    "pseudo_labels": (
        Moved("pair_scores", (*_PAIR, "source", "similarity", "history_similarity", "prefix_log_prob", "anchor_rank",
                              "coherence", "consistency", "llm_confidence", "model_version", "sid_version"),
              ("user_id",)),
        Moved("user_stats", ("user_id", "impressions", "clicks"), ("user_id",)),
        Moved("items", ("item_index", "item_id"), days=0),
    ),
    "training_feed": (
        Moved("exposed_samples", (*_EVENT, "item_index", "label", "position", "is_random"), ("request_id",)),
        Moved("unexposed_samples", (*_EVENT, "item_index", "channel", "sampling_probability"), ("request_id",)),
        Moved("pseudo_labels", (*_PAIR, "source", "pseudo_label", "weight", "coherence", "consistency",
                                "llm_confidence", "model_version", "sid_version", "calibrator_version"), _PAIR),
        Moved("item_sids", ("item_index", "sid", "sid_version"), days=0),
    ),
}  # fmt: skip


def read(market: Marketplace, moved: Moved) -> DataFrame:
    """The rows and columns that `moved` names."""
    frame = market.spark.read.format("delta").load(market.lake.uri(moved.table))
    if moved.days and "dt" in frame.columns:
        last = D - timedelta(days=moved.before)
        frame = frame.where(F.col("dt").between(F.lit(last - timedelta(days=moved.days - 1)), F.lit(last)))
    return frame.select(*moved.columns)


def away(frame: DataFrame) -> None:
    """Compute every row and write none."""
    frame.write.format("noop").mode("overwrite").save()


# ---- what it cost --------------------------------------------------------------------------------------------------


@dataclass
class Cost:
    """CPU seconds of the JVM, seconds, and what Spark's tasks say (see the module)."""

    cpu: float = 0.0
    tasks: float = 0.0  # CPU seconds of the tasks: neither code compilation nor garbage collection
    seconds: float = 0.0
    shuffled: int = 0
    spilled: int = 0
    memory: int = 0
    returned: int = 0
    slowest: float = 0.0  # not measured: no stage was large enough


class Meter:
    """Costs of named pieces of work in one session, the tasks' part read from its event log after it has ended."""

    def __init__(self, spark: SparkSession, log: Path):
        self.spark, self.log = spark, log
        self.costs: dict[str, Cost] = {}

    def cpu(self) -> float:
        """CPU seconds of the JVM so far."""
        info = self.spark._jvm.java.lang.ProcessHandle.current().info()
        return info.totalCpuDuration().get().toNanos() / 1e9

    @contextmanager
    def measured(self, name: str) -> Iterator[None]:
        """Count what the block does under `name`; blocks of one name add up."""
        self.spark._jvm.java.lang.System.gc()  # no job pays for the one before it
        self.spark.sparkContext.setJobGroup(name, name)
        cpu, start = self.cpu(), time.perf_counter()
        yield
        cost = self.costs.setdefault(name, Cost())
        cost.cpu += self.cpu() - cpu
        cost.seconds += time.perf_counter() - start
        self.spark.sparkContext.setJobGroup("", "")  # what is made for the next job is nobody's
        print(f"  {name}: {cost.cpu:.1f} CPU s, {cost.seconds:.1f} s", flush=True)

    def finish(self) -> dict[str, Cost]:
        """Stop the session and add what its tasks say."""
        self.spark.stop()
        groups: dict[int, str] = {}
        tasks: dict[tuple[str, int], list[float]] = {}
        for path in self.log.rglob("events_*"):  # beside them: checksums and a file that tells the application's state
            for text in path.read_text(encoding="utf-8").splitlines():
                event = json.loads(text)
                if event["Event"] == "SparkListenerStageSubmitted":
                    stage = event["Stage Info"]["Stage ID"]
                    groups[stage] = (event.get("Properties") or {}).get("spark.jobGroup.id", "")
                if event["Event"] == "SparkListenerTaskEnd" and event.get("Task Metrics"):
                    name, metrics = groups.get(event["Stage ID"], ""), event["Task Metrics"]
                    if name not in self.costs:
                        continue
                    cost = self.costs[name]
                    cost.tasks += metrics["Executor CPU Time"] / 1e9
                    cost.shuffled += metrics["Shuffle Write Metrics"]["Shuffle Bytes Written"]
                    cost.spilled += metrics["Disk Bytes Spilled"]
                    cost.memory = max(cost.memory, metrics["Peak Execution Memory"])
                    cost.returned += metrics["Result Size"]
                    tasks.setdefault((name, event["Stage ID"]), []).append(metrics["Executor CPU Time"] / 1e9)
        for (name, _), times in tasks.items():
            if len(times) >= 8 and max(times) >= 2.0:
                self.costs[name].slowest = max(self.costs[name].slowest, max(times) / statistics.median(times))
        return self.costs


def run_size(meter: Meter, root: Path, size: float, incremental: bool) -> dict[str, tuple[int, int]]:
    """All jobs and their floors over a marketplace of `size`: rows and files that each job wrote."""
    market = Marketplace(root, meter.spark, int(REQUESTS * size))
    print(f"{size:g}x: {market.requests:,} requests", flush=True)
    written: dict[str, tuple[int, int]] = {}
    market.raw()

    def job(name: str) -> None:
        with meter.measured(f"{size:g}x {name}"):
            market.run(name)
        outputs = find_step(name).writes
        files = [f for t in outputs for f in market.lake.open(t).select(start=D, end=D)]
        written[name] = sum(f.rows for f in files), len(files)
        with meter.measured(f"{size:g}x {name} floor"):
            for moved in FLOORS[name]:
                frame = read(market, moved)
                away(frame.repartition(PARTITIONS, *moved.by) if moved.by else frame)
        for number, table in enumerate(outputs):
            slice_ = meter.spark.read.format("delta").load(market.lake.uri(table)).where(F.col("dt") == F.lit(D))
            slice_.inputFiles()  # the log is read here, and counted nowhere
            with meter.measured(f"{size:g}x {name} read back"):
                away(slice_)
            with meter.measured(f"{size:g}x {name} floor"):
                slice_.write.format("delta").partitionBy("dt").save(str(root / "floor" / f"{name}{number}"))
        shutil.rmtree(root / "floor", ignore_errors=True)

    job("ingest")
    market.history()
    job("samples")
    job("sequences")
    job("anchor_requests")
    market.anchors(1.0)
    job("score_requests")
    market.scores()
    job("fit_calibrator")
    job("pseudo_labels")
    job("training_feed")
    if incremental:
        # All but 1 % of the users are in the cache; then a date on which 1 % of them have an event.
        few = Marketplace(market.root, market.spark, market.requests)
        meter.spark.sql(f"DELETE FROM delta.`{few.lake.uri('interest_anchors')}`")
        few.anchors(1 - CHANGED)
        with meter.measured(f"{size:g}x anchor_requests, 1 % changed"):
            few.run("anchor_requests")
        few.news(D, CHANGED)
        with meter.measured(f"{size:g}x sequences, 1 % changed"):
            few.run("sequences", D + timedelta(days=1))
        base, new = (len_of(few, "user_sequences", D + timedelta(days=i)) for i in (0, 1))
        print(f"  {new:,} of {base:,} users have a new sequence", flush=True)
    shutil.rmtree(root)
    return written


def len_of(market: Marketplace, table: str, day: Any) -> int:
    """Rows of one date by the table's log."""
    return sum(f.rows for f in market.lake.open(table).select(start=day, end=day))


def figures(sizes: tuple[float, ...], costs: Mapping[str, Cost], written: Mapping[float, Mapping[str, tuple[int, int]]]
            ) -> dict[str, Figure]:  # fmt: skip
    """Goals of every job, then what it cost at each size."""
    last = sizes[-1]
    out: dict[str, Figure] = {}
    for name in FLOORS:
        each = [costs[f"{s:g}x {name}"] for s in sizes]
        floor = costs[f"{last:g}x {name} floor"]
        back = costs.get(f"{last:g}x {name} read back", Cost())
        out[f"{name}: CPU of the floor's, {last:g}x"] = at_most(each[-1].cpu / (floor.cpu - back.cpu), 2.5, "x")
        out[f"{name}: exponent of growth"] = at_most(growth_exponent(sizes, [c.cpu for c in each]), 1.05, "")
        if each[-1].slowest:
            out[f"{name}: slowest task of the median's"] = at_most(each[-1].slowest, 3.0, "x")
    for name in ("anchor_requests", "sequences"):
        full, fixed = costs[f"{last:g}x {name}"], costs[f"tiny {name}, 1 % changed"]
        part = costs[f"{last:g}x {name}, 1 % changed"]
        share = (part.cpu - fixed.cpu) / (full.cpu - costs[f"tiny {name}"].cpu)
        out[f"{name}: 1 % changed, above fixed cost"] = at_most(share, 0.05, "of full")
        out[f"{name}: 1 % changed, CPU of tasks"] = Figure(part.tasks / full.tasks, "of full")
    for name in FLOORS:
        for size in sizes:
            cost = costs[f"{size:g}x {name}"]
            rows, files = written[size][name]
            for what, value, unit in (
                ("CPU", cost.cpu, "s"), ("CPU of tasks", cost.tasks, "s"), ("wall", cost.seconds, "s"),
                ("shuffled", cost.shuffled / 1e6, "MB"),
                ("spilled", cost.spilled / 1e6, "MB"), ("largest task memory", cost.memory / 1e6, "MB"),
                ("returned to the driver", cost.returned / 1e6, "MB"), ("rows", rows, "rows"),
                ("files", files, "files"),
                ("floor CPU", costs[f"{size:g}x {name} floor"].cpu
                 - costs.get(f"{size:g}x {name} read back", Cost()).cpu, "s"),
            ):  # fmt: skip
                out[f"{name}, {size:g}x: {what}"] = Figure(value, unit)
    return {**totals(out, last), **out}


def totals(each: Mapping[str, Figure], size: float) -> dict[str, Figure]:
    """All jobs together at `size`: against their floors, and core-hours for 10^9 rows if cost grows as the rows do."""
    cpu, floor = (sum(each[f"{name}, {size:g}x: {of}"].value for name in FLOORS) for of in ("CPU", "floor CPU"))
    rows = int(REQUESTS * size) * (CANDIDATES + TWICE)
    return {
        f"all jobs: CPU of the floors', {size:g}x": at_most(cpu / floor, 2.0, "x"),
        "all jobs: core-hours per 10^9 candidate rows": at_most(cpu / 3600 * 1e9 / rows, 10.0, "core-hours"),
    }


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="the same comparison at a smaller size")
    parser.add_argument("--work", type=Path, help="where the lakehouses are made and removed again")
    args = parser.parse_args()
    sizes = QUICK if args.quick else FULL
    with tempfile.TemporaryDirectory(dir=args.work) as name:
        work = Path(name)
        (work / "events").mkdir()
        os.environ.setdefault("SPARK_LOCAL_IP", "127.0.0.1")
        os.environ.setdefault("PYSPARK_PYTHON", sys.executable)
        os.environ["PYSPARK_SUBMIT_ARGS"] = shlex.join(
            ["--master", "local[2]", "--driver-memory", "5g", "--packages", DELTA_PACKAGE,
             "--conf", f"spark.sql.shuffle.partitions={PARTITIONS}", "--conf", f"spark.local.dir={work}/spill",
             # What start_session sets where it sees a launcher with a local master.
             "--conf", "spark.databricks.delta.snapshotPartitions=2", "--conf", "spark.ui.enabled=false",
             "--conf", "spark.eventLog.enabled=true", "--conf", "spark.eventLog.compress=false",
             "--conf", f"spark.eventLog.dir=file://{work}/events", "pyspark-shell"]
        )  # fmt: skip
        meter = Meter(start_session("bench_spark_scale"), work / "events")
        run_size(meter, work / "warm", TINY, incremental=True)  # the JVM compiles what it needs
        meter.costs.clear()
        run_size(meter, work / "tiny", TINY, incremental=True)
        meter.costs = {f"tiny {k.split('x ', 1)[1]}": c for k, c in meter.costs.items()}
        written = {s: run_size(meter, work / f"size{s:g}", s, incremental=s == sizes[-1]) for s in sizes}
        costs = meter.finish()
    title = f"Spark jobs at {', '.join(f'{s:g}x' for s in sizes)} of 1.3 million candidate rows, {device_name()}"
    report("spark_scale", figures(sizes, costs, written), args.quick, title)


if __name__ == "__main__":
    main()
