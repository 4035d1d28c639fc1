"""Fits of the calibrators: exact mean, monotone, the named distribution, refusals."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpl_core.errors import GateError
from gpl_core.labels import calibration, fitting
from gpl_core.labels.calibration import GRID_CELLS, Calibrator, FittedOn

FITTED = FittedOn("unlabeled", 1, 0, "2026-01-01", "2026-01-01", 0.05)


def _histogram(similarity: np.ndarray) -> np.ndarray:
    return np.bincount(calibration.grid_position(similarity)[0], minlength=GRID_CELLS)


def _fractions(similarity: np.ndarray) -> np.ndarray:
    cell, fraction = calibration.grid_position(similarity)
    return np.bincount(cell, fraction, minlength=GRID_CELLS) / np.maximum(_histogram(similarity), 1)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.floats(-1, 1), min_size=1, max_size=60),
    st.sampled_from([0.005, 0.05, 0.5, 0.9]),
    st.sampled_from([0.3, 1.0, 2.0]),
)
def test_quantile_labels_average_the_target_rate_and_keep_the_order(values, target, spread) -> None:
    similarity = np.array(values)
    knots = fitting.fit_quantile(_histogram(similarity), target, spread, fractions=_fractions(similarity))
    assert np.diff(knots).min() >= 0
    labels = calibration.apply(fitting.grid_calibrator("quantile", knots, FITTED), {"similarity": similarity})
    assert labels.mean() == pytest.approx(target, abs=1e-8)
    assert labels.min() >= 0
    assert labels.max() <= 1
    order = np.argsort(similarity)
    assert (np.diff(labels[order]) >= -1e-12).all()


def test_quantile_labels_are_logit_normal() -> None:
    similarity = np.random.default_rng(0).uniform(-1, 1, 200_000)
    knots = fitting.fit_quantile(_histogram(similarity), 0.1, 1.2)
    labels = calibration.apply(fitting.grid_calibrator("quantile", knots, FITTED), {"similarity": similarity})
    logits = np.log(labels / (1 - labels))
    assert logits.std() == pytest.approx(1.2, rel=0.02)
    assert np.median(logits) == pytest.approx(logits.mean(), abs=0.02)


def test_all_pairs_alike_get_the_target_rate() -> None:
    similarity = np.full(1000, 0.3)
    knots = fitting.fit_quantile(_histogram(similarity), 0.04, fractions=_fractions(similarity))
    labels = calibration.apply(fitting.grid_calibrator("quantile", knots, FITTED), {"similarity": similarity})
    assert labels == pytest.approx(np.full(1000, 0.04), abs=1e-9)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: fitting.check_fitting_rows(312, 20, 1000, "widen"), "312 rows; at least 1000"),
        (lambda: fitting.check_fitting_rows(5000, 0, 1000, "widen"), "0 clicks in the 5000 rows"),
    ],
)
def test_a_fit_that_cannot_be_honest_is_refused(call, message: str) -> None:
    with pytest.raises(GateError, match=message):
        call()


def test_base_rate_change_is_a_ratio_both_ways() -> None:
    assert fitting.base_rate_change(0.05, 0.14) is None
    assert "factor of 4.00" in fitting.base_rate_change(0.05, 0.20)
    assert "factor of 4.00" in fitting.base_rate_change(0.20, 0.05)


def test_a_fitted_calibrator_survives_its_json() -> None:
    knots = fitting.fit_quantile(np.ones(GRID_CELLS), 0.07)
    made = fitting.grid_calibrator("quantile", knots, FITTED)
    assert Calibrator.from_json(made.to_json()) == made
