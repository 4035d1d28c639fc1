"""Fits of the calibrators from aggregates or small samples (numpy only), and the reasons to refuse a fit.

Spark aggregates (rows, clicks and mean fraction per grid cell: at most GRID_CELLS rows), the driver calls these.
Formulas marked (ours) are this project's choice; the mean of the labels is what matters most (METHOD.md), so
`fit_quantile` meets its target rate exactly on the pairs it is fitted on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

from gpl_core.errors import ContractError, GateError
from gpl_core.labels.calibration import (
    GRID_CELLS,
    GRID_KINDS,
    Calibrator,
    FittedOn,
    FloatArray,
    ReliabilityBin,
    grid_position,
    sigmoid,
)

FAMILIES = ("logit_normal", "beta")


def histogram(similarity: npt.ArrayLike, values: npt.ArrayLike | None = None) -> FloatArray:
    """Rows per grid cell [GRID_CELLS], or the sum of `values` [n] per cell, of similarities [n]."""
    cell, _ = grid_position(similarity)
    weights = None if values is None else np.asarray(values, dtype=np.float64)
    return np.bincount(cell, weights=weights, minlength=GRID_CELLS).astype(np.float64)


def grid_mean(knots: npt.ArrayLike, counts: npt.ArrayLike, fractions: npt.ArrayLike | None = None) -> float:
    """Mean label of the pairs behind a histogram, exact when `fractions` are the cells' mean fractions.

    knots [GRID_CELLS + 1]; counts [GRID_CELLS]; fractions [GRID_CELLS] in [0, 1], the middle of the cell when None.
    """
    return float(_cell_labels(knots, fractions) @ _histogram(counts) / np.sum(counts))


def fit_quantile(
    counts: npt.ArrayLike,
    target_rate: float,
    family: str = "logit_normal",
    spread: float = 1.0,
    fractions: npt.ArrayLike | None = None,
) -> FloatArray:
    """Knots [GRID_CELLS + 1] of `quantile`: global rank of similarity -> quantile of a distribution (ours).

    The mid-CDF of the histogram at the grid's knots is pushed through the quantile function of `family`, whose
    location is solved so that the mean label over the histogram equals `target_rate` (to 1e-9).

    counts: pairs per cell [GRID_CELLS], exact. fractions: mean position of the pairs inside each cell, see `grid_mean`.
    spread: logit_normal: standard deviation of the labels' logits; beta: 1 / concentration (a + b = 1 / spread). > 0.
    Raises GateError when the histogram is empty, ContractError for a target rate, family or spread out of range.
    """
    if family not in FAMILIES:
        raise ContractError(f"calibration.family is {family!r}; expected one of {', '.join(FAMILIES)}")
    if not 0.0 < target_rate < 1.0:
        raise ContractError(f"calibration.target_rate is {target_rate!r}; expected a rate strictly between 0 and 1")
    if not 0.0 < spread < float("inf"):
        raise ContractError(f"calibration.spread is {spread!r}; expected a finite value above 0")
    counts = _histogram(counts)
    total = float(counts.sum())
    if total <= 0:
        raise GateError(
            "calibration.quantile: no scored unexposed pair to rank; check that score_candidates wrote pairs"
        )

    # Ranks are averaged over the two cells that meet in a knot: a histogram with one full cell then gives labels
    # around the median, not the two extremes of the distribution.
    middle = (np.cumsum(counts) - counts / 2) / total
    rank = (np.concatenate([[0.0], middle]) + np.concatenate([middle, [1.0]])) / 2
    edge = min(0.25, 0.5 / (total + 1))
    rank = np.clip(rank, edge, 1.0 - edge)

    location_to_knots = _logit_normal(rank, spread) if family == "logit_normal" else _beta(rank, spread)
    low, high = (-60.0, 60.0)
    for _ in range(200):
        location = (low + high) / 2
        if grid_mean(location_to_knots(location), counts, fractions) < target_rate:
            low = location
        else:
            high = location
        if high - low < 1e-13 * max(1.0, abs(location)):
            break
    return np.clip(location_to_knots((low + high) / 2), 0.0, 1.0)


def fit_isotonic(rows: npt.ArrayLike, clicks: npt.ArrayLike, fractions: npt.ArrayLike | None = None) -> FloatArray:
    """Knots [GRID_CELLS + 1] of the `isotonic` calibrator: non-decreasing click rate by pool-adjacent-violators.

    rows, clicks: uniformly exposed pairs and clicked ones per cell [GRID_CELLS]; fractions as in `grid_mean`. The
    pooled rate stands at each occupied cell's mean similarity; between them it is interpolated, beyond
    the ends constant.
    Raises GateError without rows or without clicks.
    """
    rows, clicks = _histogram(rows), _histogram(clicks)
    if (clicks > rows).any():
        raise ContractError("calibration.isotonic: a cell holds more clicks than rows; clicks must be 0/1 per row")
    if rows.sum() == 0 or clicks.sum() == 0:
        raise GateError(
            f"calibration.isotonic: {int(clicks.sum())} clicks in {int(rows.sum())} rows; "
            "at least one click is needed: widen calibration's date range or use kind quantile with a target_rate"
        )
    used = np.flatnonzero(rows)
    rate = pool_adjacent_violators(clicks[used] / rows[used], rows[used])
    inside = np.full(GRID_CELLS, 0.5) if fractions is None else np.asarray(fractions, dtype=np.float64)
    return np.interp(np.arange(GRID_CELLS + 1.0), used + inside[used], rate)


def pool_adjacent_violators(values: npt.ArrayLike, weights: npt.ArrayLike) -> FloatArray:
    """Weighted least-squares non-decreasing fit [n] to values [n] (Ayer et al. 1955); weights [n] > 0."""
    blocks: list[tuple[float, float, int]] = []  # mean, weight, length
    for value, weight in zip(np.asarray(values, float).tolist(), np.asarray(weights, float).tolist(), strict=True):
        mean, mass, length = value, weight, 1
        while blocks and blocks[-1][0] >= mean:
            left_mean, left_mass, left_length = blocks.pop()
            mean = (left_mean * left_mass + mean * mass) / (left_mass + mass)
            mass += left_mass
            length += left_length
        blocks.append((mean, mass, length))
    return np.repeat([block[0] for block in blocks], [block[2] for block in blocks]).astype(np.float64)


@dataclass(frozen=True)
class LogisticFit:
    """weights [F] and intercept of `fit_logistic`; iterations: Newton steps taken."""

    weights: tuple[float, ...]
    intercept: float
    iterations: int


def fit_logistic(
    features: npt.ArrayLike, clicks: npt.ArrayLike, l2: float = 1e-3, weights: npt.ArrayLike | None = None
) -> LogisticFit:
    """Ridge logistic regression by Newton's method, for samples that fit in memory (`platt`: one feature).

    features [n x F]; clicks [n] in [0, 1]; weights [n] >= 0. Minimises mean BCE + l2 / 2 * |w|^2 over standardised
    features (the intercept is free), then maps the weights back to the features' own scale.
    Raises GateError when only one class is present.
    """
    x, y = np.atleast_2d(np.asarray(features, dtype=np.float64)), np.asarray(clicks, dtype=np.float64)
    mass = np.ones_like(y) if weights is None else np.asarray(weights, dtype=np.float64)
    mass = mass / mass.sum()
    if not 0.0 < float(mass @ y) < 1.0:
        raise GateError(f"calibration: only one class among {len(y)} rows; clicks and non-clicks are both needed")
    mean = mass @ x
    scale = np.sqrt(mass @ (x - mean) ** 2)
    scale[scale == 0] = 1.0
    design = np.concatenate([(x - mean) / scale, np.ones((len(y), 1))], axis=1)
    penalty = np.append(np.full(x.shape[1], l2), 0.0)

    def loss(at: FloatArray) -> float:
        logits = design @ at
        return float(mass @ (np.logaddexp(0.0, logits) - y * logits) + penalty @ at**2 / 2)

    beta = np.zeros(x.shape[1] + 1)
    step_number = 0
    for step_number in range(1, 101):  # noqa: B007
        p = sigmoid(design @ beta)
        gradient = design.T @ (mass * (p - y)) + penalty * beta
        hessian = (design * (mass * p * (1 - p))[:, None]).T @ design + np.diag(penalty + 1e-12)
        step = np.linalg.solve(hessian, gradient)
        size = 1.0
        while size > 1e-8 and loss(beta - size * step) > loss(beta):
            size /= 2
        beta = beta - size * step
        if np.abs(size * step).max() < 1e-10:
            break
    slopes = beta[:-1] / scale
    return LogisticFit(tuple(slopes.tolist()), float(beta[-1] - slopes @ mean), step_number)


def resolve_target_rate(
    configured: float | None, uniform_rows: int, uniform_clicks: int, minimum_rows: int = 1000
) -> float:
    """The click rate that `quantile` labels must average: the configured one, else the uniform slice's.

    Never the exposed CTR: it is the rate of another population (METHOD.md). Raises GateError when neither is there.
    """
    if configured is not None:
        if not 0.0 < configured < 1.0:
            raise ContractError(f"calibration.target_rate is {configured!r}; expected a rate strictly between 0 and 1")
        return configured
    check_fitting_rows(
        "uniform", uniform_rows, uniform_clicks, minimum_rows, remedy="set labels.calibrator.target_rate"
    )
    return uniform_clicks / uniform_rows


def check_fitting_rows(
    source: str,
    rows: int,
    clicks: int,
    minimum_rows: int = 1000,
    allow_exposed: bool = False,
    remedy: str = "use kind quantile with labels.calibrator.target_rate set",
) -> None:
    """Raises GateError unless labelled rows may fit a calibrator: enough of them, both classes, and an honest source.

    source "exposed" re-imports exposure bias and did worse than no labels in our simulation: it needs `allow_exposed`.
    """
    if source not in ("uniform", "exposed"):
        raise ContractError(f"calibration source is {source!r}; expected 'uniform' or 'exposed'")
    if source == "exposed" and not allow_exposed:
        raise GateError(
            "calibration on exposed clicks re-imports exposure bias; "
            f"{remedy}, or set labels.calibrator.allow_exposed to say that you want it anyway"
        )
    if rows < minimum_rows:
        raise GateError(
            f"calibration: the {source} slice has {rows} rows; at least {minimum_rows} are needed: {remedy}"
        )
    if not 0 < clicks < rows:
        raise GateError(
            f"calibration: {clicks} clicks in the {rows} rows of the {source} slice; both classes needed: {remedy}"
        )


def base_rate_change(previous: float, current: float, largest_ratio: float) -> str | None:
    """A sentence when the base rate moved by more than a factor `largest_ratio` (> 1) since the last date."""
    ratio = max(previous, current) / max(min(previous, current), 1e-12)
    if ratio <= largest_ratio:
        return None
    return (
        f"calibration: base rate {current:.4f} against {previous:.4f} on the date before, a factor of {ratio:.2f}; "
        f"at most {largest_ratio:.2f} is expected: check the day's impressions, or raise "
        "labels.calibrator.largest_rate_change"
    )


def reliability_table(
    rows: Sequence[float], label_sums: Sequence[float], click_sums: Sequence[float]
) -> tuple[tuple[ReliabilityBin, ...], float]:
    """(bins, expected calibration error) from per-bin rows, label sums and click sums; empty bins are left out."""
    bins = tuple(
        ReliabilityBin(int(n), float(labels) / float(n), float(clicks) / float(n))
        for n, labels, clicks in zip(rows, label_sums, click_sums, strict=True)
        if n > 0
    )
    total = sum(row.rows for row in bins)
    error = sum(row.rows * abs(row.mean_label - row.click_rate) for row in bins) / total if total else float("nan")
    return bins, error


def grid_reliability(
    knots: npt.ArrayLike,
    rows: npt.ArrayLike,
    clicks: npt.ArrayLike,
    fractions: npt.ArrayLike | None = None,
    bins: int = 10,
) -> tuple[tuple[ReliabilityBin, ...], float]:
    """`reliability_table` of a grid map from the fitting histogram alone: `bins` groups of about equal rows."""
    rows, clicks = _histogram(rows), _histogram(clicks)
    total = rows.sum()
    if total == 0:
        return (), float("nan")
    group = np.minimum(((np.cumsum(rows) - rows / 2) * bins / total).astype(int), bins - 1)
    labels = _cell_labels(knots, fractions) * rows
    sums = [np.bincount(group, weights=values, minlength=bins).tolist() for values in (rows, labels, clicks)]
    return reliability_table(*sums)


def grid_calibrator(kind: str, knots: npt.ArrayLike, fitted_on: FittedOn, variable: str = "similarity") -> Calibrator:
    """A `quantile` or `isotonic` Calibrator of `variable` from fitted knots."""
    if kind not in GRID_KINDS:
        raise ContractError(f"calibrator.kind is {kind!r}; expected one of {', '.join(GRID_KINDS)} for a grid map")
    values = tuple(np.asarray(knots, dtype=np.float64).tolist())
    return Calibrator(kind=kind, knots=values, fitted_on=fitted_on, features=(variable,))


def _cell_labels(knots: npt.ArrayLike, fractions: npt.ArrayLike | None) -> FloatArray:
    knots = np.asarray(knots, dtype=np.float64)
    inside = 0.5 if fractions is None else np.nan_to_num(np.asarray(fractions, dtype=np.float64), nan=0.5)
    return (1.0 - inside) * knots[:-1] + inside * knots[1:]


def _histogram(counts: npt.ArrayLike) -> FloatArray:
    counts = np.asarray(counts, dtype=np.float64)
    if counts.shape != (GRID_CELLS,) or not np.isfinite(counts).all() or counts.min() < 0:
        raise ContractError(f"calibration histogram has shape {counts.shape}; expected {GRID_CELLS} counts >= 0")
    return counts


def _logit_normal(rank: FloatArray, spread: float) -> Callable[[float], FloatArray]:
    normal = NormalDist()
    score = spread * np.array([normal.inv_cdf(value) for value in rank.tolist()])
    return lambda location: sigmoid(location + score)


def _beta(rank: FloatArray, spread: float) -> Callable[[float], FloatArray]:
    # Under x = sigmoid(t) the beta(a, b) density becomes x^a (1 - x)^b / B(a, b): smooth on the whole line, so plain
    # trapezoids give its CDF without SciPy (which Spark's driver need not have). Beyond |t| = 40 it is exp(-a |t|) to
    # double precision, with the known integral; a small a leaves most of its mass there, at labels below 1e-17.
    t = np.linspace(-40.0, 40.0, 16001)
    step = t[1] - t[0]
    log_x, log_1_x = -np.logaddexp(0.0, -t), -np.logaddexp(0.0, t)

    def knots(location: float) -> FloatArray:
        a = float(sigmoid(location)) / spread
        b = float(sigmoid(-location)) / spread
        log_density = a * log_x + b * log_1_x
        density = np.exp(log_density - log_density.max())
        cdf = np.concatenate([[0.0], np.cumsum((density[1:] + density[:-1]) / 2 * step)]) + density[0] / a
        cdf /= cdf[-1] + density[-1] / b
        keep = np.concatenate([[True], np.diff(cdf) > 0])
        return sigmoid(np.interp(rank, cdf[keep], t[keep]))

    return knots
