"""The graph in this process: the session of the tests' Spark, and this process as the workers' only rank."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import date

import torch
from pyspark.sql import SparkSession

from gpl_core.config import Config
from gpl_core.graph.arguments import StepArguments
from gpl_core.graph.launches import plan
from gpl_core.graph.planner import Planner
from gpl_core.graph.step_run import StepContext, run_step, run_steps
from gpl_core.graph.steps import find_step
from gpu_workers.ranks import Ranks
from gpu_workers.worker import worker_of
from spark_jobs.run import job_of, run_body


def run_graph(
    config: Config, spark: SparkSession, rank: Ranks, dates: Sequence[date], only: Sequence[str] = ()
) -> None:
    """What `gpl run` launches for `dates`, without the launchers."""
    for launch in plan(Planner(config), dates, only=only):
        args = StepArguments(config, launch.dates, "in-process", bulk_through=launch.bulk_through)

        def run_one(name: str, some: Sequence[date], args: StepArguments = args) -> None:
            def body(context: StepContext) -> None:
                if find_step(name).launcher == "spark":
                    run_body(spark, context, job_of(name))
                else:
                    worker_of(name)(context, rank)

            torch.manual_seed(config.run.seed)
            run_step(Planner(config), name, some, args, body)

        assert run_steps([s.name for s in launch.steps], args, run_one) == 0
