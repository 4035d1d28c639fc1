"""Learning from content in addition to SIDs: item vectors as input and in scores, and walks between similar items.

Options, all of them (docs/decisions/018, 029). Legend: N items, d embedding width, D hidden width, L levels.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from torch import Tensor, nn

from gpl_core.errors import UsageError
from gpl_core.sids.content_table import ContentTable
from gpl_core.sids.item_catalog import ItemCatalog

_STAY = 1 / 6  # chance that a walk repeats its item: people buy again, and walks that never repeat teach otherwise
_SUM_ROWS = 65_536  # items' vectors summed at a time: bounds memory when they are a memory-mapped file
_BLOCK = 2_048  # items compared with all others at a time: bounds memory to this times the pool


class ContentHeads(nn.Module):
    """Item vectors at the input, and what is compared with them at the output."""

    def __init__(self, width: int, hidden: int, *, spread: float, share: float, seed: int) -> None:
        """``spread``: about the length of a projected unit vector; ``share``: where the share starts."""
        super().__init__()
        self.read = nn.Linear(width, hidden, bias=False)  # d -> D
        self.query = nn.Linear(hidden, width, bias=False)  # D -> d, W of the scoring rule (`trie_scoring`)
        self.share = nn.Parameter(torch.full((1,), share))
        with torch.no_grad():
            random = torch.Generator().manual_seed(seed)
            self.read.weight.normal_(std=spread / hidden**0.5, generator=random)
            # What was read can be found again from the start: the last item's content asks for its neighbors.
            self.query.weight.copy_(self.read.weight.T)


def content_of(
    table: ContentTable | None, items: np.ndarray, places: np.ndarray, device: torch.device
) -> tuple[Tensor, Tensor] | None:
    """The ``content`` of `InterestModel.hidden`: places int64 [m] and vectors [m x d] of the items that have one."""
    if table is None:
        return None
    rows = table.rows(items)
    known = rows >= 0
    return torch.from_numpy(places[known]).to(device), table.take(rows[known]).to(device)


def leaf_content(catalog: ItemCatalog, table: ContentTable | None) -> np.ndarray | None:
    """Content of the trie's leaves, float32 [S x d]: the mean vector of a SID's items, less the mean of all such means.

    A softmax over all leaves does not change when the same is taken off all of them. A leaf whose items have no vector
    stands at the mean of the leaves beside it, of the nearest ancestor that has some. None without a ``table``.
    """
    if table is None:
        return None
    trie = catalog.trie
    rows = table.rows(catalog.leaf_items)
    leaf = np.repeat(np.arange(trie.size), np.diff(catalog.leaf_offsets))
    rows, leaf = rows[rows >= 0], leaf[rows >= 0]
    content = np.zeros((trie.size, table.width), dtype=np.float32)
    for start in range(0, len(rows), _SUM_ROWS):
        part = slice(start, start + _SUM_ROWS)
        np.add.at(content, leaf[part], table.vectors[rows[part]])
    items = np.bincount(leaf, minlength=trie.size)
    content /= np.maximum(items, 1).astype(np.float32)[:, None]
    known, total, node = items > 0, content, np.arange(trie.size)
    count, missing = known.astype(np.int64), ~known
    for offsets in trie.offsets[::-1]:  # from the leaves up
        total, count = np.add.reduceat(total, offsets[:-1]), np.add.reduceat(count, offsets[:-1])
        node = np.repeat(np.arange(len(count)), np.diff(offsets))[node]
        filled = np.flatnonzero(missing & (count[node] > 0))
        content[filled] = total[node[filled]] / count[node[filled], None]
        missing[filled] = False
    content -= total[0] / max(count[0], 1)
    return content


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
    ) -> Self:
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
