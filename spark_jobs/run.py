"""Several Spark steps in one session: what `gpl run` launches for steps that follow each other.

spark-submit … spark_jobs/run.py --steps samples,sequences --config CONFIG --run-date D
"""

from __future__ import annotations

import importlib

from gpl_core.errors import UsageError
from gpl_core.graph.arguments import parse_arguments
from gpl_core.graph.steps import find_step
from spark_jobs.session import Job, run_jobs


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
