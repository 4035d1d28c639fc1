"""The study's logistic regression finds what scikit-learn finds."""

import numpy as np
import pytest

from gpl_core.errors import GateError
from gpl_core.labels.calibration import sigmoid
from tests.bench.simulation.logistic import fit_logistic


def test_logistic_fit_finds_the_weights_and_scikit_learns_optimum() -> None:
    from sklearn.linear_model import LogisticRegression

    rng = np.random.default_rng(1)
    x = rng.normal(size=(4000, 3)) * [1.0, 10.0, 0.1] + [0.0, 5.0, 2.0]
    y = (rng.random(4000) < sigmoid(x @ [1.0, -0.2, 5.0] - 9.5)).astype(float)
    fit = fit_logistic(x, y, l2=0.0)
    peer = LogisticRegression(C=np.inf, tol=1e-10, max_iter=1000).fit(x, y)
    assert fit.weights == pytest.approx(peer.coef_[0], rel=1e-3)
    assert fit.intercept == pytest.approx(peer.intercept_[0], rel=1e-3)
    p = sigmoid(x @ np.array(fit.weights) + fit.intercept)
    assert p.mean() == pytest.approx(y.mean(), abs=1e-8)


def test_one_class_alone_is_refused() -> None:
    with pytest.raises(GateError, match="only one class"):
        fit_logistic([[1.0], [2.0]], [1, 1])
