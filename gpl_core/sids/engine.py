"""What training needs of its engine, so that one loop serves plain torch and DeepSpeed."""

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


class LocalEngine:
    """One rank of plain torch."""

    rank = 0
    world = 1

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)

    def prepare(self, model: nn.Module, optimizer: torch.optim.Optimizer, parts: int, batch_size: int) -> None:
        """See TrainEngine."""
        self._model, self._optimizer, self._parts, self._calls = model.to(self.device), optimizer, parts, 0

    def forward(self, *inputs: Any) -> Any:
        """See TrainEngine."""
        return self._model(*inputs)

    def step(self, loss: Tensor) -> None:
        """See TrainEngine."""
        loss.backward()
        self._calls += 1
        if self._calls % self._parts == 0:
            self._optimizer.step()
            self._optimizer.zero_grad()

    def sum(self, tensor: Tensor) -> Tensor:
        """See TrainEngine."""
        return tensor

    def broadcast(self, tensor: Tensor) -> None:
        """See TrainEngine."""
