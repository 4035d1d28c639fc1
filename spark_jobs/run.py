"""One or several Spark steps in one session: what `gpl run` launches for steps that follow each other.

spark-submit … spark_jobs/run.py --steps samples,sequences --config CONFIG --run-date D
"""

import importlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import date
from typing import Any

import numpy as np
from pyspark.sql import SparkSession

from gpl_core.errors import UsageError
from gpl_core.graph.arguments import parse_arguments
from gpl_core.graph.planner import Planner
from gpl_core.graph.step_run import StepContext, log, run_step, run_steps
from gpl_core.graph.steps import find_step
from spark_jobs.session import exit_after, start_session
from spark_jobs.step import SparkStep

Job = Callable[[SparkStep], None]
_EXECUTOR = "org.apache.spark.status.ExecutorSummaryWrapper"


def job_main(name: str, job: Job) -> None:
    """Entry point of one Spark job; exits the process with the exit code."""
    run_jobs(name, {name: job})


def run_jobs(program: str, given: Mapping[str, Job] | None = None, *, force: bool = False) -> None:
    """Run jobs in order over the dates, in one session; exits the process with the exit code.

    given: step -> job; None: those that --steps names. force: as if --force were among the arguments.
    """

    def run_all() -> int:
        args = parse_arguments(f"{program}.py", several=given is None)
        args = replace(args, force=args.force or force)
        jobs = {name: job_of(name) for name in args.steps} if given is None else given
        spark = None if args.dry_run else start_session(program)

        def run_one(name: str, dates: Sequence[date]) -> None:
            def body(context: StepContext) -> None:
                assert spark is not None  # a dry run runs no body
                run_body(spark, context, jobs[name])

            # A new planner per step and date: it sees what the step before has written.
            run_step(Planner(args.config), name, dates, args, body)

        return run_steps(tuple(jobs), args, run_one)

    exit_after(run_all)


def work_done(spark: SparkSession) -> np.ndarray:
    """Task milliseconds, bytes read, bytes shuffled and tasks of the application's executors, lost ones included.

    Spark's own count, after every event up to now was counted, or ten seconds have passed.
    """
    jvm: Any = spark._jvm
    context = spark.sparkContext._jsc.sc()
    with suppress(Exception):  # a driver that is behind with its events must not fail the step
        context.listenerBus().waitUntilEmpty()
    # As they are stored: `executorList` puts the age of the application in place of the driver's task time.
    kept = context.statusStore().store().view(jvm.java.lang.Class.forName(_EXECUTOR)).iterator()
    counts = []
    while kept.hasNext():
        e = kept.next().info()
        counts.append((e.totalDuration(), e.totalInputBytes(), e.totalShuffleWrite(), e.totalTasks()))
    return np.array(counts, dtype=np.int64).reshape(-1, 4).sum(axis=0)


def _if_known(spark: SparkSession) -> np.ndarray | None:
    """`work_done`; None, and a line in the log, where Spark does not say it: no step must fail for that."""
    try:
        return work_done(spark)
    except Exception as error:
        log.warning("what the step cost is not known: %s", error)
        return None


def run_body(spark: SparkSession, context: StepContext, job: Job) -> None:
    """Run `job` in the session, and count what it cost."""
    before = _if_known(spark)
    try:
        job(SparkStep(spark, context))
    finally:
        counts, after = context.counts, _if_known(spark)
        if before is not None and after is not None:
            milliseconds, counts.bytes_in, shuffled, tasks = np.maximum(0, after - before).tolist()
            counts.core_seconds = milliseconds / 1000
            counts.details["spark"] = {"shuffled_bytes": shuffled, "tasks": tasks}
        spark.catalog.clearCache()  # the next step of the session needs the memory


def job_of(name: str) -> Job:
    """The `run` function of the Spark job `name`; UsageError when the step is not a Spark job."""
    if find_step(name).launcher != "spark":
        raise UsageError(f"step {name} is a GPU worker: start it with deepspeed gpu_workers/{name}.py")
    job: Job = importlib.import_module(f"spark_jobs.{name}").run
    return job


if __name__ == "__main__":
    run_jobs("run")
