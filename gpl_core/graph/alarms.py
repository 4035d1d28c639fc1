"""Alarms sent to other systems: a textfile for Prometheus' node exporter, and a webhook.

Environment variables, which every launcher passes on, set the destinations; without them nothing is sent. A failure to
send is logged as a warning and never fails the step.
"""

import fcntl
import json
import logging
import os
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from gpl_core.errors import GplError, UsageError
from gpl_core.graph.steps import start_of
from gpl_core.lakehouse.storage import write_whole

log = logging.getLogger("gpl")

TEXTFILE, WEBHOOK = "GPL_METRICS_FILE", "GPL_WEBHOOK_URL"
TIMEOUT = 10.0  # seconds that a webhook may take
_HELP = {
    "gpl_step_failed": "1 when the newest run of the step failed",
    "gpl_step_ended_timestamp_seconds": "When the newest run of the step ended",
    "gpl_step_run_date_timestamp_seconds": "Run date of the newest run that did the work",
    "gpl_step_seconds": "Seconds that it took",
    "gpl_step_rows_out": "Rows that it wrote",
    "gpl_step_warnings": "Number of its warnings, alarms of monitors among them",
    "gpl_monitor_value": "Figure of the newest run date that was judged",
    "gpl_monitor_alarm": "1 when the monitor warned or refused",
}


def export(report: Mapping[str, Any], root: str) -> None:
    """Send the content of a step's JSON line, for the lakehouse at `root`, to the destinations in the environment."""
    for name, tell in ((TEXTFILE, write_textfile), (WEBHOOK, post)):
        if place := os.environ.get(name):
            try:
                tell(place, report, root)
            except (GplError, OSError) as failure:
                log.warning("%s: %s %s: %s", name, report["step"], report["run_date"], failure)
            except Exception as failure:  # http.client quotes the URL, which may hold a token
                log.warning("%s: %s %s: %s", name, report["step"], report["run_date"], type(failure).__name__)


def write_textfile(path: str, report: Mapping[str, Any], root: str) -> None:
    """Put the figures of `report` in place of those of the step's last run; the other figures of ours stay.

    UsageError for a place that is none on this machine: an object cannot be updated by several steps at once.
    """
    if "://" in path:
        raise UsageError(f"{path}: expected a file on this machine, which the node exporter reads")
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with open(f"{path}.lock", "ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        old = Path(path).read_text(encoding="utf-8").splitlines() if Path(path).exists() else []
        ours = tuple(f"{name}{{" for name in _HELP)
        samples = dict(line.rsplit(" ", 1) for line in old if line.startswith(ours) and " " in line)
        place = root.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
        of = f'{{lakehouse="{place}",'
        if "monitors" in report["details"]:  # of an ignored one nothing must stay
            judged = ("gpl_monitor_value" + of, "gpl_monitor_alarm" + of)
            samples = {key: figure for key, figure in samples.items() if not key.startswith(judged)}
        samples |= {f'{name}{of}{label}="{value}"}}': f"{n:.17g}" for name, label, value, n in _samples(report)}
        lines = []
        for name, help_ in _HELP.items():
            found = sorted(f"{key} {value}" for key, value in samples.items() if key.startswith(name + "{"))
            lines += [f"# HELP {name} {help_}", f"# TYPE {name} gauge", *found] if found else []
        write_whole(path, ("\n".join(lines) + "\n").encode())


def _samples(report: Mapping[str, Any]) -> Iterator[tuple[str, str, str, float]]:
    """Metric, label, its value, figure."""
    step, details = report["step"], report["details"]
    figures = {"failed": report["status"] == "failed", "ended_timestamp_seconds": datetime.now(UTC).timestamp()}
    if report["status"] == "done":
        figures |= {
            "run_date_timestamp_seconds": start_of(report["run_date"]).timestamp(), "seconds": report["seconds"],
            "rows_out": report["rows_out"], "warnings": len(details.get("warnings", ())),
        }  # fmt: skip
    yield from ((f"gpl_step_{name}", "step", step, float(figure)) for name, figure in figures.items())
    for monitor, judged in details.get("monitors", {}).items():
        if judged["value"] is not None:
            yield "gpl_monitor_value", "monitor", monitor, judged["value"]
        yield "gpl_monitor_alarm", "monitor", monitor, float(judged["status"] in ("warn", "fail"))


def post(url: str, report: Mapping[str, Any], root: str) -> None:
    """POST a failure, or what a step warned of, as JSON. The message of an error stays here: it may quote rows.

    UsageError for another URL than a web server's, which is not quoted, for it may hold a token; OSError when nobody
    listens, or the answer is no success or takes too long.
    """
    import urllib.request

    warnings = list(report["details"].get("warnings", ()))
    if report["status"] != "failed" and not warnings:
        return
    if not url.startswith(("http://", "https://")):
        raise UsageError("expected a URL that begins with http:// or https://")
    what = report["error_class"] or "; ".join(warnings)
    body = {
        "text": f"gpl {report['step']} {report['run_date']} {report['status']}: {what}",
        "lakehouse": root,
        **{name: report[name] for name in ("step", "run_date", "status", "run_id", "error_class")},
        "warnings": warnings,
        "monitors": report["details"].get("monitors", {}),
    }
    data = json.dumps(body, default=str).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})

    class Unmoved(urllib.request.HTTPRedirectHandler):
        def redirect_request(self, *given: Any) -> None:
            """Refuse: the redirected request would be a GET without the alarm."""

    with urllib.request.build_opener(Unmoved).open(request, timeout=TIMEOUT):
        pass
