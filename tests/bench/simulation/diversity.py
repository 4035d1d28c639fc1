"""What the top of the lists is made of: coverage, concentration, diversity, share of the tail (numpy).

All figures look at the k best items of each list (request), as a pre-ranker would pass them on.
Legend for shapes: n rows, d width of the item embedding, N items.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from gpl_core.errors import ContractError


@dataclass(frozen=True)
class Top:
    """The k best rows of each list, lists of fewer rows whole.

    item: item_index of each kept row [m]; group: number of its list [m], ascending; lists: how many lists there are.
    """

    item: npt.NDArray[np.int64]
    group: npt.NDArray[np.int64]
    lists: int


def top_of_lists(scores: npt.ArrayLike, item_index: npt.ArrayLike, lists: npt.ArrayLike, k: int = 10) -> Top:
    """The k highest scores of each list; equal scores go by item_index, which knows nothing of clicks.

    scores, item_index, lists: [n]. Raises ContractError when k < 1 or the lengths differ.
    """
    s, item = np.asarray(scores, dtype=np.float64), np.asarray(item_index, dtype=np.int64)
    _, group = np.unique(np.asarray(lists), return_inverse=True)
    if k < 1 or not len(s) == len(item) == len(group):
        raise ContractError(
            f"top_of_lists: k {k}, lengths {len(s)}, {len(item)}, {len(group)}; expected k >= 1, one length"
        )
    count = int(group.max()) + 1 if len(group) else 0
    order = np.lexsort((item, -s, group))
    sizes = np.bincount(group, minlength=count)
    rank = np.arange(len(s)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    kept = order[rank < k]
    return Top(item[kept], group[kept], count)


def coverage(top: Top, items: int) -> float:
    """Share of the N catalog items that stand in at least one list's top."""
    return len(np.unique(top.item)) / items


def gini(top: Top, items: int) -> float:
    """Gini coefficient of how often each of the N items is shown: 0 all alike, (N - 1) / N one item only."""
    shown = np.sort(np.bincount(top.item, minlength=items).astype(np.float64))
    total = shown.sum()
    if total == 0:
        return 0.0
    rank = np.arange(1, items + 1)
    return float((2 * rank - items - 1) @ shown / (items * total))


def share_of(top: Top, chosen: npt.NDArray[np.bool_]) -> float:
    """Share of the shown rows whose item is `chosen` (bool [N]): tail items, say."""
    return float(chosen[top.item].mean()) if len(top.item) else 0.0


def intra_list_diversity(top: Top, vectors: npt.NDArray[np.floating]) -> float:
    """Mean over lists of the mean pairwise distance 1 - cosine; vectors [N x d] unit. Lists of one item are left out.

    With S = sum of a list's m unit vectors, the sum over ordered pairs of their cosines is |S|^2 - m.
    """
    sizes = np.bincount(top.group, minlength=top.lists).astype(np.float64)
    if not (sizes > 1).any():
        return 0.0
    # Rows of a list stand together, and every list has one.
    starts = np.flatnonzero(np.diff(top.group, prepend=-1))
    sums = np.add.reduceat(vectors[top.item].astype(np.float64), starts, axis=0)
    several = sizes > 1
    m = sizes[several]
    cosine = ((sums[several] ** 2).sum(axis=1) - m) / (m * (m - 1))
    return float((1.0 - cosine).mean())
