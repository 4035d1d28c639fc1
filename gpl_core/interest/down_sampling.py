"""Which positives are training targets: popular items are down-sampled; the context keeps every event."""

import numpy as np

from gpl_core.errors import ContractError, UsageError


def keep_probability(counts: np.ndarray, share: float, items: np.ndarray | None = None) -> np.ndarray:
    """p_keep(i) = min(1, sqrt(tau / f_i)), float64 [N] (word2vec's rule, Mikolov 2013; the choice of tau is ours).

    ``counts`` [N]: positives of each item in the window, f_i = counts_i / sum. tau is such that ``share``
    (0 < share <= 1) of all targets is kept on average. An item without positives has p_keep 1. ``items`` [N]:
    how many items each of ``counts`` stands for (default: one). The trainer keeps a target when its
    keep_u < p_keep(item), so a re-run keeps the same ones.
    """
    if not 0 < share <= 1:
        raise UsageError(f"interest.keep_target_share = {share}: expected 0 < share <= 1; 1 keeps every target.")
    each = np.ones(len(counts)) if items is None else items
    if (counts < 0).any():
        raise ContractError("table item_stats: a count is below 0, expected 0 or more; run sequences again")
    total = (each * counts).sum()
    keep = np.ones(len(counts))
    if total == 0 or share == 1:
        return keep
    seen = counts > 0
    root = np.sqrt(counts[seen] / total)
    # With s = sqrt(tau), the kept share is sum_i min(f_i, s sqrt(f_i)): piecewise linear and rising in s. Sorted by
    # sqrt(f), items below s are kept whole; walk to the segment in which the wanted share lies and solve it there.
    order = np.argsort(root)
    ascending, each = root[order], each[seen][order]
    whole = np.concatenate([[0.0], np.cumsum(each * ascending**2)])
    linear = np.concatenate([[0.0], np.cumsum((each * ascending)[::-1])])[::-1]
    at_knots = whole[1:] + ascending * linear[1:]
    segment = min(int(np.searchsorted(at_knots, share)), len(ascending) - 1)
    scale = (share - whole[segment]) / linear[segment]
    keep[seen] = np.minimum(1.0, scale / root)
    return keep
