"""Report: which rows became labels, which were refused or left out, and what the monitors said."""

from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from spark_jobs.common.calibrators import load_calibrator
from spark_jobs.reporting.day_tables import Day
from spark_jobs.reporting.page import DICTIONARY, PageSection, Table, link

FUNNEL = (
    ("impressions", "exposures accepted"),
    ("candidates", "recalled pairs accepted"),
    ("interactions", "positive events of the day"),
    ("exposed_samples", "exposed pairs"),
    ("unexposed_samples", "sampled unexposed pairs"),
    ("anchor_requests", "users whose anchors were missing"),
    ("score_requests", "blocks of candidates sent to scoring"),
    ("pair_scores", "distinct pairs scored, all sources"),
    ("pseudo_labels", "distinct pairs labeled, all sources"),
    ("training_feed", "rows of the training feed"),
)
_MOST_ROWS = 50


def funnel(day: Day) -> PageSection:
    """Rows of each table, the share of unexposed rows with a label, and why the others have none."""
    rows = [(link(f"{DICTIONARY}#{name}", name), what, day.rows(name, day.date)) for name, what in FUNNEL]
    table = Table(("table", "what", "rows"), rows)
    left_out: dict[str, int] = day.manifest.get("left_out", {})
    labeled = day.manifest.get("labeled", 0)
    unexposed = labeled + sum(left_out.values())
    text = "There are no unexposed rows on this date: the feed holds exposed pairs only."
    if unexposed:
        text = f"{labeled:,} of {unexposed:,} unexposed rows have a pseudo-label ({labeled / unexposed:.1%})."
    reasons = Table(("left out of the feed because of", "rows"), sorted(left_out.items(), key=lambda r: -r[1]))
    because = day.manifest.get("completeness", {}).get("because")
    tables = [table, *([reasons] if left_out else [])]
    return PageSection("From rows to labels", [text], tables, warnings=[f"not complete: {because}"] if because else [],
                       told_by="training_feed")  # fmt: skip


def quarantine(day: Day) -> PageSection:
    """Rows refused by source table and failed check, with one example message each."""
    checks = day.step.read_slice("quarantine").select(
        "source_table", "occurrences", F.explode("failed_checks").alias("check")
    )
    by_check = checks.groupBy("source_table", F.col("check.name").alias("name")).agg(
        F.sum("occurrences").alias("rows"), F.count(F.lit(1)).alias("distinct_rows"),
        F.min("check.message").alias("example"),
    )  # fmt: skip
    found = _listed(by_check)
    return PageSection("Quarantine", [] if found else ["No row of this date was refused."], found)


def monitors(day: Day) -> PageSection:
    """The monitors' figures; those beyond their bounds are warnings."""
    columns = ("monitor", "status", "value", "threshold", "reason")
    found = sorted(day.records("monitors", day.date), key=lambda r: r["monitor"])
    if not found:
        return PageSection("Monitors", ["No monitor looked at this date."])
    warnings = [r["reason"] for r in found if r["status"] in ("warn", "fail")]
    return PageSection("Monitors", tables=[Table(columns, [[r[c] for c in columns] for r in found])], warnings=warnings,
                       told_by="training_feed")  # fmt: skip


def trainers(day: Day) -> PageSection:
    """What a trainer wants to know before it takes the date's feed, and how it refuses a bad one."""
    manifest = day.context.artifact("calibrator")
    calibrator = load_calibrator(day.context.artifacts, manifest)
    alarms = [r["monitor"] for r in day.records("monitors", day.date) if r["status"] in ("warn", "fail")]
    shown, uniform = day.manifest.get("exposed", 0), day.manifest.get("random", 0)
    rows = [
        ("rows", day.manifest.get("completeness", {}).get("rows", "–")),
        ("alarms of monitors", ", ".join(sorted(alarms)) or "none"),
        ("calibrator", calibrator.kind),
        ("its mean label is from", manifest.metrics.get("target_rate_from", "the pairs it was fitted on")),
        ("it was fitted on", f"{calibrator.fitted_on.source} pairs"),
        ("uniformly exposed", f"{uniform:,} of {shown:,} exposed rows ({uniform / shown if shown else 0:.2%})"),
    ]
    text = (
        "The feed's manifest says the same to programs. A trainer that would rather keep yesterday's model than learn "
        f'from a day with alarms needs two lines of Python: feed = gpl.open_lakehouse(CONFIG).feed("{day.date}"), and '
        "feed.refuse_alarms()."
    )
    return PageSection("Before you train on it", [text], [Table(("what", "this date"), rows)])


def channels(day: Day) -> PageSection:
    """Unexposed rows of the feed by recall channel."""
    by_channel = day.step.read_slice("training_feed").where(~F.col("is_exposed")).groupBy("channel")
    means = by_channel.agg(
        F.count(F.lit(1)).alias("rows"), F.avg("pseudo_label").alias("mean_label"),
        F.avg("sample_weight").alias("mean_weight"), F.avg("sampling_probability").alias("mean_probability"),
    )  # fmt: skip
    return PageSection("Unexposed rows by recall channel", tables=_listed(means))


def _listed(frame: DataFrame) -> list[Table]:
    """`frame` as a table, most rows first; no table without rows."""
    found = frame.orderBy(F.desc("rows"), *frame.columns[:2]).limit(_MOST_ROWS).collect()
    return [Table(frame.columns, [tuple(r) for r in found])] if found else []
