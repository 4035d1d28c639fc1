"""Random streams keyed by their purpose, independent of what was drawn before."""

import hashlib

import numpy as np


def stream(seed: int, purpose: str, day: int = 0, batch: int = 0) -> np.random.Generator:
    """An independent counter-based generator (Philox) for one purpose, day and user batch.

    Keyed streams make tables independent of the order of batches: adding users, or leaving a table out, does not change
    the bytes of other batches.
    """
    key = hashlib.blake2b(f"gpl-simulation|{seed}|{purpose}|{day}|{batch}".encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(key, "little")))


def unit_rows(vectors: np.ndarray) -> np.ndarray:
    """[N x d] -> [N x d] float32 with rows of length 1; a zero row stays zero."""
    norms = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return (vectors / np.maximum(norms, 1e-12)).astype(np.float32)
