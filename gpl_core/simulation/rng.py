"""Random streams keyed by their purpose, independent of what was drawn before, and numbers alike on every CPU.

exp, log and sums of products differ in their last bits from CPU to CPU. Their results are therefore rounded before they
are used for sorting or sampling, or are written.
"""

import hashlib

import numpy as np


def stream(seed: int, purpose: str, day: int = 0, batch: int = 0) -> np.random.Generator:
    """An independent counter-based generator (Philox) for one purpose, day and user batch.

    Keyed streams make tables independent of the order of batches: adding users, or leaving a table out, does not change
    the bytes of other batches.
    """
    key = hashlib.blake2b(f"gpl-simulation|{seed}|{purpose}|{day}|{batch}".encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(key, "little")))


def rounded(values: np.ndarray, bits: int = 20) -> np.ndarray:
    """`values` as float64 multiples of 2 ** -bits."""
    return np.round(np.asarray(values, np.float64) * 2.0**bits) * 2.0**-bits


def unit_rows(vectors: np.ndarray) -> np.ndarray:
    """[N x d] -> [N x d] float32 with rows of length 1 (to 2 ** -11 per entry); a zero row stays zero.

    Entries are multiples of 2 ** -11, so that float32 dot products of such rows are exact, in whatever order they are
    summed.
    """
    vectors = np.asarray(vectors, np.float64)
    norms = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return rounded(vectors / np.maximum(norms, 1e-12), 11).astype(np.float32)
