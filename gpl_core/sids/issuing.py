"""Issuing SIDs: new items get codes from the frozen codebooks, published SIDs never change.

Legend for shapes: N items to issue, M published items, L levels, d embedding width.
"""

from dataclasses import dataclass

import numpy as np

from gpl_core.sids.collisions import Rows, duplicates, published_twins, repair, row_numbers
from gpl_core.sids.health import level_usage
from gpl_core.sids.tokenizer import TokenizedItems


class RowView:
    """Some rows of a matrix (possibly a memory map), read on access."""

    def __init__(self, matrix: Rows, rows: np.ndarray) -> None:
        """Row n of the view is ``matrix[rows[n]]``."""
        self._matrix, self._rows = matrix, np.asarray(rows)

    def __getitem__(self, wanted: int | slice | np.ndarray) -> np.ndarray:
        return self._matrix[self._rows[wanted]]


@dataclass(frozen=True)
class Issued:
    """The SIDs of N items, and what issuing them took."""

    sids: np.ndarray  # int32 [N x L]
    bucket_size: np.ndarray  # int64 [N]: items in force with this SID, these N included
    moved: int  # items that the repair moved off their nearest last code
    shared: int  # items that share their SID with other content
    repeats: int  # items that repeat the content of a published or earlier item and share its SID


def issue(
    encoded: TokenizedItems,
    embeddings: Rows,
    last_codebook: np.ndarray,
    published: np.ndarray,
    published_embeddings: Rows,
) -> Issued:
    """SIDs for N items next to M published ones in force, which keep theirs.

    ``encoded`` and ``embeddings`` [N x d] are the new items', sorted by item_index; ``last_codebook`` [C x k] is the
    tokenizer's; ``published`` int [M x L] and ``published_embeddings`` [M x d] are in force. An item with the content
    of a published one shares its SID; all others get an unused SID within their prefix, while codes are left.
    """
    codes = encoded.codes
    prefix = row_numbers(np.concatenate([codes[:, :-1], published[:, :-1]]))
    near = np.flatnonzero(np.isin(prefix[len(codes) :], prefix[: len(codes)]))  # published ones that share a prefix
    twin = published_twins(codes, embeddings, published[near], RowView(published_embeddings, near))
    first = duplicates(codes, embeddings)
    twin = twin[first]  # a repeat of a twin is a twin
    sids = codes.copy()
    sids[twin >= 0] = published[near[twin[twin >= 0]]]
    open_rows = np.flatnonzero(twin < 0)
    number = np.full(len(codes), -1)
    number[open_rows] = np.arange(len(open_rows))
    result = repair(
        codes[open_rows],
        RowView(encoded.last_residual, open_rows),
        last_codebook,
        first=number[first[open_rows]],
        taken=published[near],
    )
    sids[open_rows] = result.codes
    repeats = int((twin >= 0).sum() + (first[open_rows] != open_rows).sum())
    sid = row_numbers(np.concatenate([sids, published[near]]))
    return Issued(sids, np.bincount(sid)[sid[: len(sids)]], result.moved, result.shared, repeats)


_FEW = 30  # with fewer newly issued items, means say nothing


@dataclass(frozen=True)
class Drift:
    """How far the newly issued items differ from the published ones."""

    items: int  # newly issued items
    residual_ratio: float  # mean residual norm of new over published items; 1: no difference
    perplexity_ratio: float  # least over levels: perplexity of the new items over that of as many published ones

    def message(self, warn: float, renew: float) -> str:
        """What to do; empty when the new items resemble the published ones, or are too few to tell."""
        figures = (
            f"{self.items:,} new items leave {self.residual_ratio:.2f} times the residual of published ones, and use "
            f"{self.perplexity_ratio:.2f} times as many codes"
        )
        if self.items < _FEW:
            return ""
        if self.residual_ratio >= renew:
            return f"{figures}: train a new tokenizer version"
        if self.residual_ratio >= warn or self.perplexity_ratio < 0.5:
            return f"{figures}: the catalog drifts away from the tokenizer"
        return ""


def drift(new_sids: np.ndarray, new_norms: np.ndarray, sids: np.ndarray, norms: np.ndarray, codes: int) -> Drift | None:
    """Compares new items (int [N x L], residual norms [N]) with published ones ([M x L], [M]); None without either."""
    if not len(new_sids) or not len(sids):
        return None
    like = np.random.default_rng(0).choice(len(sids), size=min(len(new_sids), len(sids)), replace=False)
    fresh, known = level_usage(new_sids[: len(like)], codes)[0], level_usage(sids[like], codes)[0]
    return Drift(
        len(new_sids),
        float(new_norms.mean() / max(norms.mean(), 1e-9)),
        min(a / b for a, b in zip(fresh, known, strict=True)),
    )
