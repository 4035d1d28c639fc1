"""Job: pair_scores (and earlier clicks on uniform traffic) -> artifact calibrator, a small JSON.

Launch: spark-submit … spark_jobs/fit_calibrator.py --config CONFIG --run-date D

`quantile` ranks each user's unexposed pairs of D by a score: one of pair_scores, or what a regression on clicks of
ordinary exposed pairs of earlier dates, beside unexposed ones, makes of all features: its order alone counts, and
prefix_log_prob has a fixed share in it. It needs one number, the click rate of unexposed pairs: from the configuration,
from uniformly exposed traffic before D or as a share of the exposed one. The other kinds are fitted with pyspark.ml on
pairs of dates before D that were uniformly exposed and scored. Nothing that happened at or after D is read.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import date, timedelta
from typing import Any

import numpy as np
from pyspark.ml.classification import LogisticRegression
from pyspark.ml.feature import VectorAssembler
from pyspark.ml.regression import IsotonicRegression
from pyspark.sql import DataFrame, Row
from pyspark.sql import functions as F

from gpl_core.conf.sections import CalibratorSettings as Settings
from gpl_core.errors import GateError, MissingInputError
from gpl_core.graph.step_run import log
from gpl_core.labels.calibration import (
    CALIBRATOR_FILE,
    FEATURES,
    GRID_CELLS,
    SCORES,
    Calibrator,
    FittedOn,
    cell_sql,
    feature_sql,
    fraction_sql,
    grid_variable_sql,
    score_sql,
    user_logit,
    user_logit_sql,
)
from gpl_core.labels.fitting import (
    MOST_IMPRESSIONS,
    UNEXPOSED_SHARE,
    base_rate_change,
    check_fitting_rows,
    fit_location,
    fitting_fault,
    prefix_weight,
    prior_strength,
)
from gpl_core.lakehouse.artifacts import Manifest
from gpl_core.lakehouse.scratch import scratch_folder
from spark_jobs.common.calibrators import (
    band_error,
    label_cells,
    reliability_bins,
    require_one_version,
    with_counts,
    with_label,
    with_user_parts,
)
from spark_jobs.common.columns import only_row
from spark_jobs.run import job_main
from spark_jobs.step import SparkStep

REMEDY = "set labels.calibrator.kind=quantile and labels.calibrator.target_rate to the click rate of unexposed pairs"
FALLBACK = "prefix_log_prob"  # ranks where too few exposed pairs were scored on earlier dates
_L2 = 1e-3
_CELLS = 1_000_000  # of the hash that chooses unexposed pairs
_LOGIT_CELLS = 256  # per unit of a logit: a label's mean is off by less than a millionth of it


def labeled_pairs(scores: DataFrame, impressions: DataFrame, sources: Sequence[str]) -> DataFrame:
    """Scored pairs of `sources`, exposed or uniform, with the clicks of their own date and weight 1, per impression.

    `scores` and `impressions` hold the same dates.
    """
    source = F.when(F.col("is_random"), "uniform").otherwise("exposed").alias("source")
    shown = impressions.select("user_id", "item_index", "dt", source, "clicked")
    found = scores.where(F.col("source").isin(*sources)).join(shown, ["user_id", "item_index", "dt", "source"])
    return found.withColumn("weight", F.lit(1.0))


def unexposed_pairs(scores: DataFrame, rows: int) -> DataFrame:
    """Unexposed scored pairs as not clicked, about `rows` of them; together they weigh a share of `rows` exposed ones.

    None weighs more than an exposed one, however few they are.
    """
    unexposed = scores.where("source = 'unexposed'")
    count = unexposed.count()
    kept = min(_CELLS, -(-_CELLS * rows // max(count, 1)))
    weight = min(1.0, UNEXPOSED_SHARE * rows / max(count * kept / _CELLS, 1.0))
    chosen = unexposed.where(F.pmod(F.xxhash64("user_id", "item_index", "dt"), F.lit(_CELLS)) < kept)
    return chosen.withColumns({"clicked": F.lit(0), "weight": F.lit(weight)})


def fit_isotonic(labeled: DataFrame, score: str) -> np.ndarray:
    """Knots [GRID_CELLS + 1] of the isotonic click rate over the score.

    pyspark.ml's IsotonicRegression collects its pools on the driver, so it is given the grid's cells, weighted by
    their rows, and not the pairs.
    """
    variable = grid_variable_sql(score, score)
    cells = labeled.groupBy(F.expr(cell_sql(variable)).alias("cell")).agg(
        F.count(F.lit(1)).cast("double").alias("rows"), F.avg("clicked").alias("label"),
        F.avg(F.expr(f"{cell_sql(variable)} + {fraction_sql(variable)}")).alias("features"),
    )  # fmt: skip
    model = IsotonicRegression(weightCol="rows").fit(cells)
    return np.interp(np.arange(GRID_CELLS + 1.0), model.boundaries.toArray(), model.predictions.toArray())


def fit_logistic(labeled: DataFrame, start: Calibrator) -> Calibrator:
    """`start` with the weights and intercept of a weighted ridge regression of `clicked` over its features."""
    features = start.features
    # The calibrator's own SQL of each feature: what is fitted is what is applied.
    columns = [F.expr(feature_sql(start, name)).alias(name) for name in features]
    made = labeled.select(*columns, F.col("clicked").cast("double").alias("label"), "weight")
    assembled = VectorAssembler(inputCols=list(features), outputCol="features").transform(made)
    model = LogisticRegression(regParam=_L2, tol=1e-9, maxIter=200, weightCol="weight").fit(assembled)
    return replace(start, weights=tuple(float(w) for w in model.coefficients), intercept=float(model.intercept))


def prior_counts(stats: DataFrame) -> Row:
    """What `prior_strength` asks of user_stats or item_stats of one date: one row of sums.

    More impressions than `MOST_IMPRESSIONS` count as so many, with the same click rate: moments weigh a user by the
    square of the impressions, and one crawler would decide about all users.
    """
    n = F.least("impressions", F.lit(MOST_IMPRESSIONS)).cast("double")
    shown = stats.where("impressions > 0").select(n.alias("n"), (F.col("clicks") * n / F.col("impressions")).alias("k"))
    rate = F.lit(only_row(shown.agg(F.sum("k") / F.sum("n")))[0] or 0.0)
    n, k = F.col("n"), F.col("k")
    sums = {"groups": F.lit(1), "impressions": n, "clicks": k, "pairs": n * (n - 1), "squares": (k - n * rate) ** 2}
    return only_row(shown.agg(*[F.coalesce(F.sum(c), F.lit(0.0)).alias(name) for name, c in sums.items()]))


def unfitted(step: SparkStep, settings: Settings) -> Calibrator:
    """A calibrator of all features without weights; with the click rate before D, and what it is worth for a user."""
    of_user = prior_counts(step.read_slice("user_stats")).asDict()
    of_item = prior_counts(step.read_slice("item_stats")).asDict() if settings.uses_all_features else of_user
    rate = of_user["clicks"] / of_user["impressions"] if of_user["impressions"] else 0.0
    rate = min(max(rate, 1e-6), 1 - 1e-6)
    day = step.run_date.isoformat()
    return Calibrator(
        "quantile", FittedOn("unlabeled", 0, 0, day, day, rate), features=FEATURES, weights=(0.0,) * len(FEATURES),
        spread=settings.spread, across_users=settings.across_users, prior_rate=rate,
        user_strength=prior_strength(**of_user), item_strength=prior_strength(**of_item),
    )  # fmt: skip


def target_rate(step: SparkStep, settings: Settings, first: date, last: date) -> tuple[float, dict[str, Any]]:
    """The mean that labels of unexposed candidates must have, and where it comes from.

    GateError when it must come from traffic of earlier dates, and there is too little of that, or none was clicked.
    """
    if isinstance(settings.target_rate, float):
        return settings.target_rate, {"target_rate_from": "configuration"}
    shown = step.read_dates("impressions", first, last)
    counts = {bool(r["is_random"]): (r[1], r[2]) for r in
              shown.groupBy("is_random").agg(F.count(F.lit(1)), F.sum("clicked")).collect()}  # fmt: skip
    rows, clicks = counts.get(True, (0, 0))
    if settings.target_rate == "uniform" or not fitting_fault(rows, clicks, settings.min_rows):
        check_fitting_rows(rows, clicks, settings.min_rows, f"{REMEDY}; looked at {first} to {last}")
        return clicks / rows, {"target_rate_from": "uniform", "uniform_rows": rows, "uniform_clicks": clicks}
    rows, clicks = counts.get(False, (0, 0))
    if not 0 < clicks < rows:
        raise GateError(
            f"calibration: {clicks} of the {rows} exposed rows of {first} to {last} are clicked: no click rate to "
            "take a share of; start on a later date, or set labels.calibrator.target_rate to the click rate that you "
            "expect of unexposed pairs"
        )
    details = {"target_rate_from": f"{settings.exposed_share} of the exposed click rate", "exposed_rows": rows}
    return settings.exposed_share * clicks / rows, details


def quantile(
    step: SparkStep, settings: Settings, start: Calibrator, first: date, last: date
) -> tuple[Calibrator, dict[str, Any]]:
    """The `quantile` calibrator of D's unexposed pairs; where its target rate and its order come from."""
    rate, details = target_rate(step, settings, first, last)
    ranked_by, more = ranking(step, settings, start, first, last)
    item_stats = step.read_slice("item_stats") if ranked_by.needs_item_counts else None
    pairs = with_counts(step.read_slice("pair_scores"), step.read_slice("user_stats"), item_stats)
    if ranked_by.fitted_on.source == "exposed" and settings.prefix_share:
        ranked_by, more["prefix_weight"] = with_prefix_share(ranked_by, pairs, settings.prefix_share)
    stands_for = F.sum(1 / F.col("sampling_probability")).alias("candidates")  # as training weighs its rows
    sampled = step.read_slice("unexposed_samples").groupBy("user_id", "item_index").agg(stands_for)
    logit = F.expr(user_logit_sql(ranked_by))
    parts = (
        with_user_parts(pairs, ranked_by)
        .where("source = 'unexposed'")
        .select("user_id", "item_index", logit.alias("x"))
    )
    cells = parts.join(sampled, ["user_id", "item_index"]).groupBy(F.floor(F.col("x") * _LOGIT_CELLS)).agg(
        F.sum("candidates").alias("candidates"),
        (F.sum(F.col("x") * F.col("candidates")) / F.sum("candidates")).alias("x"),
        F.count(F.lit(1)).alias("pairs"),
    ).collect()  # fmt: skip
    found = sum(c["pairs"] for c in cells)
    if not cells:
        # An empty day must not stop the graph.
        step.context.warn("no unexposed pair was scored: this calibrator will label nothing")
        cells = [Row(x=float(user_logit(ranked_by, ranked_by.prior_rate, 0.5)), candidates=1, pairs=0)]
    location = fit_location([c["x"] for c in cells], [c["candidates"] for c in cells], rate)
    on = replace(ranked_by.fitted_on, base_rate=rate)
    if on.source == "unlabeled":
        on = replace(on, rows=found)
    return replace(ranked_by, location=location, fitted_on=on), {**details, **more, "target_rate": rate}


def with_prefix_share(calibrator: Calibrator, pairs: DataFrame, share: float) -> tuple[Calibrator, float]:
    """`calibrator` with `share` of prefix_log_prob in the order of each user's unexposed pairs; the weight it adds.

    One more pass over the date's scored pairs (with `with_counts`).
    """
    count = F.count(F.lit(1))
    of_user = (
        pairs.where("source = 'unexposed'")
        .groupBy("user_id")
        .agg(
            count.alias("pairs"),
            (count * F.var_pop(F.expr(score_sql(calibrator)))).alias("score"),
            (count * F.var_pop("prefix_log_prob")).alias("prefix"),
        )
    )
    within = [F.coalesce(F.sum(name) / F.sum("pairs"), F.lit(0.0)) for name in ("score", "prefix")]
    variances = only_row(of_user.agg(*within))
    added = prefix_weight(share, *variances)
    weights = zip(calibrator.features, calibrator.weights, strict=True)
    return replace(calibrator, weights=tuple(w + added * (name == "prefix_log_prob") for name, w in weights)), added


def ranking(
    step: SparkStep, settings: Settings, start: Calibrator, first: date, last: date
) -> tuple[Calibrator, dict[str, Any]]:
    """A `quantile` calibrator without location: the features and weights of its score, and where these come from."""
    if settings.score != "exposed_clicks":
        return replace(start, features=(settings.score,), weights=(1.0,)), {"score": settings.score}
    labeled, rows, clicks, models = labeled_rows(step, ("exposed", "uniform"), FEATURES, first, last)
    if fault := fitting_fault(rows, clicks, settings.min_rows):
        warning = (
            f"pairs are ranked by {FALLBACK}, as is usual on a first date: the exposed pairs scored from {first} to "
            f"{last} are {fault}"
        )
        log.warning("fit_calibrator: %s: %s", step.run_date, warning)  # no alarm: every new lakehouse begins so
        return replace(start, features=(FALLBACK,), weights=(1.0,)), {"score": FALLBACK, "warning": warning}
    on = FittedOn("exposed", rows, clicks, first.isoformat(), last.isoformat(), clicks / rows)
    others = unexposed_pairs(step.read_dates("pair_scores", first, last), rows)
    both = labeled.unionByName(counted(step, others, first, last))
    calibrator = fit_logistic(both, replace(start, fitted_on=on))
    labeled.unpersist()
    return calibrator, {"score": "exposed_clicks", "scored_by": sorted(models)}


def fitted(
    step: SparkStep, settings: Settings, start: Calibrator, first: date, last: date
) -> tuple[Calibrator, dict[str, Any]]:
    """A `platt`, `isotonic` or `logistic` calibrator from pairs of `first` to `last` that were uniformly exposed.

    MissingInputError when none of them was scored, GateError when too few are labeled, or all of one class.
    """
    features = FEATURES if settings.kind == "logistic" else (settings.variable,)
    labeled, rows, clicks, models = labeled_rows(step, ("uniform",), features, first, last)
    if not rows:
        raise MissingInputError(
            f"step fit_calibrator: labels.calibrator.kind={settings.kind} is fitted on uniformly exposed pairs scored "
            f"from {first} to {last}, before {step.run_date}, and there are none; run score_candidates for earlier "
            f"dates, or {REMEDY}"
        )
    remedy = f"widen labels.calibrator.window_days ({settings.window_days}), or {REMEDY}"
    check_fitting_rows(rows, clicks, settings.min_rows, remedy)
    base = FittedOn("uniform", rows, clicks, first.isoformat(), last.isoformat(), clicks / rows)
    # Earlier dates were scored by the models of their time; their similarities are taken as comparable (ours).
    details: dict[str, Any] = {"source": "uniform", "rows": rows, "clicks": clicks, "scored_by": sorted(models)}
    if settings.kind == "isotonic":
        knots = tuple(fit_isotonic(labeled, settings.variable).tolist())
        calibrator = replace(start, kind="isotonic", fitted_on=base, knots=knots, features=features, weights=())
    else:
        weights = (0.0,) * len(features)
        start = replace(start, kind=settings.kind, fitted_on=base, features=features, weights=weights)
        calibrator = fit_logistic(labeled, start)
        if calibrator.weights[0] <= 0:
            rise = f"clicks do not rise with {features[0]} (weight {calibrator.weights[0]:.4f})"
            details["warning"] = f"{rise}: labels mean little"
            step.context.warn(details["warning"])
    cells = label_cells(with_label(labeled, calibrator))
    labeled.unpersist()
    on = replace(base, reliability=reliability_bins(cells), ece=band_error(cells))
    return replace(calibrator, fitted_on=on), details


def labeled_rows(
    step: SparkStep, sources: Sequence[str], features: Sequence[str], first: date, last: date
) -> tuple[DataFrame, int, int, list[str]]:
    """Persisted `labeled_pairs` of `first` to `last`, with the counts of their own dates when `features` need them.

    Also their number, that of the clicked ones, and the models that scored them.
    """
    shown = step.read_dates("impressions", first, last)
    labeled = labeled_pairs(step.read_dates("pair_scores", first, last), shown, sources)
    labeled = (counted(step, labeled, first, last) if set(features) - set(SCORES) else labeled).persist()
    sums = F.count(F.lit(1)), F.coalesce(F.sum("clicked"), F.lit(0)), F.collect_set("model_version")
    return labeled, *only_row(labeled.agg(*sums))


def counted(step: SparkStep, pairs: DataFrame, first: date, last: date) -> DataFrame:
    """`pairs` of `first` to `last` with the counts of their own dates."""
    return with_counts(pairs, *(step.read_dates(t, first, last) for t in ("user_stats", "item_stats")))


def check_rate(step: SparkStep, rate: float, before: Manifest | None) -> dict[str, Any]:
    """A warning for the manifest when the mean label moved too far since the calibrator of the date before.

    GateError instead when labels.calibrator.on_rate_change is `refuse`.
    """
    if before is None or "base_rate" not in before.metrics:
        return {}
    sentence = base_rate_change(float(before.metrics["base_rate"]), rate)
    if sentence is None:
        return {}
    if step.config.labels.calibrator.on_rate_change == "refuse":
        raise GateError(f"{sentence} (the calibrator before: {before.version})")
    step.context.warn(sentence)
    return {"rate_warning": sentence}


def run(step: SparkStep) -> None:
    """Fit the configured kind for the run date and publish it."""
    context, settings = step.context, step.config.labels.calibrator
    model = context.artifact("interest_model")
    through = context.step.trained_through(step.run_date)
    first = step.run_date - timedelta(days=settings.window_days)
    scored_by = only_row(step.read_slice("pair_scores").agg(F.min("model_version"), F.max("model_version")))
    require_one_version(
        scored_by, model.version, f"pair_scores dt={step.run_date}",
        "the interest_model in force", f"run score_requests and score_candidates for {step.run_date} again",
    )  # fmt: skip
    make = quantile if settings.kind == "quantile" else fitted
    calibrator, details = make(step, settings, unfitted(step, settings), first, through)
    before = context.artifacts.in_force_or_none("calibrator", through)
    on = calibrator.fitted_on
    details |= check_rate(step, on.base_rate, before)
    metrics: Mapping[str, Any] = {
        **details, "kind": calibrator.kind, "source": on.source, "base_rate": on.base_rate, "rows": on.rows,
        "dates": [on.first_date, on.last_date], "ece": on.ece, "uses_clicks": calibrator.uses_clicks,
    }  # fmt: skip
    with scratch_folder() as folder:
        (folder / CALIBRATOR_FILE).write_text(calibrator.to_json(), encoding="utf-8")
        lineage = {"model_version": model.version, "sid_version": model.lineage["sid_version"]}
        manifest = context.publish(folder, lineage, metrics)
    context.counts.rows_in = on.rows
    context.counts.details |= metrics
    log.info("fit_calibrator: published %s calibrator %s", calibrator.kind, manifest.version)


if __name__ == "__main__":
    job_main("fit_calibrator", run)
