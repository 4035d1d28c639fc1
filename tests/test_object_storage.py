"""The whole graph on S3 (moto's server) and without a network for jars: Spark on s3a:// and workers on s3://.

`gpl run` launches the first step of each kind, as everywhere; one process does the rest, in a tenth of the starts.

`make test-slow` installs the server and the jars that s3a:// needs. GPL_JARS names another folder of them.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from datetime import date
from pathlib import Path

import pytest
import yaml

from gpl_core.cli import main
from gpl_core.config import load_config
from gpl_core.graph.launches import tool
from gpl_core.graph.planner import Planner
from gpl_core.graph.steps import STEPS
from gpl_core.lakehouse.storage import filesystem
from tests.documented import ROOT
from tests.object_store import bucket
from tests.test_pipeline import JARS, SIZE, SMALL

pytestmark = [pytest.mark.pipeline, pytest.mark.spark, pytest.mark.deepspeed, pytest.mark.slow]
DAY = date(2026, 1, 3)


@pytest.fixture
def store() -> Iterator[str]:
    with bucket() as location:
        yield location


def test_every_step_runs_on_object_storage(store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    jars = Path(os.environ.get("GPL_JARS") or ROOT / ".venv-moto" / "jars")
    if not list(jars.glob("*hadoop-aws-*.jar")):
        pytest.skip(f"no hadoop-aws under {jars}: make .venv-moto/jars")
    monkeypatch.chdir(tmp_path)  # logs/ come here
    usual = SMALL["launch"]["spark_submit"]
    submit = [*usual[: usual.index(JARS[0])], "--jars", f"{jars}/*.jar", "--conf", f"spark.jars.ivy={tmp_path}/ivy"]
    path = tmp_path / "s3.yaml"
    body = {
        **SMALL,
        "lakehouse": {"root": f"{store}/small"},
        # Few days: moto has one thread, and every file is a request.
        "run": {**SMALL["run"], "end_date": DAY.isoformat(), "history_start": "2025-12-31"},
        "launch": {**SMALL["launch"], "spark_submit": submit},
    }
    path.write_text(yaml.safe_dump(body), encoding="utf-8")
    given = ["--config", str(path)]
    assert main(["simulate", *given, *SIZE]) == 0
    assert main(["run", *given, "--only", "ingest", "--only", "encode_items"]) == 0
    config = load_config(str(path))
    script = tmp_path / "rest.py"
    script.write_text("from tests.in_process import main\n\nmain()\n", encoding="utf-8")
    rest = [tool("spark-submit"), *config.launch.spark_submit, str(script), str(path), DAY.isoformat()]
    own = {"PYTHONPATH": str(ROOT), "SPARK_LOCAL_IP": "127.0.0.1"}
    subprocess.run(rest, check=True, env={**os.environ, **config.launch.env, **own})

    planner = Planner(config)
    assert {s.name: planner.state(s, DAY).status for s in STEPS} == {s.name: "done" for s in STEPS}
    fs, manifest = filesystem(planner.lake.path("manifests", "training_feed", f"{DAY}.json"))
    feed = planner.lake.open("training_feed")
    assert json.loads(fs.cat_file(manifest))["rows"] == feed.read().num_rows > 0
    assert main(["summary", *given]) == 0
    assert main(["vacuum", *given]) == 0
    assert not (tmp_path / "ivy").exists(), "no jar was looked for elsewhere"
