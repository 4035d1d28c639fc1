"""Intervals over users and training seeds: how much a metric varies with the users and the initial weights.

A metric gives sums per user, so that a replicate costs two dot products: the Poisson bootstrap (Chamandy et al. 2012)
counts each user Poisson(1) times. Over S seeds a replicate is the mean of S - 1 seeds drawn with replacement, whose
variance is that of a mean over S seeds (Rao & Wu 1988). Compared models share users and seeds, draw by draw.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]

REPLICATES = 1000
MOST_GROUPS = 20_000
"""More users than this are dealt into so many groups, which are drawn as a whole."""


class UserSums(NamedTuple):
    """A figure as a ratio of sums over users: sum(parts) / sum(mass), both float64 [G]."""

    parts: FloatArray
    mass: FloatArray


def sums_by_user(users: npt.NDArray[np.int64], parts: FloatArray, mass: FloatArray) -> UserSums:
    """Sums of rows by user; users: int [n], numbered from 0."""
    groups = min(int(users.max()) + 1, MOST_GROUPS)
    group = users % groups
    both = (np.bincount(group, of, minlength=groups).astype(np.float64) for of in (parts, mass))
    return UserSums(*both)


def replicates(figures: Sequence[UserSums], count: int = REPLICATES) -> FloatArray:
    """Bootstrap replicates [count x F] of figures over the same users; NaN where no user with any mass was drawn."""
    parts, mass = (np.stack(side, axis=1) for side in zip(*figures, strict=True))
    random = np.random.default_rng(0)
    drawn = []
    for start in range(0, count, 100):  # bounds memory
        weights = random.poisson(1.0, (min(100, count - start), len(parts))).astype(np.float64)
        with np.errstate(invalid="ignore"):
            drawn.append((weights @ parts) / (weights @ mass))
    return np.concatenate(drawn)


def over_seeds(drawn: FloatArray) -> FloatArray:
    """Replicates [count] of the mean over seeds from those of each seed [count x S]."""
    count, seeds = drawn.shape
    chosen = np.random.default_rng(1).integers(seeds, size=(count, max(1, seeds - 1)))
    return np.take_along_axis(drawn, chosen, axis=1).mean(axis=1)


def interval(drawn: FloatArray) -> tuple[float, float] | tuple[None, None]:
    """The ends of the middle 95% of replicates [count]; None if there are too few users."""
    known = drawn[np.isfinite(drawn)]
    if len(known) < len(drawn) / 2 or np.ptp(known) == 0.0:
        return None, None
    low, high = np.quantile(known, (0.025, 0.975))
    return float(low), float(high)
