"""Ridge logistic regression of the study (numpy); the pipeline fits with pyspark.ml."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from gpl_core.errors import GateError
from gpl_core.labels.calibration import FloatArray, sigmoid


@dataclass(frozen=True)
class LogisticFit:
    """weights [F] and intercept of `fit_logistic`."""

    weights: tuple[float, ...]
    intercept: float


def fit_logistic(
    features: npt.ArrayLike, clicks: npt.ArrayLike, l2: float = 1e-3, weights: npt.ArrayLike | None = None
) -> LogisticFit:
    """Ridge logistic regression by Newton's method.

    features [n x F]; clicks [n] in [0, 1]; weights [n] >= 0. Minimizes mean BCE + l2 / 2 * |w|^2 over standardized
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
    for _ in range(100):
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
    return LogisticFit(tuple(slopes.tolist()), float(beta[-1] - slopes @ mean))
