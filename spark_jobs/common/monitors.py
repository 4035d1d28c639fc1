"""Monitors of a run date: measured and judged by `training_feed` before it publishes the slice.

A monitor that may refuse must run before the commit that trainers read, and that step reads most of what monitors look
at (coverage, labels, requests) anyway. The monitors' rows are written first, in a commit of their own, so that they
show what was wrong when the feed is refused.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from functools import reduce
from typing import Literal

from pyspark.sql import Column, DataFrame, Row
from pyspark.sql import functions as F

from gpl_core.conf.sections import Monitors
from spark_jobs.common.calibrators import band_error, label_band
from spark_jobs.step import SparkStep

TABLE = "monitors"
LEAST_IMPRESSIONS = 1000  # uniformly exposed ones; the calibration error of fewer says little
_ACCEPTED = ("impressions", "candidates", "interactions")


@dataclass(frozen=True)
class Measured:
    """Figures of one date, None where there was nothing to measure."""

    label_drift: float | None = None  # population stability index of the unexposed labels against the day before
    quarantine_share: float | None = None  # quarantined rows / (quarantined + accepted rows)
    anchors_per_user: float | None = None  # mean anchors of the users with unexposed pairs
    calibration_error: float | None = None  # expected one on uniformly exposed impressions
    uniform_impressions: int = 0  # how many they are
    first_labels: bool = False  # no earlier date has labels: there is no drift to measure


@dataclass(frozen=True)
class Verdict:
    """One monitor's row without run and date; see `schemas/monitors.yaml`."""

    monitor: str
    value: float | None
    threshold: float
    bound: Literal["most", "least"]
    status: Literal["ok", "warn", "fail", "unmeasured"]
    reason: str


def measure(step: SparkStep, settings: Monitors) -> Measured:
    """Figures of the run date in one bounded action; an ignored monitor costs nothing."""
    context, day = step.context, step.run_date
    parts: list[DataFrame] = []

    def part(name: str, frame: DataFrame, key: Column, rows: Column, labels: Column, clicks: Column) -> None:
        grouped = frame.groupBy(F.lit(name).alias("name"), key.cast("string").alias("key"))
        sums = [c.cast("double").alias(n) for c, n in ((rows, "rows"), (labels, "labels"), (clicks, "clicks"))]
        parts.append(grouped.agg(*sums))

    one, none = F.count(F.lit(1)), F.lit(0.0)
    if "label_drift" not in settings.ignore:
        labels = step.read_dates("pseudo_labels", day - timedelta(days=1), day).where("source = 'unexposed'")
        part("drift", labels, F.concat_ws(" ", F.col("dt"), label_band()), one, none, none)
    if "quarantine_share" not in settings.ignore and context.has("quarantine"):
        events = step.read_slice("quarantine").where("source_table NOT IN ('raw_items', 'raw_opt_outs')")
        part("quarantine", events, F.lit(""), F.sum("occurrences"), none, none)
    if "anchors_per_user" not in settings.ignore and context.has("score_requests"):
        users = step.read_slice("score_requests").where("source = 'unexposed' AND block = 0")
        anchors = F.size(F.filter("log_prob", lambda p: p > -100))
        part("anchors", users, F.lit(""), one, F.sum(anchors), none)
    if "calibration_error" not in settings.ignore and context.has("impressions"):
        shown = step.read_slice("impressions").where("is_random").select("user_id", "item_index", "clicked")
        judged = step.read_slice("pseudo_labels").where("source = 'uniform'").join(shown, ["user_id", "item_index"])
        # Decimals: a sum of doubles depends on the order in which tasks end.
        exact = F.sum(F.col("pseudo_label").cast("decimal(18,12)"))
        part("calibration", judged, label_band(), one, exact, F.sum("clicked"))
    if not parts:
        return Measured()
    found: dict[str, list[Row]] = {}  # a few label bands of two dates
    for row in reduce(DataFrame.unionByName, parts).collect():
        found.setdefault(row["name"], []).append(row)

    bands: dict[str, dict[str, float]] = {}
    for row in found.get("drift", ()):
        dt, band = row["key"].split(" ")
        bands.setdefault(dt, {})[band] = row["rows"]
    now = bands.pop(day.isoformat(), {})
    before = next(iter(bands.values()), {})
    refused = sum(r["rows"] or 0.0 for r in found.get("quarantine", ()))
    accepted = sum(step.slice_rows(t) for t in _ACCEPTED)
    asked = [r for r in found.get("anchors", ()) if r["rows"]]
    cells = [Row(**r.asDict(), band=r["key"]) for r in found.get("calibration", ())]
    return Measured(
        label_drift=stability_index(before, now) if now and before else None,
        quarantine_share=refused / (refused + accepted) if refused + accepted else None,
        anchors_per_user=asked[0]["labels"] / asked[0]["rows"] if asked else None,
        calibration_error=band_error(cells),
        uniform_impressions=int(sum(r["rows"] for r in cells)),
        first_labels=all(d >= day for d in context.snapshot("pseudo_labels").slices()),
    )


def stability_index(before: Mapping[str, float], after: Mapping[str, float]) -> float:
    """Population stability index, sum (p - q) ln(p / q), of two histograms; every cell of either gets half a row."""
    keys = sorted(before.keys() | after.keys())  # a set of strings has another order in every process
    p, q = ({k: h.get(k, 0.0) + 0.5 for k in keys} for h in (before, after))
    totals = sum(p.values()), sum(q.values())
    shares = [(p[k] / totals[0], q[k] / totals[1]) for k in keys]
    return sum((a - b) * math.log(a / b) for a, b in shares)


def judge(
    found: Measured, labeled: int, left_out: Mapping[str, int], settings: Monitors, missing: Sequence[str] = ()
) -> list[Verdict]:
    """The verdicts of all monitors that are not ignored; one under `monitors.fail` fails when it cannot be measured.

    missing: what the date lacks; the coverage of the rest is none.
    """
    unexposed = labeled + sum(left_out.values())
    coverage = labeled / unexposed if unexposed and not missing else None
    left = [f"{v:,} {k}" for k, v in sorted(left_out.items(), key=lambda r: -r[1])]
    causes = ", ".join([*missing, *left])
    few = found.uniform_impressions < LEAST_IMPRESSIONS
    # name, figure, bound, what it is, what to look at on an alarm, why there is none
    figures: list[tuple[str, float | None, Literal["most", "least"], str, str, str]] = [
        ("label_drift", found.label_drift, "most",
         "population stability index of the labels against the day before",
         "compare calibrator, target_rate and model",
         "no earlier date has labels" if found.first_labels else "this date or the day before has no labels"),
        ("coverage", coverage, "least",
         f"share of unexposed rows with a label ({causes or 'none left out'})",
         "look at view coverage and worker_rejects", causes or "there are no unexposed rows"),
        ("quarantine_share", found.quarantine_share, "most",
         "share of raw event rows refused", "look at failed_checks in table quarantine", "there are no raw rows"),
        ("anchors_per_user", found.anchors_per_user, "least",
         "mean anchors per user", "look at the interest model and at retired SIDs", "no user has unexposed pairs"),
        ("calibration_error", None if few else found.calibration_error, "most",
         f"expected calibration error on {found.uniform_impressions:,} uniformly exposed impressions",
         "look at view calibration",
         f"{found.uniform_impressions:,} uniformly exposed impressions have a label, at least {LEAST_IMPRESSIONS:,} "
         "are needed"),
    ]  # fmt: skip
    verdicts = []
    for name, value, bound, about, advice, lacking in figures:
        if name in settings.ignore:
            continue
        threshold = getattr(settings, name)
        status: Literal["ok", "warn", "fail", "unmeasured"] = "fail" if name in settings.fail else "warn"
        if value is None:
            if status == "warn" or (name == "label_drift" and found.first_labels):
                status = "unmeasured"
            reason = f"{name} could not be measured: {lacking}"
        else:
            sign = {"most": "above", "least": "below"}[bound]
            if value <= threshold if bound == "most" else value >= threshold:
                status, sign = "ok", f"at {bound}"
            reason = f"{name} {value:.4g} is {sign} {threshold:g}: {about}"
        reason += f"; {advice}" if status in ("warn", "fail") else ""
        verdicts.append(Verdict(name, value, threshold, bound, status, reason))
    return verdicts


def write(step: SparkStep, verdicts: Sequence[Verdict]) -> None:
    """Replace the date's slice of `monitors`, through delta-rs: a handful of rows."""
    context = step.context
    contract = context.contract(TABLE)
    partition = {"dt": step.run_date.isoformat()}
    with context.lake.writer(contract, partition, dims={}) as writer:
        writer.write_rows({**asdict(v), "run_id": context.run_id} for v in verdicts)
    mark = context.mark(TABLE)
    commit = context.lake.commit(
        contract, writer.parts, mark=mark, mode="overwrite", partition=partition,
        since=context.state.outputs.get(TABLE),
    )  # fmt: skip
    context.counts.outputs[TABLE] = {
        "before": commit.version_before, "after": commit.version_after, "rows": commit.rows
    }  # fmt: skip


def watch(step: SparkStep, labeled: int, left_out: Mapping[str, int], missing: Sequence[str]) -> list[str]:
    """Measure, judge and record; returns the reasons of monitors under `monitors.fail` that refuse.

    Warnings also go to the step's details.
    """
    settings = step.config.monitors
    verdicts = judge(measure(step, settings), labeled, left_out, settings, missing)
    if not verdicts:
        return []
    write(step, verdicts)
    step.context.counts.details["monitors"] = {v.monitor: {"status": v.status, "value": v.value} for v in verdicts}
    for verdict in verdicts:
        if verdict.status == "warn":
            step.context.warn(verdict.reason)
    return [v.reason for v in verdicts if v.status == "fail"]
