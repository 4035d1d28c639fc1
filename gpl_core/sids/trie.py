"""The catalog's prefix trie as flat arrays (CSR), so that a search can gather children on any device.

Legend for shapes: S SIDs given, L levels, C codes per level, n_l nodes at depth l (n_0 = 1, the root).
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Self

import numpy as np

from gpl_core.errors import ContractError
from gpl_core.grouping import run_starts


def are_too_many(codes: int, levels: int) -> bool:
    """Whether prefixes of so many levels and codes, with one sign more for the end, have no number in an int64."""
    return (codes + 1) ** levels >= 2**63


@dataclass(frozen=True, eq=False)
class Trie:
    """A prefix trie over distinct SIDs; nodes of one depth are numbered in lexicographic order of their prefix.

    The leaf numbered ``i`` is therefore the i-th distinct SID in lexicographic order.
    Memory is 4 bytes of token and 8 bytes of offset per node: at most 12 * L bytes per SID, less where prefixes are
    shared.
    """

    codes: int  # C: every token is in [0, C)
    offsets: tuple[np.ndarray, ...]
    """L arrays; ``offsets[l]`` int64 [n_l + 1]: children of node n (depth l) are offsets[l][n]:offsets[l][n+1]."""
    tokens: tuple[np.ndarray, ...]
    """L arrays; ``tokens[l]`` int32 [n_(l+1)]: the code of each node of depth l+1, ascending within a parent."""

    @property
    def levels(self) -> int:
        """L, the number of codes in a SID."""
        return len(self.tokens)

    @property
    def size(self) -> int:
        """The number of distinct SIDs, which is the number of leaves."""
        return len(self.tokens[-1])

    @classmethod
    def build(cls, sids: np.ndarray, codes: int) -> Self:
        """The trie of ``sids`` (int [S x L], any order, duplicates allowed); S = 0 gives a root without children.

        Raises ContractError on a wrong shape, on a code outside [0, codes), or where `are_too_many`.
        """
        if sids.ndim != 2 or sids.shape[1] < 1:
            raise ContractError(f"sids: shape {sids.shape}, expected [S x L] with L >= 1; unflatten the column first.")
        if len(bad := np.flatnonzero(((sids < 0) | (sids >= codes)).any(axis=1))):
            raise ContractError(
                f"sids: row {bad[0]} is {sids[bad[0]].tolist()}, expected codes in [0, {codes}); drop padding (-1) and "
                "check that codes and SIDs come from the same tokenizer."
            )
        levels = sids.shape[1]
        if are_too_many(codes, levels):
            raise ContractError(f"sids: {levels} levels of {codes} codes, expected (codes + 1)^levels below 2^63.")
        offsets: list[np.ndarray] = []
        tokens: list[np.ndarray] = []
        key = np.zeros(len(sids), dtype=np.int64)
        for level in range(levels):
            key *= codes
            key += sids[:, level]
        key.sort()
        key = key[run_starts(key)]
        # From the leaves up: a node starts where its prefix differs from its left neighbor's.
        for _ in range(levels):
            parent = key // codes
            tokens.append((key - parent * codes).astype(np.int32))
            starts = run_starts(parent)
            offsets.append(np.append(np.flatnonzero(starts), len(key)).astype(np.int64))
            key = parent[starts]
        if not len(sids):  # a catalog without items is a root with no children
            offsets[-1] = np.zeros(2, dtype=np.int64)
        return cls(codes, tuple(offsets[::-1]), tuple(tokens[::-1]))

    def sids(self) -> np.ndarray:
        """All distinct SIDs in leaf order, int32 [size x L]."""
        out = np.empty((self.size, self.levels), dtype=np.int32)
        node = np.arange(self.size)
        for level in range(self.levels - 1, -1, -1):
            out[:, level] = self.tokens[level][node]
            node = self._parents[level][node]
        return out

    def prefixes(self) -> np.ndarray:
        """Every prefix shorter than a SID, int32 [n_1 + ... + n_(L-1) x L], by length, then lexicographic; -1 behind
        its end."""
        out = [np.empty((0, self.levels), dtype=np.int32)]
        above = np.full((1, self.levels), -1, dtype=np.int32)
        for level in range(self.levels - 1):
            above = above[self._parents[level]]
            above[:, level] = self.tokens[level]
            out.append(above)
        return np.concatenate(out)

    def leaf_of(self, sids: np.ndarray) -> np.ndarray:
        """The leaf of each SID, int64 [S]; -1 where the catalog has no such SID (codes outside [0, C) too)."""
        rows = np.asarray(sids)
        node = np.zeros(len(rows), dtype=np.int64)
        found = ((rows >= 0) & (rows < self.codes)).all(axis=1)
        for level, keys in enumerate(self.edge_keys):
            if not len(keys):
                return np.full(len(rows), -1, dtype=np.int64)
            wanted = node * self.codes + rows[:, level]
            node = np.searchsorted(keys, wanted)
            np.minimum(node, len(keys) - 1, out=node)
            found &= keys[node] == wanted
        return np.where(found, node, -1)

    @cached_property
    def _parents(self) -> tuple[np.ndarray, ...]:
        return tuple(np.repeat(np.arange(len(o) - 1), np.diff(o)) for o in self.offsets)

    @cached_property
    def edge_keys(self) -> tuple[np.ndarray, ...]:
        """Per level, int64 [n_(l+1)]: parent node * C + code of each child, ascending."""
        return tuple(p * self.codes + t for p, t in zip(self._parents, self.tokens, strict=True))
