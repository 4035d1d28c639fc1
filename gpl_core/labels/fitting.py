"""Fits of the calibrators from aggregates (numpy only), and the reasons to refuse a fit.

Spark aggregates, the driver calls these. Formulas marked (ours) are this project's choice; the mean of the labels
matters more than any other one, so `fit_location` meets the target rate as training weighs its rows.
"""

import math
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from gpl_core.errors import GateError
from gpl_core.labels.calibration import sigmoid

UNEXPOSED_SHARE = 0.5
"""Weight of all unexposed pairs, as not clicked, for 1 of all exposed ones, in the regression that ranks (ours).

Who chose what was shown may know more than the features do. Among shown pairs alone, what it was chosen by then counts
too little (Berkson 1946): what was shown although unpopular was shown for a reason.
"""

LEAST_STRENGTH, MOST_STRENGTH = 1.0, 1000.0
MOST_IMPRESSIONS = 1000  # of one user or item in the sums of `prior_strength`
LEAST_VARIANCE = 1e-10  # of a score within users: less is the rounding of float32
LEAST_SHARE = 0.05  # of the rows that a fit needs: so many clicks, and so many rows without one
_LARGEST_RATE_CHANGE = 3.0


def fit_location(logits: npt.ArrayLike, counts: npt.ArrayLike, target_rate: float) -> float:
    """The location at which the mean of sigmoid(location + logit) is `target_rate`, to 1e-9 of it.

    logits: of the labels without their location; counts: how often each counts; alike in shape. target_rate: in (0, 1).
    """
    logits, counts = (np.asarray(given, dtype=np.float64).reshape(-1) for given in (logits, counts))
    low, high = -60.0 - float(logits.max()), 60.0 - float(logits.min())
    while high - low > 1e-12 * max(1.0, abs(low)):
        location = (low + high) / 2
        if not low < location < high:
            break
        if float(sigmoid(location + logits) @ counts) < target_rate * float(counts.sum()):
            low = location
        else:
            high = location
    return (low + high) / 2


def prefix_weight(share: float, score_variance: float, prefix_variance: float) -> float:
    """What `share` of the language model in the order adds to the weight of prefix_log_prob in the score (ours).

    (1 - share) score / sd(score) + share prefix_log_prob / sd(prefix_log_prob) orders as score + prefix_weight *
    prefix_log_prob. share: in [0, 1). Variances: within users, over their unexposed pairs. A score that is constant
    there leaves the order to the language model.
    """
    if not share or prefix_variance < LEAST_VARIANCE:
        return 0.0
    if score_variance < LEAST_VARIANCE:
        return 1.0
    return share / (1.0 - share) * math.sqrt(score_variance / prefix_variance)


def prior_strength(groups: float, impressions: float, clicks: float, pairs: float, squares: float) -> float:
    """How many impressions the overall click rate is worth for one user (or item): beta-binomial, by moments (ours).

    With n impressions and k clicks of each: E (k - n p)^2 = n p (1 - p) (1 + (n - 1) rho), strength = 1 / rho - 1.
    groups: how many users; impressions: sum of n; clicks: sum of k; pairs: sum of n (n - 1); squares: sum of
    (k - n p)^2 with p = clicks / impressions. Between `LEAST_STRENGTH` and `MOST_STRENGTH`, the latter where clicks say
    nothing of a difference between users.
    """
    rate = clicks / impressions if impressions else 0.0
    noise = rate * (1.0 - rate)
    if groups < 2 or not noise or not pairs:
        return MOST_STRENGTH
    rho = (squares - impressions * noise) / (noise * pairs)
    return min(max(1.0 / rho - 1.0, LEAST_STRENGTH), MOST_STRENGTH) if rho > 0 else MOST_STRENGTH


def click_prior(counts: Iterable[npt.NDArray[np.floating]]) -> tuple[float, float]:
    """Click rate of all users, in (0, 1), and its `prior_strength`, from batches [m x 2] of clicks and impressions."""
    sums = np.zeros(7)
    for batch in counts:
        clicks, shown = batch[batch[:, 1] > 0].T
        n = np.minimum(shown, MOST_IMPRESSIONS)
        k = clicks * n / shown
        sums += [len(n), n.sum(), k.sum(), (n * (n - 1)).sum(), (k * k).sum(), (k * n).sum(), (n * n).sum()]
    groups, impressions, clicked, pairs, kk, kn, nn = sums.tolist()
    rate = clicked / impressions if impressions else 0.0
    strength = prior_strength(groups, impressions, clicked, pairs, kk - 2 * rate * kn + rate * rate * nn)
    return min(max(rate, 1e-6), 1 - 1e-6), strength


def fitting_fault(rows: int, clicks: int, minimum_rows: int) -> str:
    """Why so many exposed rows with so many clicks cannot fit a calibrator; empty when they can."""
    if rows < minimum_rows:
        return f"{rows:,} rows, where at least {minimum_rows:,} are needed"
    needed = math.ceil(LEAST_SHARE * minimum_rows)
    if min(clicks, rows - clicks) < needed:
        return f"{rows:,} rows, {clicks:,} of them clicked, where {needed:,} of either kind are needed"
    return ""


def check_fitting_rows(rows: int, clicks: int, minimum_rows: int, remedy: str) -> None:
    """Raises GateError unless the uniform slice can fit a calibrator: enough rows, and both classes."""
    if fault := fitting_fault(rows, clicks, minimum_rows):
        raise GateError(f"calibration on the uniform slice: {fault}; {remedy}")


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
