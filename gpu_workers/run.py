"""Several worker steps in one launch: what `gpl run` starts for workers that follow each other.

deepspeed … gpu_workers/run.py --steps train_tokenizer,assign_sids --config CONFIG --run-date D
"""

import importlib

from gpl_core.errors import UsageError
from gpl_core.graph.arguments import parse_arguments
from gpl_core.graph.steps import find_step
from gpu_workers.worker import WorkerBody, run_workers


def worker_of(name: str) -> WorkerBody:
    """The `run` function of the worker `name`; UsageError when the step is not a GPU worker."""
    if find_step(name).launcher != "deepspeed":
        raise UsageError(f"step {name} is a Spark job: start it with spark-submit spark_jobs/{name}.py")
    body: WorkerBody = importlib.import_module(f"gpu_workers.{name}").run
    return body


def main() -> None:
    """Entry point."""
    run_workers(
        lambda args: {name: worker_of(name) for name in args.steps}, lambda: parse_arguments("run.py", several=True)
    )


if __name__ == "__main__":
    main()
