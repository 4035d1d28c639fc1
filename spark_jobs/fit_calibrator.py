"""Job: pair_scores (and earlier clicks on uniform traffic) -> artifact calibrator, a small JSON.

Launch: spark-submit … spark_jobs/fit_calibrator.py --config CONFIG --run-date D

`quantile` ranks the scores (`labels.calibrator.score`) of D's unexposed pairs and needs one number: the click rate of
unexposed pairs, from the configuration or from uniformly exposed traffic before D. The other kinds are fitted with
pyspark.ml on pairs of dates before D that were uniformly exposed and scored. Nothing that happened at or after D is
read.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import date, timedelta
from typing import Any

import numpy as np
from pyspark.ml.classification import LogisticRegression
from pyspark.ml.feature import VectorAssembler
from pyspark.ml.regression import IsotonicRegression
from pyspark.sql import Column, DataFrame, Row
from pyspark.sql import functions as F

from gpl_core.conf.sections import CalibratorSettings as Settings
from gpl_core.errors import GateError, MissingInputError
from gpl_core.graph.step_run import log
from gpl_core.labels.calibration import (
    CALIBRATOR_FILE,
    FEATURES,
    GRID_CELLS,
    Calibrator,
    FittedOn,
    cell_sql,
    feature_sql,
    fraction_sql,
    grid_variable_sql,
)
from gpl_core.labels.fitting import base_rate_change, check_fitting_rows, fit_quantile, grid_calibrator, grid_mean
from gpl_core.lakehouse.artifacts import Manifest
from gpl_core.lakehouse.scratch import scratch_folder
from spark_jobs.common.calibrators import label_reliability, require_one_version, with_counts, with_label
from spark_jobs.common.columns import only_row
from spark_jobs.run import job_main
from spark_jobs.step import SparkStep

REMEDY = "set labels.calibrator.kind=quantile and labels.calibrator.target_rate to the click rate of unexposed pairs"
_L2 = 1e-3
_PRIOR_STRENGTH = 20.0


def grid_cells(pairs: DataFrame, score: str, *figures: Column, by: Sequence[str] = ()) -> DataFrame:
    """`by`, cell, rows, fraction (mean place inside the cell) and `figures`: at most GRID_CELLS rows per group."""
    variable = grid_variable_sql(score, score)
    return pairs.groupBy(*by, F.expr(cell_sql(variable)).alias("cell")).agg(
        F.count(F.lit(1)).alias("rows"), F.avg(F.expr(fraction_sql(variable))).alias("fraction"), *figures
    )


def labeled_pairs(scores: DataFrame, impressions: DataFrame) -> DataFrame:
    """Uniformly exposed scored pairs with the clicks of their own date: one row per impression of the pair.

    `scores` and `impressions` hold the same dates.
    """
    shown = impressions.where("is_random").select("user_id", "item_index", "dt", "clicked")
    return scores.where("source = 'uniform'").join(shown, ["user_id", "item_index", "dt"])


def fit_isotonic(labeled: DataFrame, score: str) -> np.ndarray:
    """Knots [GRID_CELLS + 1] of the isotonic click rate over the score.

    pyspark.ml's IsotonicRegression collects its pools on the driver, so it is given the grid's cells, weighted by
    their rows, and not the pairs.
    """
    cells = grid_cells(labeled, score, F.avg("clicked").alias("label")).select(
        F.col("rows").cast("double"), "label", (F.col("cell") + F.col("fraction")).alias("features")
    )
    model = IsotonicRegression(weightCol="rows").fit(cells)
    return np.interp(np.arange(GRID_CELLS + 1.0), model.boundaries.toArray(), model.predictions.toArray())


def fit_logistic(labeled: DataFrame, kind: str, features: tuple[str, ...], fitted_on: FittedOn) -> Calibrator:
    """A `platt` or `logistic` calibrator by ridge regression over `features` (see `calibration.FEATURES`)."""
    unfitted = Calibrator(
        kind=kind, fitted_on=fitted_on, features=features, weights=(0.0,) * len(features),
        prior_rate=fitted_on.base_rate, prior_strength=_PRIOR_STRENGTH,
    )  # fmt: skip
    # The calibrator's own SQL of each feature: what is fitted is what is applied.
    columns = [F.expr(feature_sql(unfitted, name)).alias(name) for name in features]
    made = labeled.select(*columns, F.col("clicked").cast("double").alias("label"))
    assembled = VectorAssembler(inputCols=list(features), outputCol="features").transform(made)
    model = LogisticRegression(regParam=_L2, tol=1e-9, maxIter=200, standardization=True).fit(assembled)
    return replace(unfitted, weights=tuple(float(w) for w in model.coefficients), intercept=float(model.intercept))


def count_clicks(shown: DataFrame, *more: Column) -> Row:
    """Rows and clicked rows of `shown`, and `more` aggregates."""
    return only_row(shown.agg(F.count(F.lit(1)), F.coalesce(F.sum("clicked"), F.lit(0)), *more))


def collect_histogram(pairs: DataFrame, score: str) -> tuple[np.ndarray, np.ndarray, set[str]]:
    """The run date's scores on the driver: one bounded aggregation of `pairs`.

    Returns: (unexposed pairs per cell [GRID_CELLS], their mean place inside the cell in [0, 1], 0.5 in empty cells
    [GRID_CELLS], model_versions that scored the pairs of all sources).
    """
    rows, fractions, versions = np.zeros(GRID_CELLS), np.full(GRID_CELLS, 0.5), set()
    scored_by = F.min("model_version").alias("oldest"), F.max("model_version").alias("newest")
    for row in grid_cells(pairs, score, *scored_by, by=["source"]).collect():
        versions |= {row["oldest"], row["newest"]}
        if row["source"] == "unexposed":
            rows[row["cell"]], fractions[row["cell"]] = row["rows"], row["fraction"]
    return rows, fractions, versions


def target_rate(step: SparkStep, settings: Settings, first: date, last: date) -> tuple[float, dict[str, Any]]:
    """The mean that labels of unexposed pairs must have, and where it comes from.

    GateError when it must come from uniform traffic, and there is too little of that, or none was clicked.
    """
    if settings.target_rate != "uniform":
        return float(settings.target_rate), {"target_rate_from": "configuration"}
    rows = clicks = 0
    if step.context.has("impressions"):
        rows, clicks = count_clicks(step.read_dates("impressions", first, last).where("is_random"))
    check_fitting_rows(rows, clicks, settings.min_rows, f"{REMEDY}; looked at {first} to {last}")
    return clicks / rows, {"target_rate_from": "uniform", "uniform_rows": rows, "uniform_clicks": clicks}


def quantile(
    step: SparkStep, settings: Settings, rows: np.ndarray, fractions: np.ndarray, first: date, last: date
) -> tuple[Calibrator, dict[str, Any]]:
    """The `quantile` calibrator of the pairs of `collect_histogram`, and details about its target rate."""
    rate, details = target_rate(step, settings, first, last)
    day = step.run_date.isoformat()
    pairs = int(rows.sum())
    if pairs:
        knots = fit_quantile(rows, rate, settings.spread, fractions)
        base = grid_mean(knots, rows, fractions)
    else:
        # An empty day must not stop the graph: this calibrator will label nothing.
        log.warning("fit_calibrator: %s has no scored unexposed pair; the calibrator is the constant %.4f", day, rate)
        knots, base = np.full(GRID_CELLS + 1, rate), rate
    fitted = FittedOn("unlabeled", pairs, 0, day, day, base)
    return grid_calibrator("quantile", knots, fitted, settings.score), {**details, "target_rate": rate}


def fitted(step: SparkStep, settings: Settings, first: date, last: date) -> tuple[Calibrator, dict[str, Any]]:
    """A `platt`, `isotonic` or `logistic` calibrator from scored and labeled pairs of `first` to `last`.

    MissingInputError when none of them was scored, GateError when too few are labeled, or all of one class.
    """
    labeled, base, models = labeled_rows(step, settings, first, last)
    # Earlier dates were scored by the models of their time; their similarities are taken as comparable (ours).
    details = {"source": base.source, "rows": base.rows, "clicks": base.clicks, "scored_by": models}
    if settings.kind == "isotonic":
        calibrator = grid_calibrator("isotonic", fit_isotonic(labeled, settings.score), base, settings.score)
    else:
        features = (settings.score,) if settings.kind == "platt" else FEATURES
        calibrator = fit_logistic(labeled, settings.kind, features, base)
        if calibrator.weights[0] <= 0:
            rise = f"clicks do not rise with {features[0]} (weight {calibrator.weights[0]:.4f})"
            details["warning"] = f"{rise}: labels mean little"
            log.warning("fit_calibrator: %s", details["warning"])
    bins, error = label_reliability(with_label(labeled, calibrator))
    labeled.unpersist()
    return replace(calibrator, fitted_on=replace(base, reliability=bins, ece=error)), details


def labeled_rows(step: SparkStep, settings: Settings, first: date, last: date) -> tuple[DataFrame, FittedOn, list[str]]:
    """Persisted labeled pairs of uniform traffic; what and how many they are; the models that scored them."""
    scores = step.read_dates("pair_scores", first, last)
    if not step.context.has("impressions") or scores.isEmpty():
        raise MissingInputError(
            f"step fit_calibrator: labels.calibrator.kind={settings.kind} is fitted on pairs scored from {first} to "
            f"{last}, before {step.run_date}, and there are none; run score_candidates for earlier dates, or {REMEDY}"
        )
    shown = step.read_dates("impressions", first, last)
    labeled = labeled_pairs(scores, shown)
    if settings.kind == "logistic":
        labeled = with_counts(labeled, *(step.read_dates(t, first, last) for t in ("item_stats", "user_stats")))
    rows, clicks, models = count_clicks(labeled.persist(), F.collect_set("model_version"))
    remedy = f"widen labels.calibrator.window_days ({settings.window_days}), or {REMEDY}"
    check_fitting_rows(rows, clicks, settings.min_rows, remedy)
    on = FittedOn("uniform", rows, clicks, first.isoformat(), last.isoformat(), clicks / rows)
    return labeled, on, sorted(models)


def check_rate(rate: float, before: Manifest | None, settings: Settings) -> dict[str, Any]:
    """A warning for the details when the mean label moved too far since the calibrator of the date before.

    GateError instead when labels.calibrator.on_rate_change is `refuse`.
    """
    if before is None or "base_rate" not in before.metrics:
        return {}
    sentence = base_rate_change(float(before.metrics["base_rate"]), rate)
    if sentence is None:
        return {}
    if settings.on_rate_change == "refuse":
        raise GateError(f"{sentence} (the calibrator before: {before.version})")
    log.warning("fit_calibrator: %s", sentence)
    return {"rate_warning": sentence}


def run(step: SparkStep) -> None:
    """Fit the configured kind for the run date and publish it."""
    context, settings = step.context, step.config.labels.calibrator
    model = context.artifact("interest_model")
    through = context.step.trained_through(step.run_date)
    first = step.run_date - timedelta(days=settings.window_days)
    rows, fractions, scored_by = collect_histogram(step.read_slice("pair_scores"), settings.score)
    require_one_version(
        sorted(scored_by), model.version, f"pair_scores dt={step.run_date}",
        "the interest_model in force", f"run score_requests and score_candidates for {step.run_date} again",
    )  # fmt: skip
    if settings.kind == "quantile":
        calibrator, details = quantile(step, settings, rows, fractions, first, through)
    else:
        calibrator, details = fitted(step, settings, first, through)
    before = context.artifacts.in_force_or_none("calibrator", through)
    on = calibrator.fitted_on
    details |= check_rate(on.base_rate, before, settings)
    metrics: Mapping[str, Any] = {
        **details, "kind": calibrator.kind, "base_rate": on.base_rate, "rows": on.rows,
        "dates": [on.first_date, on.last_date], "ece": on.ece, "content_only": calibrator.content_only,
    }  # fmt: skip
    with scratch_folder() as folder:
        (folder / CALIBRATOR_FILE).write_text(calibrator.to_json(), encoding="utf-8")
        lineage = {"model_version": model.version, "sid_version": model.lineage["sid_version"]}
        manifest = context.publish(folder, lineage, metrics)
    context.counts.rows_in = on.rows
    context.counts.outputs["artifact:calibrator"] = {"version": manifest.version}
    context.counts.details |= dict(metrics)
    log.info("fit_calibrator: published %s calibrator %s", calibrator.kind, manifest.version)


if __name__ == "__main__":
    job_main("fit_calibrator", run)
