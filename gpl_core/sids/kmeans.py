"""Residual k-means: the start of an RQ-VAE's codebooks.

Legend for shapes: N rows, L levels, C codes, k width. The clustering is scikit-learn's.
"""

import warnings

import numpy as np
from sklearn.cluster import KMeans, MiniBatchKMeans
from sklearn.exceptions import ConvergenceWarning

_DISTINCT_ROWS = 20_000  # a larger catalog is assumed to have more distinct rows than codes
_ROWS = 16_384  # compared with all codes at a time
_EXACT_ROWS = 200_000  # mini-batches beyond it: Lloyd's step over all rows costs N * C * k


def residual_kmeans(x: np.ndarray, levels: int, codes: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Codebooks float32 [L x C x k] fitted level by level on the residuals of ``x`` [N x k]; rows per code [L x C].

    With fewer distinct rows than codes, each distinct row gets a code and the other codes are rows with a little noise
    (a tenth of the spread), near which later items may fall. Deterministic for a seed.
    """
    residual = np.ascontiguousarray(x, dtype=np.float32).copy()
    books = np.empty((levels, codes, x.shape[1]), dtype=np.float32)
    counts = np.zeros((levels, codes), dtype=np.float32)
    for level in range(levels):
        rng = np.random.default_rng([seed, level])
        distinct = residual if len(residual) > _DISTINCT_ROWS else np.unique(residual, axis=0)
        clusters = min(codes, len(distinct))
        if clusters == len(distinct):
            books[level, :clusters] = distinct
        else:
            kind = KMeans if len(residual) <= _EXACT_ROWS else MiniBatchKMeans
            extra = {} if kind is KMeans else {"batch_size": max(8192, 4 * codes)}
            with warnings.catch_warnings():
                # Nearly equal rows may share a cluster; unused codes are revived later.
                warnings.simplefilter("ignore", ConvergenceWarning)
                fitted = kind(clusters, n_init=1, max_iter=50, random_state=int(rng.integers(2**31)), **extra).fit(
                    residual
                )
            books[level, :clusters] = fitted.cluster_centers_
        spread = residual.std() + 1e-6
        noise = rng.normal(scale=0.1 * spread, size=(codes - clusters, x.shape[1]))
        books[level, clusters:] = distinct[rng.integers(len(distinct), size=codes - clusters)] + noise
        half = np.square(books[level]).sum(axis=1) / 2
        parts = np.split(residual, range(_ROWS, len(residual), _ROWS))
        chosen = np.concatenate([np.argmax(part @ books[level].T - half, axis=1) for part in parts])
        counts[level] = np.bincount(chosen, minlength=codes)
        residual -= books[level][chosen]
    return books, counts
