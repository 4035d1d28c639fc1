"""Calibrators: the map from a pair's scores to its pseudo-label, as pure formulas (numpy and Spark SQL text).

All formulas here are ours (docs/method.md), after published parts: Platt 1999 (`platt`), isotonic regression by
pool-adjacent-violators (Zadrozny & Elkan 2002).

| kind | label | parameters |
|---|---|---|
| quantile | sigmoid(location + logit(user_rate) + spread' * logit(user_rank)) | location, spread, features, weights |
| platt | sigmoid(a * variable + b) | features (the variable,), weights (a,), intercept b |
| logistic | sigmoid(w . x + b), x of `FEATURES` | features, weights, intercept |
| isotonic | the grid map below | features (the variable,), knots |

A quantile label has two parts. `user_rate` says how often this user clicks, `user_rank` where the pair stands among the
user's unexposed ones by its score w . x; the location, the same for all, sets the mean label. spread' = spread *
sqrt(3) / pi: the logit of a uniform rank has standard deviation pi / sqrt(3).

`isotonic` (and `quantile` as published before it had two parts) *is* a piecewise linear map on one uniform grid, so
that numpy and Spark evaluate the same few float64 operations. The variable is the similarity, or the prefix_log_prob
brought to the same range (-NATS becomes 0, -2 NATS and below becomes -1).

This module imports neither torch nor Spark: Spark's driver imports it for the text of the expressions.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Self

import numpy as np
import numpy.typing as npt
from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from gpl_core.contracts.yaml_problems import problems_of
from gpl_core.errors import ContractError

GRID_CELLS = 1024  # cells of the similarity grid over [-1, 1]; a grid map has GRID_CELLS + 1 knots, one per cell edge

NATS = 16.0  # prefix_log_prob / NATS + 1 is its place on the grid: probabilities down to 10^-13 stay above its end

KINDS = ("quantile", "isotonic", "platt", "logistic")
CALIBRATOR_FILE = "calibrator.json"  # the one file of a calibrator's bundle

VARIABLES = ("similarity", "prefix_log_prob")  # what a calibrator of one variable may map to a label

SCORES = ("similarity", "history_similarity", "prefix_log_prob")  # features that are columns of pair_scores

FEATURES = (*SCORES, "item_click_logit", "user_click_logit", "log_popularity")
"""Features of `logistic`, and of a `quantile` that ranks by exposed clicks; the last three are of pre-window counts."""

COUNT_COLUMNS = ("item_impressions", "item_clicks", "user_impressions", "user_clicks", "item_positives")
"""Pre-window counts behind the last three features: columns of item_stats and user_stats, prefixed by their owner."""

USER_PARTS = ("user_rate", "user_rank")  # the two parts of a quantile label, columns of pseudo_labels

_UNIT_SPREAD = math.sqrt(3.0) / math.pi  # times the logit of a uniform rank: standard deviation 1

FloatArray = npt.NDArray[np.float64]
_STRICT = ConfigDict(extra="forbid")
_LATER = {"location", "spread", "across_users"}  # fields that calibrators published earlier lack


@dataclass(frozen=True, config=_STRICT)
class ReliabilityBin:
    """One row of a reliability diagram: pairs grouped by their label."""

    rows: int
    mean_label: float
    click_rate: float


@dataclass(frozen=True, config=_STRICT)
class FittedOn:
    """What a calibrator was fitted on."""

    source: str  # "uniform" (uniformly exposed slice), "exposed" (ordinary exposed pairs) or "unlabeled" (scores alone)
    rows: int  # pairs seen
    clicks: int  # of them; 0 when unlabeled
    first_date: str
    last_date: str
    base_rate: float  # the target mean of the labels
    reliability: tuple[ReliabilityBin, ...] = ()
    ece: float | None = None  # sum_b n_b |mean label - click rate| / n; None where it was not measured


@dataclass(frozen=True, config=_STRICT)
class Calibrator:
    """A fitted calibrator; the module's table says which parameters each kind has."""

    kind: str
    fitted_on: FittedOn
    knots: tuple[float, ...] = ()
    features: tuple[str, ...] = ()
    weights: tuple[float, ...] = ()
    intercept: float = 0.0
    location: float = 0.0
    spread: float = 1.0
    across_users: str = "user_rate"  # level of a quantile label; or "global": the prior rate for all
    # Click rates are shrunken toward prior_rate, as if it had been observed in so many impressions of a user or item.
    prior_rate: float = 0.05
    user_strength: float = 20.0
    item_strength: float = 20.0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ContractError(f"calibrator.kind is {self.kind!r}; expected one of {', '.join(KINDS)}")
        if self.knots and not self.features:  # published before there was a choice
            object.__setattr__(self, "features", ("similarity",))
        if self.on_grid:
            if self.features not in [(name,) for name in VARIABLES]:
                raise ContractError(
                    f"calibrator.features of a grid map is {self.features!r}; expected one of {', '.join(VARIABLES)}"
                )
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
        if not all(math.isfinite(value) for value in (*self.weights, self.intercept, self.location, self.spread)):
            raise ContractError("calibrator.weights, .intercept, .location or .spread is not finite; fit it again")
        if self.across_users not in ("user_rate", "global"):
            raise ContractError(f"calibrator.across_users is {self.across_users!r}; expected user_rate or global")
        if not 0.0 < self.prior_rate < 1.0 or not min(self.user_strength, self.item_strength) > 0.0:
            raise ContractError(
                f"calibrator.prior_rate {self.prior_rate!r} must lie in (0, 1), "
                f"user_strength {self.user_strength!r} and item_strength {self.item_strength!r} above 0"
            )

    @property
    def on_grid(self) -> bool:
        """True when the label is the grid map of one variable."""
        return self.kind == "isotonic" or bool(self.knots)

    @property
    def has_user_parts(self) -> bool:
        """True when the label is made of `USER_PARTS`."""
        return self.kind == "quantile" and not self.on_grid

    @property
    def needs_item_counts(self) -> bool:
        """True when a feature is made of item_stats; user_stats are needed for `user_rate` anyway."""
        return bool({"item_click_logit", "log_popularity"} & set(self.features))

    @property
    def uses_clicks(self) -> bool:
        """True when clicks shape the order or the level of its labels, beyond what items are and what users like."""
        by_level = self.has_user_parts and self.across_users == "user_rate"
        return by_level or self.fitted_on.clicks > 0

    def to_json(self) -> str:
        """The calibrator as canonical JSON text (sorted keys): equal calibrators give equal text."""
        return json.dumps(asdict(self), sort_keys=True, allow_nan=False, indent=1)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Reads `to_json()` text; raises ContractError naming the field that is missing, unknown or wrong."""
        try:
            data = json.loads(text)
            if isinstance(data, dict) and "prior_strength" in data:  # published before users and items had one each
                data |= dict.fromkeys(("user_strength", "item_strength"), data.pop("prior_strength"))
            made = TypeAdapter(cls).validate_json(json.dumps(data), strict=True)
        except ValidationError as error:
            raise ContractError(f"calibrator JSON: {'; '.join(problems_of(error, cls, data))}") from None
        except ValueError as error:
            raise ContractError(f"calibrator JSON cannot be read: {error}") from None
        for kind, body in ((cls, data), (FittedOn, data["fitted_on"])):  # defaults are for what is made, not read
            if lacking := {item.name for item in fields(kind)} - _LATER - body.keys():
                raise ContractError(f"calibrator JSON: {', '.join(sorted(lacking))}: required, but not given")
        return made


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
    """Feature matrix float64 [n x F] in the order of the calibrator's `features`.

    columns: the `SCORES` and `COUNT_COLUMNS` that the features need; each [n].
    Shrunken click logit (ours): p = (clicks + strength * rate) / (impressions + strength), logit(p); unknown counts are
    0, and clicks beyond the impressions count as impressions too.
    Log popularity: ln(1 + item_positives).
    """

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
        positive, negative = _prior_counts(calibrator, owner)
        return np.log((clicks + positive) / (np.maximum(impressions - clicks, 0.0) + negative))

    return np.stack([feature(name) for name in calibrator.features], axis=-1)


def apply(calibrator: Calibrator, columns: Mapping[str, npt.ArrayLike]) -> FloatArray:
    """Pseudo-labels float64 [n] in [0, 1] from the columns of `feature_values`, or from the `USER_PARTS`."""
    if calibrator.on_grid:
        knots = np.asarray(calibrator.knots, dtype=np.float64)
        (name,) = calibrator.features
        cell, fraction = grid_position(grid_variable(name, columns[name]))
        return (1.0 - fraction) * knots[cell] + fraction * knots[cell + 1]
    if calibrator.has_user_parts:
        return sigmoid(calibrator.location + user_logit(calibrator, columns["user_rate"], columns["user_rank"]))
    return sigmoid(feature_values(calibrator, columns) @ np.asarray(calibrator.weights) + calibrator.intercept)


def user_rate(calibrator: Calibrator, columns: Mapping[str, npt.ArrayLike]) -> FloatArray:
    """The users' shrunken click rates [n] in (0, 1), from user_impressions and user_clicks [n]."""
    clicks, impressions = (np.asarray(columns[name], dtype=np.float64) for name in ("user_clicks", "user_impressions"))
    positive, negative = _prior_counts(calibrator, "user")
    return (clicks + positive) / (np.maximum(impressions - clicks, 0.0) + negative + (clicks + positive))


def user_logit(calibrator: Calibrator, user_rate: npt.ArrayLike, user_rank: npt.ArrayLike) -> FloatArray:
    """The logit [n] of a quantile label without its location: level of the user, and place among the user's pairs."""
    level = user_rate if calibrator.across_users == "user_rate" else calibrator.prior_rate
    return _logit(level) + rank_logits(user_rank, calibrator.spread)


def rank_logits(rank: npt.ArrayLike, spread: float) -> FloatArray:
    """Logits [n] of standard deviation `spread` for ranks [n] in (0, 1) that are spread evenly."""
    return spread * _UNIT_SPREAD * _logit(rank)


def sigmoid(x: npt.ArrayLike) -> FloatArray:
    """1 / (1 + exp(-x)) without overflow, any shape."""
    x = np.asarray(x, dtype=np.float64)
    small = np.exp(-np.abs(x))
    return np.where(x >= 0, 1.0, small) / (1.0 + small)


def _logit(p: npt.ArrayLike) -> FloatArray:
    p = np.asarray(p, dtype=np.float64)
    return np.log(p / (1.0 - p))


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
    if calibrator.on_grid:
        knots = "array(" + ",".join(_double(value) for value in calibrator.knots) + ")"
        (name,) = calibrator.features
        variable = grid_variable_sql(name, name)
        cell, fraction = cell_sql(variable), fraction_sql(variable)
        return f"((1.0D - {fraction}) * element_at({knots}, {cell} + 1) + {fraction} * element_at({knots}, {cell} + 2))"
    if calibrator.has_user_parts:
        return _sigmoid_sql(f"{_double(calibrator.location)} + {user_logit_sql(calibrator)}")
    return _sigmoid_sql(score_sql(calibrator))


def score_sql(calibrator: Calibrator) -> str:
    """Spark SQL text (double) of what the calibrator ranks pairs by: w . x + b, or the variable of a grid map."""
    if calibrator.on_grid:
        return feature_sql(calibrator, calibrator.features[0])
    terms = [_double(calibrator.intercept)]
    for name, weight in zip(calibrator.features, calibrator.weights, strict=True):
        terms.append(f"{_double(weight)} * {feature_sql(calibrator, name)}")
    return " + ".join(terms)


def user_rate_sql(calibrator: Calibrator) -> str:
    """Spark SQL text (double, in (0, 1)) of the user's shrunken click rate, from user_impressions and user_clicks."""
    positive, negative = _prior_counts(calibrator, "user")
    clicks, impressions = _count_sql("user_clicks"), _count_sql("user_impressions")
    rest, clicks = f"greatest({impressions} - {clicks}, 0.0D)", f"({clicks} + {_double(positive)})"
    return f"({clicks} / ({rest} + {_double(negative)} + {clicks}))"


def user_logit_sql(calibrator: Calibrator) -> str:
    """Spark SQL text (double) of `user_logit` over the columns user_rate and user_rank."""
    level = "user_rate" if calibrator.across_users == "user_rate" else _double(calibrator.prior_rate)
    spread = _double(calibrator.spread * _UNIT_SPREAD)
    return f"ln({level} / (1.0D - {level})) + {spread} * ln(user_rank / (1.0D - user_rank))"


def feature_sql(calibrator: Calibrator, name: str) -> str:
    """Spark SQL text (double) of one feature of `FEATURES`: the same formula as `feature_values`."""
    if name in SCORES:
        return f"cast({name} as double)"
    if name == "log_popularity":
        return f"ln(1.0D + {_count_sql('item_positives')})"
    owner = name.removesuffix("_click_logit")
    clicks, impressions = _count_sql(f"{owner}_clicks"), _count_sql(f"{owner}_impressions")
    positive, negative = (_double(value) for value in _prior_counts(calibrator, owner))
    return f"ln(({clicks} + {positive}) / (greatest({impressions} - {clicks}, 0.0D) + {negative}))"


def _prior_counts(calibrator: Calibrator, owner: str) -> tuple[float, float]:
    """Clicks, and impressions without one, that the prior adds to the counts of an item or a user."""
    strength = calibrator.item_strength if owner == "item" else calibrator.user_strength
    return strength * calibrator.prior_rate, strength * (1.0 - calibrator.prior_rate)


def _sigmoid_sql(logit: str) -> str:
    # exp(-x) overflows to infinity for x < -709, and 1 / (1 + inf) is the intended 0.
    return f"(1.0D / (1.0D + exp(-({logit}))))"


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
