"""OpenLineage events of step runs, sent if the environment configures a transport as OpenLineage's client documents it.

One job per step; its datasets are the tables and artifacts, with versions. A failure to send is only a warning.
"""

import logging
import os
import uuid
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from functools import cache
from typing import Any, Literal

from gpl_core import __version__
from gpl_core.graph.steps import ONE_DAY, start_of
from gpl_core.lakehouse.lake import Lake

log = logging.getLogger("gpl")

Kind = Literal["START", "COMPLETE", "FAIL"]
_ARTIFACT, _PATIENCE = "artifact:", 10.0  # seconds


def emit(kind: Kind, report: Mapping[str, Any], lake: Lake) -> None:
    """Send one event about a run whose row of `job_runs` is `report`, inputs and outputs as mappings."""
    if not any(name.startswith("OPENLINEAGE_") for name in os.environ):
        return
    try:
        _client().emit(_event(kind, report, lake))
        wait = getattr(_client().transport, "wait_for_completion", None)  # of those that send in the background
        if wait is not None and kind != "START":  # this process may be over at once
            wait(timeout=_PATIENCE)
    except ImportError:
        log.warning("OpenLineage: its client is not installed; pip install 'gpl-prerank[openlineage]'")
    except Exception as failure:
        log.warning("OpenLineage: %s of %s %s: %s", kind, report["step"], report["run_date"], failure)


@cache
def _client() -> Any:
    from openlineage.client import OpenLineageClient

    return OpenLineageClient()


def _event(kind: Kind, report: Mapping[str, Any], lake: Lake) -> Any:
    from openlineage.client import event_v2, facet_v2

    day = start_of(report["run_date"])
    nominal = facet_v2.nominal_time_run.NominalTimeRunFacet(day.isoformat(), (day + ONE_DAY).isoformat())
    facets: dict[str, Any] = {"nominalTime": nominal}
    if kind == "FAIL":  # the message may quote rows: it stays in job_runs
        facets["errorMessage"] = facet_v2.error_message_run.ErrorMessageRunFacet(report["error_class"], "PYTHON")

    def versioned(version: object) -> dict[str, Any]:
        return {"version": facet_v2.dataset_version_dataset.DatasetVersionDatasetFacet(str(version))}

    inputs = {name: entry["version"] for name, entry in report["inputs"].items()}
    outputs = {name: o.get("after", o.get("version")) for name, o in report["outputs"].items() if "path" not in o}
    attempt = f"{lake.root}/{report['run_id']}/{report['step']}/{report['run_date']}/{report['attempt']}"
    return event_v2.RunEvent(
        eventType=event_v2.RunState[kind],
        eventTime=datetime.now(UTC).isoformat(),
        run=event_v2.Run(str(uuid.uuid5(uuid.NAMESPACE_URL, attempt)), facets),
        job=event_v2.Job(os.environ.get("OPENLINEAGE_NAMESPACE", "gpl"), report["step"]),
        inputs=[event_v2.InputDataset(*place, facets=versioned(v)) for place, v in _placed(inputs, lake)],
        outputs=[event_v2.OutputDataset(*place, facets=versioned(v)) for place, v in _placed(outputs, lake)],
        producer=f"urn:gpl-prerank:{__version__}",
    )


def _placed(versions: Mapping[str, object], lake: Lake) -> Iterator[tuple[tuple[str, str], object]]:
    """((namespace, name), version) of each table and artifact, named as OpenLineage names datasets."""
    for name, version in versions.items():
        is_artifact = name.startswith(_ARTIFACT)
        place = lake.path("artifacts", name.removeprefix(_ARTIFACT)) if is_artifact else lake.uri(name)
        scheme, separator, path = place.partition("://")
        store, _, key = path.partition("/")
        yield (f"{scheme}://{store}", key) if separator else ("file", place), version
