"""Ranking metrics that report when they are undefined, and the mean length of the ranked lists (numpy).

An undefined figure (one class only, no list with a positive) is None with a reason, never 0.5 or 0. Ties never help:
AUC counts them half, lists break them by a key that is independent of labels and input order. Given the users of the
rows, a figure carries its sums per user, from which `bootstrap` makes intervals.
"""

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from gpl_core.errors import ContractError
from gpl_core.grouping import ranges, run_starts
from gpl_core.prerank.bootstrap import FloatArray, UserSums, sums_by_user


@dataclass(frozen=True)
class Figure:
    """One measured figure."""

    metric: str
    value: float | None  # None when undefined; `note` then says why
    rows: int  # its pairs
    clicks: float = 0.0  # those clicked; of soft labels their sum
    note: str = ""
    candidate_set_size: float | None = None  # mean length of the ranked lists; None for figures without lists
    sums: UserSums | None = field(default=None, repr=False, compare=False)  # what to draw users from

    def columns(self) -> dict[str, Any]:
        """The figure as columns of a table, without the sums."""
        return {name: value for name, value in vars(self).items() if name != "sums"}


def auc(scores: npt.ArrayLike, labels: npt.ArrayLike, users: npt.ArrayLike | None = None) -> Figure:
    """Area under the ROC curve; scores [n] finite, labels [n] in [0, 1], users [n] of any sortable type.

    Soft labels give the *expected* AUC: a pair counts p as a positive and 1 - p as a negative, never against itself.
    """
    s, p = _checked(scores, labels)
    return _weighted_auc("auc", s, p, 1.0 - p, float(p.sum()), users)


def _weighted_auc(
    metric: str, s: FloatArray, positive: FloatArray, negative: FloatArray, clicks: float, users: npt.ArrayLike | None
) -> Figure:
    """AUC of rows that are positives and negatives of some weight each, never against themselves.

    The sums per user are the first term of the AUC's expansion in the users' weights: their variance is that of an AUC
    over clustered rows (Obuchowski 1997), DeLong's (1988) when every user has one row.
    """
    rows = len(s)
    if rows == 0:
        return Figure(metric, None, 0, clicks, "no rows")
    negative_below, positive_below = _mass_below(s, negative), _mass_below(s, positive)
    own = positive * negative
    pairs = float(positive.sum() * negative.sum() - own.sum())
    if pairs <= 1e-12:
        kind = "click" if positive.sum() < negative.sum() else "non-click"
        return Figure(metric, None, rows, clicks, f"one class only: no {kind} among {rows} rows")
    value = float((positive @ negative_below - 0.5 * own.sum()) / pairs)
    if users is None:
        return Figure(metric, value, rows, clicks)
    wins = positive * negative_below + negative * (positive.sum() - positive_below) - 0.5 * own
    slope = (wins - value * (positive * negative.sum() + negative * positive.sum() - own)) / pairs
    user = np.unique(np.asarray(users), return_inverse=True)[1].astype(np.int64)
    first = np.unique(user, return_index=True)[1]
    mass = np.zeros(rows)
    mass[first] = 1.0 / len(first)
    return Figure(metric, value, rows, clicks, sums=sums_by_user(user, value * mass + slope - slope.sum() * mass, mass))


def snips_auc(
    scores: npt.ArrayLike, clicks: npt.ArrayLike, propensity: npt.ArrayLike, users: npt.ArrayLike | None = None
) -> Figure:
    """Self-normalized inverse-propensity estimate of the AUC over all pairs that could have been shown (ours).

    Each shown pair counts 1 / propensity, its logged probability of being shown (normalized as by Swaminathan &
    Joachims 2015). clicks [n] 0/1; rows whose propensity is not in (0, 1] are left out and counted in the note, with
    the effective number of rows, (sum w)^2 / sum w^2.
    """
    s, y = _checked(scores, clicks)
    p = np.asarray(propensity, dtype=np.float64)
    if p.shape != s.shape:
        raise ContractError(f"snips_auc: propensity {p.shape}; expected {s.shape}")
    usable = (p > 0.0) & (p <= 1.0)  # False for NaN
    s, y, weight = s[usable], y[usable], 1.0 / p[usable]
    of = None if users is None else np.asarray(users)[usable]
    found = _weighted_auc("snips_auc", s, weight * y, weight * (1.0 - y), float(y.sum()), of)
    left_out = f"{int((~usable).sum())} of {len(p)} rows have no propensity in (0, 1]"
    if found.value is None:
        return replace(found, note=f"{found.note}; {left_out}")
    effective = f"{weight.sum() ** 2 / (weight**2).sum():.0f} effective rows"
    return replace(found, note=effective if usable.all() else f"{effective}; {left_out}")


def gauc(scores: npt.ArrayLike, labels: npt.ArrayLike, users: npt.ArrayLike) -> Figure:
    """Per-user AUC, averaged with the user's rows (impressions) as weight (Zhu et al. 2017, "GAUC").

    users [n]: the user of each row, any sortable type. Those with one class only are left out and counted in the note.
    labels may be soft, see `auc`.
    """
    s, p = _checked(scores, labels)
    found, sizes = _per_group_auc(s, p, users)
    kept = ~np.isnan(found)
    left_out = int((~kept).sum())
    note = f"{left_out} of {len(kept)} users have one class only" if left_out else ""
    if not kept.any():
        return Figure("gauc", None, len(s), float(p.sum()), note or "no rows")
    rows = np.where(kept, sizes, 0).astype(np.float64)
    sums = sums_by_user(np.arange(len(rows)), rows * np.nan_to_num(found), rows)
    value = float(sums.parts.sum() / sums.mass.sum())
    return Figure("gauc", value, int(rows.sum()), float(p.sum()), note, sums=sums)


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
    kind: str,
    scores: npt.ArrayLike,
    labels: npt.ArrayLike,
    lists: npt.ArrayLike,
    tie_key: npt.ArrayLike,
    k: int = 10,
    users: npt.ArrayLike | None = None,
) -> Figure:
    """HR@k (`kind` hr) or NDCG@k (ndcg) over the lists that have a positive; labels 0/1.

    HR@k: the share of them that show one among their k highest scores. NDCG@k: gain 1 / log2(1 + rank) of a positive.
    Absent where k covers half of their mean length or more: there nearly every order is a hit. lists [n]: the request
    of each row; tie_key int [n]: breaks ties, independent of labels (an item hash, say).
    """
    metric = f"{kind}@{k}"
    s, y = _checked(scores, labels)
    if not np.isin(y, (0.0, 1.0)).all():
        raise ContractError(f"{metric}: labels must be 0 or 1; soft labels have an expected AUC only")
    _, group = np.unique(np.asarray(lists), return_inverse=True)
    count, clicks = int(group.max()) + 1 if len(group) else 0, float(y.sum())
    sizes = np.bincount(group, minlength=count)
    positives = np.bincount(group, weights=y, minlength=count)
    kept = positives > 0
    if not kept.any():
        return Figure(metric, None, len(s), clicks, f"none of {count} lists has a positive")
    size = float(sizes[kept].mean())
    about = (int(sizes[kept].sum()), clicks)
    if 2 * k >= size:
        why = f"{k} is half of a list's {size:.1f} candidates or more"
        return Figure(metric, None, *about, why, candidate_set_size=size)
    order = np.lexsort((np.asarray(tie_key), -s, group))
    start = np.cumsum(sizes) - sizes
    rank = ranges(sizes)  # 0 for the best of its list
    shown = (rank < k) * y[order]
    if kind == "hr":
        values = np.minimum(np.bincount(group[order], weights=shown, minlength=count)[kept], 1.0)
    else:
        gains = np.bincount(group[order], weights=shown / np.log2(rank + 2.0), minlength=count)
        best = np.cumsum(1.0 / np.log2(np.arange(k) + 2.0))[np.minimum(positives[kept].astype(int), k) - 1]
        values = gains[kept] / best
    note = f"{int((~kept).sum())} of {count} lists have no positive" if not kept.all() else ""
    of = np.asarray(lists if users is None else users)[order][start[kept]]  # a list has one user
    user = np.unique(of, return_inverse=True)[1].astype(np.int64)
    sums = sums_by_user(user, values, np.ones(len(values)))
    return Figure(metric, float(values.mean()), *about, note, candidate_set_size=size, sums=sums)


def _mass_below(scores: FloatArray, mass: FloatArray, group: npt.NDArray[np.int64] | None = None) -> FloatArray:
    """For each row: the mass at lower scores plus half the mass at equal ones (its own included), inside its group."""
    group = np.zeros(len(scores), dtype=np.int64) if group is None else group
    order = np.lexsort((scores, group))
    s, g, m = scores[order], group[order], mass[order]
    before = np.concatenate([[0.0], np.cumsum(m)])
    new_group = run_starts(g)
    new_run = new_group | run_starts(s)
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
