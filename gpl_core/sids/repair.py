"""Collision repair: two contents of one prefix get different last-level codes, moving as few items and as near as
possible.

Items with the same embedding share a SID on purpose; published SIDs are fixed and their codes are taken. The repair
stays inside the item's own (c_1 .. c_(L-1)), so that a moved item keeps its meaning down to the last level.

Legend for shapes: N items, M published items, L levels, C codes per level, k latent width, d embedding width.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from scipy.optimize import linear_sum_assignment

SAME_EMBEDDING = 1e-4
"""Unit embeddings nearer than this (Euclidean) are one content: an encoder repeats itself to about 1e-5."""

_PAIRS = 8192


class Rows(Protocol):
    """A matrix read by rows: an array, a memory map, or a view of some of its rows."""

    def __getitem__(self, wanted: Any, /) -> Any:
        """The rows ``wanted``."""


@dataclass(frozen=True)
class Repair:
    """The SIDs after repair, and what it took."""

    codes: np.ndarray
    """int32 [N x L]"""
    moved: int
    """Items whose last code is not their nearest one."""
    shared: int
    """Items that share their SID with another content, because their prefix has no free code left."""


def duplicates(codes: np.ndarray, embeddings: Rows) -> np.ndarray:
    """The first row with the same content, int64 [N] (its own number where there is none before it).

    Compared are rows of one SID only: ``codes`` int [N x L] as the tokeniser gave them; equal embeddings get equal
    codes. ``embeddings`` [N x d] may be a memory map: rows are read bucket by bucket.
    """
    first = np.arange(len(codes), dtype=np.int64)
    key = row_numbers(codes)
    size = np.bincount(key)[key]
    # Most crowded SIDs hold two items: those are compared many at a time.
    pairs = np.flatnonzero(size == 2)
    pairs = pairs[np.argsort(key[pairs], kind="stable")].reshape(-1, 2)
    for start in range(0, len(pairs), _PAIRS):
        one, other = pairs[start : start + _PAIRS].T
        distance = np.linalg.norm(np.asarray(embeddings[one]) - np.asarray(embeddings[other]), axis=1)
        first[other[distance <= SAME_EMBEDDING]] = one[distance <= SAME_EMBEDDING]
    crowded = np.flatnonzero(size > 2)
    for bucket in _buckets(key[crowded]):
        rows = crowded[bucket]
        rest, vectors = rows, np.asarray(embeddings[rows], dtype=np.float32)
        while len(rest):
            same = np.linalg.norm(vectors - vectors[0], axis=1) <= SAME_EMBEDDING
            first[rest[same]] = rest[0]
            rest, vectors = rest[~same], vectors[~same]
    return first


def published_twins(
    codes: np.ndarray, embeddings: Rows, published: np.ndarray, published_embeddings: Rows
) -> np.ndarray:
    """The published row with the same content, int64 [N]; -1 where there is none.

    Compared are rows of one prefix, for a published item may have been moved: ``codes`` int [N x L], ``published``
    int [M x L], and their embeddings [N x d] and [M x d].
    """
    twin = np.full(len(codes), -1, dtype=np.int64)
    if not len(codes) or not len(published):
        return twin
    both = row_numbers(np.concatenate([codes[:, :-1], published[:, :-1]]))
    for rows in _buckets(both):
        new, old = rows[rows < len(codes)], rows[rows >= len(codes)] - len(codes)
        if not len(new) or not len(old):
            continue
        known = np.asarray(published_embeddings[old], dtype=np.float32)
        for row in new:
            distance = np.linalg.norm(known - np.asarray(embeddings[row], dtype=np.float32), axis=1)
            if distance.min() <= SAME_EMBEDDING:
                twin[row] = old[distance.argmin()]
    return twin


def repair(
    codes: np.ndarray,
    last_residual: np.ndarray,
    last_codebook: np.ndarray,
    *,
    first: np.ndarray | None = None,
    taken: np.ndarray | None = None,
    exact_limit: int = 512,
) -> Repair:
    """Gives every content a SID of its own, within its prefix, where codes are left.

    ``codes`` int [N x L] and ``last_residual`` float [N x k] are a tokeniser's, ``last_codebook`` [C x k] is its last
    one; ``first`` int [N] says which rows are the same content (see ``duplicates``; default: none); ``taken`` int [M
    x L] are published SIDs, which nobody else may have. Row order decides ties: callers sort by item_index.

    Within a prefix with collisions the change is a minimum-cost assignment (Hungarian method, SciPy): the fewest
    moved items, and among those changes the least growth of squared distance to the code. In a prefix where more
    than ``exact_limit`` contents want crowded codes, the nearest one keeps a code and the others take, nearest first,
    the nearest free code.
    """
    out = np.array(codes, dtype=np.int32)
    if not len(out):
        return Repair(out, 0, 0)
    lead = np.arange(len(out)) if first is None else np.asarray(first)
    heads = np.flatnonzero(lead == np.arange(len(out)))
    fixed = np.empty((0, out.shape[1]), dtype=np.int32) if taken is None else np.asarray(taken, dtype=np.int32)
    shared_sid = np.zeros(len(out), dtype=bool)
    size = len(last_codebook)
    book = np.asarray(last_codebook, dtype=np.float64)
    book_square = np.square(book).sum(axis=1)
    wished = np.concatenate([out[heads], fixed])
    sid, prefix = row_numbers(wished), row_numbers(wished[:, :-1])
    crowded = np.zeros(prefix.max(initial=0) + 1, dtype=bool)
    crowded[prefix[(np.bincount(sid) > 1)[sid]]] = True
    affected = np.flatnonzero(crowded[prefix])  # most prefixes have no collision: Python sees only the others
    for bucket in _buckets(prefix[affected]):
        rows = affected[bucket]
        new = heads[rows[rows < len(heads)]]
        free = np.ones(size, dtype=bool)
        free[fixed[rows[rows >= len(heads)] - len(heads), -1]] = False
        own = out[new, -1].astype(np.int64)
        contested = (np.bincount(own, minlength=size)[own] > 1) | ~free[own]
        if not contested.any():
            continue
        # Whoever has a code to itself keeps it: each move of such an item would be one move more than needed.
        free[own[~contested]] = False
        new, own = new[contested], own[contested]
        residual = np.asarray(last_residual[new], dtype=np.float64)
        distance = np.square(residual).sum(axis=1)[:, None] - 2.0 * residual @ book.T + book_square
        chosen = (_assign_exactly if len(new) <= exact_limit else _assign_greedily)(distance, own, free)
        out[new, -1] = chosen
        shared_sid[new] = (np.bincount(chosen, minlength=size) + ~free)[chosen] > 1
    out[:, -1] = out[lead, -1]
    return Repair(out, int((out[:, -1] != np.asarray(codes)[:, -1]).sum()), int(shared_sid[lead].sum()))


def _assign_exactly(distance: np.ndarray, own: np.ndarray, free: np.ndarray) -> np.ndarray:
    """Codes int [n] of n contents by minimum cost; ``distance`` [n x C] squared, ``own`` int [n] wished, ``free``
    bool [C]."""
    n = len(own)
    columns = np.flatnonzero(free)
    if len(columns) > n:
        # The n nearest free codes and its own are enough for each content: the others can take n - 1 of them at most.
        near = np.argpartition(distance[:, columns], n - 1, axis=1)[:, :n]
        columns = np.unique(np.concatenate([columns[near].reshape(-1), own[free[own]]]))
    growth = distance - distance[np.arange(n), own][:, None]
    move = 1.0 + n * (np.abs(growth).max() + 1.0)  # one move costs more than any growth of all others
    cost = growth[:, columns] + move * (columns[None, :] != own[:, None])
    crowded = max(0, n - len(columns))  # more contents than codes: so many stay where they are and share
    cost = np.concatenate([cost, np.full((n, crowded), 4.0 * n * move)], axis=1)
    row, column = linear_sum_assignment(cost)
    chosen = own.copy()
    placed = column < len(columns)
    chosen[row[placed]] = columns[column[placed]]
    return chosen


def _assign_greedily(distance: np.ndarray, own: np.ndarray, free: np.ndarray) -> np.ndarray:
    """As ``_assign_exactly``, one content after the other."""
    free = free.copy()
    chosen = own.copy()
    movers = []
    for n in np.argsort(distance[np.arange(len(own)), own], kind="stable"):
        if free[own[n]]:
            free[own[n]] = False
        else:
            movers.append(n)
    for n in movers:
        if not free.any():
            break
        chosen[n] = np.where(free, distance[n], np.inf).argmin()
        free[chosen[n]] = False
    return chosen


def row_numbers(codes: np.ndarray) -> np.ndarray:
    """A number from 0 on for each distinct row of ``codes`` int [N x m], int64 [N]; all zero for m = 0."""
    rows = np.asarray(codes)
    key = np.zeros(len(rows), dtype=np.int64)
    for column in range(rows.shape[1]):
        # Renumbering after each column keeps the key below N * C, whatever the number of levels.
        _, key = np.unique(key * (int(rows[:, column].max(initial=0)) + 1) + rows[:, column], return_inverse=True)
        key = key.reshape(-1).astype(np.int64)
    return key


def _buckets(key: np.ndarray) -> Iterator[np.ndarray]:
    """Row numbers of each distinct key, ascending within a bucket."""
    order = np.argsort(key, kind="stable")
    if len(order):
        yield from np.split(order, np.flatnonzero(np.diff(key[order])) + 1)
