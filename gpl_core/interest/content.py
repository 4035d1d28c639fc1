"""Learning from content in addition to SIDs: item vectors as input and in scores, and walks between related items.

`interest.content: false` and `interest.walks: 0` go without (docs/decisions/018, 029, 031, 035). Legend: N items, d
embedding width, D hidden width, L levels.
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
_FOLLOW = 0.5  # of the other steps: chance to go where users went, not to a similar item
_APART = 3  # places between events of a user that count as together
_SUM_ROWS = 65_536  # items' vectors summed at a time: bounds memory when they are a memory-mapped file
_BLOCK = 2_048  # items compared with all others at a time: bounds memory to this times the pool


RECENT = 8
"""M, the newest events of a history that ask by their own content. Part of a bundle's format."""


class ContentHeads(nn.Module):
    """Item vectors at the input, and what is compared with them at the output (`trie_scoring`)."""

    def __init__(self, width: int, hidden: int, *, spread: float, share: float, seed: int) -> None:
        """``spread``: about the length of a projected unit vector; ``share``: where the share starts."""
        super().__init__()
        self.read = nn.Linear(width, hidden, bias=False)  # d -> D
        self.query = nn.Linear(hidden, width, bias=False)  # D -> d, W of the scoring rule (`trie_scoring`)
        self.share = nn.Parameter(torch.full((1,), share))
        # In nats; they hardly move in a short training: what they start from was chosen (docs/decisions/035).
        self.sharpness = nn.Parameter(torch.full((1,), 10.0))  # between an equal item and one at a right angle
        self.age = nn.Parameter(6.0 - 0.5 * torch.arange(float(RECENT)))  # of the newest event, the one before, …
        self.own = nn.Parameter(torch.full((RECENT,), -3.0))  # of the event's own SID, beside others as like it
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
    known = items > 0
    mean = content.sum(axis=0, dtype=np.float64) / max(known.sum(), 1)
    np.subtract(content, mean.astype(np.float32), out=content, where=known[:, None])
    total, count, node, missing = content, known.astype(np.int64), np.arange(trie.size), ~known
    for offsets in trie.offsets[:0:-1]:  # from the leaves up; at the root the mean is 0
        if not missing.any():  # `total` may be as large as `content`
            break
        total, count = np.add.reduceat(total, offsets[:-1]), np.add.reduceat(count, offsets[:-1])
        node = np.repeat(np.arange(len(count)), np.diff(offsets))[node]
        filled = np.flatnonzero(missing & (count[node] > 0))
        content[filled] = total[node[filled]] / count[node[filled], None]
        missing[filled] = False
    return content


@dataclass(frozen=True, eq=False)
class NeighborGraph:
    """Each item's nearest items by content, and those that users had near it: the edges of synthetic walks (ours)."""

    items: np.ndarray  # int64 [n]: item_index of the graph's nodes, ascending
    near: np.ndarray  # int32 [n x neighbors]: nodes of highest cosine, never the node itself
    together: np.ndarray  # int32 [E]: the nodes that users had near node 0, then near node 1, …; as often as they had
    starts: np.ndarray  # int64 [n + 1]: where a node's begin in it

    @classmethod
    def build(
        cls,
        table: ContentTable,
        item_index: np.ndarray,
        histories: Sequence[np.ndarray] = (),
        *,
        seed: int,
        neighbors: int = 10,
        pool: int = 50_000,
        device: torch.device | str = "cpu",
    ) -> Self:
        """The graph over ``pool`` of the items (all, where there are fewer), so that its cost is bounded.

        ``histories``: users' item_index, oldest first; events at most 3 places apart are together. Half of the pool are
        items of the first of them, so that these are whole, the rest are drawn. UsageError where fewer than two items
        have a vector.
        """
        usable = np.unique(np.asarray(item_index)[table.rows(item_index) >= 0])
        if len(usable) > pool:
            had, first = np.unique(np.concatenate([*histories, usable[:0]]), return_index=True)
            known = np.isin(had, usable)
            had = had[known][np.argsort(first[known])][: pool // 2]
            rest = np.setdiff1d(usable, had)
            drawn = np.random.default_rng(seed).choice(rest, pool - len(had), replace=False)
            usable = np.sort(np.concatenate([had, drawn]))
        if len(usable) < 2:
            raise UsageError(
                f"walks: {len(usable)} items have a content vector, expected at least 2; switch walks off."
            )
        vectors = table.take(table.rows(usable)).to(device)
        most = min(neighbors, len(usable) - 1)
        near = [_nearest(vectors, start, most) for start in range(0, len(usable), _BLOCK)]
        left, right = _together(usable, histories)
        starts = np.searchsorted(left, np.arange(len(usable) + 1))
        return cls(usable.astype(np.int64), np.concatenate(near), right.astype(np.int32), starts)

    def walks(self, count: int, *, seed: Sequence[int], length: int = 3) -> np.ndarray:
        """``count`` random walks of ``length`` items, int64 [count x length] of item_index; same seed, same walks.

        Each step stays with probability 1/6; else it goes to a neighbor, or (every other step, from an item that users
        had with others) to one of those.
        """
        random = np.random.default_rng(seed)
        nodes = np.empty((count, length), dtype=np.int64)
        nodes[:, 0] = random.integers(0, len(self.items), count)
        for step in range(1, length):
            node = nodes[:, step - 1]
            moved = self.near[node, random.integers(0, self.near.shape[1], count)]
            users = self.starts[node + 1] - self.starts[node]
            follow = (random.random(count) < _FOLLOW) & (users > 0)
            place = self.starts[node] + (random.random(count) * users).astype(np.int64)
            moved[follow] = self.together[place[follow]]
            nodes[:, step] = np.where(random.random(count) < _STAY, node, moved)
        return self.items[nodes]


def _together(items: np.ndarray, histories: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Nodes that users had together, both ways, int64 [E] each, ordered by the first; equal items are not together."""
    if not histories:
        return np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64)
    events, user = np.concatenate(histories), np.repeat(np.arange(len(histories)), [len(h) for h in histories])
    node = np.searchsorted(items, events).clip(max=len(items) - 1)
    known = items[node] == events
    pairs = []
    for apart in range(1, _APART + 1):
        one, other = slice(None, -apart), slice(apart, None)
        together = (user[one] == user[other]) & known[one] & known[other] & (node[one] != node[other])
        pairs.append(np.stack([node[one][together], node[other][together]]))
    left, right = np.concatenate([*pairs, *(pair[::-1] for pair in pairs)], axis=1)
    order = np.argsort(left, kind="stable")
    return left[order], right[order]


def _nearest(vectors: Tensor, start: int, count: int) -> np.ndarray:
    """int32 [_BLOCK x count]: the rows of highest cosine to each of the rows from ``start`` on, itself excluded."""
    block = vectors[start : start + _BLOCK]
    score = block @ vectors.T
    own = torch.arange(len(block), device=score.device)
    score[own, start + own] = -torch.inf
    return score.topk(count, dim=1).indices.cpu().numpy().astype(np.int32)
