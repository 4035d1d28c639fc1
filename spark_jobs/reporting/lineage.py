"""Report: the date's runs, the versions that each step read and made, and the artifacts in force."""

import json
from collections.abc import Mapping, Sequence
from datetime import date, timedelta
from typing import Any

from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from gpl_core.contracts.contract import load_contract
from gpl_core.graph.steps import STEPS, Step
from gpl_core.lakehouse.artifacts import KINDS
from spark_jobs.reporting.changes import figures
from spark_jobs.reporting.day_tables import Day
from spark_jobs.reporting.page import PageSection, Table


def step_runs(job_runs: DataFrame, run_date: date) -> list[dict[str, Any]]:
    """One run of each step for the date, in the graph's order: the last that was done; else the last that found the
    work done already; else the last failed one. `attempts` do not count those that found it done.
    """
    columns = (
        "status", "seconds", "rows_in", "rows_out", "rows_quarantined", "rows_dropped", "bytes_out", "inputs",
        "outputs",
    )  # fmt: skip
    rank = F.when(F.col("status") == "done", 2).when(F.col("status") == "noop", 1).otherwise(0)
    last = F.max_by(F.struct(*columns), F.struct(rank, "started_at"))
    rows = (
        job_runs.where((F.col("run_date") == F.lit(run_date)) & F.col("status").isin("done", "noop", "failed"))
        .withColumn("rows_in", F.nullif("rows_in", F.lit(-1)))
        .groupBy("step")
        .agg(last.alias("run"), F.count_if(F.col("status") != "noop").alias("attempts"))
        .collect()
    )
    found = {r["step"]: {"step": r["step"], "attempts": r["attempts"], **r["run"].asDict()} for r in rows}
    return [found[s.name] for s in STEPS if s.name in found and not s.writes_page]


def lineage_rows(runs: Sequence[Mapping[str, Any]], known: Mapping[str, str]) -> list[tuple[str, str, str]]:
    """(step, what it read, what it made) in the graph's order, tables with their version as `@4`.

    An output has the version that the date's steps read, or the one that was written if none of them read it.

    Args:
        runs: the date's runs, one per step.
        known: output -> version where the runs do not record it: `encoder_version`, `preranker`.
    """
    inputs = {run["step"]: _versions(run["inputs"]) for run in runs}
    read: dict[str, set[str]] = {}
    for versions in inputs.values():
        for name, version in versions.items():
            read.setdefault(name, set()).add(version)
    written = {name: {version} for run in runs for name, version in _versions(run["outputs"]).items()}
    made = written | read | {name: {version} for name, version in known.items()}
    text = {name: ", ".join(sorted(versions, key=lambda v: (len(v), v))) for name, versions in made.items()}
    rows = [
        (step.name, _listed(inputs.get(step.name, {})), _listed({n: text[n] for n in _outputs(step) if n in text}))
        for step in STEPS
    ]
    return [row for row in rows if any(row[1:])]


def _versions(recorded: str) -> dict[str, str]:
    """Table or artifact -> version, from `inputs` or `outputs` of a run."""
    found = {k.removeprefix("artifact:"): v.get("version", v.get("after")) for k, v in json.loads(recorded).items()}
    return {name: f"@{version}" if isinstance(version, int) else version for name, version in sorted(found.items())}


def _outputs(step: Step) -> list[str]:
    tables = [t for t in (*step.writes, *step.also_writes) if load_contract(t).owner == step.name]
    return [*tables, *filter(None, (step.stamp, step.publishes))]


def _listed(versions: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items())


def sections(day: Day) -> list[PageSection]:
    """The artifacts in force, what each step read and made, and what its run cost."""
    # The pre-ranker of D was trained on D; the other artifacts only on what lies before it.
    limits = {kind: day.date + timedelta(days=kind == "preranker") for kind in KINDS}
    artifacts = [a for k, limit in limits.items() if (a := day.context.artifacts.in_force_or_none(k, limit))]
    used = figures(day, day.date)
    warnings = [
        f"{a.kind} {a.version} was built on {key} {version}, the feed of this date on {used[key]}."
        for a in artifacts for key, version in sorted(a.lineage.items())
        if used.get(key) and used[key] not in version.split(",")  # a pre-ranker may be built on several days' feeds
    ]  # fmt: skip
    built_on = [(a.kind, a.version, a.trained_through.isoformat(), _listed(dict(sorted(a.lineage.items()))))
                for a in artifacts]  # fmt: skip
    runs = step_runs(day.step.read("job_runs"), day.date) if day.context.has("job_runs") else []
    known = {"encoder_version": used["encoder_version"], "preranker": used["preranker_version"]}
    made = lineage_rows(runs, {k: v for k, v in known.items() if v})
    costs = ("step", "status", "attempts", "seconds", "rows_in", "rows_out", "rows_quarantined", "rows_dropped",
             "bytes_out")  # fmt: skip
    return [
        PageSection(
            "Versions and lineage", ["@ is the version of a table. A step made its outputs from what it read."],
            [Table(("artifact", "version", "trained through", "built on"), built_on),
             Table(("step", "read", "made"), made)], warnings=warnings,
        ),
        PageSection("Runs", tables=[Table(costs, [[r[c] for c in costs] for r in runs])]),
    ]  # fmt: skip
