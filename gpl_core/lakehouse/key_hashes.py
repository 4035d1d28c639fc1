"""64-bit hashes of text keys, which steps hold in memory instead of ids."""

from collections.abc import Iterable
from hashlib import blake2b

import numpy as np


def hash_keys(*columns: Iterable[str]) -> np.ndarray:
    """A 64-bit hash of each row of `columns` (equally long), uint64; the same on every machine.

    Two of n different keys share a hash with probability n^2 / 2^65: about .003 for 3e8.
    """
    return np.fromiter(
        (int.from_bytes(blake2b("\0".join(row).encode(), digest_size=8).digest(), "little") for row in zip(*columns)),
        dtype=np.uint64,
    )


def members(values: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """Bool per element of `values` (uint64): whether it is one of `keys` (uint64, ascending)."""
    if not len(keys):
        return np.zeros(len(values), dtype=bool)
    return keys[np.searchsorted(keys, values).clip(max=len(keys) - 1)] == values
