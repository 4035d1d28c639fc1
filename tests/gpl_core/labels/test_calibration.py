"""Calibrators: the formulas' own invariants, JSON, and agreement of the numpy and the Spark SQL form."""

import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpl_core.errors import ContractError
from gpl_core.labels import calibration
from gpl_core.labels.calibration import GRID_CELLS, Calibrator, FittedOn, ReliabilityBin
from gpl_core.labels.confidence import combined_weight, weight_sql
from tests.support import spark_conf

FITTED = FittedOn("uniform", 1200, 60, "2026-01-01", "2026-01-03", 0.05, (ReliabilityBin(1200, 0.05, 0.05),), 0.0)
TYPES = {"float32": "float", "float64": "double", "int64": "bigint"}
KNOTS = tuple(np.linspace(0.01, 0.9, GRID_CELLS + 1).tolist())
GRID = Calibrator("isotonic", FITTED, knots=KNOTS, features=("similarity",))
BY_PREFIX = Calibrator("isotonic", FITTED, knots=KNOTS, features=("prefix_log_prob",))
QUANTILE = Calibrator(
    "quantile", FITTED, features=("prefix_log_prob",), weights=(1.0,), location=-0.5, spread=0.8, prior_rate=0.1,
    user_strength=30.0,
)  # fmt: skip
PLATT = Calibrator("platt", FITTED, features=("similarity",), weights=(3.0,), intercept=-2.0)
LOGISTIC = Calibrator(
    "logistic", FITTED, features=calibration.FEATURES, weights=(2.0, -1.0, 0.3, 0.5, 0.25, -0.125), intercept=-1.0
)


@given(st.floats(-1.0, 1.0))
def test_a_linear_grid_map_is_that_line(similarity: float) -> None:
    label = calibration.apply(GRID, {"similarity": [similarity]})[0]
    assert label == pytest.approx(0.01 + (similarity + 1) / 2 * 0.89, abs=1e-12)


def test_a_grid_map_of_log_probabilities_is_a_line_over_32_nats_and_flat_below() -> None:
    nats = np.array([0.0, -8.0, -16.0, -32.0, -80.0])
    labels = calibration.apply(BY_PREFIX, {"prefix_log_prob": nats})
    assert labels == pytest.approx(0.01 + np.array([1, 0.75, 0.5, 0, 0]) * 0.89, abs=1e-12)


def test_calibrators_published_earlier_stay_readable() -> None:
    """A quantile was a grid map, of similarity before there was a choice; one prior strength served users and items."""
    data = json.loads(GRID.to_json()) | {"features": [], "kind": "quantile", "prior_strength": 20.0}
    for name in ("location", "spread", "across_users", "user_strength", "item_strength"):
        del data[name]
    old = Calibrator.from_json(json.dumps(data))
    assert old == replace(GRID, kind="quantile")
    assert calibration.apply(old, {"similarity": [0.3]}) == calibration.apply(GRID, {"similarity": [0.3]})
    assert not old.has_user_parts


def test_a_quantile_label_is_its_two_parts_on_the_scale_of_logits() -> None:
    """3 clicks in 20 impressions and a prior of 3 in 30: rate 6 / 50. Rank 3/4: logit ln 3."""
    rate = calibration.user_rate(QUANTILE, {"user_clicks": [3], "user_impressions": [20]})
    assert rate[0] == pytest.approx(6 / 50)
    parts = {"user_rate": rate, "user_rank": [0.75]}
    place = 0.8 * np.sqrt(3) / np.pi * np.log(3)
    odds = np.exp(-0.5) * (6 / 44) * np.exp(place)
    assert calibration.apply(QUANTILE, parts)[0] == pytest.approx(odds / (1 + odds), abs=1e-12)
    alike = replace(QUANTILE, across_users="global")
    odds = np.exp(-0.5) * (0.1 / 0.9) * np.exp(place)
    assert calibration.apply(alike, parts)[0] == pytest.approx(odds / (1 + odds), abs=1e-12)
    assert QUANTILE.uses_clicks
    assert not replace(alike, fitted_on=replace(FITTED, clicks=0)).uses_clicks


def test_the_logits_of_one_user_have_the_spread_as_their_standard_deviation() -> None:
    labels = calibration.apply(
        QUANTILE, {"user_rate": np.full(100_000, 0.2), "user_rank": (np.arange(1e5) + 0.5) / 1e5}
    )
    assert np.log(labels / (1 - labels)).std() == pytest.approx(0.8, rel=1e-3)


def test_grid_position_of_the_edges_and_beyond() -> None:
    cell, fraction = calibration.grid_position([-1.0, 1.0, 1.5, -7.0, 0.0])
    assert cell.tolist() == [0, GRID_CELLS - 1, GRID_CELLS - 1, 0, GRID_CELLS // 2]
    assert fraction.tolist() == [0.0, 1.0, 1.0, 0.0, 0.0]


def test_platt_and_logistic_are_the_sigmoid_of_their_features() -> None:
    columns = {
        "similarity": [0.5],
        "history_similarity": [0.25],
        "prefix_log_prob": [-4.0],
        "item_impressions": [80],
        "item_clicks": [7],
        "user_impressions": [0],
        "user_clicks": [0],
        "item_positives": [9],
    }
    assert calibration.apply(PLATT, columns)[0] == pytest.approx(1 / (1 + np.exp(-(3 * 0.5 - 2))))
    # The prior is worth 20 impressions at 5 %: item (7 + 1) / (80 + 20), user 1 / 20.
    x = [0.5, 0.25, -4.0, np.log(0.08 / 0.92), np.log(0.05 / 0.95), np.log(10)]
    assert calibration.feature_values(LOGISTIC, columns)[0] == pytest.approx(x)
    logit = np.dot(LOGISTIC.weights, x) - 1.0
    assert calibration.apply(LOGISTIC, columns)[0] == pytest.approx(1 / (1 + np.exp(-logit)))
    assert LOGISTIC.needs_item_counts
    assert not PLATT.needs_item_counts


@pytest.mark.parametrize("calibrator", [GRID, BY_PREFIX, QUANTILE, PLATT, LOGISTIC], ids=lambda c: c.kind)
def test_json_round_trip(calibrator: Calibrator) -> None:
    again = Calibrator.from_json(calibrator.to_json())
    assert again == calibrator
    assert again.to_json() == calibrator.to_json()


def test_json_with_a_wrong_field_is_refused_by_name() -> None:
    data = json.loads(PLATT.to_json())
    data["slope"] = data.pop("weights")
    with pytest.raises(ContractError, match="slope"):
        Calibrator.from_json(json.dumps(data))
    with pytest.raises(ContractError, match="cannot be read"):
        Calibrator.from_json("{")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda data: data.pop("prior_rate"), "prior_rate: required, but not given"),
        (lambda data: data["fitted_on"].pop("ece"), "ece: required, but not given"),
        (lambda data: data.update(intercept="2.5"), "intercept"),
    ],
)
def test_json_that_lacks_a_field_or_has_text_for_a_number_is_refused(change, said) -> None:
    data = json.loads(PLATT.to_json())
    change(data)
    with pytest.raises(ContractError, match=said):
        Calibrator.from_json(json.dumps(data))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "cosine"}, "kind is 'cosine'"),
        ({"kind": "isotonic", "knots": (0.1, 0.2)}, "2 values; expected 1025"),
        ({"kind": "isotonic", "knots": (*KNOTS[:-1], 1.5)}, "outside"),
        ({"kind": "isotonic", "knots": (*KNOTS[:-1], float("nan"))}, "not finite"),
        ({"kind": "logistic", "features": ("price",), "weights": (1.0,)}, "price"),
        ({"kind": "logistic", "features": ("similarity",), "weights": ()}, "0 values"),
        ({"kind": "platt", "features": ("similarity",), "weights": (float("inf"),)}, "not finite"),
        ({"kind": "quantile", "features": ("similarity",), "weights": (1.0,), "across_users": "all"}, "is 'all'"),
        (
            {"kind": "quantile", "features": ("similarity",), "weights": (1.0,), "user_strength": 0.0},
            "user_strength 0.0",
        ),
        (
            {"kind": "quantile", "features": ("history_similarity",), "knots": KNOTS},
            "is .'history_similarity'",
        ),
    ],
)
def test_a_calibrator_that_could_give_a_wrong_label_is_refused(changes: dict, message: str) -> None:
    with pytest.raises(ContractError, match=message):
        Calibrator(**{"fitted_on": FITTED, **changes})


@given(st.tuples(*[st.floats(0, 1)] * 3))
def test_combined_weight_is_the_geometric_mean(factors: tuple) -> None:
    weight = combined_weight(*([value] for value in factors))[0]
    assert weight == pytest.approx(np.prod(factors) ** (1 / 3), abs=1e-9)
    assert 0.0 <= weight <= 1.0


@pytest.mark.spark
def test_spark_evaluates_the_same_formulas(spark) -> None:
    rng = np.random.default_rng(5)
    n = 64
    columns = {
        "similarity": np.concatenate([[-1.0, 1.0, 1.0000001, 0.0], rng.uniform(-1, 1, n - 4)]).astype(np.float32),
        "history_similarity": rng.uniform(-1, 1, n).astype(np.float32),
        "prefix_log_prob": rng.uniform(-20, 0, n).astype(np.float32),
        "item_impressions": rng.integers(0, 500, n),
        "item_clicks": rng.integers(0, 50, n),
        "user_impressions": rng.integers(0, 500, n),
        "user_clicks": rng.integers(0, 50, n),
        "item_positives": rng.integers(0, 500, n),
        "user_rate": rng.uniform(0.001, 0.999, n),
        "user_rank": rng.uniform(0.001, 0.999, n),
        "coherence": np.concatenate([[0.0, 1.0], rng.uniform(0, 1, n - 2)]).astype(np.float32),
        "consistency": rng.uniform(0, 1, n).astype(np.float32),
        "llm_confidence": np.concatenate([rng.uniform(0, 1, n - 2), [0.0, 1.0]]).astype(np.float32),
    }
    curved = Calibrator("isotonic", FITTED, knots=tuple(np.sort(rng.uniform(0, 1, GRID_CELLS + 1)).tolist()))
    schema = ", ".join(f"{c} {TYPES[v.dtype.name]}" for c, v in columns.items())
    expressions = [
        calibration.sql_expression(curved),
        calibration.sql_expression(PLATT),
        calibration.sql_expression(LOGISTIC),
        calibration.sql_expression(BY_PREFIX),
        calibration.sql_expression(QUANTILE),
        calibration.user_rate_sql(QUANTILE),
        calibration.cell_sql("similarity"),
        calibration.fraction_sql("similarity"),
        weight_sql(),
    ]
    # In generated code, as in production.
    with spark_conf(spark, {"spark.sql.codegen.wholeStage": True, "spark.sql.codegen.factoryMode": "FALLBACK"}):
        rows = spark.createDataFrame([tuple(v[i].item() for v in columns.values()) for i in range(n)], schema)
        found = np.array(rows.selectExpr(*expressions).collect(), dtype=np.float64)
    cell, fraction = calibration.grid_position(columns["similarity"])
    expected = [
        calibration.apply(curved, columns),
        calibration.apply(PLATT, columns),
        calibration.apply(LOGISTIC, columns),
        calibration.apply(BY_PREFIX, columns),
        calibration.apply(QUANTILE, columns),
        calibration.user_rate(QUANTILE, columns),
        cell,
        fraction,
        combined_weight(columns["coherence"], columns["consistency"], columns["llm_confidence"]),
    ]
    np.testing.assert_allclose(found, np.stack(expected, axis=1), rtol=0, atol=1e-12)
