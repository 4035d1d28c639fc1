"""Job: pair_scores and the calibrator in force -> pseudo_labels: what analysts query and the feed joins.

Launch: spark-submit … spark_jobs/pseudo_labels.py --config CONFIG --run-date D
"""

from pyspark.sql import DataFrame, Row
from pyspark.sql import functions as F

from gpl_core.errors import ContractError
from gpl_core.labels.calibration import Calibrator
from gpl_core.labels.confidence import weight_sql
from spark_jobs.common.calibrators import load_calibrator, require_one_version, with_counts, with_label, with_user_parts
from spark_jobs.common.columns import only_row
from spark_jobs.run import job_main
from spark_jobs.step import SparkStep


def score_facts(scores: DataFrame) -> Row:
    """One bounded aggregation over the date's scores.

    model_versions, sid_versions: the smallest and the largest, null without rows; unexposed: pairs, which are distinct,
    as a (user, item, source) occurs once; mean_weight: their mean raw weight, 0 without any.
    """
    unexposed = F.col("source") == "unexposed"
    weight = F.avg(F.when(unexposed, F.expr(weight_sql())))
    return only_row(
        scores.agg(
            *[F.array(F.min(v), F.max(v)).alias(f"{v}s") for v in ("model_version", "sid_version")],
            F.count_if(unexposed).alias("unexposed"), F.coalesce(weight, F.lit(0.0)).alias("mean_weight"),
        )
    )  # fmt: skip


def label_pairs(scores: DataFrame, calibrator: Calibrator, mean_weight: float | None) -> DataFrame:
    """`scores` (with `with_counts`) with the user's parts, pseudo_label, raw_weight and weight.

    weight = raw_weight / mean_weight, 1 for all where `mean_weight` is None. A mean of 0 (no pairs, or all weights 0)
    leaves the weights as they are: 0 stays 0.
    """
    weighted = with_label(with_user_parts(scores, calibrator), calibrator).withColumn(
        "raw_weight", F.least(F.expr(weight_sql()), F.lit(1.0))
    )
    if mean_weight is None:
        return weighted.withColumn("weight", F.lit(1.0))
    return weighted.withColumn("weight", F.col("raw_weight") / F.lit(mean_weight or 1.0))


def with_item_ids(pairs: DataFrame, items: DataFrame) -> DataFrame:
    """`pairs` with item_id by item_index; null where the item is unknown, or where two items hold one index."""
    ids = items.groupBy("item_index").agg(F.when(F.count(F.lit(1)) == 1, F.min("item_id")).alias("item_id"))
    return pairs.join(ids, "item_index", "left")


def run(step: SparkStep) -> None:
    """Label the run date's pairs and write the slice."""
    context = step.context
    manifest, model = context.artifact("calibrator"), context.artifact("interest_model")
    calibrator = load_calibrator(context.artifacts, manifest)
    scores = step.read_slice("pair_scores")
    facts = score_facts(scores)

    day, again = step.run_date, f"run fit_calibrator for {step.run_date} again"
    require_one_version(
        [manifest.lineage.get("model_version", "none")], model.version,
        f"calibrator {manifest.version}", "the interest_model in force", again,
    )  # fmt: skip
    for kind in ("model_version", "sid_version"):
        require_one_version(
            facts[f"{kind}s"], manifest.lineage[kind], f"pair_scores dt={day}",
            f"the {kind} of calibrator {manifest.version}", f"run score_candidates for {day}, then fit_calibrator",
        )  # fmt: skip

    items = step.read("items")
    item_stats = step.read_slice("item_stats") if calibrator.needs_item_counts else None
    pairs = with_counts(scores, step.read_slice("user_stats"), item_stats)
    mean_weight = facts["mean_weight"] if step.config.labels.weight == "factors" else None
    labeled = with_item_ids(label_pairs(pairs, calibrator, mean_weight), items)
    named = labeled.withColumn("calibrator_version", F.lit(manifest.version))
    contract = context.contract("pseudo_labels")
    context.counts.rows_in = step.slice_rows("pair_scores")
    details = {
        "calibrator_version": manifest.version, "model_version": model.version, "unexposed_pairs": facts["unexposed"],
        "mean_raw_weight": facts["mean_weight"], "weight": step.config.labels.weight,
    }  # fmt: skip
    context.counts.details |= details
    try:
        commit = step.write_slice("pseudo_labels", named.select(*contract.column_names), details=details)
    except Exception as error:
        # The table's NOT NULL refused the commit. Find out which item it was, only now that it went wrong.
        missing = with_item_ids(scores, items).where("item_id IS NULL").select("item_index").limit(3).collect()
        if not missing:
            raise
        raise ContractError(
            f"pair_scores dt={day}: item_index {', '.join(str(r['item_index']) for r in missing)} "
            "is missing from table items, or there twice; run ingest, score_requests and score_candidates for this "
            "date again"
        ) from error
    if commit.rows != context.counts.rows_in:
        raise ContractError(
            f"pseudo_labels dt={day}: {commit.rows} rows from {context.counts.rows_in} of pair_scores; "
            f"an item_index must occur once in item_stats dt={day}, and a user_id once in user_stats dt={day}"
        )


if __name__ == "__main__":
    job_main("pseudo_labels", run)
