"""Job: a small site, one self-contained HTML page per run date, an index over them and the data dictionary.

Launch: spark-submit … spark_jobs/report.py --config CONFIG --run-date D

Each part of a page is a module of `reporting/`: its aggregates, its words and its tables together.
"""

import json
from collections.abc import Sequence
from datetime import date

from gpl_core.config import with_passthrough
from gpl_core.graph.step_run import log
from gpl_core.lakehouse.storage import write_whole
from gpl_core.simulation.raw_tables import provenance
from spark_jobs.common.manifests import ensure_manifest
from spark_jobs.reporting import (
    changes,
    coverage,
    evaluations,
    examples,
    labels,
    lineage,
    popularity,
    reliability,
    semantic_ids,
    site,
)
from spark_jobs.reporting.day_tables import Day
from spark_jobs.reporting.page import DICTIONARY, INDEX, PageSection, render
from spark_jobs.run import job_main
from spark_jobs.step import SparkStep


def parts(day: Day) -> list[PageSection]:
    """The sections of the date's page."""
    return [
        changes.section(day), coverage.monitors(day), coverage.trainers(day), coverage.funnel(day),
        coverage.quarantine(day), labels.section(day), *examples.sections(day), reliability.section(day),
        coverage.channels(day),
        *semantic_ids.sections(day), popularity.section(day), evaluations.section(day), *lineage.sections(day),
    ]  # fmt: skip


def build(day: Day) -> dict[str, str]:
    """Name -> page: the dictionary, the index, and last the page of the run date, which tells that the step is done."""
    context, lake = day.context, day.context.lake
    sections = parts(day)
    warnings = [text for section in sections for text in section.warnings]
    own = [text for section in sections if not section.told_by for text in section.warnings]
    context.counts.details |= {"banners": warnings, "warnings": own}
    origin = provenance(lake)
    banner = [f"Every figure here is {origin.split(' ')[0]}: the raw tables say '{origin}'."] if origin else []
    known = site.pages(lake) | {day.date}
    lines, part = site.lines(day, warnings)

    def page(title: str, found: Sequence[PageSection], banners: Sequence[str] = (), of: date | None = None) -> str:
        # The page of the date alone has what tells that the step is done.
        marks = {"gpl-fingerprint": context.state.fingerprint, "gpl-origin": json.dumps(context.origin())} if of else {}
        return render(title=title, marks=marks, dates=site.links(of, known), banners=banners, sections=found,
                      note=f"Made by run {context.run_id} for {day.date}.")  # fmt: skip

    name = lake.root.rpartition("/")[2]
    return {
        DICTIONARY: page(f"Data dictionary of {name}", site.dictionary()),
        INDEX: page(f"Pseudo-labels of {name}", site.overview(lines, part, known), banner),
        f"{day.date}.html": page(f"Pseudo-labels of {day.date}", sections, [*banner, *warnings], day.date),
    }


def run(step: SparkStep) -> None:
    """Write the report of the run date; also restores the feed's manifest if a killed run left none."""
    context = step.context
    ensure_manifest(context.lake, step.run_date, with_passthrough("training_feed", step.config))
    day = Day(step)
    site.link_neighbors(context.lake, step.run_date)
    for name, page in build(day).items():
        path = context.lake.path("reports", name)
        write_whole(path, page.encode())
        context.counts.bytes_out += len(page.encode())
    context.counts.outputs["report"] = {"path": path}
    log.info("report: %s", path)


if __name__ == "__main__":
    job_main("report", run)
