"""Job: one self-contained HTML page per run date, from aggregates alone.

Launch: spark-submit … spark_jobs/report.py --config CONFIG --run-date D

Each part of the page is a module of `reporting/`: its aggregates, its words and its tables together.
"""

import json

from gpl_core.config import with_passthrough
from gpl_core.contracts.contract import all_contracts
from gpl_core.graph.step_run import log
from gpl_core.lakehouse.storage import write_whole
from gpl_core.simulation.raw_tables import provenance
from spark_jobs.common.manifests import ensure_manifest
from spark_jobs.reporting import changes, coverage, evaluations, labels, lineage, popularity, reliability, semantic_ids
from spark_jobs.reporting.day import Day
from spark_jobs.reporting.page import PageSection, Table, render
from spark_jobs.run import job_main
from spark_jobs.step import SparkStep


def dictionary() -> PageSection:
    """Every column of every table, from the contracts."""
    rows = [
        (name, c.name, c.type, c.unit, c.comment)
        for name, contract in all_contracts().items()
        for c in contract.columns
    ]
    return PageSection(
        "Data dictionary", tables=[Table(("table", "column", "type", "unit", "meaning"), rows)], folded=True
    )


def build(step: SparkStep) -> str:
    """The page of the run date."""
    day, context = Day(step), step.context
    sections = [
        changes.section(day), coverage.monitors(day), coverage.funnel(day), coverage.quarantine(day),
        labels.section(day), reliability.section(day), coverage.channels(day), *semantic_ids.sections(day),
        popularity.section(day), evaluations.section(day), *lineage.sections(day), dictionary(),
    ]  # fmt: skip
    warnings = [text for section in sections for text in section.warnings]
    context.counts.details["warnings"] = warnings
    origin = provenance(context.lake)
    banner = [f"Every figure here is {origin.split(' ')[0]}: the raw tables say '{origin}'."] if origin else []
    return render(
        title=f"Pseudo-labels of {step.run_date}", fingerprint=context.fingerprint, origin=json.dumps(context.origin()),
        run_id=context.run_id, banners=[*banner, *warnings], sections=sections,
    )  # fmt: skip


def run(step: SparkStep) -> None:
    """Write the report of the run date; also restores the feed's manifest if a killed run left none."""
    context = step.context
    ensure_manifest(context.lake, step.run_date, with_passthrough("training_feed", step.config))
    path = context.lake.path("reports", f"{step.run_date.isoformat()}.html")
    page = build(step).encode()
    write_whole(path, page)
    context.counts.outputs["report"] = {"path": path}
    context.counts.bytes_out = len(page)
    log.info("report: %s", path)


if __name__ == "__main__":
    job_main("report", run)
