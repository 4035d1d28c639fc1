"""Do neighbors by embedding stay neighbors by SID? (numpy, brute force)"""

from __future__ import annotations

import numpy as np


def neighbor_recall(embeddings: np.ndarray, decoded: np.ndarray, k: int = 10) -> np.ndarray:
    """Float [N]: the share of an item's k nearest by embedding that are among its k nearest by decoded vector.

    Both [N x d], nearest by cosine, the item itself left out.
    Ties among decoded vectors (items of one SID) are broken by a fixed random order, so that table order earns nothing.
    """
    order = np.random.default_rng(0).permutation(len(embeddings))
    unit = _unit(embeddings)[order]
    unit_decoded = _unit(decoded)[order]
    position = np.argsort(order)
    width = min(k, len(embeddings) - 1)
    out = np.zeros(len(embeddings))
    for start in range(0, len(embeddings), 512):
        own = position[start : start + 512]
        near = _nearest(unit, own, width)
        near_decoded = _nearest(unit_decoded, own, width)
        out[start : start + len(own)] = [
            len(np.intersect1d(a, b)) / max(1, width) for a, b in zip(near, near_decoded, strict=True)
        ]
    return out


def _unit(x: np.ndarray) -> np.ndarray:
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)


def _nearest(unit: np.ndarray, own: np.ndarray, width: int) -> np.ndarray:
    similarity = unit[own] @ unit.T
    similarity[np.arange(len(own)), own] = -np.inf
    return np.argsort(-similarity, axis=1, kind="stable")[:, :width]
