"""Job: exposed_samples ∪ unexposed_samples ⋈ pseudo_labels -> training_feed, and its manifest.

Launch: spark-submit … spark_jobs/training_feed.py --config CONFIG --run-date D

Exposed pairs carry their click and weight 1, unexposed pairs their pseudo-label and confidence. An unexposed pair
without a label is left out and counted by reason; an exposed pair never gets a pseudo-label.
"""

from dataclasses import dataclass, replace
from typing import Self

from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F

from gpl_core.config import Config, with_passthrough
from gpl_core.errors import ContractError, GateError, counted
from spark_jobs.common.calibrators import require_one_version
from spark_jobs.common.columns import only_row, passthrough_of, sids_in_force
from spark_jobs.common.exclusions import flagged
from spark_jobs.common.histories import read_latest_sequences
from spark_jobs.common.manifests import check_compatible, ensure_manifest, schema_hash, schema_of
from spark_jobs.common.monitors import watch
from spark_jobs.run import job_main
from spark_jobs.step import SparkStep

PAIR = ["user_id", "item_index"]
FACTORS = ("coherence", "consistency", "llm_confidence")
NO_HISTORY, NO_ANCHORS, NO_EMBEDDING, OTHER = "no history", "no anchors", "no embedding", "other"
LATE, REFUSED = "labels late", "a monitor refused"
_VERSIONS = ("sid_version", "model_version", "calibrator_version")
_RECORDED = ("exposed", "random", "labeled", "left_out", "label_sum", "pseudo_label_sum", "weight_sum")


@dataclass(frozen=True)
class FeedSlice:
    """What is known about the date's pairs before anything is written."""

    exposed: int  # exposed rows, which all reach the feed
    random: int
    labeled: int  # unexposed rows that reach it
    left_out: dict[str, int]  # unexposed rows without a label, by reason
    shown: int  # unexposed rows whose user saw the item on this date: must be 0
    label_sum: float  # this and the next two over the feed's rows, of its float values
    pseudo_label_sum: float
    weight_sum: float
    versions: dict[str, tuple[str | None, ...]]  # smallest and largest of the labels, by kind; None without

    def exposed_only(self, late: bool) -> Self:
        """The slice without its unexposed rows: labels are late, or a monitor refused."""
        left_out = {LATE: sum(self.left_out.values())} if late else {**self.left_out, REFUSED: self.labeled}
        return replace(
            self, labeled=0, left_out={k: v for k, v in left_out.items() if v}, pseudo_label_sum=0.0,
            weight_sum=float(self.exposed), versions=dict.fromkeys(_VERSIONS, (None,)),
        )  # fmt: skip


def labels_of(pseudo_labels: DataFrame) -> DataFrame:
    """The labels that the feed may use: those of unexposed pairs."""
    return pseudo_labels.where(F.col("source") == "unexposed").select(
        *PAIR, F.col("pseudo_label").cast("float").alias("pseudo_label"), F.col("weight").cast("float").alias("weight"),
        *FACTORS, *_VERSIONS,
    )  # fmt: skip


def counted_pairs(unexposed: DataFrame, labels: DataFrame, exposed: DataFrame) -> DataFrame:
    """Per pair of `unexposed`: its `rows`, `labels` and times `shown`, `label` and `weight` (null without a label).

    One hash aggregation of all three: a join would sort them.
    """
    none, zero = F.lit(None).cast("double"), F.lit(0)
    counts = ("rows", "labels", "shown")

    def counted(frame: DataFrame, name: str, label: Column = none, weight: Column = none) -> DataFrame:
        ones = [F.lit(1).alias(c) if c == name else zero.alias(c) for c in counts]
        return frame.select(*PAIR, *ones, label.alias("label"), weight.alias("weight"))

    label, weight = (F.col(c).cast("double") for c in ("pseudo_label", "weight"))
    every = counted(unexposed, "rows").union(counted(labels, "labels", label, weight)).union(counted(exposed, "shown"))
    sums = [F.sum(c).alias(c) for c in (*counts, "label", "weight")]
    return every.groupBy(*PAIR).agg(*sums).where(F.col("rows") > 0)


def unlabeled_reasons(
    pairs: DataFrame, histories: DataFrame | None, asked: DataFrame | None, rejects: DataFrame | None
) -> DataFrame:
    """`pairs` (user_id, item_index, …) with the column `reason`: why the pair has no label.

    Args:
        histories: distinct user_id of users with a usable history; None when that is unknown.
        asked: distinct user_id of users whose unexposed candidates were sent to scoring; None when that is unknown.
        rejects: key of what scoring had to leave out: user_id=… or item_index=….
    """

    def rejected(kind: str) -> DataFrame | None:
        if rejects is None:
            return None
        value = F.expr(f"substring(key, {len(kind) + 2})").try_cast(pairs.schema[kind].dataType)
        return rejects.where(F.col("key").startswith(f"{kind}=")).select(value.alias(kind)).distinct()

    found = flagged(pairs, histories, "user_id", "_history", unknown=True)
    found = flagged(found, asked, "user_id", "_asked", unknown=True)
    for kind in PAIR:
        found = flagged(found, rejected(kind), kind, f"_{kind}_rejected")
    return found.withColumn(
        "reason",
        F.when(~F.col("_asked") & ~F.col("_history"), NO_HISTORY)
        .when(~F.col("_asked") | F.col("_user_id_rejected"), NO_ANCHORS)
        .when(F.col("_item_index_rejected"), NO_EMBEDDING)
        .otherwise(OTHER),
    )


def exposed_rows(exposed: DataFrame, config: Config) -> DataFrame:
    """The feed's columns (without sid, versions and shuffle key) of exposed pairs; the writer casts them."""
    zero, one, empty, yes = F.lit(0.0), F.lit(1.0), F.lit(""), F.lit(True)
    return exposed.select(
        "request_id", "item_id", "user_id", "item_index", yes.alias("is_exposed"), "is_random", yes.alias("has_label"),
        "label", zero.alias("pseudo_label"), F.col("label").alias("target"), one.alias("sample_weight"),
        one.alias("sampling_probability"), *[zero.alias(f) for f in FACTORS], empty.alias("channel"), "position",
        F.unix_micros("event_time").alias("event_time"), empty.alias("model_version"),
        empty.alias("calibrator_version"), "dt", *passthrough_of(exposed, config),
    )  # fmt: skip


def unexposed_rows(found: DataFrame, config: Config) -> DataFrame:
    """The same columns of unexposed rows with their label."""
    no = F.lit(False)
    return found.select(
        "request_id", "item_id", "user_id", "item_index", no.alias("is_exposed"), no.alias("is_random"),
        no.alias("has_label"), F.lit(0).alias("label"), "pseudo_label", F.col("pseudo_label").alias("target"),
        F.col("weight").alias("sample_weight"), "sampling_probability", *FACTORS, "channel",
        F.lit(-1).alias("position"), F.unix_micros("event_time").alias("event_time"), "model_version",
        "calibrator_version", "dt", *passthrough_of(found, config),
    )  # fmt: skip


def finish(rows: DataFrame, sids: DataFrame, sid_version: str, levels: int) -> DataFrame:
    """`rows` with SIDs, -1 where an item has none, and the key that shuffles them."""
    none = F.array_repeat(F.lit(-1), levels)
    return (
        rows.join(sids, "item_index", "left")
        .withColumn("sid", F.coalesce("sid", none))
        .withColumn("sid_version", F.lit(sid_version))
        .withColumn("dt_copy", F.col("dt").cast("string"))
        # Salted: samples were chosen by a hash of the same two columns.
        .withColumn("shuffle_key", F.xxhash64("request_id", "item_id", F.lit("training_feed")))
    )


def shuffled(rows: DataFrame, count: int, rows_per_file: int) -> DataFrame:
    """`rows` in files of about `rows_per_file`, equally large, each in the order of `shuffle_key`."""
    files = max(1, -(-count // rows_per_file))
    # dt first, although it is one value: Delta sorts by the partition column unless the rows already are.
    return rows.repartition(files, "shuffle_key").sortWithinPartitions("dt", "shuffle_key", "request_id", "item_id")


def feed_facts(
    exposed: DataFrame, unexposed: DataFrame, labels: DataFrame, reasons: dict[str, DataFrame | None]
) -> FeedSlice:
    """Bounded aggregations. Labeled pairs fall into one group; the others keep their keys, to look up why."""
    seen = exposed.agg(
        F.count(F.lit(1)).alias("exposed"), F.count_if("is_random").alias("random"),
        F.coalesce(F.sum("label"), F.lit(0)).alias("clicks"),
    )  # fmt: skip
    versions = labels.agg(*[F.array(F.min(v), F.max(v)).alias(v) for v in _VERSIONS])
    without = F.col("labels") == 0
    groups = (
        counted_pairs(unexposed, labels, exposed)
        .groupBy(*[F.when(without, F.col(c)).alias(c) for c in PAIR])
        .agg(
            F.sum(F.when(without, F.col("rows")).otherwise(0)).alias("missing"),
            # Rows that a join would give: a pair with two labels is found by their number.
            F.sum(F.col("rows") * F.col("labels")).alias("labeled"),
            F.sum(F.when(F.col("shown") > 0, F.col("rows")).otherwise(0)).alias("shown"),
            F.sum(F.col("rows") * F.col("label")).alias("labels"),
            F.sum(F.col("rows") * F.col("weight")).alias("weights"),
        )
    )
    names = (NO_HISTORY, NO_ANCHORS, NO_EMBEDDING, OTHER)
    total = unlabeled_reasons(groups, **reasons).agg(
        *[F.coalesce(F.sum(F.when(F.col("reason") == n, F.col("missing"))), F.lit(0)).alias(n) for n in names],
        *[F.coalesce(F.sum(c), F.lit(0)).alias(c) for c in ("labeled", "shown", "labels", "weights")],
    )
    row = only_row(total.crossJoin(seen).crossJoin(versions))  # one row each
    return FeedSlice(
        exposed=row["exposed"], random=row["random"], labeled=row["labeled"],
        left_out={n: row[n] for n in names if row[n]}, shown=row["shown"], label_sum=float(row["clicks"]),
        pseudo_label_sum=float(row["labels"]), weight_sum=float(row["weights"]) + row["exposed"],
        versions={v: tuple(row[v]) for v in _VERSIONS},
    )  # fmt: skip


def reason_tables(step: SparkStep, sid_version: str) -> dict[str, DataFrame | None]:
    """What `unlabeled_reasons` looks up, None where the table does not exist."""
    histories = asked = rejects = None
    if step.context.has("user_sequences"):
        histories = read_latest_sequences(step)
    if step.context.has("score_requests"):
        asked = step.read_slice("score_requests").where(F.col("source") == "unexposed").select("user_id").distinct()
    if step.context.has("worker_rejects"):
        rejects = step.read_slice("worker_rejects").where(F.col("step") == "score_candidates")
    return {"histories": histories, "asked": asked, "rejects": rejects}


def check_facts(facts: FeedSlice, step: SparkStep, sid_version: str, rows_in: int) -> None:
    """Refuse what must not reach a trainer, before anything is written.

    LineageError: labels of another tokenizer, or of more than one model or calibrator. ContractError: an exposed pair
    among the unexposed ones, or a pair with two labels.
    """
    day = step.run_date
    what, again = f"pseudo_labels dt={day}", f"run score_candidates, fit_calibrator and pseudo_labels for {day} again"
    require_one_version(facts.versions["sid_version"], sid_version, what, "the tokenizer in force", again)
    for kind in ("model_version", "calibrator_version"):
        found = facts.versions[kind]
        require_one_version(found, found[0] or "", what, f"the {kind} of other rows of this date", again)
    if facts.shown:
        raise ContractError(
            f"unexposed_samples dt={day}: {counted(facts.shown, 'row')} of pairs that are in exposed_samples of the "
            f"same date; run samples for {day} again"
        )
    total = facts.exposed + facts.labeled + sum(facts.left_out.values())
    if total != rows_in:
        raise ContractError(
            f"training_feed dt={day}: {rows_in} rows came in, {total} would go out or be left out; a pair must occur "
            f"once among the unexposed rows of pseudo_labels: run pseudo_labels for {day} again"
        )


def run(step: SparkStep) -> None:
    """Build the run date's feed and its manifest."""
    context, config, day = step.context, step.config, step.run_date
    sid_version = context.artifact("tokenizer").version
    contract = with_passthrough("training_feed", config)
    check_compatible(context.lake, contract)
    exposed, unexposed = step.read_slice("exposed_samples"), step.read_slice("unexposed_samples")
    late = not context.has("pseudo_labels")  # by feed.publish the slice need not be there
    labels = labels_of(step.empty("pseudo_labels") if late else step.read_slice("pseudo_labels"))
    facts = feed_facts(exposed, unexposed, labels, reason_tables(step, sid_version))
    context.counts.rows_in = step.slice_rows("exposed_samples") + step.slice_rows("unexposed_samples")
    check_facts(facts, step, sid_version, context.counts.rows_in)
    rows, missing = exposed_rows(exposed, config), _missing(step, facts)
    if (because := _held_back(step, facts, late, missing)) is None:
        rows = rows.unionByName(unexposed_rows(unexposed.join(labels, PAIR), config))
        kind = "incomplete" if missing else "complete"
    else:
        facts, kind = facts.exposed_only(late), "exposed_only"
        context.warn(f"only exposed rows are published: {because}")
    completeness = {"rows": kind, "because": "; ".join([*missing, *([because] if because else [])])}
    sids = sids_in_force(step.read("item_sids"), sid_version)
    count = facts.exposed + facts.labeled
    feed = shuffled(finish(rows, sids, sid_version, config.tokenizer.levels), count, config.feed.rows_per_file)
    details = {
        "rows": count, **{name: getattr(facts, name) for name in _RECORDED}, "completeness": completeness,
        "uniform_share": facts.random / facts.exposed if facts.exposed else 0.0,
        "monitors": context.counts.details.get("monitors", {}), "calibrator": _calibrator(step, facts),
        "schema": schema_of(contract), "schema_hash": schema_hash(contract), "contract_version": contract.version,
        "versions": {**{kind: found[0] or "" for kind, found in facts.versions.items()}, "sid_version": sid_version},
    }  # fmt: skip
    commit = step.write_slice("training_feed", feed, contract=contract, details=details)
    if commit.rows != count:
        raise ContractError(f"training_feed dt={day}: {commit.rows} rows were written, {count} were expected")
    context.counts.rows_dropped = sum(facts.left_out.values())
    context.counts.details |= details
    ensure_manifest(context.lake, day, contract)


def _calibrator(step: SparkStep, facts: FeedSlice) -> dict[str, str]:
    """Kind of the calibrator behind the labels, and the pairs it was fitted on; empty without labels."""
    version = facts.versions["calibrator_version"][0]
    made = step.context.artifacts.find("calibrator", version) if version else None
    return {name: str(made.metrics.get(name, "")) for name in ("kind", "source")} if made else {}


def _missing(step: SparkStep, facts: FeedSlice) -> list[str]:
    """The raw tables of which no row of the date has reached the graph, also as warnings in the step's details."""
    rows = {"impressions": facts.exposed, "candidates": facts.labeled + sum(facts.left_out.values())}
    missing = [f"raw_{t} has no usable row of {step.run_date}" for t, n in rows.items() if not n + step.slice_rows(t)]
    for text in missing:
        step.context.warn(text)
    return missing


def _held_back(step: SparkStep, facts: FeedSlice, late: bool, missing: list[str]) -> str | None:
    """Why only exposed rows are published; None when the unexposed ones are too.

    GateError when a monitor refuses, and by `feed.publish` the slice is then held back.
    """
    day = step.run_date
    if late:
        return f"pseudo_labels has no slice dt={day} that stands"  # none, or one that its own run refused
    refused = watch(step, facts.labeled, facts.left_out, missing)
    if refused and step.config.feed.publish == "complete":
        raise GateError(
            f"training_feed dt={day}: not published, {counted(len(refused), 'monitor')} refused it: "
            f"{'; '.join(refused)}. The figures are in table monitors; correct the cause, or change the "
            "configuration's section monitors"
        )
    return "; ".join(refused) or None


if __name__ == "__main__":
    job_main("training_feed", run)
