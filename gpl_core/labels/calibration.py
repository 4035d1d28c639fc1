"""Calibrators: the map from an anchor similarity to a pseudo-label, as pure formulas (numpy and Spark SQL text).

A pseudo-label is `y~ = calibrate(sim)` in [0, 1]. All formulas here are ours (docs/method.md), after published parts:
Platt 1999 (`platt`), isotonic regression by pool-adjacent-violators (Zadrozny & Elkan 2002).

`quantile` and `isotonic` are *defined* as a piecewise linear map on one uniform grid, so that numpy and Spark evaluate
the same few float64 operations. The variable is the similarity, or the prefix_log_prob brought to the same range (-NATS
becomes 0, -2 NATS and below becomes -1):

    x = similarity, or 1 + prefix_log_prob / NATS
    t = (clip(x, -1, 1) + 1) * GRID_CELLS / 2,  j = min(floor(t), GRID_CELLS - 1),  f = t - j
    label = (1 - f) * y[j] + f * y[j + 1]

| kind | formula | parameters |
|---|---|---|
| quantile | the grid map | features (the variable,), knots (GRID_CELLS + 1 values) |
| isotonic | the grid map | features (the variable,), knots |
| platt | sigmoid(a * variable + b) | features (the variable,), weights (a,), intercept b |
| logistic | sigmoid(w . x + b), x of `FEATURES` | features, weights, intercept, prior_rate, prior_strength |

This module imports neither torch nor Spark: Spark's driver imports it for the text of the expressions.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt

from gpl_core.errors import ContractError

GRID_CELLS = 1024  # cells of the similarity grid over [-1, 1]; a grid map has GRID_CELLS + 1 knots, one per cell edge

NATS = 16.0  # prefix_log_prob / NATS + 1 is its place on the grid: probabilities down to 10^-13 stay above its end

GRID_KINDS = ("quantile", "isotonic")
KINDS = (*GRID_KINDS, "platt", "logistic")
CALIBRATOR_FILE = "calibrator.json"  # the one file of a calibrator's bundle

VARIABLES = ("similarity", "prefix_log_prob")  # what a calibrator of one variable may map to a label

SCORES = ("similarity", "history_similarity", "prefix_log_prob")  # features that are columns of pair_scores

FEATURES = (*SCORES, "item_click_logit", "user_click_logit", "log_popularity")
"""Features a `logistic` calibrator may use; the last three come from pre-window counts (`feature_values`)."""

COUNT_COLUMNS = ("item_impressions", "item_clicks", "user_impressions", "user_clicks", "item_positives")
"""Pre-window counts behind the last three features: columns of item_stats and user_stats, prefixed by their owner."""

FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True)
class ReliabilityBin:
    """One row of a reliability diagram: pairs grouped by their label."""

    rows: int
    mean_label: float
    click_rate: float


@dataclass(frozen=True)
class FittedOn:
    """What a calibrator was fitted on.

    source: "uniform" (uniformly exposed slice) or "unlabeled" (scores alone). rows: pairs seen; clicks: clicked ones
        (0 when unlabeled). base_rate: the target mean of the labels. ece: expected calibration error,
        sum_b n_b |mean label - click rate| / n; None without clicks.
    """

    source: str
    rows: int
    clicks: int
    first_date: str
    last_date: str
    base_rate: float
    reliability: tuple[ReliabilityBin, ...] = ()
    ece: float | None = None


@dataclass(frozen=True)
class Calibrator:
    """A fitted calibrator; the module's table says which parameters each kind has.

    prior_rate, prior_strength (`logistic` only): click rates are shrunk toward prior_rate as if it had been observed in
    prior_strength impressions.
    """

    kind: str
    fitted_on: FittedOn
    knots: tuple[float, ...] = ()
    features: tuple[str, ...] = ()
    weights: tuple[float, ...] = ()
    intercept: float = 0.0
    prior_rate: float = 0.05
    prior_strength: float = 20.0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ContractError(f"calibrator.kind is {self.kind!r}; expected one of {', '.join(KINDS)}")
        if self.kind in GRID_KINDS and not self.features:  # published before there was a choice
            object.__setattr__(self, "features", ("similarity",))
        if self.kind != "logistic" and self.features not in [(name,) for name in VARIABLES]:
            raise ContractError(
                f"calibrator.features of kind {self.kind} is {self.features!r}; expected one of {', '.join(VARIABLES)}"
            )
        if self.kind in GRID_KINDS:
            _check_knots(self.knots)
            return
        unknown = [name for name in self.features if name not in FEATURES]
        if unknown or not self.features or len(set(self.features)) != len(self.features):
            raise ContractError(
                f"calibrator.features is {list(self.features)}; expected distinct names out of {', '.join(FEATURES)}"
            )
        if len(self.weights) != len(self.features):
            raise ContractError(
                f"calibrator.weights has {len(self.weights)} values; expected one per feature ({len(self.features)})"
            )
        if not all(math.isfinite(value) for value in (*self.weights, self.intercept)):
            raise ContractError("calibrator.weights or .intercept is not finite; fit again on more rows")
        if not 0.0 < self.prior_rate < 1.0 or not self.prior_strength > 0.0:
            raise ContractError(
                f"calibrator.prior_rate {self.prior_rate!r} must lie in (0, 1) and "
                f"prior_strength {self.prior_strength!r} above 0"
            )

    @property
    def needs_counts(self) -> bool:
        """True when the features need item_stats / user_stats in addition to the pair's scores."""
        return any(name not in SCORES for name in self.features)

    @property
    def content_only(self) -> bool:
        """False for a calibrator that sees interaction counts: its labels are no longer content-only."""
        return not self.needs_counts

    def to_json(self) -> str:
        """The calibrator as canonical JSON text (sorted keys): equal calibrators give equal text."""
        return json.dumps(asdict(self), sort_keys=True, allow_nan=False, indent=1)

    @classmethod
    def from_json(cls, text: str) -> Calibrator:
        """Reads `to_json()` text; raises ContractError naming the field that is missing, unknown or wrong."""
        try:
            data = json.loads(text)
        except json.JSONDecodeError as error:
            raise ContractError(f"calibrator JSON cannot be read: {error}") from error
        data = _checked_fields(cls, data, "calibrator")
        fitted = _checked_fields(FittedOn, data["fitted_on"], "calibrator.fitted_on")
        bins = (
            _checked_fields(ReliabilityBin, row, "calibrator.fitted_on.reliability") for row in fitted["reliability"]
        )
        fitted["reliability"] = tuple(ReliabilityBin(**row) for row in bins)
        data["fitted_on"] = FittedOn(**fitted)
        for name in ("knots", "features", "weights"):
            data[name] = tuple(data[name])
        return cls(**data)


def grid_variable(name: str, values: npt.ArrayLike) -> FloatArray:
    """A variable of `VARIABLES` on the grid's range [-1, 1] (beyond it: clipped by `grid_position`), any shape."""
    values = np.asarray(values, dtype=np.float64)
    return values if name == "similarity" else 1.0 + values / NATS


def grid_variable_sql(name: str, column: str) -> str:
    """Spark SQL text (double) of `grid_variable` of a column."""
    return column if name == "similarity" else f"(1.0D + cast({column} as double) / {_double(NATS)})"


def grid_position(similarity: npt.ArrayLike) -> tuple[npt.NDArray[np.int64], FloatArray]:
    """(cell j in [0, GRID_CELLS), fraction f in [0, 1]) of similarities of any shape, clipped to [-1, 1]."""
    position = (np.clip(np.asarray(similarity, dtype=np.float64), -1.0, 1.0) + 1.0) * (GRID_CELLS / 2)
    cell = np.minimum(np.floor(position), GRID_CELLS - 1)
    return cell.astype(np.int64), position - cell


def feature_values(calibrator: Calibrator, columns: Mapping[str, npt.ArrayLike]) -> FloatArray:
    """Feature matrix float64 [n x F] of a `platt` or `logistic` calibrator, in the order of its `features`.

    columns: the `SCORES` and `COUNT_COLUMNS` that the features need; each [n].
    Shrunken click logit (ours): p = (clicks + strength * rate) / (impressions + strength), logit(p); unknown counts are
    0, and clicks beyond the impressions count as impressions too.
    Log popularity: ln(1 + item_positives).
    """
    rate, strength = calibrator.prior_rate, calibrator.prior_strength

    def column(name: str) -> FloatArray:
        if name not in columns:
            raise ContractError(f"calibrator feature needs column {name!r}; got {', '.join(sorted(columns))}")
        return np.asarray(columns[name], dtype=np.float64)

    def feature(name: str) -> FloatArray:
        if name in SCORES:
            return column(name)
        if name == "log_popularity":
            return np.log1p(column("item_positives"))
        owner = name.removesuffix("_click_logit")
        clicks, impressions = column(f"{owner}_clicks"), column(f"{owner}_impressions")
        return np.log((clicks + strength * rate) / (np.maximum(impressions - clicks, 0.0) + strength * (1.0 - rate)))

    return np.stack([feature(name) for name in calibrator.features], axis=-1)


def apply(calibrator: Calibrator, columns: Mapping[str, npt.ArrayLike]) -> FloatArray:
    """Pseudo-labels float64 [n] in [0, 1] from the columns of `feature_values`."""
    if calibrator.kind in GRID_KINDS:
        knots = np.asarray(calibrator.knots, dtype=np.float64)
        (name,) = calibrator.features
        cell, fraction = grid_position(grid_variable(name, columns[name]))
        return (1.0 - fraction) * knots[cell] + fraction * knots[cell + 1]
    logits = feature_values(calibrator, columns) @ np.asarray(calibrator.weights) + calibrator.intercept
    return sigmoid(logits)


def sigmoid(x: npt.ArrayLike) -> FloatArray:
    """1 / (1 + exp(-x)) without overflow, any shape."""
    x = np.asarray(x, dtype=np.float64)
    small = np.exp(-np.abs(x))
    return np.where(x >= 0, 1.0, small) / (1.0 + small)


def cell_sql(similarity: str) -> str:
    """Spark SQL text of `grid_position`'s cell (int) of a similarity column: group by it to make histograms."""
    return f"cast(least(floor({_position_sql(similarity)}), {GRID_CELLS - 1}) as int)"


def fraction_sql(similarity: str) -> str:
    """Spark SQL text of `grid_position`'s fraction (double); its mean per cell makes fits exact."""
    return f"({_position_sql(similarity)} - {cell_sql(similarity)})"


def sql_expression(calibrator: Calibrator) -> str:
    """Spark SQL text (double, in [0, 1]) of `apply` over the columns of the same names; agrees to 1e-12 (tested).

    Counts that are null (no row in item_stats / user_stats) count as 0; a null score gives null.
    """
    if calibrator.kind in GRID_KINDS:
        knots = "array(" + ",".join(_double(value) for value in calibrator.knots) + ")"
        (name,) = calibrator.features
        variable = grid_variable_sql(name, name)
        cell, fraction = cell_sql(variable), fraction_sql(variable)
        return f"((1.0D - {fraction}) * element_at({knots}, {cell} + 1) + {fraction} * element_at({knots}, {cell} + 2))"
    terms = [_double(calibrator.intercept)]
    for name, weight in zip(calibrator.features, calibrator.weights, strict=True):
        terms.append(f"{_double(weight)} * {feature_sql(calibrator, name)}")
    # exp(-x) overflows to infinity for x < -709, and 1 / (1 + inf) is the intended 0.
    return f"(1.0D / (1.0D + exp(-({' + '.join(terms)}))))"


def feature_sql(calibrator: Calibrator, name: str) -> str:
    """Spark SQL text (double) of one feature of `FEATURES`: the same formula as `feature_values`."""
    if name in SCORES:
        return f"cast({name} as double)"
    if name == "log_popularity":
        return f"ln(1.0D + {_count_sql('item_positives')})"
    owner = name.removesuffix("_click_logit")
    clicks, impressions = _count_sql(f"{owner}_clicks"), _count_sql(f"{owner}_impressions")
    positive = _double(calibrator.prior_strength * calibrator.prior_rate)
    negative = _double(calibrator.prior_strength * (1.0 - calibrator.prior_rate))
    return f"ln(({clicks} + {positive}) / (greatest({impressions} - {clicks}, 0.0D) + {negative}))"


def _position_sql(similarity: str) -> str:
    clipped = f"least(greatest(cast({similarity} as double), -1.0D), 1.0D)"
    return f"(({clipped} + 1.0D) * {_double(GRID_CELLS / 2)})"


def _count_sql(column: str) -> str:
    return f"coalesce(cast({column} as double), 0.0D)"


def _double(value: float) -> str:
    # repr round-trips float64; the D suffix makes it a double literal (a bare 0.1 is a decimal in Spark SQL).
    text = f"{float(value)!r}D"
    return f"({text})" if text.startswith("-") else text


def _check_knots(knots: tuple[float, ...]) -> None:
    values = np.asarray(knots, dtype=np.float64)
    if values.shape != (GRID_CELLS + 1,):
        raise ContractError(f"calibrator.knots has {values.size} values; expected {GRID_CELLS + 1}")
    if not np.isfinite(values).all() or values.min() < 0.0 or values.max() > 1.0:
        raise ContractError("calibrator.knots holds a value that is not finite or outside [0, 1]; fit it again")


def _checked_fields(kind: type, data: Any, where: str) -> dict[str, Any]:
    names = {item.name for item in fields(kind)}
    if not isinstance(data, dict) or set(data) != names:
        found = sorted(data) if isinstance(data, dict) else type(data).__name__
        raise ContractError(f"{where} has fields {found}; expected exactly {sorted(names)}")
    return dict(data)
