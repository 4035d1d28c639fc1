"""What follows after the graph has run: late rows, the same jobs on a standalone cluster, a bad day and its runbook."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from http.server import HTTPServer
from pathlib import Path

import pyarrow.compute as pc
import pytest
import yaml

import gpl_core as gpl
from gpl_core.config import load_config
from gpl_core.contracts.contract import load_contract
from gpl_core.graph.launches import script_path, tool
from gpl_core.graph.planner import Planner
from gpl_core.graph.steps import STEPS
from gpl_core.lakehouse.marks import SliceMark
from tests.documented import ROOT, commands, typed
from tests.gpl_core.graph.test_alarms import samples
from tests.in_process import run_graph
from tests.support import DELTA_JARS, JVM, started, web_server
from tests.test_pipeline import FIRST, LAST, SIZE, SMALL, House

pytestmark = [pytest.mark.pipeline, pytest.mark.spark, pytest.mark.deepspeed, pytest.mark.slow]


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory, spark, one_rank) -> House:
    """A lakehouse over which every step has run, in this process."""
    folder = tmp_path_factory.mktemp("house")
    path = folder / "small.yaml"
    path.write_text(yaml.safe_dump({**SMALL, "lakehouse": {"root": str(folder / "lake")}}), encoding="utf-8")
    made = House(path, load_config(str(path)), "")
    code, output = made.gpl("simulate", *SIZE)
    assert code == 0, output
    run_graph(made.config, spark, one_rank, [FIRST, LAST])
    return made


def test_late_candidates_make_that_date_stale_and_no_other_and_it_is_rebuilt(house: House, spark, one_rank) -> None:
    planner = Planner(house.config)
    raw = planner.lake.open("raw_candidates")
    contract = load_contract("raw_candidates")
    rows = raw.read(raw.select(start=FIRST, end=FIRST))
    first_request = rows["request_id"][0].as_py()
    fewer = rows.filter(pc.not_equal(rows["request_id"], first_request)).drop(["dt"])
    partition = {"dt": FIRST.isoformat()}
    with planner.lake.writer(contract, partition, dims={}) as writer:
        writer.write(fewer)
    mark = SliceMark("platform", {FIRST.isoformat(): "late"}, "platform")
    planner.lake.commit(contract, writer.parts, mark=mark, mode="overwrite", partition=partition)

    assert house.states(FIRST)["ingest"] == "stale"
    assert set(house.states(LAST).values()) == {"done"}
    untouched = house.rows("pseudo_labels", LAST, "user_id", "item_id", "source", "pseudo_label")

    run_graph(house.config, spark, one_rank, [FIRST])
    assert set(house.states(FIRST).values()) == {"done"}
    assert set(house.states(LAST).values()) == {"done"}
    assert first_request not in house.rows("unexposed_samples", FIRST, "request_id")["request_id"].to_pylist()
    assert house.rows("pseudo_labels", LAST, "user_id", "item_id", "source", "pseudo_label").equals(untouched)


@pytest.fixture
def standalone(tmp_path: Path) -> Iterator[str]:
    """Address of a standalone master on loopback with two workers of one core."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    address = f"spark://127.0.0.1:{port}"
    local = ["--host", "127.0.0.1", "--webui-port", "0"]
    spark_class, deploy = tool("spark-class"), "org.apache.spark.deploy"
    running = [started([spark_class, f"{deploy}.master.Master", *local, "--port", port], "New state: ALIVE")]
    try:
        for number in range(2):
            size = ["--cores", "1", "--memory", "600m", "--work-dir", str(tmp_path / f"work{number}")]
            running.append(
                started([spark_class, f"{deploy}.worker.Worker", *local, *size, address], "Successfully registered")
            )
        yield address
    finally:
        for process in reversed(running):
            process.terminate()
            process.wait()


def test_every_spark_job_gives_the_same_rows_on_a_standalone_cluster(house: House, standalone: str, tmp_path) -> None:
    """Executors are processes of their own here, and the driver has the modules from gpl.zip."""
    tables = {
        "impressions": (), "candidates": (), "interactions": (), "exposed_samples": (), "unexposed_samples": (),
        "user_sequences": (), "item_stats": (), "user_stats": (), "score_requests": (),
        "pseudo_labels": ("calibrator_version",), "training_feed": ("calibrator_version",),
    }  # fmt: skip

    def contents() -> dict[str, list[str]]:
        found = {}
        for table, but in tables.items():
            columns = [c for c in load_contract(table).column_names if c not in but]
            found[table] = sorted(map(str, house.rows(table, LAST, *columns).to_pylist()))
        return found

    from spark_jobs.session import _DEFAULTS

    before = contents()
    archive = tmp_path / "gpl.zip"
    subprocess.run(
        [sys.executable, "-m", "zipfile", "-c", str(archive), "gpl_core/", "spark_jobs/"],
        cwd=Path(__file__).parents[1], check=True,
    )  # fmt: skip
    # As docs/deploy.md says for machines without a network: jars from a folder, an empty cache to resolve them from.
    jars, cache, events = tmp_path / "jars", tmp_path / "ivy", tmp_path / "events"
    for folder in (jars, events):
        folder.mkdir()
    for jar in DELTA_JARS:
        (jars / jar.name).symlink_to(jar)
    settings = {
        "spark.driver.host": "127.0.0.1", "spark.executor.extraJavaOptions": JVM, "spark.ui.enabled": "false",
        # What start_session sets for local masters only: a cluster's defaults are for a cluster's tables.
        "spark.databricks.delta.snapshotPartitions": "2", "spark.sql.shuffle.partitions": "4",
        "spark.sql.adaptive.enabled": "true",
        "spark.jars.ivy": str(cache), "spark.eventLog.enabled": "true", "spark.eventLog.dir": str(events),
        "spark.eventLog.compress": "false",
        # Other than start_session's own.
        "spark.hadoop.parquet.block.size": str(32 * 2**20), "spark.log.level": "WARN",
    }  # fmt: skip
    steps = ",".join(s.name for s in STEPS if s.launcher == "spark")
    done = subprocess.run(
        [
            tool("spark-submit"), *SMALL["launch"]["spark_submit"], "--master", standalone, "--jars", f"{jars}/*.jar",
            "--py-files", str(archive), "--executor-memory", "600m",
            *(a for key, value in settings.items() for a in ("--conf", f"{key}={value}")),
            script_path("spark_jobs/run.py"), "--steps", steps, "--config", str(house.config_file),
            "--run-date", LAST.isoformat(), "--force",
        ],
        env={**os.environ, "PYSPARK_PYTHON": sys.executable}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"')]
    assert [line["step"] for line in lines if line["status"] == "done"] == steps.split(",")
    after = contents()
    assert {t for t in tables if after[t] != before[t]} == set()
    assert all(before[t] for t in tables)
    assert not list(cache.rglob("*.jar")), "no jar was looked for elsewhere"
    in_force = spark_properties(events)
    # Spark puts JVM options of its own before those that are given.
    overridden = {
        key: in_force.get(key) for key, value in settings.items() if not in_force.get(key, "").endswith(value)
    }
    assert overridden == {}, "what the launcher sets is never overridden"
    assert {key for key in _DEFAULTS if key not in in_force} == set(), "what it leaves open is set"


def spark_properties(events: Path) -> dict[str, str]:
    """The settings of the application whose event log lies under `events`."""
    for log in events.rglob("events_*"):
        for line in log.read_text("utf-8").splitlines():
            if line.startswith('{"Event":"SparkListenerEnvironmentUpdate"'):
                return dict(json.loads(line)["Spark Properties"])
    raise AssertionError(f"no event log under {events} holds the settings")


@pytest.fixture
def told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HTTPServer]:
    """A webhook; the steps that a launcher starts also write metrics.prom and, for OpenLineage, events.json."""
    pytest.importorskip("openlineage.client")
    transport = {"type": "file", "log_file_path": str(tmp_path / "events.json"), "append": True}
    with web_server() as server:
        monkeypatch.setenv("GPL_WEBHOOK_URL", f"http://127.0.0.1:{server.server_port}/hook")
        monkeypatch.setenv("GPL_METRICS_FILE", str(tmp_path / "metrics.prom"))
        monkeypatch.setenv("OPENLINEAGE__TRANSPORT", json.dumps(transport))
        yield server


def test_the_runbook_of_a_bad_label_day_makes_it_a_good_one(house: House, tmp_path: Path, told: HTTPServer) -> None:
    """A wrong target rate on the last date: it is told everywhere. Then the commands of docs/operations.md in order."""
    lakehouse = {"root": house.config.lakehouse.root}
    good = gpl.open_lakehouse(str(house.config_file)).feed(LAST).manifest
    others = sorted(good["monitors"].keys() - {"label_drift"})
    bound = 0.2 + 2 * good["monitors"]["label_drift"]["value"]
    path = tmp_path / "watched.yaml"
    monitors = {"ignore": others, "label_drift": bound}  # of a marketplace so small the others may alarm on any day
    path.write_text(yaml.safe_dump({**SMALL, "lakehouse": lakehouse, "monitors": monitors}), encoding="utf-8")
    watched = House(path, load_config(str(path)), "")
    steps = ("fit_calibrator", "pseudo_labels", "training_feed")
    only = [a for step in steps for a in ("--only", step)]  # the pre-ranker and the report have their own tests

    def in_force() -> str:
        return Planner(watched.config).artifacts.in_force("calibrator", LAST).version

    before = in_force()
    wrong = ["--set", "labels.calibrator.target_rate=0.4", "--run-date", LAST.isoformat()]
    code, output = watched.gpl("run", *wrong, *only, "--fail-on-alarm")
    assert code == 3, output
    setting = "setting labels.calibrator.target_rate is 0.4, was 0.04"
    assert f"fit_calibrator {LAST}: calibrator {before} is out of date: {setting}" in output
    assert f"training_feed {LAST}: label_drift" in output
    bad = in_force()
    assert bad != before
    metrics = samples(tmp_path / "metrics.prom")
    assert {metrics[f"gpl_step_failed {step}"] for step in steps} == {0}
    assert metrics["gpl_monitor_alarm label_drift"] == 1
    (alarm,) = [body for _, _, body in told.received if body["step"] == "training_feed"]
    assert (alarm["run_date"], alarm["status"]) == (LAST.isoformat(), "done")
    assert alarm["monitors"]["label_drift"]["value"] == pytest.approx(metrics["gpl_monitor_value label_drift"])
    events = [json.loads(line) for line in (tmp_path / "events.json").read_text().splitlines()]
    assert [(e["job"]["name"], e["eventType"]) for e in events] == [
        (step, kind) for step in steps for kind in ("START", "COMPLETE")
    ]
    written = {d["name"]: d["facets"]["version"]["datasetVersion"] for d in events[-1]["outputs"]}
    lake = Planner(watched.config).lake
    assert written[lake.uri("training_feed")] == str(lake.open("training_feed").version)
    with pytest.raises(gpl.ContractError, match="label_drift warns"):
        gpl.open_lakehouse(str(path)).feed(LAST).refuse_alarms()

    section = (ROOT / "docs" / "operations.md").read_text("utf-8").split("### A bad label day")[1].split("\n1. ")[0]
    label = house.table("pseudo_labels", LAST)[0]
    said: list[str] = []
    for command in commands(section):
        arguments = typed(
            command.replace("VERSION", bad), config=str(path), first=FIRST.isoformat(), last=LAST.isoformat(),
            user=label["user_id"], item=label["item_id"],
        )  # fmt: skip
        code, output = watched.gpl(*arguments[:1], *arguments[3:], *(only if arguments[0] == "run" else ()))
        assert code == 0, f"{command}: {output}"
        said.append(output)
    assert "label_drift" in said[0]
    assert bad in said[1]
    assert f"artifact calibrator is {before}, was {bad}" in " ".join(re.sub("[│\n]", " ", said[4]).split())
    healthy = gpl.open_lakehouse(str(path)).feed(LAST)
    healthy.refuse_alarms()
    assert healthy.manifest["pseudo_label_sum"] == pytest.approx(good["pseudo_label_sum"])
    assert {watched.states(LAST)[step] for step in steps} == {"done"}
    assert samples(tmp_path / "metrics.prom")["gpl_monitor_alarm label_drift"] == 0
