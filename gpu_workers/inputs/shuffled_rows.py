"""Rows in random order over all files of a window, in bounded memory.

Rows are structured arrays with a field `shuffle_key`. A hash of it deals them into buckets on the local disk, so that
each bucket is a random sample of the whole window. An epoch takes the buckets in random order, and the rows of each in
random order. The order depends only on keys, seed and epoch, not on a row's file or on the other rows.
"""

import itertools
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

Rows = npt.NDArray[np.void]

BUCKET_ROWS = 1 << 21  # rows of a bucket: some 100 MB while they are sorted


def places(shuffle_key: np.ndarray, seed: int, epoch: int) -> np.ndarray:
    """A pseudo-random place uint64 [n] per row: SplitMix64's mixer (Steele et al. 2014) on its key, salted, twice."""
    salt = mixed(np.array([(seed * 1_000_003 + epoch) % 2**64], np.uint64))
    return mixed(mixed(shuffle_key.astype(np.int64).view(np.uint64) ^ salt))


def mixed(x: np.ndarray) -> np.ndarray:
    """A well-mixed, reversible map of uint64 to uint64, [n]."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


class ShuffledRows:
    """Rows on the local disk, read epoch after epoch, in a new order each time.

    folder: where, not there yet. expected: about how many rows will be added; it decides the number of buckets.
    """

    def __init__(self, folder: Path, kind: np.dtype, expected: int, bucket_rows: int = BUCKET_ROWS) -> None:
        self.kind, self.rows, self.buckets = kind, 0, max(1, -(-expected // bucket_rows))
        self._folder = folder
        folder.mkdir()

    def add(self, rows: Rows) -> None:
        """Add a batch."""
        self.rows += len(rows)
        bucket = mixed(rows["shuffle_key"].view(np.uint64)) % np.uint64(self.buckets)
        order = np.argsort(bucket, kind="stable")
        starts = np.searchsorted(bucket[order], np.arange(self.buckets + 1))
        for number in np.flatnonzero(np.diff(starts)).tolist():
            with open(self._folder / str(number), "ab") as out:
                out.write(rows[order[starts[number] : starts[number + 1]]].tobytes())

    def bucket(self, number: int, seed: int = 0, epoch: int = 0) -> Rows:
        """The rows of one bucket, a random sample of all, in the order of an epoch."""
        path = self._folder / str(number)
        rows = np.fromfile(path, self.kind) if path.exists() else np.empty(0, self.kind)
        return rows[np.argsort(places(rows["shuffle_key"], seed, epoch), kind="stable")]

    def batches(self, size: int, seed: int) -> Iterator[Rows]:
        """Batches of exactly `size` rows without end; empty ones when there are no rows."""
        held = np.empty(0, self.kind)
        if not self.rows:
            yield from itertools.repeat(held)
        for epoch in itertools.count():
            for number in np.random.default_rng([seed, epoch]).permutation(self.buckets).tolist():
                held = np.concatenate([held, self.bucket(number, seed, epoch)])
                whole = len(held) // size * size
                yield from (held[start : start + size] for start in range(0, whole, size))
                held = held[whole:]
