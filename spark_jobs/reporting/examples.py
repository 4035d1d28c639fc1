"""Report: examples of high labels with strong and with weak evidence, in readable form."""

from collections.abc import Mapping
from typing import Any

from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from spark_jobs.common.columns import only_row
from spark_jobs.reporting.day_tables import Day
from spark_jobs.reporting.page import PageSection, Table

_PAIRS = 10  # of each kind
_TOP = 0.9  # only labels above this quantile are shown: nobody asks for the evidence behind a low label
_EVIDENCE: Mapping[str, tuple[str, str]] = {
    "similarity": ("it is near the anchor", "it is far from every anchor"),
    "history_similarity": ("it is like an item of the history", "it is unlike every item of the history"),
    "coherence": ("the user's anchors point the same way", "the user's anchors scatter"),
    "consistency": ("the anchors agree with the history", "the anchors are far from the history"),
    "llm_confidence": ("the model is sure of the anchor", "the model is unsure of the anchor"),
}
"""Stored score or factor -> what a high one says, what a low one says."""
_COLUMNS = ("title", "anchor_title", "reason", "pseudo_label", "user_spread", "user_rank", "user_rate", "similarity")


def reason(pair: Mapping[str, Any], usual: Mapping[str, float], *, doubtful: bool) -> str:
    """The two things that speak most for the pair, or against it, by standard deviations from the date's mean.

    usual: mean and standard deviation of each score, as `NAME` and `NAME_deviation`.
    """
    far = {name: (pair[name] - usual[name]) / (usual[f"{name}_deviation"] or 1.0) for name in _EVIDENCE}
    most = sorted(far, key=far.__getitem__, reverse=not doubtful)[:2]
    return ", ".join(f"{_EVIDENCE[n][doubtful]} ({n} {pair[n]:.2f}, mean {usual[n]:.2f})" for n in most)


def best_pairs(labels: DataFrame, most: int = _PAIRS) -> DataFrame:
    """The highest label of each of the `most` users of largest user_spread, then of least, which are `doubtful`."""
    best = F.max_by(F.struct("item_id", "user_spread"), F.struct("pseudo_label", "item_id")).alias("best")
    of_user = labels.groupBy("user_id").agg(best)
    best_of = of_user.select("user_id", "best.*")
    sure = best_of.orderBy(F.desc("user_spread"), "user_id").limit(most)
    others = best_of.join(sure, "user_id", "left_anti")  # of few users none is both
    unsure = others.orderBy(F.asc("user_spread"), "user_id").limit(most)
    return sure.withColumn("doubtful", F.lit(False)).union(unsure.withColumn("doubtful", F.lit(True)))


def sections(day: Day) -> list[PageSection]:
    """Ten pairs of each kind, of as many users, without their ids."""
    title = "Confidently labeled pairs"
    explained = day.view("explained_pairs")
    if explained is None:
        return [PageSection(title, ["A table that explains pairs is missing."])]
    labels = day.step.read_slice("pseudo_labels").where("source = 'unexposed'")
    sums = [f(name).alias(name + end) for name in _EVIDENCE for f, end in ((F.avg, ""), (F.stddev_pop, "_deviation"))]
    usual = only_row(labels.agg(F.percentile_approx("pseudo_label", _TOP).alias("top"), *sums)).asDict()
    if usual["top"] is None:
        return [PageSection(title, ["No unexposed pair was labeled."])]
    chosen = best_pairs(labels.where(F.col("pseudo_label") >= F.lit(usual["top"]))).collect()
    users, items = ({row[c] for row in chosen} for c in ("user_id", "item_id"))
    # The view is filtered by user before it is computed.
    wanted = (F.col("source") == "unexposed") & F.col("user_id").isin(users) & F.col("item_id").isin(items)
    found = {(r["user_id"], r["item_id"]): r.asDict() for r in explained.where(wanted).collect()}
    tables = []
    for doubtful in (False, True):
        rows = []
        for key in chosen:
            pair = found.get((key["user_id"], key["item_id"]))
            if pair and key["doubtful"] == doubtful:
                told = {**pair, "user_spread": key["user_spread"], "reason": reason(pair, usual, doubtful=doubtful)}
                rows.append([told[c] for c in _COLUMNS])
        tables.append(Table(_COLUMNS, rows))
    text = [
        "Of the highest tenth of the date's labels: the best pair of each of the ten users whose candidates the score "
        "tells apart most (user_spread, the standard deviation of the score over a user's pairs).",
        "The anchor is the one nearest to the item among those that the model expects of the user, named by an item "
        "that carries it; the reasons are what stands out most among the date's pairs. User ids stay out of the "
        "report: the view explained_pairs has them, for those who may read it.",
    ]
    low = (
        "From the same tenth, the ten users whose candidates the score tells apart least: there a high label comes "
        "from how often the user clicks, or from chance, more than from the item."
    )
    return [PageSection(title, text, tables[:1]), PageSection("Doubtfully labeled pairs", [low], tables[1:])]
