"""What the model may learn from content besides the SIDs: item vectors at its input, walks between alike items.

Both are options (METHOD.md's study found a gain on little data). Legend: N items, d embedding width, M events.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gpl_core.errors import UsageError

_BLOCK = 4_096  # start items compared at a time: bounds memory to this times the pool


@dataclass(frozen=True, eq=False)
class ContentTable:
    """Item vectors by item_index; what is missing stays missing, it is not guessed."""

    vectors: np.ndarray
    """float32 [n x d], unit rows; a memory map will do."""
    row_of: np.ndarray
    """int64 [largest item_index + 1]: row of an item, -1 where it has no usable vector."""

    @property
    def width(self) -> int:
        """d."""
        return self.vectors.shape[1]

    def rows(self, item_index: np.ndarray) -> np.ndarray:
        """Rows of ``item_index`` (int, any shape), -1 where there is none."""
        index = np.asarray(item_index)
        known = (index >= 0) & (index < len(self.row_of))
        return np.where(known, self.row_of[np.where(known, index, 0)], -1)

    def take(self, rows: np.ndarray) -> Tensor:
        """Vectors of ``rows`` (int [M], none negative), float32 [M x d] on the CPU."""
        return torch.from_numpy(np.ascontiguousarray(self.vectors[rows], dtype=np.float32))


def neighbour_walks(
    table: ContentTable,
    item_index: np.ndarray,
    count: int,
    *,
    seed: int,
    length: int = 3,
    neighbours: int = 10,
    pool: int = 100_000,
    device: torch.device | str = "cpu",
) -> np.ndarray:
    """``count`` random walks over the content-neighbour graph, int64 [count x length] of item_index (ours; METHOD.md).

    Each step goes to one of the ``neighbours`` items of highest cosine, never to the item itself. Walks stay within a
    random ``pool`` of the items (all, where there are fewer), so that the cost does not grow with the catalogue.
    UsageError where fewer than two items have a vector.
    """
    random = np.random.default_rng(seed)
    usable = np.asarray(item_index)[table.rows(item_index) >= 0]
    if len(usable) > pool:
        usable = np.sort(random.choice(usable, pool, replace=False))
    if len(usable) < 2:
        raise UsageError(f"walks: {len(usable)} items have a content vector, expected at least 2; switch walks off.")
    vectors = table.take(table.rows(usable)).to(device)
    most = min(neighbours, len(usable) - 1)
    walks = np.empty((count, length), dtype=np.int64)
    walks[:, 0] = random.integers(0, len(usable), count)
    for step in range(1, length):
        here, place = np.unique(walks[:, step - 1], return_inverse=True)
        near = np.concatenate([_nearest(vectors, here[i : i + _BLOCK], most) for i in range(0, len(here), _BLOCK)])
        walks[:, step] = near[place, random.integers(0, most, count)]
    return usable[walks]


def _nearest(vectors: Tensor, rows: np.ndarray, count: int) -> np.ndarray:
    """The ``count`` rows of highest cosine to each of ``rows``, itself left out: int64 [len(rows) x count]."""
    index = torch.from_numpy(rows).to(vectors.device)
    score = vectors[index] @ vectors.T
    score[torch.arange(len(index), device=score.device), index] = -torch.inf
    return score.topk(count, dim=1).indices.cpu().numpy()
