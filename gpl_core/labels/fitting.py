"""Fits of the calibrators from aggregates (numpy only), and the reasons to refuse a fit.

Spark aggregates (rows, clicks and mean fraction per grid cell: at most GRID_CELLS rows), the driver calls these.
Formulas marked (ours) are this project's choice; the mean of the labels is what matters most, so `fit_quantile` meets
its target rate exactly on the pairs it is fitted on.
"""

from statistics import NormalDist

import numpy as np
import numpy.typing as npt

from gpl_core.errors import ContractError, GateError
from gpl_core.labels.calibration import GRID_CELLS, Calibrator, FittedOn, FloatArray, sigmoid

_LARGEST_RATE_CHANGE = 3.0


def grid_mean(knots: npt.ArrayLike, counts: npt.ArrayLike, fractions: npt.ArrayLike | None = None) -> float:
    """Mean label of the pairs behind a histogram, exact when `fractions` are the cells' mean fractions.

    knots [GRID_CELLS + 1]; counts [GRID_CELLS]; fractions [GRID_CELLS] in [0, 1], the middle of the cell when None.
    """
    knots = np.asarray(knots, dtype=np.float64)
    inside = 0.5 if fractions is None else np.nan_to_num(np.asarray(fractions, dtype=np.float64), nan=0.5)
    labels = (1.0 - inside) * knots[:-1] + inside * knots[1:]
    return float(labels @ _histogram(counts) / np.sum(counts))


def fit_quantile(
    counts: npt.ArrayLike, target_rate: float, spread: float = 1.0, fractions: npt.ArrayLike | None = None
) -> FloatArray:
    """Knots [GRID_CELLS + 1] of `quantile`: global rank of the variable -> quantile of a logit-normal (ours).

    The mid-CDF of the histogram at the grid's knots is pushed through the quantile function of a logit-normal
    distribution, whose location is solved so that the mean label over the histogram equals `target_rate` (to 1e-9).

    counts: pairs per cell [GRID_CELLS], exact, not all 0. target_rate: in (0, 1). fractions: mean position of the pairs
    inside each cell, see `grid_mean`. spread: standard deviation of the labels' logits, > 0.
    """
    counts = _histogram(counts)
    total = float(counts.sum())
    # Ranks are averaged over the two cells that meet in a knot: a histogram with one full cell then gives labels
    # around the median, not the two extremes of the distribution.
    middle = (np.cumsum(counts) - counts / 2) / total
    rank = (np.concatenate([[0.0], middle]) + np.concatenate([middle, [1.0]])) / 2
    edge = min(0.25, 0.5 / (total + 1))
    normal = NormalDist()
    scores = spread * np.array([normal.inv_cdf(value) for value in np.clip(rank, edge, 1.0 - edge).tolist()])
    low, high = (-60.0, 60.0)
    for _ in range(200):
        location = (low + high) / 2
        if grid_mean(sigmoid(location + scores), counts, fractions) < target_rate:
            low = location
        else:
            high = location
        if high - low < 1e-13 * max(1.0, abs(location)):
            break
    return np.clip(sigmoid((low + high) / 2 + scores), 0.0, 1.0)


def check_fitting_rows(rows: int, clicks: int, minimum_rows: int, remedy: str) -> None:
    """Raises GateError unless the uniform slice can fit a calibrator: enough rows, and both classes."""
    if rows < minimum_rows:
        raise GateError(f"calibration: the uniform slice has {rows} rows; at least {minimum_rows} are needed: {remedy}")
    if not 0 < clicks < rows:
        raise GateError(
            f"calibration: {clicks} clicks in the {rows} rows of the uniform slice; both classes needed: {remedy}"
        )


def base_rate_change(previous: float, current: float) -> str | None:
    """A sentence when the base rate moved by more than a factor of three since the last date."""
    ratio = max(previous, current) / max(min(previous, current), 1e-12)
    if ratio <= _LARGEST_RATE_CHANGE:
        return None
    return (
        f"calibration: base rate {current:.4f} against {previous:.4f} on the date before, a factor of {ratio:.2f}; "
        f"at most {_LARGEST_RATE_CHANGE:.2f} is expected: check the day's impressions; if the rate is right, "
        "set labels.calibrator.on_rate_change to warn"
    )


def grid_calibrator(kind: str, knots: npt.ArrayLike, fitted_on: FittedOn, variable: str = "similarity") -> Calibrator:
    """A `quantile` or `isotonic` Calibrator of `variable` from fitted knots."""
    values = tuple(np.asarray(knots, dtype=np.float64).tolist())
    return Calibrator(kind=kind, knots=values, fitted_on=fitted_on, features=(variable,))


def _histogram(counts: npt.ArrayLike) -> FloatArray:
    counts = np.asarray(counts, dtype=np.float64)
    if counts.shape != (GRID_CELLS,) or not np.isfinite(counts).all() or counts.min() < 0:
        raise ContractError(f"calibration histogram has shape {counts.shape}; expected {GRID_CELLS} counts >= 0")
    return counts
