"""What leaves the house when a step ends: a textfile, a webhook, OpenLineage events; and nothing when nobody asks."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from http.server import HTTPServer
from pathlib import Path
from typing import Any

import pytest

from gpl_core.config import Config
from gpl_core.errors import ContractError, GateError
from gpl_core.graph import alarms, lineage_events
from gpl_core.graph.arguments import StepArguments
from gpl_core.graph.job_runs import Counts, JobRun
from gpl_core.graph.planner import Planner
from gpl_core.graph.step_run import StepContext, run_step
from gpl_core.lakehouse.lake import Lake
from tests.support import DAY, DIMS, ONE, data_table, legal_rows, put, small_config, web_server

GOOD = {"coverage": {"status": "ok", "value": 0.75}, "label_drift": {"status": "unmeasured", "value": None}}
BAD = {"coverage": {"status": "warn", "value": 0.25}}
WARNED = {"monitors": BAD, "warnings": ["coverage 0.25 is below 0.5: look at view coverage"]}


@pytest.fixture
def lake(tmp_path: Path) -> Lake:
    return Lake(str(tmp_path / 'a "lake"'))


def ended(lake: Lake, step: str, status: str = "done", error: Exception | None = None, **details: Any) -> None:
    """One run of a step, from its start to its end."""
    run = JobRun(lake, step, DAY, "run-1")
    run.begin()
    run.end(status, Counts(rows_out=7, details=details), error)


# ---- the textfile ----------------------------------------------------------------------------------------------


def samples(path: Path) -> dict[str, float]:
    """Metric and last label -> figure; every line is what Prometheus' text format allows."""
    found, line = {}, r'(\w+)\{lakehouse="(?:[^"\\\n]|\\["\\n])*",\w+="(\w+)"\} (-?[0-9.e+]+)'
    text = path.read_text()
    assert text.endswith("\n")
    for row in text.splitlines():
        if not re.fullmatch(r"# (HELP|TYPE) \w+ .+", row):
            name, label, figure = re.fullmatch(line, row).groups()
            found[f"{name} {label}"] = float(figure)
    typed = re.findall(r"# TYPE (\w+) gauge", text)
    assert sorted(typed) == sorted({key.split()[0] for key in found}), "one TYPE per metric"
    return found


def test_a_textfile_holds_the_newest_run_of_every_step_and_the_monitors(lake, tmp_path, monkeypatch):
    path = tmp_path / "metrics" / "gpl.prom"
    monkeypatch.setenv("GPL_METRICS_FILE", str(path))
    before = datetime.now(UTC).timestamp()
    ended(lake, "samples")
    ended(lake, "training_feed", **WARNED)
    found = samples(path)
    assert found["gpl_step_ended_timestamp_seconds samples"] >= before
    assert found["gpl_step_run_date_timestamp_seconds samples"] == datetime(2026, 1, 3, tzinfo=UTC).timestamp()
    assert {k: v for k, v in found.items() if "seconds" not in k} == {
        "gpl_step_failed samples": 0, "gpl_step_rows_out samples": 7, "gpl_step_warnings samples": 0,
        "gpl_step_failed training_feed": 0, "gpl_step_rows_out training_feed": 7, "gpl_step_warnings training_feed": 1,
        "gpl_monitor_value coverage": 0.25, "gpl_monitor_alarm coverage": 1,
    }  # fmt: skip
    ended(lake, "training_feed", "noop")
    assert samples(path)["gpl_monitor_alarm coverage"] == 1, "a run that had nothing to do takes no alarm back"
    ended(lake, "training_feed", "failed", GateError("u17 is in it"), monitors=GOOD)
    found = samples(path)
    assert (found["gpl_step_failed training_feed"], found["gpl_step_failed samples"]) == (1, 0)
    assert {k: v for k, v in found.items() if "monitor" in k} == {
        "gpl_monitor_value coverage": 0.75, "gpl_monitor_alarm coverage": 0, "gpl_monitor_alarm label_drift": 0,
    }  # fmt: skip
    other = Lake(str(tmp_path / "other"))
    ended(other, "training_feed", monitors=BAD)
    assert path.read_text().count("gpl_monitor_alarm{") == 3, "two lakehouses in one file"
    assert [p.name for p in path.parent.iterdir() if not p.name.endswith(".lock")] == ["gpl.prom"]


def test_a_textfile_that_somebody_else_wrote_into_is_put_right_and_an_object_store_is_refused(
    lake, tmp_path, monkeypatch, caplog
):
    path = tmp_path / "gpl.prom"
    path.write_text("\n# a note\nother_metric 1\ngpl_step_failed{")
    monkeypatch.setenv("GPL_METRICS_FILE", str(path))
    ended(lake, "samples")
    assert samples(path)["gpl_step_failed samples"] == 0
    assert "gpl_step_failed{\n" not in path.read_text()
    monkeypatch.setenv("GPL_METRICS_FILE", "s3://bucket/gpl.prom")
    ended(lake, "samples")
    assert "s3://bucket/gpl.prom: expected a file on this machine" in caplog.text


def test_a_run_whose_row_cannot_be_written_is_told_as_failed(lake, tmp_path, monkeypatch, capsys):
    path = tmp_path / "gpl.prom"
    monkeypatch.setenv("GPL_METRICS_FILE", str(path))
    ended(lake, "samples")
    run = JobRun(lake, "samples", DAY, "run-2")
    run.begin()
    log = tmp_path / 'a "lake"' / "tables" / "job_runs" / "_delta_log"
    log.rename(log.with_name("away"))
    log.write_text("no folder")
    with pytest.raises(OSError, match=r"(?s)_delta_log.*Not a directory"):
        run.end("done", Counts())
    assert samples(path)["gpl_step_failed samples"] == 1
    line = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (line["status"], line["attempt"], line["error_class"]) == ("failed", 2, "OSError")


# ---- the webhook -----------------------------------------------------------------------------------------------


@pytest.fixture
def receiver() -> Iterator[HTTPServer]:
    with web_server() as server:
        yield server


def test_a_webhook_hears_of_alarms_and_failures_and_of_nothing_else(lake, receiver, monkeypatch):
    monkeypatch.setenv("GPL_WEBHOOK_URL", f"http://127.0.0.1:{receiver.server_port}/hook")
    ended(lake, "samples")
    ended(lake, "training_feed", monitors=GOOD)
    assert receiver.received == []
    ended(lake, "training_feed", **WARNED)
    ended(lake, "ingest", "failed", ContractError("row of user u17 is bad"))
    (warned, failed) = [body for _, _, body in receiver.received]
    assert {(path, kind) for path, kind, _ in receiver.received} == {("/hook", "application/json")}
    assert warned == {
        "text": "gpl training_feed 2026-01-03 done: coverage 0.25 is below 0.5: look at view coverage",
        "lakehouse": lake.root, "step": "training_feed", "run_date": "2026-01-03", "status": "done", "run_id": "run-1",
        "error_class": "", "warnings": WARNED["warnings"], "monitors": BAD,
    }  # fmt: skip
    assert failed["text"] == "gpl ingest 2026-01-03 failed: ContractError"
    assert "u17" not in json.dumps(receiver.received), "an error's message may quote rows"


def test_a_webhook_that_fails_is_a_warning_and_the_step_is_done(lake, receiver, monkeypatch, caplog):
    monkeypatch.setattr(alarms, "TIMEOUT", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        for url, said in (
            (f"http://127.0.0.1:{receiver.server_port}/no?SECRET", "HTTP Error 500"),
            (f"http://127.0.0.1:{silent.getsockname()[1]}/SECRET", "timed out"),
            ("http://127.0.0.1:9/SECRET", "refused"),
            (f"http://127.0.0.1:{receiver.server_port}/away?SECRET", "HTTP Error 302"),
            ("https://bot:SECRET@hooks.example/x", "InvalidURL"),
            ("https://hooks.example/a SECRET", "InvalidURL"),
            ("file:///etc/hostname?SECRET", "expected a URL that begins with http"),
        ):
            monkeypatch.setenv("GPL_WEBHOOK_URL", url)
            caplog.clear()
            ended(lake, "training_feed", **WARNED)
            assert said in caplog.text, url
            assert "GPL_WEBHOOK_URL: training_feed 2026-01-03: " in caplog.text
            assert "SECRET" not in caplog.text
    monkeypatch.setenv("GPL_METRICS_FILE", "/proc/nowhere/gpl.prom")
    ended(lake, "training_feed")
    assert "GPL_METRICS_FILE: training_feed" in caplog.text
    rows = lake.open("job_runs").read(columns=["status"]).to_pylist()
    assert [row["status"] for row in rows] == ["done"] * 8


# ---- OpenLineage -----------------------------------------------------------------------------------------------


@pytest.fixture
def events(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where events go, by the file transport of OpenLineage's own client."""
    pytest.importorskip("openlineage.client")
    path = tmp_path / "events.json"
    transport = {"type": "file", "log_file_path": str(path), "append": True}
    monkeypatch.setenv("OPENLINEAGE__TRANSPORT", json.dumps(transport))
    monkeypatch.setenv("OPENLINEAGE_NAMESPACE", "shop")
    lineage_events._client.cache_clear()
    yield path
    lineage_events._client.cache_clear()


def run_encode(config: Config, run_id: str, body: Any) -> str:
    return run_step(Planner(config), "encode_items", DAY, StepArguments(config, (DAY,), run_id), body)


def encode(context: StepContext) -> None:
    """Writes one row and publishes nothing."""
    contract = context.contract("item_embeddings")
    with context.lake.writer(contract, {"encoder_version": "v1"}, dims=DIMS) as writer:
        writer.write(data_table(contract, legal_rows(contract, 1)))
    since, mark = context.state.outputs["item_embeddings"], context.mark("item_embeddings")
    context.committed(
        "item_embeddings", context.lake.commit(contract, writer.parts, mark=mark, mode="append", since=since)
    )


def test_events_tell_each_run_of_a_step_with_the_versions_of_its_datasets(tmp_path, events):
    config = small_config(tmp_path)
    lake = Planner(config).lake
    put(lake, "items", 3)
    assert run_encode(config, "run-1", encode) == "done"
    assert run_encode(config, "run-1", encode) == "noop"
    put(lake, "items", 1, seed=1)

    def broken(context: StepContext) -> None:
        raise GateError("u17 is in it")

    with pytest.raises(GateError):
        run_encode(config, "run-2", broken)
    said = [json.loads(line) for line in events.read_text().splitlines()]
    assert [e["eventType"] for e in said] == ["START", "COMPLETE", "START", "FAIL"]
    assert {(e["job"]["namespace"], e["job"]["name"]) for e in said} == {("shop", "encode_items")}
    runs = [e["run"]["runId"] for e in said]
    assert runs[0] == runs[1] != runs[2] == runs[3]

    def datasets(event: dict[str, Any], side: str) -> dict[str, str]:
        assert {d["namespace"] for d in event[side]} <= {"file"}
        return {d["name"].rpartition("/")[2]: d["facets"]["version"]["datasetVersion"] for d in event[side]}

    start, complete, _, fail = said
    assert start["inputs"][0]["name"] == lake.uri("items")
    assert datasets(start, "inputs") == datasets(complete, "inputs") == {"items": "1"}
    assert (start["outputs"], datasets(complete, "outputs")) == ([], {"item_embeddings": "1"})
    assert datasets(fail, "inputs") == {"items": "2"}
    assert fail["run"]["facets"]["errorMessage"]["message"] == "GateError"
    nominal = complete["run"]["facets"]["nominalTime"]
    assert (nominal["nominalStartTime"][:10], nominal["nominalEndTime"][:10]) == (str(DAY), str(DAY + ONE))
    assert "u17" not in events.read_text()


def test_datasets_are_named_as_openlineage_names_them():
    named = dict(lineage_events._placed({"items": 1, "artifact:tokenizer": "t"}, Lake("s3://bucket/a/b")))
    assert named == {("s3://bucket", "a/b/tables/items"): 1, ("s3://bucket", "a/b/artifacts/tokenizer"): "t"}


def test_without_being_asked_for_nothing_is_sent_and_nothing_imported(tmp_path):
    code = (
        "import sys; from datetime import date; from gpl_core.lakehouse.lake import Lake; "
        "from gpl_core.graph.job_runs import Counts, JobRun; "
        f"run = JobRun(Lake({str(tmp_path)!r}), 'samples', date(2026, 1, 3), 'r'); run.begin(); "
        "run.end('done', Counts(details={'warnings': ['w']})); "
        "print({'openlineage', 'requests', 'prometheus_client'} & {name.split('.')[0] for name in sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "set()"
    assert done.stderr == ""
