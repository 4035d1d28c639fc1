"""What every worker shares: ranks, seeds, device, the life cycle of a step under the DeepSpeed launcher."""

from __future__ import annotations

import json
import os
import random
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from typing import Any

import deepspeed
import numpy as np
import torch
import torch.distributed as dist

from gpl_core.errors import GplError, MissingInputError, exit_code_of
from gpl_core.graph.arguments import StepArguments, parse_arguments
from gpl_core.graph.dry_run import print_dry_run
from gpl_core.graph.planner import Planner, StepState
from gpl_core.graph.step_run import Begun, Counts, Failures, StepContext, begin, exit_with, log, record, setup_logging
from gpl_core.graph.steps import find_step
from gpl_core.lakehouse.lake import Commit
from gpl_core.lakehouse.marks import SliceMark


@dataclass(frozen=True)
class Ranks:
    """This process among its peers."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Rank 0: the only one that commits, publishes and records."""
        return self.rank == 0

    def broadcast_text(self, text: str) -> str:
        """Rank 0's `text` on every rank (bytes over the wire, no pickle)."""
        if self.size == 1:
            return text
        payload = text.encode() if self.is_main else b""
        size = torch.tensor([len(payload)], dtype=torch.int64, device=self.device)
        dist.broadcast(size, 0)
        if not int(size):  # torch makes no buffer of nothing
            return ""
        buffer = torch.zeros(int(size), dtype=torch.uint8, device=self.device)
        if self.is_main:
            buffer.copy_(torch.frombuffer(bytearray(payload), dtype=torch.uint8))
        dist.broadcast(buffer, 0)
        return bytes(buffer.cpu().numpy()).decode()

    def gather_text(self, text: str) -> list[str]:
        """Every rank's `text`, in rank order, on every rank."""
        if self.size == 1:
            return [text]
        data = text.encode()
        # torch makes no buffer of nothing: at least one byte travels, its length says whether it counts
        payload = torch.frombuffer(bytearray(data or b" "), dtype=torch.uint8).to(self.device)
        sizes = [torch.zeros(1, dtype=torch.int64, device=self.device) for _ in range(self.size)]
        dist.all_gather(sizes, torch.tensor([len(data)], dtype=torch.int64, device=self.device))
        longest = max(1, *(int(s) for s in sizes))
        padded = torch.zeros(longest, dtype=torch.uint8, device=self.device)
        padded[: len(payload)] = payload
        buffers = [torch.zeros(longest, dtype=torch.uint8, device=self.device) for _ in range(self.size)]
        dist.all_gather(buffers, padded)
        return [bytes(b[: int(n)].cpu().numpy()).decode() for b, n in zip(buffers, sizes, strict=True)]

    @contextmanager
    def together(self) -> Iterator[None]:
        """Run a block that holds no collective call; when it fails on one rank, it fails on all.

        Without it a rank that fails alone leaves its peers waiting until the launcher ends them, and they never
        record what happened. The failing rank keeps its error, the others raise PeerError with its exit code.
        """
        error: Exception | None = None
        try:
            yield
        except Exception as caught:
            error = caught
        code = int(self.max(exit_code_of(error) if error else 0))
        if code:
            told = self.gather_text(f"{type(error).__name__}: {error}"[:2000] if error else "")
            if error is None:
                rank = next(r for r, text in enumerate(told) if text)
                error = PeerError(code, f"rank {rank} failed with exit code {code}: {told[rank]}")
            error.agreed = True  # type: ignore[attr-defined]
            raise error

    def max(self, value: float) -> float:
        """Largest `value` over the ranks."""
        return self._reduce(value, dist.ReduceOp.MAX)

    def min(self, value: float) -> float:
        """Smallest `value` over the ranks."""
        return self._reduce(value, dist.ReduceOp.MIN)

    def sum(self, value: float) -> float:
        """Sum of `value` over the ranks."""
        return self._reduce(value, dist.ReduceOp.SUM)

    def _reduce(self, value: float, op: Any) -> float:
        if self.size == 1:
            return value
        tensor = torch.tensor([value], dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor, op)
        return float(tensor)


def start_ranks() -> Ranks:
    """Join the process group that the launcher describes (gloo on the CPU, NCCL on GPUs)."""
    if "RANK" not in os.environ:  # started without a launcher: one rank by itself
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    cuda = torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu"
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if cuda:
        torch.cuda.set_device(local)
    # On the CPU DeepSpeed would compile a shared-memory all-reduce first: a minute on two cores, once more for every
    # other version of `ninja` on PATH, and a lock file that a killed process leaves behind for all that follow.
    # gloo alone does what our small models need.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(
        dist_backend="nccl" if cuda else "gloo", timeout=timedelta(minutes=30), verbose=False
    )  # fmt: skip
    device = torch.device("cuda", local) if cuda else torch.device("cpu")
    return Ranks(dist.get_rank(), dist.get_world_size(), device)


def seed_everything(seed: int) -> None:
    """Seed python, numpy and torch; torch refuses nondeterministic CPU kernels where it can."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


WorkerBody = Callable[[StepContext, Ranks], None]


def worker_main(name: str, body: WorkerBody, argv: Sequence[str] | None = None) -> None:
    """Entry point of a worker: parse, join the ranks, run every date, leave with the agreed exit code.

    The launcher kills the peers of the first rank that exits, so work that may fail on one rank stands inside
    `Ranks.together()`: then all ranks leave with one code, after rank 0 has recorded the failure.
    """
    setup_logging()
    try:
        args = parse_arguments(name, argv)
    except GplError as error:
        sys.exit(exit_with(error))
    ranks = start_ranks()
    code, together = 0, True
    try:
        failures = Failures(args.max_failures)
        for run_date in args.dates:
            try:
                _run_date(name, run_date, args, body, ranks)
            except Exception as error:
                if not getattr(error, "agreed", False):  # the other ranks wait for us somewhere: none can go on
                    raise
                failures.note(run_date, error)
        code = failures.code
    except Exception as error:
        code = error.exit_code if isinstance(error, PeerError) else exit_with(error)
        together = getattr(error, "agreed", False)
    sys.stdout.flush()
    sys.stderr.flush()
    if together:  # else: leave at once, the launcher ends the peers that wait for us
        dist.barrier()
        dist.destroy_process_group()
    os._exit(code)  # reader threads of a failed feed must not keep the process alive


class PeerError(GplError):
    """Another rank failed; this one stops with its code."""

    def __init__(self, code: int, message: str):
        super().__init__(message)
        self.exit_code = code


def _run_date(name: str, run_date: date, args: StepArguments, body: WorkerBody, ranks: Ranks) -> None:
    started, clock = datetime.now(UTC), time.monotonic()
    planner = Planner(args.config)
    state = StepState("blocked", "not evaluated")
    context: StepContext | None = None
    begun: Begun | None = None
    status = "failed"
    error: BaseException | None = None
    try:
        state = _agreed_state(planner, name, run_date, ranks)
        if args.dry_run:
            if ranks.is_main:
                print_dry_run(planner, name, run_date, state, force=args.force)
            return
        if not state.may_run(force=args.force):
            with ranks.together():
                raise MissingInputError(state.reason)
        if state.status == "done" and not args.force:
            status = "noop"
            return
        context = StepContext(planner, name, run_date, state, args.run_id, force=args.force)
        context.run_id = ranks.broadcast_text(args.run_id)
        if ranks.is_main:
            begun = begin(planner.lake, name, run_date, context.run_id, state, started)
            context.counts.bytes_in = context.input_bytes
        cpu = time.process_time()
        body(context, ranks)
        context.counts.core_seconds = ranks.sum(time.process_time() - cpu)
        status = "done"
    except BaseException as caught:
        error = caught
        raise
    finally:
        if ranks.is_main and not args.dry_run:
            counts = context.counts if context else Counts()
            if context and ranks.device.type == "cuda":
                counts.gpu_seconds = ranks.size * (time.monotonic() - clock)
            record(planner.lake, name, run_date, args.run_id, state, status, counts, error, started, clock, begun)


def _agreed_state(planner: Planner, name: str, run_date: date, ranks: Ranks) -> StepState:
    """Rank 0's view of the tables, on every rank: all of them read the same pinned versions."""
    text = ""
    with ranks.together():
        if ranks.is_main:
            text = planner.state(find_step(name), run_date).to_json()
    return StepState.from_json(ranks.broadcast_text(text))


def commit_parts(
    context: StepContext,
    ranks: Ranks,
    table: str,
    parts: Sequence[Mapping[str, Any]],
    *,
    mode: str,
    partition: Mapping[str, str] | None = None,
    details: Mapping[str, Any] | None = None,
    mark: SliceMark | None = None,
) -> None:
    """Commit every rank's `parts` of `table` in one transaction by rank 0; all ranks return after it."""
    everyone = [part for text in ranks.gather_text(json.dumps(list(parts))) for part in json.loads(text)]
    with ranks.together():
        if ranks.is_main:
            commit: Commit = context.lake.commit(
                context.contract(table), everyone, mark=mark or context.mark(table, details), mode=mode,
                partition=partition,
            )  # fmt: skip
            context.committed(table, commit)


def work_folder(context: StepContext, *parts: str) -> str:
    """A folder for this step's checkpoints, keyed by its fingerprint: other inputs never resume from it."""
    key = context.state.artifact_fingerprint or context.fingerprint
    return context.lake.path("work", context.step.name, key[:16], *parts)


__all__ = [
    "PeerError",
    "Ranks",
    "StepContext",
    "commit_parts",
    "log",
    "seed_everything",
    "start_ranks",
    "work_folder",
    "worker_main",
]
