"""The graph in one process: one Spark session, and the process itself as the workers' only rank."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from datetime import date

import torch
from pyspark.sql import SparkSession

from gpl_core.config import Config, load_config
from gpl_core.graph.arguments import StepArguments
from gpl_core.graph.launches import plan
from gpl_core.graph.planner import Planner
from gpl_core.graph.step_run import StepContext, run_step, run_steps
from gpl_core.graph.steps import find_step
from gpu_workers.ranks import Ranks, start_ranks
from gpu_workers.worker import worker_of
from spark_jobs.run import job_of, run_body
from spark_jobs.session import start_session

ONE_RANK = {
    "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0",
    "DS_ACCELERATOR": "cpu",
}  # fmt: skip
"""The environment of a worker that is alone."""


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


def main() -> None:
    """What a script for spark-submit calls: its arguments are a configuration and a date."""
    os.environ.update(ONE_RANK)
    run_graph(load_config(sys.argv[1]), start_session("graph"), start_ranks(), [date.fromisoformat(sys.argv[2])])
