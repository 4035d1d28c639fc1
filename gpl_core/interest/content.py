"""What the model may learn from content besides the SIDs: item vectors at its input, walks between similar items.

Both are options (docs/decisions/018). Legend: N items, d embedding width, M events.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gpl_core.errors import UsageError
from gpl_core.sids.content_table import ContentTable

_STAY = 1 / 6  # chance that a walk repeats its item: people buy again, and walks that never repeat teach otherwise
_BLOCK = 2_048  # items compared with all others at a time: bounds memory to this times the pool


@dataclass(frozen=True, eq=False)
class NeighborGraph:
    """Each item's nearest items by content: the edges of synthetic walks (ours)."""

    items: np.ndarray  # int64 [n]: item_index of the graph's nodes
    near: np.ndarray  # int32 [n x neighbors]: nodes of highest cosine, never the node itself

    @classmethod
    def build(
        cls,
        table: ContentTable,
        item_index: np.ndarray,
        *,
        seed: int,
        neighbors: int = 10,
        pool: int = 50_000,
        device: torch.device | str = "cpu",
    ) -> NeighborGraph:
        """The graph over a random ``pool`` of the items (all, where there are fewer), so that its cost is bounded.

        UsageError where fewer than two items have a vector.
        """
        usable = np.asarray(item_index)[table.rows(item_index) >= 0]
        if len(usable) > pool:
            usable = np.sort(np.random.default_rng(seed).choice(usable, pool, replace=False))
        if len(usable) < 2:
            raise UsageError(
                f"walks: {len(usable)} items have a content vector, expected at least 2; switch walks off."
            )
        vectors = table.take(table.rows(usable)).to(device)
        most = min(neighbors, len(usable) - 1)
        near = [_nearest(vectors, start, most) for start in range(0, len(usable), _BLOCK)]
        return cls(usable.astype(np.int64), np.concatenate(near))

    def walks(self, count: int, *, seed: Sequence[int], length: int = 3) -> np.ndarray:
        """``count`` random walks of ``length`` items, int64 [count x length] of item_index; same seed, same walks.

        Each step goes to one of the neighbors, or stays with probability 1/6.
        """
        random = np.random.default_rng(seed)
        nodes = np.empty((count, length), dtype=np.int64)
        nodes[:, 0] = random.integers(0, len(self.items), count)
        for step in range(1, length):
            moved = self.near[nodes[:, step - 1], random.integers(0, self.near.shape[1], count)]
            nodes[:, step] = np.where(random.random(count) < _STAY, nodes[:, step - 1], moved)
        return self.items[nodes]


def _nearest(vectors: Tensor, start: int, count: int) -> np.ndarray:
    """int32 [_BLOCK x count]: the rows of highest cosine to each of the rows from ``start`` on, itself excluded."""
    block = vectors[start : start + _BLOCK]
    score = block @ vectors.T
    own = torch.arange(len(block), device=score.device)
    score[own, start + own] = -torch.inf
    return score.topk(count, dim=1).indices.cpu().numpy().astype(np.int32)
