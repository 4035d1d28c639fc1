"""What training needs of its engine: DeepSpeed in the worker, plain torch in tests."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn


class TrainEngine(Protocol):
    """Forward, backward and optimizer steps of one model on all ranks.

    An optimizer step is made of ``parts`` calls of ``step`` on each rank; the applied gradient is the sum of the
    gradients of all parts on all ranks.
    """

    rank: int
    world: int
    device: torch.device

    def prepare(self, model: nn.Module, optimizer: torch.optim.Optimizer, parts: int, batch_size: int) -> None:
        """Takes the model (moved to ``device`` in place) and its optimizer; called once, before anything else."""

    def forward(self, *inputs: Any) -> Any:
        """The model's output."""

    def step(self, loss: Tensor) -> None:
        """Adds one part's gradient; every ``parts``-th call applies the sum."""

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over ranks."""

    def broadcast(self, tensor: Tensor) -> None:
        """Overwrites ``tensor`` with rank 0's."""
