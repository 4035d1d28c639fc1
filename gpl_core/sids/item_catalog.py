"""Which item carries which SID, and which items a SID holds (one or several), for one sid_version.

Legend for shapes: N items, L levels, S distinct SIDs (the trie's leaves), d embedding width.
"""

import numpy as np

from gpl_core.errors import ContractError
from gpl_core.grouping import ranges, runs
from gpl_core.sids.trie import Trie

_SUM_ROWS = 65_536  # embeddings gathered at a time: bounds memory when they are a memory-mapped file


class ItemCatalog:
    """Items and SIDs of one sid_version as arrays: the trie, the items of each leaf (CSR), the leaf of each item."""

    def __init__(self, item_index: np.ndarray, sids: np.ndarray, codes: int) -> None:
        """``item_index`` int [N], ``sids`` int [N x L], ``codes`` = C. ContractError for an item twice or below 0."""
        if item_index.min(initial=0) < 0:
            raise ContractError(f"table item_sids: item_index {item_index.min()}, expected >= 0; assign SIDs again")
        order = np.argsort(item_index, kind="stable")
        self.item_index: np.ndarray = item_index[order].astype(np.int64)
        """int64 [N], ascending; the other per-item arrays follow this order."""
        repeated = self.item_index[1:][self.item_index[1:] == self.item_index[:-1]]
        if len(repeated):
            raise ContractError(
                f"item_index: {repeated[0]} occurs more than once, expected one SID per item; "
                "read one sid_version and only rows in force (retired_at = 0)."
            )
        self.codes = codes
        self.trie = Trie.build(sids, codes)
        self.leaf: np.ndarray = self.trie.leaf_of(sids[order])  # int64 [N]: the leaf of each item
        by_leaf = np.argsort(self.leaf, kind="stable")
        self.leaf_items: np.ndarray = self.item_index[by_leaf]
        """int64 [N]: items grouped by leaf, ascending item_index within a leaf."""
        counts = np.bincount(self.leaf, minlength=self.trie.size)
        self.leaf_offsets: np.ndarray = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        """int64 [S + 1]: items of leaf a are leaf_items[leaf_offsets[a]:leaf_offsets[a + 1]]."""
        self._leaf_of = np.full(int(self.item_index.max(initial=0)) + 1, -1, dtype=np.int64)
        self._leaf_of[self.item_index] = self.leaf
        self._leaf_sids = self.trie.sids()

    @property
    def levels(self) -> int:
        """L, the number of codes in a SID."""
        return self.trie.levels

    def leaf_of_item(self, item_index: np.ndarray) -> np.ndarray:
        """The leaf of each item, int64, any shape; -1 for an item without a SID (and for padding -1)."""
        index = np.asarray(item_index, dtype=np.int64)
        known = (index >= 0) & (index < len(self._leaf_of))
        return np.where(known, self._leaf_of[np.where(known, index, 0)], -1)

    def sids_of(self, item_index: np.ndarray) -> np.ndarray:
        """The SID of each item, int32 [... x L]; all -1 for an item without a SID."""
        leaf = self.leaf_of_item(item_index)
        out = np.full((*leaf.shape, self.levels), -1, dtype=np.int32)
        out[leaf >= 0] = self._leaf_sids[leaf[leaf >= 0]]
        return out

    def anchor_embeddings(self, embeddings: np.ndarray, leaves: np.ndarray | None = None) -> np.ndarray:
        """g(a): the unit-normalized mean of e(j) over the items of each leaf, float32 [S x d] (formula: ours).

        ``embeddings`` [>= max item_index + 1 x d] is indexed by item_index and may be a memory map;
        ``leaves`` int [M] limits the work to some leaves and gives [M x d] in their order.
        Where the items of a SID cancel out, the item with the lowest index stands for them.
        """
        chosen = np.arange(self.trie.size) if leaves is None else leaves
        out = np.zeros((len(chosen), embeddings.shape[1]), dtype=np.float32)
        sizes = self.leaf_offsets[chosen + 1] - self.leaf_offsets[chosen]
        for run in runs(sizes, _SUM_ROWS):
            counts = sizes[run]
            firsts = np.cumsum(counts) - counts
            items = self.leaf_items[np.repeat(self.leaf_offsets[chosen[run]], counts) + ranges(counts)]
            vectors = np.asarray(embeddings[items], dtype=np.float64)
            mean = np.add.reduceat(vectors, firsts, axis=0) / counts[:, None]
            norm = np.linalg.norm(mean, axis=1)
            flat = norm < 1e-6
            mean[flat] = vectors[firsts[flat]]
            norm[flat] = np.linalg.norm(mean[flat], axis=1)
            out[run] = mean / norm[:, None]
        return out
