"""Inputs of the towers: hashed ids, and a bounded table of what users liked before the run date.

Legend for shapes: n rows, d width of the item embedding, H history items.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:  # serving needs this module, and no torch
    from torch import Tensor


class TowerBatch(NamedTuple):
    """Model inputs of n (user, item) pairs."""

    user_bucket: Tensor  # int64 [n], `user_buckets` of the user id
    profile: Tensor  # float32 [n x d], `UserProfiles.of` the bucket; 0 for a user without history
    item_bucket: Tensor  # int64 [n], `item_buckets` of the item index
    content: Tensor  # float32 [n x d], unit item embedding e(i); 0 where it is missing
    sid: Tensor  # int64 [n x L]; -1 for an item without a semantic ID
    pair: Tensor  # float32 [n x F], passthrough features of the pair; F may be 0


def user_buckets(user_ids: Iterable[str], buckets: int) -> npt.NDArray[np.int64]:
    """CRC-32 of each user id (UTF-8) modulo `buckets`, int64 [n]: reproducible in any language at serving time."""
    return np.fromiter((zlib.crc32(user.encode()) % buckets for user in user_ids), dtype=np.int64)


def item_buckets(item_index: npt.ArrayLike, buckets: int) -> npt.NDArray[np.int64]:
    """item_index modulo `buckets`, int64 [n]: item_index is dense, so items collide only when buckets run out."""
    return np.asarray(item_index, dtype=np.int64) % buckets


class UserProfiles:
    """Mean embedding of the items in a user's history, one row per hashed user bucket: memory [buckets x d], bounded.

    Users that share a bucket share its mean. Add a date's sequences with `add`, then `close_slice`; a later date
    replaces the buckets it has rows for, because a row holds the user's whole history.
    """

    def __init__(self, buckets: int, width: int) -> None:
        self.table: npt.NDArray[np.float32] = np.zeros((buckets, width), dtype=np.float32)
        self._sum = np.zeros((buckets, width), dtype=np.float64)
        self._rows = np.zeros(buckets, dtype=np.int64)

    def add(self, user_ids: Iterable[str], rows: npt.NDArray[np.integer], vectors: npt.NDArray[np.floating]) -> None:
        """Adds sequences of one date: the items' rows int [n x H] of vectors [N x d], -1 where there is none."""
        known = rows >= 0
        gathered = np.asarray(vectors[np.where(known, rows, 0)], dtype=np.float64)
        gathered[~known] = 0.0
        mean = gathered.sum(axis=1) / np.maximum(known.sum(axis=1), 1)[:, None]
        bucket = user_buckets(user_ids, len(self.table))
        np.add.at(self._sum, bucket, mean)
        np.add.at(self._rows, bucket, 1)

    def close_slice(self, total: Callable[[np.ndarray], np.ndarray] = lambda own: own) -> float:
        """Ends a date; `total`: the sum of an array over the ranks that have each added a part of it.

        Returns the share of its users that share their bucket.
        """
        sums, rows = total(self._sum), total(self._rows)
        touched = rows > 0
        mean = sums[touched] / rows[touched, None]
        norm = np.linalg.norm(mean, axis=1, keepdims=True)
        self.table[touched] = mean / np.where(norm > 0, norm, 1.0)
        self._sum[:] = 0.0
        self._rows[:] = 0
        return float(rows[rows > 1].sum() / max(1, rows.sum()))

    def of(self, bucket: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        """Profiles [n x d] of the buckets [n], of unit norm, or 0 where none is known."""
        return self.table[bucket]
