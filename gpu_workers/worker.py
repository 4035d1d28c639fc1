"""The life cycle of worker steps under the DeepSpeed launcher."""

import gc
import importlib
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import date
from functools import partial

import torch
import torch.distributed as dist

from gpl_core.errors import GplError, UsageError
from gpl_core.graph.arguments import parse_arguments
from gpl_core.graph.planner import Planner
from gpl_core.graph.step_run import StepContext, exit_with, run_step, run_steps, setup_logging
from gpl_core.graph.steps import find_step
from gpu_workers.ranks import PeerError, Ranks, is_agreed, start_ranks

WorkerBody = Callable[[StepContext, Ranks], None]


def worker_main(name: str, body: WorkerBody, argv: Sequence[str] | None = None) -> None:
    """Entry point of one worker; exits the process with the exit code."""
    run_workers(name, {name: body}, argv)


def run_workers(program: str, given: Mapping[str, WorkerBody] | None = None, argv: Sequence[str] | None = None) -> None:
    """Join the ranks, run steps in order over the dates, exit the process with the agreed exit code.

    given: step -> body; None: those that --steps names. The launcher kills the peers of the first rank that exits, so
    work that may fail on one rank belongs inside `Ranks.together()`: then all ranks exit with one code, after rank 0
    has recorded the failure.
    """
    setup_logging()
    try:
        args = parse_arguments(program, argv, several=given is None)
        bodies = {name: worker_of(name) for name in args.steps} if given is None else given
    except GplError as error:
        sys.exit(exit_with(error))
    ranks = start_ranks()
    gc.freeze()  # what is imported stays: the collections between steps pass over it
    agreed = True
    try:
        args = replace(args, run_id=ranks.broadcast_text(args.run_id))

        def run_one(name: str, dates: Sequence[date]) -> None:
            # The same start for a step whatever has run before it in this process.
            torch.manual_seed(args.config.run.seed)
            run_step(Planner(args.config), name, dates, args, partial(_run_body, bodies[name], ranks), ranks)
            gc.collect()
            if ranks.device.type == "cuda":
                torch.cuda.empty_cache()

        code = run_steps(tuple(bodies), args, run_one, is_fatal=lambda error: not is_agreed(error))
    except Exception as error:
        code = error.exit_code if isinstance(error, PeerError) else exit_with(error)
        agreed = is_agreed(error)
    sys.stdout.flush()
    sys.stderr.flush()
    if agreed:  # otherwise exit at once: the launcher ends the peers that wait for this rank
        dist.barrier()
        dist.destroy_process_group()
    os._exit(code)  # reader threads of a failed feed must not keep the process alive


def worker_of(name: str) -> WorkerBody:
    """The `run` function of the worker `name`; UsageError when the step is not a GPU worker."""
    if find_step(name).launcher != "deepspeed":
        raise UsageError(f"step {name} is a Spark job: start it with spark-submit spark_jobs/{name}.py")
    body: WorkerBody = importlib.import_module(f"gpu_workers.{name}").run
    return body


def _run_body(body: WorkerBody, ranks: Ranks, context: StepContext) -> None:
    """Run `body` and count what it cost."""
    counts, clock, cpu = context.counts, time.monotonic(), time.process_time()
    if ranks.is_main:
        counts.bytes_in = context.input_bytes
    try:
        body(context, ranks)
        counts.core_seconds = ranks.sum(time.process_time() - cpu)
    finally:
        if ranks.device.type == "cuda":
            counts.gpu_seconds = ranks.size * (time.monotonic() - clock)
