"""`gpl register`: a Spark job that asks the catalog for raw tables and names our tables in it."""

import argparse
import os

from gpl_core.commands.command import Command, source
from gpl_core.config import Config
from gpl_core.graph.launches import environment, shell, spark_submit
from gpl_core.graph.supervisor import supervised


def run(args: argparse.Namespace, config: Config) -> int:
    """Start the job; returns its exit code."""
    arguments = spark_submit(config, "spark_jobs/register.py", source(args).arguments())
    print(f"$ {shell(arguments, environment(config))}", flush=True)
    return supervised(arguments, env={**os.environ, **environment(config)}).wait()


COMMAND = Command(
    "register", "look up the raw tables in Spark's catalog, and register our tables in lakehouse.database", run,
    in_shadow=False,
    examples=("--config shop.yaml",),
)  # fmt: skip
