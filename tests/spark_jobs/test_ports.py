"""Who can reach a Spark job of one machine, under the real launcher: nobody else."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from gpl_core.graph.launches import environment, spark_submit
from tests.support import JVM, small_config

ROOT = Path(__file__).parents[2]
JOB = """
import json, os
from spark_jobs.session import start_session
from tests.support import listening
spark = start_session("ports")
spark.range(1).count()
print(json.dumps([sorted(listening(pid)) for pid in (os.getppid(), os.getpid())]))
"""


@pytest.mark.spark
@pytest.mark.parametrize("by_hand", [pytest.param(False, marks=pytest.mark.slow), True])
def test_with_a_local_master_driver_blocks_and_ui_are_on_loopback(tmp_path, by_hand):
    """As `gpl run` starts it, with the UI on; and typed by hand, without our environment."""
    script = tmp_path / "job.py"
    script.write_text(JOB)
    options = ["--master", "local[1]", "--driver-java-options", JVM]
    config = small_config(tmp_path, {"launch": {
        "spark_submit": options if by_hand else [*options, "--conf", "spark.ui.enabled=true"]
    }})  # fmt: skip
    command = spark_submit(config, "spark_jobs/session.py", [])
    env = {name: value for name, value in os.environ.items() if name != "SPARK_LOCAL_IP"}
    done = subprocess.run(
        [*command[:-1], str(script)], env={**env, **({} if by_hand else environment(config)), "PYTHONPATH": str(ROOT)},
        cwd=tmp_path, text=True, capture_output=True, timeout=280,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    jvm, python = json.loads(done.stdout.splitlines()[-1])
    assert jvm == ["127.0.0.1"], "driver, block manager, gateway"
    assert python in ([], ["127.0.0.1"])
