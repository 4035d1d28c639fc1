"""Started by the launcher in place of `gpu_workers/run.py`: another run ends while this one is under way.

After the state has been sent to all ranks, rank 1 runs the step alone, from beginning to end; rank 0 has begun already.
"""

import os
import tempfile
from pathlib import Path

from gpl_core.graph.step_run import StepContext
from gpu_workers import assign_sids, encode_items, generate_anchors
from gpu_workers.ranks import Ranks
from gpu_workers.worker import WorkerBody, run_workers
from tests.support import run_of


def _elsewhere(root: str, *parts: str) -> Path:
    return Path(tempfile.mkdtemp(), *parts)


def overtaken(body: WorkerBody) -> WorkerBody:
    """`body` with another run of its step inside."""

    def run(context: StepContext, ranks: Ranks) -> None:
        if ranks.rank == 1:
            os.environ["LOCAL_RANK"] = "0"  # of the other run
            # Its scratch is that of another machine: on one machine the second run is refused.
            here, generate_anchors.local_folder = generate_anchors.local_folder, _elsewhere
            alone = Ranks(0, 1, ranks.device)
            end = run_of(context.config, context.step.name, context.run_date, lambda c: body(c, alone), "other")
            os.environ["LOCAL_RANK"], generate_anchors.local_folder = "1", here
            assert end == "done", end
        body(context, ranks)

    return run


for module in (encode_items, assign_sids, generate_anchors):
    module.run = overtaken(module.run)
run_workers("run.py")
