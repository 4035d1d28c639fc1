"""The processes of one launch: their identity, their communication, and how a failure of one propagates to all."""

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import deepspeed
import numpy as np
import torch
import torch.distributed as dist

from gpl_core.errors import ConflictError, GplError, exit_code_of


class PeerError(GplError):
    """Another rank failed; this one stops with its code."""

    def __init__(self, code: int, message: str):
        super().__init__(message)
        self.exit_code = code


class PeerConflictError(PeerError, ConflictError):
    """Another rank's commit met one of another run."""


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

    def broadcast_text(self, text: str, source: int = 0) -> str:
        """The `text` of rank `source` on every rank (bytes over the wire, no pickle)."""
        if self.size == 1:
            return text
        payload = text.encode() if self.rank == source else b""
        size = torch.tensor([len(payload)], dtype=torch.int64, device=self.device)
        dist.broadcast(size, source)
        if not int(size):  # torch refuses an empty buffer
            return ""
        buffer = torch.zeros(int(size), dtype=torch.uint8, device=self.device)
        if payload:
            buffer.copy_(torch.frombuffer(bytearray(payload), dtype=torch.uint8))
        dist.broadcast(buffer, source)
        return bytes(buffer.cpu().numpy()).decode()

    def gather_text(self, text: str) -> list[str]:
        """Every rank's `text`, in rank order, on every rank."""
        return [self.broadcast_text(text, source) for source in range(self.size)]

    @contextmanager
    def together(self) -> Iterator[None]:
        """Run a block without collective calls; when it fails on one rank, it fails on all.

        Without it the peers of a rank that fails would wait until the launcher kills them, and nobody would record what
        happened. The failing rank keeps its error, the others raise PeerError with its exit code; all are `agreed`.
        """
        error: Exception | None = None
        try:
            yield
        except Exception as caught:
            error = caught
        code = int(self.max(exit_code_of(error) if error else 0))
        if code:
            messages = self.gather_text(f"{type(error).__name__}: {error}"[:2000] if error else "")
            if error is None:
                rank = next(r for r, text in enumerate(messages) if text)
                kind = PeerConflictError if messages[rank].startswith(f"{ConflictError.__name__}:") else PeerError
                error = kind(code, f"rank {rank} failed with exit code {code}: {messages[rank]}")
            error.__dict__["agreed"] = True
            raise error

    def max(self, value: float) -> float:
        """Largest `value` over the ranks."""
        return float(self._reduced(np.array(value, np.float64), dist.ReduceOp.MAX))

    def sum(self, value: float) -> float:
        """Sum of `value` over the ranks."""
        return float(self.summed(np.array(value, np.float64)))

    def summed(self, values: np.ndarray) -> np.ndarray:
        """Sum of `values`, alike in shape, over the ranks."""
        return self._reduced(values, dist.ReduceOp.SUM)

    def _reduced(self, values: np.ndarray, op: Any) -> np.ndarray:
        if self.size == 1:
            return values
        tensor = torch.from_numpy(values.copy()).to(self.device)
        dist.all_reduce(tensor, op)
        return tensor.cpu().numpy()


# For another rank: one may work alone for hours. Of one that died the launcher hears, not this limit.
_MOST_WAITING = timedelta(days=1)


def start_ranks() -> Ranks:
    """Join the process group that the launcher describes (gloo on the CPU, NCCL on GPUs)."""
    if "RANK" not in os.environ:  # started without a launcher: a single rank
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    if "OMP_NUM_THREADS" not in os.environ:  # PyTorch would give every rank all cores
        ranks_here = int(os.environ.get("LOCAL_SIZE", "1"))
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // ranks_here))
    cuda = torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu"
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if cuda:
        torch.cuda.set_device(local)
    # On the CPU DeepSpeed would first compile a shared-memory all-reduce: a minute on two cores, repeated for every
    # other version of `ninja` on PATH, with a lock file that a killed process leaves behind. gloo is enough for us.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    backend = "nccl" if cuda else "gloo"
    if os.environ["MASTER_ADDR"] in ("127.0.0.1", "localhost") and not dist.is_initialized():
        _meet_on_this_machine(backend)
    deepspeed.init_distributed(dist_backend=backend, timeout=_MOST_WAITING, verbose=False)
    device = torch.device("cuda", local) if cuda else torch.device("cpu")
    return Ranks(dist.get_rank(), dist.get_world_size(), device)


def _meet_on_this_machine(backend: str) -> None:
    """Join the process group without listening beyond loopback: by itself torch's store listens on every interface."""
    for library in ("GLOO", "NCCL"):
        os.environ.setdefault(f"{library}_SOCKET_IFNAME", "lo")
    rank, size, port = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "MASTER_PORT"))
    listening = socket.create_server(("127.0.0.1", port)) if rank == 0 else None
    store = dist.TCPStore(
        "127.0.0.1", listening.getsockname()[1] if listening else port, size, rank == 0, timedelta(minutes=30),
        master_listen_fd=listening.detach() if listening else None,
    )  # fmt: skip
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=_MOST_WAITING)


@contextmanager
def one_thread() -> Iterator[None]:
    """Run a block on one CPU thread: small layers gain nothing from more, and wait for each other on busy cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def is_agreed(error: Exception) -> bool:
    """Whether all ranks have left `together` with an error; else the others still wait for this one."""
    return bool(getattr(error, "agreed", False))
