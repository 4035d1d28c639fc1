"""SASRec (Kang & McAuley 2018) with cross-entropy over the full catalog, with or without content vectors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from tests.bench.quality.data import MOST_EVENTS, RANKED, Task


@dataclass(frozen=True)
class SasRecSettings:
    """Its usual shape; dropout and epochs are what is tuned on the validation split."""

    width: int = 64
    layers: int = 2
    heads: int = 2
    dropout: float = 0.4
    epochs: int = 40
    batch_size: int = 128
    learning_rate: float = 1e-3


class SasRec(nn.Module):
    """Causal self-attention over item vectors; scores are products with the same vectors."""

    def __init__(self, items: int, settings: SasRecSettings, content: np.ndarray | None) -> None:
        super().__init__()
        self.item = nn.Embedding(items + 1, settings.width, padding_idx=items)
        nn.init.normal_(self.item.weight, std=0.02)
        self.position = nn.Embedding(MOST_EVENTS, settings.width)
        nn.init.normal_(self.position.weight, std=0.02)
        self.register_buffer("content", None if content is None else torch.from_numpy(content))
        self.project = None if content is None else nn.Linear(content.shape[1], settings.width, bias=False)
        self.dropout = nn.Dropout(settings.dropout)
        layer = nn.TransformerEncoderLayer(
            settings.width,
            settings.heads,
            2 * settings.width,
            settings.dropout,
            "gelu",
            batch_first=True,
            norm_first=True,
        )
        self.body = nn.TransformerEncoder(layer, settings.layers, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(settings.width)

    def items(self) -> Tensor:
        """Item vectors [items x width]."""
        own = self.item.weight[:-1]
        return own if self.project is None else own + self.project(self.content)

    def forward(self, rows: Tensor, vectors: Tensor) -> Tensor:
        """``rows`` int64 [B x n], padded at the end by the number of items -> states [B x n x width]."""
        padded = torch.cat([vectors, vectors.new_zeros(1, vectors.shape[1])])
        x = self.dropout(padded[rows] + self.position.weight[: rows.shape[1]])
        mask = nn.Transformer.generate_square_subsequent_mask(rows.shape[1])
        return self.norm(self.body(x, mask=mask, is_causal=True))


def train_sasrec(task: Task, settings: SasRecSettings, content: np.ndarray | None, seed: int) -> np.ndarray:
    """Train on the task's rows and rank its targets: int64 [T x RANKED]."""
    return rankings_after(task, settings, content, seed, [settings.epochs])[settings.epochs]


def rankings_after(
    task: Task, settings: SasRecSettings, content: np.ndarray | None, seed: int, epochs: Sequence[int]
) -> dict[int, np.ndarray]:
    """The ranking int64 [T x RANKED] after each number of ``epochs``: the rate is constant, so one run has them all."""
    torch.manual_seed(seed)
    model = SasRec(task.items, settings, content)
    optimizer = torch.optim.Adam(model.parameters(), settings.learning_rate)
    random = np.random.default_rng(seed)
    found = {}
    for epoch in range(1, max(epochs) + 1):
        model.train()
        order = random.permutation(len(task.train))
        for start in range(0, len(order), settings.batch_size):
            rows = _padded([task.train[n] for n in order[start : start + settings.batch_size]], task.items)
            inputs, targets = rows[:, :-1], rows[:, 1:]
            vectors = model.items()
            real = targets != task.items
            logits = model(inputs, vectors)[real] @ vectors.T
            loss = nn.functional.cross_entropy(logits, targets[real])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        if epoch in epochs:
            found[epoch] = _rank(model.eval(), task)
    return found


def _rank(model: SasRec, task: Task) -> np.ndarray:
    out = []
    with torch.no_grad():
        vectors = model.items()
        for start in range(0, len(task.histories), 512):
            part = task.histories[start : start + 512]
            last = torch.tensor([len(h) - 1 for h in part])
            states = model(_padded(part, task.items), vectors)[torch.arange(len(part)), last]
            out.append((states @ vectors.T).topk(RANKED, dim=1).indices.numpy())
    return np.concatenate(out)


def _padded(rows: list[np.ndarray], padding: int) -> Tensor:
    longest = max(map(len, rows))
    out = torch.full((len(rows), longest), padding)
    for line, row in enumerate(rows):
        out[line, : len(row)] = torch.from_numpy(row)
    return out
