"""SASRec (Kang & McAuley 2018) with cross-entropy over the full catalog: on item vectors, content, or both; walks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count, islice
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from gpl_core.interest.content import NeighborGraph
from gpl_core.sids.content_table import ContentTable
from tests.bench.quality.data import MOST_EVENTS, RANKED, Task, judge


@dataclass(frozen=True)
class SasRecSettings:
    """Two layers of two heads; width, dropout, learning rate and epochs are what is tuned on the validation split."""

    content: Literal["none", "added", "only"] = "none"  # what an item is: a learned vector, its projected content, both
    walks: int = 0  # synthetic walks per real row
    width: int = 64
    dropout: float = 0.4
    learning_rate: float = 1e-3
    epochs: int = 40
    batch_size: int = 128


class SasRec(nn.Module):
    """Causal self-attention over item vectors; scores are products with the same vectors."""

    def __init__(self, items: int, settings: SasRecSettings, content: np.ndarray) -> None:
        super().__init__()
        width, own = settings.width, settings.content != "only"
        self.item = nn.Embedding(items, width) if own else None
        self.project = nn.Linear(content.shape[1], width, bias=False) if settings.content != "none" else None
        self.position = nn.Embedding(MOST_EVENTS, width)
        for table in filter(None, (self.item, self.position)):
            nn.init.normal_(table.weight, std=0.02)
        self.register_buffer("content", torch.from_numpy(content))
        self.dropout = nn.Dropout(settings.dropout)
        layer = nn.TransformerEncoderLayer(
            width, 2, 2 * width, settings.dropout, "gelu", batch_first=True, norm_first=True
        )  # fmt: skip
        self.body = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(width)

    def items(self) -> Tensor:
        """Item vectors [items x width]."""
        parts = [self.item.weight] if self.item else []
        return sum(parts + ([self.project(self.content)] if self.project else []))

    def forward(self, rows: Tensor, vectors: Tensor) -> Tensor:
        """``rows`` int64 [B x n], padded at the end by the number of items -> states [B x n x width]."""
        padded = torch.cat([vectors, vectors.new_zeros(1, vectors.shape[1])])
        x = self.dropout(padded[rows] + self.position.weight[: rows.shape[1]])
        mask = nn.Transformer.generate_square_subsequent_mask(rows.shape[1])
        return self.norm(self.body(x, mask=mask, is_causal=True))


def sasrec_epochs(
    task: Task, settings: SasRecSettings, content: np.ndarray, seed: int
) -> Iterator[Callable[[], np.ndarray]]:
    """Train epoch by epoch, without end; after each a function that ranks the task's targets, int64 [T x RANKED].

    The rate is constant, so one run has every number of epochs. ``content`` float32 [items x d], unit rows.
    """
    torch.manual_seed(seed)
    model = SasRec(task.items, settings, content)
    optimizer = torch.optim.Adam(model.parameters(), settings.learning_rate)
    random = np.random.default_rng(seed)
    every = np.arange(task.items)
    table = ContentTable(content, every)
    graph = NeighborGraph.build(table, every, task.train, seed=seed) if settings.walks else None
    for epoch in count():
        model.train()
        rows = [*task.train, *(graph.walks(settings.walks * len(task.train), seed=[seed, epoch]) if graph else ())]
        order = random.permutation(len(rows))
        for start in range(0, len(order), settings.batch_size):
            batch = _padded([rows[n] for n in order[start : start + settings.batch_size]], task.items)
            inputs, targets = batch[:, :-1], batch[:, 1:]
            vectors = model.items()
            real = targets != task.items
            logits = model(inputs, vectors)[real] @ vectors.T
            loss = nn.functional.cross_entropy(logits, targets[real])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        yield lambda: _rank(model.eval(), task)


def train_sasrec(task: Task, settings: SasRecSettings, content: np.ndarray, seed: int) -> np.ndarray:
    """Train for the settings' epochs and rank the task's targets: int64 [T x RANKED]."""
    return next(islice(sasrec_epochs(task, settings, content, seed), settings.epochs - 1, None))()


def best_epochs(
    task: Task, settings: SasRecSettings, content: np.ndarray, *, every: int, patience: int, most: int
) -> tuple[float, int, int]:
    """Highest HR@10 of seed 0, after how many epochs, and how many were trained.

    Judged after ``every`` so many epochs, until ``patience`` judgments in a row were no better, or ``most`` epochs.
    """
    best, at = -1.0, 0
    for epoch, ranked in enumerate(islice(sasrec_epochs(task, settings, content, 0), most), 1):
        if epoch % every == 0:
            found = judge(ranked(), task)["HR@10"]
            if found > best:
                best, at = found, epoch
            elif epoch - at >= patience * every:
                break
    return best, at, epoch


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
