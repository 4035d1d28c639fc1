"""The tokenizer's training on one rank of plain torch, without DeepSpeed."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gpl_core.sids import rqvae
from gpl_core.sids.rqvae import RqVaeSettings, TrainEngine
from gpl_core.sids.tokenizer import Tokenizer


class LocalEngine:
    """See TrainEngine."""

    rank = 0
    world = 1

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)

    def prepare(self, model: nn.Module, optimizer: torch.optim.Optimizer, parts: int, batch_size: int) -> None:
        self._model, self._optimizer, self._parts, self._calls = model.to(self.device), optimizer, parts, 0

    def forward(self, *inputs: Any) -> Any:
        return self._model(*inputs)

    def step(self, loss: Tensor) -> None:
        loss.backward()
        self._calls += 1
        if self._calls % self._parts == 0:
            self._optimizer.step()
            self._optimizer.zero_grad()

    def sum(self, tensor: Tensor) -> Tensor:
        return tensor

    def broadcast(self, tensor: Tensor) -> None:
        pass


def fit(x: np.ndarray, settings: RqVaeSettings, *, engine: TrainEngine | None = None, **options: Any) -> Tokenizer:
    """`rqvae.fit`, by default on a CPU."""
    return rqvae.fit(x, settings, engine=engine or LocalEngine(), **options)
