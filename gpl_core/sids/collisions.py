"""Collision repair: different contents of one prefix get different last-level codes, with few and short moves.

Items with the same embedding share a SID on purpose; published SIDs are fixed and their codes are taken. The repair
stays inside the item's own (c_1 .. c_(L-1)), so that a moved item keeps its meaning down to the last level.

Legend for shapes: N items, M published items, L levels, C codes per level, k latent width, d embedding width.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import pandas as pd
from scipy.optimize import linear_sum_assignment

from gpl_core.grouping import ranges, run_starts, runs

SAME_EMBEDDING = 1e-4
"""Unit embeddings nearer than this (Euclidean) are one content: an encoder reproduces a vector to about 1e-5."""

_READ = 8192  # embeddings gathered at a time
_BLOCK = 512  # contested contents placed at a time


class Rows(Protocol):
    """A matrix read by rows: an array, a memory map, or a view of some of its rows."""

    def __getitem__(self, wanted: Any, /) -> Any:
        """The rows ``wanted``."""


@dataclass(frozen=True)
class Repair:
    """The SIDs after repair, and what the repair took."""

    codes: np.ndarray  # int32 [N x L]
    moved: int  # items whose last code is not the one they had
    shared: int  # items that share their SID with other content, because no code of their prefix was free


def duplicates(codes: np.ndarray, embeddings: Rows) -> np.ndarray:
    """The first row with the same content, int64 [N]; a row's own number where no earlier one has it.

    Only rows of one SID are compared: ``codes`` int [N x L] come from the tokenizer, which gives equal embeddings equal
    codes. ``embeddings`` [N x d] may be a memory map: some thousand rows are read at a time.
    """
    first = np.arange(len(codes), dtype=np.int64)
    key = row_numbers(codes)
    rest = np.flatnonzero(np.bincount(key)[key] > 1)
    rest = rest[np.argsort(key[rest], kind="stable")]
    place = _projection(embeddings, rest)
    # Each round compares the first row left of every SID with the others left of that SID.
    while len(rest):
        run = np.flatnonzero(run_starts(key[rest]))
        size = np.diff(np.append(run, len(rest)))
        lead = np.repeat(run, size)
        near = np.abs(place - place[lead]) <= SAME_EMBEDDING  # leaves few rows to read
        near[run] = False
        pair = np.flatnonzero(near)
        near[pair] = _distances(embeddings, rest[pair], embeddings, rest[lead[pair]]) <= SAME_EMBEDDING
        first[rest[near]] = rest[lead[near]]
        left = ~near
        left[run] = False
        rest, place = rest[left], place[left]
    return first


def published_twins(
    codes: np.ndarray, embeddings: Rows, published: np.ndarray, published_embeddings: Rows
) -> np.ndarray:
    """The published row with the same content, int64 [N]; -1 where there is none.

    Rows of one prefix are compared, because a published item may have been moved: ``codes`` int [N x L], ``published``
    int [M x L], and their embeddings [N x d] and [M x d].
    """
    twin = np.full(len(codes), -1, dtype=np.int64)
    if not len(codes) or not len(published):
        return twin
    prefix = row_numbers(np.concatenate([codes[:, :-1], published[:, :-1]]))
    # Prefix and projection in one number: projections of unit vectors lie within [-1, 1].
    new = 4.0 * prefix[: len(codes)] + _projection(embeddings, np.arange(len(codes)))
    old = 4.0 * prefix[len(codes) :] + _projection(published_embeddings, np.arange(len(published)))
    order = np.argsort(old, kind="stable")
    start = np.searchsorted(old[order], new - 1.1 * SAME_EMBEDDING)
    count = np.searchsorted(old[order], new + 1.1 * SAME_EMBEDDING, side="right") - start
    asked = np.repeat(np.arange(len(codes)), count)
    found = order[start[asked] + ranges(count)]
    distance = _distances(embeddings, asked, published_embeddings, found)
    best = np.lexsort((found, distance, asked))
    best = best[run_starts(asked[best])]
    best = best[distance[best] <= SAME_EMBEDDING]
    twin[asked[best]] = found[best]
    return twin


def repair(
    codes: np.ndarray,
    last_residual: Rows,
    last_codebook: np.ndarray,
    *,
    first: np.ndarray | None = None,
    taken: np.ndarray | None = None,
    exact_limit: int = 512,
) -> Repair:
    """Gives every content a SID of its own within its prefix, while codes are left.

    ``codes`` int [N x L], ``last_residual`` float [N x k] and ``last_codebook`` [C x k] are a tokenizer's; ``first``
    int [N] says which rows are the same content (see ``duplicates``; default: none); ``taken`` int [M x L] are
    published SIDs, which stay reserved. Row order decides ties: callers sort by item_index.

    Within a prefix with collisions the repair is a minimum-cost assignment (Hungarian method, SciPy): the fewest moved
    items, and among those solutions the least growth of squared distance to the code. In a prefix where more than
    ``exact_limit`` contents want crowded codes, the nearest content keeps a code and the others take, nearest first,
    the nearest free one.
    """
    out = np.array(codes, dtype=np.int32)
    if not len(out):
        return Repair(out, 0, 0)
    lead = np.arange(len(out)) if first is None else np.asarray(first)
    heads = np.flatnonzero(lead == np.arange(len(out)))
    fixed = np.empty((0, out.shape[1]), dtype=np.int32) if taken is None else np.asarray(taken, dtype=np.int32)
    shared = np.zeros(len(out), dtype=bool)
    book = np.asarray(last_codebook, dtype=np.float64)
    wished = np.concatenate([out[heads], fixed])
    sid, prefix = row_numbers(wished), row_numbers(wished[:, :-1])
    claims = np.bincount(sid[: len(heads)], minlength=len(wished))
    published = np.bincount(sid[len(heads) :], minlength=len(wished)) > 0
    contested = np.zeros(len(wished), dtype=bool)
    contested[: len(heads)] = ((claims > 1) | published)[sid[: len(heads)]]
    for rows, others in _prefixes(prefix, contested):
        new = heads[rows]
        number, group = np.unique(prefix[rows], return_inverse=True)
        free = np.ones((len(number), len(book)), dtype=bool)
        # An item alone on its code keeps it: moving it would be one move more than needed.
        free[np.searchsorted(number, prefix[others]), wished[others, -1]] = False
        chosen = _place(np.asarray(last_residual[new], dtype=np.float64), book, out[new, -1], free, group, exact_limit)
        crowd = np.bincount(group * len(book) + chosen, minlength=free.size).reshape(free.shape)
        out[new, -1] = chosen
        shared[new] = (crowd + ~free)[group, chosen] > 1
    out[:, -1] = out[lead, -1]
    return Repair(out, int((out[:, -1] != np.asarray(codes)[:, -1]).sum()), int(shared[lead].sum()))


def _prefixes(prefix: np.ndarray, contested: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Prefixes with contested rows, about _BLOCK such rows at a time: their contested rows, and their others."""
    concerned = np.flatnonzero(np.bincount(prefix, weights=contested)[prefix] > 0)
    concerned = concerned[np.argsort(prefix[concerned], kind="stable")]
    starts = np.flatnonzero(run_starts(prefix[concerned]))
    bounds = np.append(starts, len(concerned))
    for run in runs(np.add.reduceat(contested[concerned].astype(np.int64), starts), _BLOCK):
        rows = concerned[bounds[run.start] : bounds[run.stop]]
        yield rows[contested[rows]], rows[~contested[rows]]


def _place(
    residual: np.ndarray, book: np.ndarray, own: np.ndarray, free: np.ndarray, group: np.ndarray, exact_limit: int
) -> np.ndarray:
    """Codes int [n] of contested contents, sorted by ``group`` int [n]; ``free`` bool [groups x C]; ``own`` int [n]:
    the codes they want."""
    chosen = own.astype(np.int64)
    size = np.bincount(group)
    start = np.cumsum(size) - size
    # Most crowded prefixes hold two contents that want one code: those are placed many at a time.
    pair = np.flatnonzero(size == 2)
    pair = pair[(own[start[pair]] == own[start[pair] + 1]) & free[pair, own[start[pair]]]]
    if len(pair):
        both = np.stack([start[pair], start[pair] + 1], axis=1)
        growth = np.where(free[pair][:, None], _distance(residual[both], book), np.inf)
        wished = np.take_along_axis(growth, chosen[both][..., None], axis=2)[..., 0]
        np.put_along_axis(growth, chosen[both][..., None], np.inf, axis=2)
        target = growth.argmin(axis=2)
        cost = np.take_along_axis(growth, target[..., None], axis=2)[..., 0] - wished
        mover = np.where(cost[:, 0] < cost[:, 1], 0, 1)
        at = np.arange(len(pair))
        movable = np.isfinite(cost[at, mover])
        chosen[both[at, mover][movable]] = target[at, mover][movable]
    for number in np.setdiff1d(np.flatnonzero(size), pair):
        rows = slice(start[number], start[number] + size[number])
        solve = _assign_exactly if size[number] <= exact_limit else _assign_greedily
        chosen[rows] = solve(residual[rows], book, chosen[rows], free[number])
    return chosen


def _assign_exactly(residual: np.ndarray, book: np.ndarray, own: np.ndarray, free: np.ndarray) -> np.ndarray:
    """Codes int [n] of the n contents of one prefix by minimum cost; ``own`` int [n]: wanted, ``free`` bool [C]."""
    n = len(own)
    distance = _distance(residual, book)
    columns = np.flatnonzero(free)
    if len(columns) > n:
        # Its n nearest free codes and its own suffice for each content: the others take at most n - 1 of them.
        near = np.argpartition(distance[:, columns], n - 1, axis=1)[:, :n]
        columns = np.unique(np.concatenate([columns[near].reshape(-1), own[free[own]]]))
    growth = distance - distance[np.arange(n), own][:, None]
    move = 1.0 + n * (np.abs(growth).max() + 1.0)  # one move costs more than the growth of all others
    cost = growth[:, columns] + move * (columns[None, :] != own[:, None])
    crowded = max(0, n - len(columns))  # more contents than codes: this many stay and share
    cost = np.concatenate([cost, np.full((n, crowded), 4.0 * n * move)], axis=1)
    row, column = linear_sum_assignment(cost)
    chosen = own.copy()
    placed = column < len(columns)
    chosen[row[placed]] = columns[column[placed]]
    return chosen


def _assign_greedily(residual: np.ndarray, book: np.ndarray, own: np.ndarray, free: np.ndarray) -> np.ndarray:
    """As ``_assign_exactly``, but one content after the other; at most C of them can move."""
    free, chosen = free.copy(), own.copy()
    order = np.argsort(np.square(residual - book[own]).sum(axis=1), kind="stable")
    keeps = np.zeros(len(own), dtype=bool)
    keeps[order[np.unique(own[order], return_index=True)[1]]] = True
    keeps &= free[own]
    free[own[keeps]] = False
    movers = order[~keeps[order]][: free.sum()]
    for n in movers:
        chosen[n] = np.where(free, _distance(residual[n], book), np.inf).argmin()
        free[chosen[n]] = False
    return chosen


def _distance(x: np.ndarray, book: np.ndarray) -> np.ndarray:
    """Squared distance to every code, [... x C], of ``x`` [... x k]."""
    return np.square(x).sum(axis=-1)[..., None] - 2.0 * x @ book.T + np.square(book).sum(axis=1)


def row_numbers(codes: np.ndarray) -> np.ndarray:
    """Numbers the distinct rows of ``codes`` int [N x m] from 0, in their order, int64 [N]; all zero for m = 0."""
    levels = codes.shape[1]
    return pd.DataFrame(codes).groupby([*range(levels)]).ngroup().to_numpy() if levels else np.zeros(len(codes), int)


def _projection(embeddings: Rows, rows: np.ndarray) -> np.ndarray:
    """float64 [n]: coordinates along one fixed direction; two rows are at least as far apart as their coordinates."""
    out = np.zeros(len(rows))
    for start in range(0, len(rows), _READ):
        part = np.asarray(embeddings[rows[start : start + _READ]], dtype=np.float32)
        direction = np.random.default_rng(0).normal(size=part.shape[1])
        out[start : start + len(part)] = part @ (direction / np.linalg.norm(direction))
    return out


def _distances(left: Rows, left_rows: np.ndarray, right: Rows, right_rows: np.ndarray) -> np.ndarray:
    """Euclidean distance of row pairs, float [n]."""
    out = np.zeros(len(left_rows))
    for start in range(0, len(out), _READ):
        part = slice(start, start + _READ)
        a, b = (np.asarray(m[r[part]], dtype=np.float32) for m, r in ((left, left_rows), (right, right_rows)))
        out[part] = np.linalg.norm(a - b, axis=1)
    return out
