"""Ranking metrics that say when they are undefined, and how long the ranked lists were (numpy).

An undefined figure (one class only, no list with a positive) is None with a reason, never 0.5 or 0. Ties never help:
AUC counts them half, lists break them by a key that is independent of labels and input order.
"""

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from gpl_core.errors import ContractError

FloatArray = npt.NDArray[np.float64]
_NORMAL_95 = 1.959963984540054


@dataclass(frozen=True)
class Figure:
    """One measured figure.

    value: None when undefined; `note` then says why. low, high: ends of a 95 % interval, None without one. rows: its
    pairs. candidate_set_size: mean length of the ranked lists, None for figures without lists.
    """

    metric: str
    value: float | None
    rows: int
    note: str = ""
    low: float | None = None
    high: float | None = None
    candidate_set_size: float | None = None


def auc(scores: npt.ArrayLike, labels: npt.ArrayLike, metric: str = "auc") -> Figure:
    """Area under the ROC curve; scores [n] finite, labels [n] in [0, 1].

    Soft labels give the *expected* AUC: a pair counts p as a positive and 1 - p as a negative, never against itself.
    For 0/1 labels the interval is DeLong's (1988), which takes rows as independent.
    """
    s, p = _checked(scores, labels)
    rows = len(s)
    if rows == 0:
        return Figure(metric, None, 0, "no rows")
    negative_below, positive_below = _mass_below(s, 1.0 - p), _mass_below(s, p)
    pairs = p.sum() * (1.0 - p).sum() - float(p @ (1.0 - p))
    if pairs <= 1e-12:
        kind = "click" if p.sum() < 0.5 else "non-click"
        return Figure(metric, None, rows, f"one class only: no {kind} among {rows} rows")
    value = float((p @ negative_below - 0.5 * (p @ (1.0 - p))) / pairs)
    hard = bool(np.isin(p, (0.0, 1.0)).all())
    positives, negatives = int(p.sum()), int(rows - p.sum())
    if not hard or positives < 2 or negatives < 2:
        return Figure(metric, value, rows)
    above = negative_below[p == 1.0] / negatives
    below = 1.0 - positive_below[p == 0.0] / positives
    error = _NORMAL_95 * float(np.sqrt(above.var(ddof=1) / positives + below.var(ddof=1) / negatives))
    return Figure(metric, value, rows, low=max(0.0, value - error), high=min(1.0, value + error))


def snips_auc(scores: npt.ArrayLike, clicks: npt.ArrayLike, propensity: npt.ArrayLike) -> Figure:
    """Self-normalized inverse-propensity estimate of the AUC over all pairs that could have been shown (ours).

    Each shown pair counts 1 / propensity, its logged probability of being shown (normalized as by Swaminathan &
    Joachims 2015). clicks [n] 0/1; rows whose propensity is not in (0, 1] are left out and counted in the note, with
    the effective number of rows, (sum w)^2 / sum w^2. Without an interval, because the rows' weights differ.
    """
    s, y = _checked(scores, clicks)
    p = np.asarray(propensity, dtype=np.float64)
    if p.shape != s.shape:
        raise ContractError(f"snips_auc: propensity {p.shape}; expected {s.shape}")
    usable = (p > 0.0) & (p <= 1.0)  # False for NaN
    s, y, weight = s[usable], y[usable], 1.0 / p[usable]
    left_out = f"{int((~usable).sum())} of {len(p)} rows have no propensity in (0, 1]"
    positive, negative = weight * y, weight * (1.0 - y)
    if positive.sum() == 0 or negative.sum() == 0:
        kind = "no rows" if not len(s) else f"one class only: no {'click' if positive.sum() == 0 else 'non-click'}"
        return Figure("snips_auc", None, len(s), f"{kind} among {len(s)} rows; {left_out}")
    value = float(positive @ _mass_below(s, negative) / (positive.sum() * negative.sum()))
    effective = f"{weight.sum() ** 2 / (weight**2).sum():.0f} effective rows"
    return Figure("snips_auc", value, len(s), effective if usable.all() else f"{effective}; {left_out}")


def gauc(scores: npt.ArrayLike, labels: npt.ArrayLike, groups: npt.ArrayLike) -> Figure:
    """Per-user AUC, averaged with the user's rows (impressions) as weight (Zhu et al. 2017, "GAUC").

    groups [n]: the user of each row, any sortable type. Users with one class only are left out and counted in the
    note. labels may be soft, see `auc`. The interval takes users as independent.
    """
    s, p = _checked(scores, labels)
    found, sizes = _per_group_auc(s, p, groups)
    kept = ~np.isnan(found)
    left_out = int((~kept).sum())
    note = f"{left_out} of {len(kept)} users have one class only" if left_out else ""
    if not kept.any():
        return Figure("gauc", None, len(s), note or "no rows")
    rows = int(sizes[kept].sum())
    value, weight = found[kept], sizes[kept] / rows
    mean = float(weight @ value)
    if len(value) < 2:
        return Figure("gauc", mean, rows, note)
    error = _NORMAL_95 * float(np.sqrt((weight**2) @ (value - mean) ** 2 * len(value) / (len(value) - 1)))
    return Figure("gauc", mean, rows, note, max(0.0, mean - error), min(1.0, mean + error))


def _per_group_auc(s: FloatArray, p: FloatArray, groups: npt.ArrayLike) -> tuple[FloatArray, npt.NDArray[np.int64]]:
    """(AUC per group [G], NaN where undefined; rows per group [G]), in the groups' sorted order, all in one sort."""
    _, group = np.unique(np.asarray(groups), return_inverse=True)
    count = int(group.max()) + 1 if len(group) else 0
    rows = np.bincount(group, minlength=count)
    negative_below = _mass_below(s, 1.0 - p, group)
    self_pairs = np.bincount(group, weights=p * (1.0 - p), minlength=count)
    positive, negative = (np.bincount(group, weights=w, minlength=count) for w in (p, 1.0 - p))
    pairs = positive * negative - self_pairs
    wins = np.bincount(group, weights=p * negative_below, minlength=count) - 0.5 * self_pairs
    defined = pairs > 1e-12
    return np.where(defined, wins / np.where(defined, pairs, 1.0), np.nan), rows


def ranked(
    kind: str, scores: npt.ArrayLike, labels: npt.ArrayLike, lists: npt.ArrayLike, tie_key: npt.ArrayLike, k: int = 10
) -> Figure:
    """HR@k (`kind` hr) or NDCG@k (ndcg) over the lists that have a positive; labels 0/1.

    HR@k: the share of them that show one among their k highest scores. NDCG@k: gain 1 / log2(1 + rank) of a positive.
    lists [n]: the request of each row; tie_key int [n]: breaks ties, independent of labels (an item hash, say).
    """
    metric = f"{kind}@{k}"
    s, y = _checked(scores, labels)
    if not np.isin(y, (0.0, 1.0)).all():
        raise ContractError(f"{metric}: labels must be 0 or 1; soft labels have an expected AUC only")
    _, group = np.unique(np.asarray(lists), return_inverse=True)
    count = int(group.max()) + 1 if len(group) else 0
    sizes = np.bincount(group, minlength=count)
    positives = np.bincount(group, weights=y, minlength=count)
    kept = positives > 0
    if not kept.any():
        return Figure(metric, None, len(s), f"none of {count} lists has a positive")
    order = np.lexsort((np.asarray(tie_key), -s, group))
    start = np.concatenate([[0], np.cumsum(sizes)[:-1]])
    rank = np.arange(len(s)) - np.repeat(start, sizes)  # 0 for the best of its list
    shown = (rank < k) * y[order]
    if kind == "hr":
        values = np.minimum(np.bincount(group[order], weights=shown, minlength=count)[kept], 1.0)
    else:
        gains = np.bincount(group[order], weights=shown / np.log2(rank + 2.0), minlength=count)
        best = np.cumsum(1.0 / np.log2(np.arange(k) + 2.0))[np.minimum(positives[kept].astype(int), k) - 1]
        values = gains[kept] / best
    note = f"{int((~kept).sum())} of {count} lists have no positive" if not kept.all() else ""
    figure = Figure(
        metric, float(values.mean()), int(sizes[kept].sum()), note, candidate_set_size=float(sizes[kept].mean())
    )
    if len(values) < 2:
        return figure
    error = _NORMAL_95 * float(values.std(ddof=1) / np.sqrt(len(values)))
    return replace(figure, low=max(0.0, float(values.mean()) - error), high=min(1.0, float(values.mean()) + error))


def _mass_below(scores: FloatArray, mass: FloatArray, group: npt.NDArray[np.int64] | None = None) -> FloatArray:
    """For each row: the mass at lower scores plus half the mass at equal ones (its own included), inside its group."""
    if len(scores) == 0:
        return np.zeros(0)
    group = np.zeros(len(scores), dtype=np.int64) if group is None else group
    order = np.lexsort((scores, group))
    s, g, m = scores[order], group[order], mass[order]
    before = np.concatenate([[0.0], np.cumsum(m)])
    new_group = np.concatenate([[True], g[1:] != g[:-1]])
    new_run = new_group | np.concatenate([[True], s[1:] != s[:-1]])
    starts = np.flatnonzero(new_run)
    run = np.cumsum(new_run) - 1
    ends = np.append(starts[1:], len(s))
    group_start = np.flatnonzero(new_group)[np.cumsum(new_group) - 1]
    below = before[starts][run] - before[group_start] + 0.5 * (before[ends] - before[starts])[run]
    out = np.empty_like(below)
    out[order] = below
    return out


def _checked(scores: npt.ArrayLike, labels: npt.ArrayLike) -> tuple[FloatArray, FloatArray]:
    s, p = np.asarray(scores, dtype=np.float64), np.asarray(labels, dtype=np.float64)
    if s.shape != p.shape or s.ndim != 1:
        raise ContractError(f"metrics: scores {s.shape} and labels {p.shape}; expected two vectors of one length")
    if not np.isfinite(s).all():
        raise ContractError(f"metrics: {int((~np.isfinite(s)).sum())} of {len(s)} scores are not finite")
    if len(p) and (not np.isfinite(p).all() or p.min() < 0.0 or p.max() > 1.0):
        raise ContractError("metrics: a label is outside [0, 1] or not finite")
    return s, p
