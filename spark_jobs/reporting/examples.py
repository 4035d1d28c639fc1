"""Report: the unexposed pairs that were labeled most and least confidently, as a person would read them."""

from collections.abc import Mapping
from typing import Any

from pyspark.sql import functions as F

from spark_jobs.common.columns import only_row
from spark_jobs.reporting.day import Day
from spark_jobs.reporting.page import PageSection, Table

_PAIRS = 10  # of each kind
_FACTORS: Mapping[str, tuple[str, str]] = {
    "coherence": ("the user's anchors point the same way", "the user's anchors scatter"),
    "consistency": ("the anchors agree with the history", "the anchors are far from the history"),
    "llm_confidence": ("the model is sure of the anchor", "the model is unsure of the anchor"),
}
"""Factor -> what a high one says, what a low one says."""
_COLUMNS = ("title", "anchor_title", "reason", "pseudo_label", "raw_weight", "similarity", "anchor_rank", *_FACTORS)


def reason(pair: Mapping[str, Any], means: Mapping[str, float], *, doubtful: bool) -> str:
    """The factor that speaks most for the pair's confidence, or against it, by its ratio to the date's mean."""
    ratios = {name: pair[name] / means[name] if means[name] else 1.0 for name in _FACTORS}
    factor = min(ratios, key=ratios.__getitem__) if doubtful else max(ratios, key=ratios.__getitem__)
    return f"{_FACTORS[factor][doubtful]} ({factor} {pair[factor]:.2f}, mean {means[factor]:.2f})"


def sections(day: Day) -> list[PageSection]:
    """Ten pairs of each kind, of as many users, without their ids."""
    title = "Confidently labeled pairs"
    explained = day.view("explained_pairs")
    if explained is None:
        return [PageSection(title, ["A table that explains pairs is missing."])]
    labels = day.slice("pseudo_labels").where("source = 'unexposed'")
    pair, order = F.struct("user_id", "item_id", "raw_weight"), F.struct("raw_weight", "item_id")
    of_user = labels.groupBy("user_id").agg(F.max_by(pair, order).alias("high"), F.min_by(pair, order).alias("low"))
    parts = [
        of_user.select(F.lit(kind == "low").alias("doubtful"), f"{kind}.*").orderBy(by, "user_id").limit(_PAIRS)
        for kind, by in (("high", F.desc("raw_weight")), ("low", F.asc("raw_weight")))
    ]
    chosen = parts[0].union(parts[1]).collect()
    if not chosen:
        return [PageSection(title, ["No unexposed pair was labeled."])]
    users, items = ({row[c] for row in chosen} for c in ("user_id", "item_id"))
    # The view is filtered by user before it is computed.
    wanted = (F.col("source") == "unexposed") & F.col("user_id").isin(users) & F.col("item_id").isin(items)
    found = {(r["user_id"], r["item_id"]): r.asDict() for r in explained.where(wanted).collect()}
    means = only_row(labels.agg(*[F.avg(name).alias(name) for name in _FACTORS])).asDict()
    tables = []
    for doubtful in (False, True):
        rows = []
        for key in chosen:
            told = found.get((key["user_id"], key["item_id"]))
            if told and key["doubtful"] == doubtful:
                told |= {"raw_weight": key["raw_weight"], "reason": reason(told, means, doubtful=doubtful)}
                rows.append([told[c] for c in _COLUMNS])
        tables.append(Table(_COLUMNS, rows))
    text = [
        "The ten pairs with the highest raw_weight, the cube root of coherence x consistency x llm_confidence, one "
        "pair a user. The anchor is the one nearest to the item among those that the model expects of the user (rank 0 "
        "the likeliest), named by an item that carries it. How high a label is, and how sure, are two things.",
        "User ids stay out of the report: the view explained_pairs has them, for those who may read it.",
    ]
    low = "The ten pairs with the lowest raw_weight, one pair a user. If they look right too, weights tell you little."
    return [PageSection(title, text, tables[:1]), PageSection("Doubtfully labeled pairs", [low], tables[1:])]
