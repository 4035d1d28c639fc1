"""Job: one self-contained HTML page per run date, from aggregates alone.

Launch: spark-submit … spark_jobs/report.py --config CONFIG --run-date D
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from datetime import date, timedelta
from typing import Any

from markupsafe import Markup
from pyspark.sql import functions as F

from gpl_core.contracts.contract import all_contracts
from gpl_core.graph.steps import STEPS
from gpl_core.labels.calibration import Calibrator
from gpl_core.lakehouse.artifacts import KINDS
from gpl_core.lakehouse.files import rows_in
from gpl_core.lakehouse.views import all_views
from gpl_core.simulation.tables import provenance
from spark_jobs.common.calibrators import load_calibrator
from spark_jobs.common.columns import sids_in_force, with_passthrough
from spark_jobs.common.manifests import ensure_manifest
from spark_jobs.common.whole_files import write_whole
from spark_jobs.reporting import data as data
from spark_jobs.reporting import plots as plots
from spark_jobs.reporting.changes import changes, feed_figures, warnings
from spark_jobs.reporting.lineage import draw, inputs_of, nodes
from spark_jobs.reporting.page import Plot, Section, Table, render
from spark_jobs.session import SparkStep, job_main

log = logging.getLogger("gpl")

FUNNEL = (
    ("impressions", "exposures accepted"),
    ("candidates", "recalled pairs accepted"),
    ("interactions", "positive events of the day"),
    ("exposed_samples", "exposed pairs"),
    ("unexposed_samples", "sampled unexposed pairs"),
    ("anchor_requests", "users whose anchors were missing"),
    ("score_requests", "blocks of candidates sent to scoring"),
    ("pair_scores", "distinct pairs scored, all sources"),
    ("pseudo_labels", "distinct pairs labelled, all sources"),
    ("training_feed", "rows of the training feed"),
)


RUNS = 20
"""Runs of assign_sids that are listed."""
SLICES = 40
"""Slices whose calibration is listed."""


class Page:
    """Collects the sections of one date's report."""

    def __init__(self, step: SparkStep):
        self.step = step
        self.context = step.context
        self.day = step.run_date
        self.warnings: list[str] = []
        self.feeds = self._feeds()
        self.manifest = self.feeds.get(self.day, {})
        steps = [s.name for s in STEPS if not s.writes_page]
        self.step_runs = data.step_runs(step.read("job_runs"), self.day, steps) if self.context.has("job_runs") else []

    # ---- reading -----------------------------------------------------------------------------------------------

    def _feeds(self) -> dict[date, Mapping[str, Any]]:
        """Run date -> details of the newest commit of its slice of the feed."""
        marks = [m for _, m in self.context.snapshot("training_feed").marks() if m.step == "training_feed"]
        return {date.fromisoformat(d): m.details for m in reversed(marks) for d in m.slices}

    def rows(self, table: str, day: date) -> int | None:
        """Rows of one slice by the table's log; None when there is no such table or slice."""
        if not self.context.has(table):
            return None
        snapshot = self.context.snapshot(table)
        files = snapshot.select(start=day, end=day)
        if not files and snapshot.mark(day.isoformat()) is None:
            return None
        return rows_in(files)

    def slice(self, table: str) -> Any:
        """The date's slice as a DataFrame, empty when the (optional) table does not exist."""
        return self.step.read_slice(table) if self.context.has(table) else self.step.empty(table)

    # ---- sections ----------------------------------------------------------------------------------------------

    def funnel(self) -> Section:
        table = Table(("table", "what", "rows"), [(name, what, self.rows(name, self.day)) for name, what in FUNNEL])
        left_out: dict[str, int] = self.manifest.get("left_out", {})
        text = []
        unexposed = self.manifest.get("labelled", 0) + sum(left_out.values())
        if unexposed:
            share = self.manifest["labelled"] / unexposed
            text.append(
                f"{self.manifest['labelled']:,} of {unexposed:,} unexposed rows have a pseudo-label ({share:.1%})."
            )
        else:
            text.append("There are no unexposed rows on this date: the feed holds exposed pairs only.")
        reasons = Table(("left out of the feed because of", "rows"), sorted(left_out.items(), key=lambda r: -r[1]))
        return Section("From rows to labels", text, [table, *([reasons] if left_out else [])])

    def quarantine(self) -> Section:
        found = data.quarantine_reasons(self.slice("quarantine"))
        if not found:
            return Section("Quarantine", ["No row of this date was refused."])
        columns = ("source_table", "name", "rows", "distinct_rows", "example")
        return Section("Quarantine", [], [Table(columns, [[r[c] for c in columns] for r in found])])

    def labels(self, calibrator: Calibrator, found: data.Distributions) -> Section:
        rows = [
            (source, found.rows[source], *(found.means[(source, c)] for c in data.AXES))
            for source in ("unexposed", "exposed", "uniform")
            if source in found.rows
        ]
        fitted = calibrator.fitted_on
        text = [
            f"Calibrator of kind {calibrator.kind}, aimed at a mean label of {fitted.base_rate:.4g} "
            f"({fitted.source}: {fitted.rows:,} rows, {fitted.first_date} to {fitted.last_date}).",
        ]
        if not calibrator.content_only:
            text.append("It also sees click counts of items and users: these labels are not content-only.")
        about = self.context.artifact("calibrator").metrics
        self.warnings += [str(about[k]) for k in ("rate_warning", "warning") if k in about]
        if fitted.source == "exposed":
            self.warnings.append("The calibrator was fitted on exposed clicks: the labels repeat exposure bias.")
        if "unexposed" not in found.rows:
            return Section(
                "Labels and weights",
                [*text, "No unexposed pair was labelled."],
                [Table(("source", "pairs", *data.AXES), rows)] if rows else [],
            )
        panels = [(c, found.histograms[("unexposed", c)], data.AXES[c]) for c in data.AXES]
        svg = [
            plots.histograms("labels", "Labels and weights of unexposed pairs", panels[:3]),
            plots.histograms("factors", "Similarity and confidence factors of unexposed pairs", panels[3:]),
            plots.heat_maps(
                "heats", "Factors against each other",
                [(x, y, found.heats[(x, y)], (*data.AXES[x], *data.AXES[y])) for x, y in data.HEATS],
            ),
        ]  # fmt: skip
        captions = (
            "Pseudo-label, scaled weight (those above 4 in the last cell) and raw weight of the unexposed pairs.",
            "Similarity to the nearest anchor, and the three confidence factors.",
            "Where the unexposed pairs lie; brighter cells hold more of them (logarithmic).",
        )
        return Section(
            "Labels and weights", text, [Table(("source", "pairs", *data.AXES), rows)],
            [Plot(Markup(s), c) for s, c in zip(svg, captions, strict=True)],
        )  # fmt: skip

    def monitors(self) -> Section:
        columns = ("monitor", "status", "value", "threshold", "reason")
        # A handful of rows, one per monitor.
        found = self.slice("monitors").select(*columns).orderBy("monitor").collect()
        self.warnings += [r["reason"] for r in found if r["status"] in ("warn", "fail")]
        if not found:
            return Section("Monitors", ["No monitor looked at this date."])
        return Section("Monitors", [], [Table(columns, [list(r) for r in found])])

    def calibration(self) -> Section:
        found = data.calibrations(self.slice("pseudo_labels"), self.slice("impressions"))
        if not found:
            return Section("Are the labels right?", ["No labelled pair of this date was exposed: nothing to judge by."])
        text = [
            f"{c.source}: {c.rows:,} scored impressions, {c.clicks:,} clicks, expected calibration error {c.error:.4f}."
            for c in found
        ]
        if any(c.source == "uniform" for c in found):
            text.append(data.weight_sentence(next(c for c in found if c.source == "uniform")))
        else:
            text.append(
                "There is no uniformly exposed slice: exposed clicks are biased, read the curve with that in mind."
            )
        rows = [(c.source, b.rows, b.mean_label, b.click_rate) for c in found for b in c.bins]
        curves = [(c.source, [b.mean_label for b in c.bins], [b.click_rate for b in c.bins]) for c in found]
        drawn = [
            Plot(
                Markup(plots.reliability("reliability", "Reliability of the labels", curves)),
                "Groups of about equal size by label. On the dotted line a label is the click rate.",
            )
        ]
        judged = found[0].by_weight
        if len(judged) > 1:
            svg = plots.weight_error(
                "weights", "Error by weight", [b.mean_weight for b in judged], [b.squared_error for b in judged],
                [b.calibration_error for b in judged],
            )  # fmt: skip
            drawn.append(Plot(Markup(svg), f"Error of the label by raw weight, {found[0].source} pairs."))
        tables = [Table(("source", "rows", "mean label", "click rate"), rows), *self._calibration_slices()]
        return Section("Are the labels right?", text, tables, drawn)

    def _calibration_slices(self) -> list[Table]:
        """The view of that name on this date; of many categories those with most impressions."""
        view = all_views()["calibration_slices"]
        if not all(self.context.has(name) for name in view.reads):
            return []
        for name in view.reads:
            frame = self.step.read(name) if name == "items" else self.slice(name)
            frame.createOrReplaceTempView(name)
        columns = ("source", "slice", "value", "impressions", "mean_label", "click_rate", "calibration_error")
        found = self.step.spark.sql(view.sql).orderBy(F.desc("impressions"), *columns[:3]).limit(SLICES).collect()
        return [Table(columns, [[r[c] for c in columns] for r in sorted(found)])] if found else []

    def channels(self) -> Section:
        columns = ("channel", "rows", "mean_label", "mean_weight", "mean_probability")
        found = data.channels(self.slice("training_feed"))
        return Section(
            "Unexposed rows by recall channel",
            [],
            [Table(columns, [[r[c] for c in columns] for r in found])] if found else [],
        )

    def sids(self) -> list[Section]:
        title = "Semantic IDs"
        version = self.manifest.get("versions", {}).get("sid_version", "")
        if not self.context.has("item_sids"):
            return [Section(title, ["No item has a semantic ID."])]
        table = self.step.read("item_sids")
        live = sids_in_force(table, version)
        found = data.sid_health(live)
        if found is None:
            return [Section(title, ["No item has a semantic ID."])]
        tokenizer = self.context.artifacts.find("tokenizer", version)
        size = tokenizer.metrics.get("codes") if tokenizer else None
        rows = [(i + 1, u, size, p) for i, (u, p) in enumerate(zip(found.used, found.perplexity, strict=True))]
        text = [
            f"{found.items:,} items have one under {version}, {found.distinct:,} distinct; "
            f"{found.sharing / found.items:.1%} of the items share theirs."
        ]
        usage = Plot(
            Markup(plots.code_usage("usage", "Code usage per level", found.usage)),
            "Items per code, the most used codes first. On the dotted line all codes are used alike.",
        )
        health = Section(title, text, [Table(("level", "codes in use", "codes", "perplexity"), rows)], [usage])
        return [health, *self._sid_meaning(live), self._sid_versions(table)]

    def _sid_meaning(self, live: Any) -> list[Section]:
        if not self.context.has("items"):
            return []
        shared, prefixes = data.buckets(live, self.step.read("items"))
        largest = Section(
            "Semantic IDs that most items share",
            ["Items of one content share theirs on purpose."] if shared else ["No two items share one."],
            [_buckets("semantic ID", shared)] if shared else [],
        )
        return [
            largest,
            Section(
                "What codes mean", ["Titles of one row should belong together, those of two codes more closely."],
                [_buckets("first codes", prefixes)],
            ),
        ]  # fmt: skip

    def _sid_versions(self, table: Any) -> Section:
        """Versions with their items, and the newest runs that issued SIDs with what they said of drift."""
        known = {m.version: m for m in self.context.artifacts.manifests("tokenizer")}
        versions = []
        for found in data.sid_versions(table):
            made = known.get(found.version)
            metrics = made.metrics if made else {}
            trained = made.trained_through.isoformat() if made else None
            versions.append(
                (found.version, trained, metrics.get("codes"), metrics.get("reconstruction"),
                 metrics.get("collision_share"), found.in_force, found.retired, found.reissued)
            )  # fmt: skip
        runs = []
        marks = [(v, m) for v, m in self.context.snapshot("item_sids").marks() if m.step == "assign_sids"]
        for version, mark in marks[:RUNS]:
            told = mark.details
            drift = told.get("drift") or {}
            runs.append(
                (version, told.get("sid_version"), told.get("issued"), told.get("reissued"), drift.get("residual"),
                 drift.get("perplexity"), told.get("warning", ""))
            )  # fmt: skip
        if marks and marks[0][1].details.get("warning"):
            self.warnings.append(f"Semantic IDs: {marks[0][1].details['warning']}.")
        columns = ("version", "trained through", "codes", "reconstruction cosine", "collisions before repair",
                   "items", "retired", "issued again")  # fmt: skip
        drifts = ("table version", "semantic-ID version", "issued", "issued again", "residual ratio",
                  "perplexity ratio", "said")  # fmt: skip
        return Section(
            "Versions of semantic IDs",
            [
                "Versions live side by side until all consumers have moved. "
                "Ratios compare new items with published ones."
            ],
            [Table(columns, versions), *([Table(drifts, runs)] if runs else [])],
        )

    def popularity(self) -> Section:
        share = self.step.config.interest.keep_target_share
        bands = data.popularity(self.slice("item_stats"), share)
        title = "Popularity of positives"
        if not bands:
            return Section(title, ["No positive event lies in the window before this date."])
        total, kept = sum(b.positives for b in bands), sum(b.kept for b in bands)
        labels = [f"{b.low}" if b.low == b.high else f"{b.low}-{b.high}" for b in bands]
        svg = plots.popularity(
            "popularity", title, labels, [b.positives / total for b in bands], [b.kept / kept for b in bands]
        )
        rows = [(n, b.items, b.positives, 1 - b.kept / b.positives) for n, b in zip(labels, bands, strict=True)]
        return Section(
            title, [f"Down-sampling keeps {share:.0%} of the positives as targets; the context keeps all of them."],
            [Table(("positives of the item", "items", "positives", "share removed"), rows)],
            [Plot(Markup(svg), "Share of positives by how popular the item is, before and after down-sampling.")],
        )  # fmt: skip

    def evaluations(self) -> Section:
        title = "Pre-ranker, judged on the day after"
        snapshot = self.context.snapshot("evaluations")
        # One row per variant, seed, slice and metric: small however large the feed is.
        found = snapshot.read(snapshot.select(start=self.day, end=self.day)).to_pylist()
        if not found:
            return Section(title, ["Nothing was judged: the day after has no impressions yet."])
        text = ["In brackets the 95 % interval, the mean over seeds where there are several; read HR and NDCG together "
                "with the candidate-set size."]  # fmt: skip
        return Section(title, text, [compare(found)])

    def figures(self, day: date) -> dict[str, Any]:
        """What the run of `day` recorded: name -> rows, share, mean or version; None where it did not."""
        details = self.feeds.get(day, {})
        monitors = self.context.snapshot("monitors") if self.context.has("monitors") else None
        watched = (
            monitors.read(monitors.select(start=day, end=day), ["monitor", "value"]).to_pylist() if monitors else []
        )
        versions = details.get("versions", {})
        return {
            **{name: self.rows(name, day) for name, _ in FUNNEL},
            **feed_figures(details),
            "quarantine_share": next((r["value"] for r in watched if r["monitor"] == "quarantine_share"), None),
            "encoder_version": self.encoder_version(versions.get("sid_version", "")),
            **{kind: versions.get(kind) for kind in ("sid_version", "model_version", "calibrator_version")},
            "preranker_version": self.preranker_version(day),
        }

    def encoder_version(self, sid_version: str) -> str | None:
        """The encoder below a tokeniser."""
        tokenizer = self.context.artifacts.find("tokenizer", sid_version) if sid_version else None
        return tokenizer.lineage.get("encoder_version") if tokenizer else None

    def preranker_version(self, day: date) -> str | None:
        """The pre-ranker trained on the feed of `day`."""
        found = self.context.artifacts.in_force_or_none("preranker", day + timedelta(days=1))
        return found.version if found and found.trained_through == day else None

    def changes(self) -> Section:
        previous = max((d for d in self.feeds if d < self.day), default=None)
        now, before = self.figures(self.day), self.figures(previous) if previous else {}
        found = warnings(now, before)
        self.warnings += found
        return changes(now, before, found, self.day, previous)

    def lineage(self) -> Section:
        # The pre-ranker of D has seen D: all others only what lies before it.
        limits = {kind: self.day + timedelta(days=kind == "preranker") for kind in KINDS}
        made = [a for k, limit in limits.items() if (a := self.context.artifacts.in_force_or_none(k, limit))]
        used = self.figures(self.day)
        self.warnings += [
            f"{a.kind} {a.version} was built on {key} {version}, the feed of this date on {used[key]}."
            for a in made for key, version in sorted(a.lineage.items())
            if used.get(key) and used[key] not in version.split(",")  # a pre-ranker may be built on several days' feeds
        ]  # fmt: skip
        built_on = [(a.kind, a.version, a.trained_through.isoformat(), _listed(a.lineage)) for a in made]
        known = {"encoder_version": used["encoder_version"], "preranker": used["preranker_version"]}
        graph = nodes(self.step_runs, {k: v for k, v in known.items() if v})
        read = [(r["step"], _listed(inputs_of(r))) for r in self.step_runs]
        caption = (
            "What each step made, in the versions that this date's steps read (@: of a table). A step may read from "
            "all that stands above it along the arrows."
        )
        return Section(
            "Versions and lineage", [],
            [Table(("artifact", "version", "trained through", "built on"), built_on), Table(("step", "read"), read)],
            [Plot(draw(graph), caption)] if graph else [],
        )  # fmt: skip

    def runs(self) -> Section:
        columns = (
            "step", "status", "attempts", "seconds", "rows_in", "rows_out", "rows_quarantined", "rows_dropped",
            "bytes_out",
        )  # fmt: skip
        return Section("Runs", [], [Table(columns, [[r[c] for c in columns] for r in self.step_runs])])


def _listed(versions: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in sorted(versions.items()))


def _buckets(what: str, found: Sequence[data.Bucket]) -> Table:
    rows = [("-".join(map(str, b.prefix)), b.items, " | ".join(b.titles)) for b in found]
    return Table((what, "items", "titles of some"), rows)


def compare(evaluations: Sequence[dict[str, Any]]) -> Table:
    """One row per slice and metric, models side by side; an undefined figure shows its reason."""
    models = sorted({r["model"] for r in evaluations})
    groups: dict[tuple[str, str], dict[str, list[dict[str, Any]]]] = {}
    for row in evaluations:
        groups.setdefault((row["slice"], row["metric"]), {}).setdefault(row["model"], []).append(row)
    rows = []
    for (part, metric), by_model in sorted(groups.items()):
        one = next(iter(by_model.values()))[0]
        cells = [_figures(by_model.get(m, [])) for m in models]
        # An absent figure tells its own reason.
        note = next((r["note"] for each in by_model.values() for r in each if r["value"] is not None), "")
        rows.append((part, metric, *cells, one["candidate_set_size"], one["rows"], note))
    return Table(("slice", "metric", *models, "candidate-set size", "pairs", "note"), rows)


def _figures(rows: Sequence[dict[str, Any]]) -> str:
    known = [r for r in rows if r["value"] is not None]
    if not known:
        return f"absent: {rows[0]['note']}" if rows else "absent: not measured"

    def mean(name: str) -> float | None:
        values = [r[name] for r in known]
        return None if None in values else sum(values) / len(values)

    low, high = mean("low"), mean("high")
    interval = "" if low is None or high is None else f" [{low:.4f}, {high:.4f}]"
    return f"{mean('value'):.4f}{interval}" + (f", {len(known)} seeds" if len(known) > 1 else "")


def dictionary() -> Section:
    """Every column of every table, from the contracts."""
    rows = [
        (name, c.name, c.type, c.unit, c.comment)
        for name, contract in all_contracts().items()
        for c in contract.columns
    ]
    return Section("Data dictionary", [], [Table(("table", "column", "type", "unit", "meaning"), rows)], folded=True)


def build(step: SparkStep) -> str:
    """The page of the run date."""
    page = Page(step)
    context = step.context
    calibrator = load_calibrator(context.artifacts, context.artifact("calibrator"))
    found = data.distributions(step.read_slice("pseudo_labels"))
    sections = [
        page.changes(), page.monitors(), page.funnel(), page.quarantine(), page.labels(calibrator, found),
        page.calibration(), page.channels(), *page.sids(), page.popularity(), page.evaluations(), page.lineage(),
        page.runs(), dictionary(),
    ]  # fmt: skip
    made_up = provenance(context.lake)
    banners = [f"Every figure here is {made_up.split(' ')[0]}: the raw tables say '{made_up}'."] if made_up else []
    context.counts.details |= {"warnings": page.warnings}
    return render(
        title=f"Pseudo-labels of {step.run_date}", fingerprint=context.fingerprint, run_id=context.run_id,
        banners=[*banners, *page.warnings], sections=sections,
    )  # fmt: skip


def run(step: SparkStep) -> None:
    """Write the report of the run date; also restores the feed's manifest if a killed run left none."""
    context = step.context
    ensure_manifest(context.lake, step.run_date, with_passthrough("training_feed", step.config))
    path = context.lake.path("reports", f"{step.run_date.isoformat()}.html")
    text = build(step)
    write_whole(path, text.encode())
    context.counts.outputs["report"] = {"path": path}
    context.counts.bytes_out = len(text.encode())
    log.info("report: %s", path)


def main() -> None:
    """Entry point."""
    job_main("report", run)


if __name__ == "__main__":
    main()
