"""One or several Spark steps in one session: what `gpl run` launches for steps that follow each other.

spark-submit … spark_jobs/run.py --steps samples,sequences --config CONFIG --run-date D
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import date

from pyspark.sql import SparkSession

from gpl_core.errors import UsageError
from gpl_core.graph.arguments import StepArguments, parse_arguments
from gpl_core.graph.planner import Planner
from gpl_core.graph.step_run import StepContext, run_step, run_steps
from gpl_core.graph.steps import find_step
from spark_jobs.session import exit_after, start_session
from spark_jobs.step import SparkStep

Job = Callable[[SparkStep], None]


def job_main(name: str, job: Job) -> None:
    """Entry point of one Spark job; exits the process with the exit code."""
    run_jobs(name, lambda args: {name: job}, lambda: parse_arguments(f"{name}.py"))


def run_jobs(
    program: str, choose: Callable[[StepArguments], Mapping[str, Job]], parse: Callable[[], StepArguments]
) -> None:
    """Run the chosen jobs in order over the dates, in one session; exits the process with the exit code."""

    def run_all() -> int:
        args = parse()
        jobs = choose(args)
        spark = None if args.dry_run else start_session(program)

        def run_one(name: str, dates: Sequence[date]) -> None:
            def body(context: StepContext) -> None:
                assert spark is not None  # a dry run runs no body
                run_body(spark, context, jobs[name])

            # A new planner per step and date: it sees what the step before has written.
            run_step(Planner(args.config), name, dates, args, body)

        return run_steps(tuple(jobs), args, run_one)

    exit_after(run_all)


@dataclass(frozen=True)
class Work:
    """What an application's executors have done so far, lost ones included: task time in seconds, bytes, tasks."""

    seconds: float
    bytes_in: int
    shuffled: int
    tasks: int

    @staticmethod
    def of(spark: SparkSession) -> Work:
        """Spark's own count, after every event up to now was counted, or ten seconds have passed."""
        context = spark.sparkContext._jsc.sc()
        with suppress(Exception):  # a driver that is behind with its events must not fail the step
            context.listenerBus().waitUntilEmpty()
        executors = context.statusStore().executorList(False)
        each = [executors.apply(i) for i in range(executors.size())]
        return Work(
            sum(e.totalDuration() for e in each) / 1000, sum(e.totalInputBytes() for e in each),
            sum(e.totalShuffleWrite() for e in each), sum(e.totalTasks() for e in each),
        )  # fmt: skip


def run_body(spark: SparkSession, context: StepContext, job: Job) -> None:
    """Run `job` in the session, and count what it cost."""
    before = Work.of(spark)
    try:
        job(SparkStep(spark, context))
    finally:
        after = Work.of(spark)
        counts = context.counts
        counts.core_seconds = max(0.0, after.seconds - before.seconds)
        counts.bytes_in = max(0, after.bytes_in - before.bytes_in)
        counts.details["spark"] = {
            "shuffled_bytes": after.shuffled - before.shuffled, "tasks": after.tasks - before.tasks
        }  # fmt: skip
        spark.catalog.clearCache()  # the next step of the session needs the memory


def job_of(name: str) -> Job:
    """The `run` function of the Spark job `name`; UsageError when the step is not a Spark job."""
    if find_step(name).launcher != "spark":
        raise UsageError(f"step {name} is a GPU worker: start it with deepspeed gpu_workers/{name}.py")
    job: Job = importlib.import_module(f"spark_jobs.{name}").run
    return job


if __name__ == "__main__":
    run_jobs(
        "run", lambda args: {name: job_of(name) for name in args.steps}, lambda: parse_arguments("run.py", several=True)
    )
