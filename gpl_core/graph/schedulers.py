"""The plan in the words of a scheduler: JSON, a shell script, or a file with an Airflow DAG."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from datetime import date, timedelta

from gpl_core.config import Config
from gpl_core.errors import UsageError
from gpl_core.graph.launches import Launch, Source, command, environment, shell
from gpl_core.graph.steps import STEPS

FORMATS = ("shell", "json", "airflow")
_LOGICAL_DATE = "%RUN_DATE%"  # stands for the run date in a task's command

_DAG = '''"""Daily run of GPL, a task per step. Written by `gpl plan --format airflow`: make it anew, do not edit it.

The logical date is the run date D: it runs at the end of D, and does not wait for slices that the platform writes late.
Exit codes: 0 (done, or nothing to do) is success; 2 (configuration), 3 (contract or gate) and 4 (an input is missing)
fail at once, since a retry cannot help; any other is tried again. A step that is done ends at once: clear tasks freely.
"""

from __future__ import annotations

import os
import shlex
import subprocess
from datetime import datetime, timedelta, timezone

try:  # Airflow 3
    from airflow.sdk import DAG, get_current_context, task
    from airflow.sdk.exceptions import AirflowException, AirflowFailException
except ImportError:  # Airflow 2
    from airflow import DAG
    from airflow.decorators import task
    from airflow.exceptions import AirflowException, AirflowFailException
    from airflow.operators.python import get_current_context
from airflow.timetables.interval import CronDataIntervalTimetable

FIRST = @FIRST@
ENVIRONMENT = @ENVIRONMENT@
HISTORY = @HISTORY@  # before the first date, once
STEPS = @STEPS@


def launch(command: str, run_date: str) -> None:
    """Run one launcher command for `run_date` and turn its exit code into what Airflow understands."""
    command = command.replace("@DATE@", run_date)
    print("running", command)
    code = subprocess.run(shlex.split(command), env={**os.environ, **ENVIRONMENT}, check=False).returncode
    if code in (2, 3, 4):
        raise AirflowFailException(f"exit code {code}: a retry cannot help; see the step's message above")
    if code:
        raise AirflowException(f"exit code {code}")


with DAG(
    dag_id=@NAME@,
    description="Pseudo-labels and training feed of one date",
    # Airflow 3 reads "@daily" as a trigger whose logical date is the day that begins; this one's is the day that ends.
    schedule=CronDataIntervalTimetable("0 0 * * *", timezone="UTC"),
    start_date=datetime(*FIRST, tzinfo=timezone.utc),
    catchup=True,  # backfill: every logical date from the first one on
    max_active_runs=1,  # a date builds on the ones before it
    default_args={
        "retries": @RETRIES@,
        "retry_delay": timedelta(minutes=10),
        "depends_on_past": True,
    },
    tags=["gpl"],
) as dag:

    @task
    def run_step(step: str) -> None:
        logical_date = get_current_context()["dag_run"].logical_date
        if logical_date is None:
            raise AirflowFailException("trigger this DAG with a logical date: it is the run date")
        run_date = logical_date.strftime("%Y-%m-%d")
        if step == "ingest" and HISTORY and run_date == datetime(*FIRST).strftime("%Y-%m-%d"):
            launch(HISTORY, run_date)
        launch(STEPS[step], run_date)

    previous = None
    for name in STEPS:
        current = run_step.override(task_id=name)(name)
        if previous is not None:
            previous >> current
        previous = current
'''


def render(form: str, launches: Sequence[Launch], source: Source, config: Config, *, force: bool = False) -> str:
    """The text of the plan in `form`, one of FORMATS."""
    if form == "json":
        return _json(launches, source, config, force)
    if form == "airflow":
        return _airflow(launches, source, config, force)
    lines = []
    for launch in launches:
        lines.append(f"# {launch.label}")
        lines.append(shell(command(launch, launch.dates, source, config, force=force), environment(config)))
    return "\n".join(lines)


def _json(launches: Sequence[Launch], source: Source, config: Config, force: bool) -> str:
    body = [
        {
            "steps": [s.name for s in launch.steps],
            "launcher": launch.steps[0].launcher,
            "dates": [d.isoformat() for d in launch.dates],
            "argv": command(launch, launch.dates, source, config, force=force),
            "env": environment(config),
        }
        for launch in launches
    ]
    return json.dumps(body, indent=1)


def _airflow(launches: Sequence[Launch], source: Source, config: Config, force: bool) -> str:
    """A DAG over the steps of `launches`; its dates are Airflow's, from the first date of the plan on."""
    chosen = [step for step in STEPS if any(step in launch.steps for launch in launches)]
    if not chosen:
        raise UsageError("gpl plan --format airflow: no step is left to schedule")
    if force:
        raise UsageError("gpl plan --format airflow: --force would run every step anew each time; clear tasks instead")
    first = max(launch.dates[0] for launch in launches)  # ingest alone may begin earlier, with history
    if all(step.takes_history for step in chosen):
        first = max(first, config.run.start_date)
    steps = {}
    for step in chosen:
        words = command(Launch((step,), (first,)), (first,), source, config)
        steps[step.name] = shlex.join(_LOGICAL_DATE if word == first.isoformat() else word for word in words)
    history = ""
    start = config.run.history_start
    if start is not None and start < first and chosen[0].takes_history:
        before = first - timedelta(days=1)
        dates = tuple(date.fromordinal(n) for n in range(start.toordinal(), first.toordinal()))
        history = shlex.join(command(Launch((chosen[0],), dates, before), dates, source, config))
    values = {
        "@FIRST@": repr((first.year, first.month, first.day)),
        "@ENVIRONMENT@": _listed(environment(config)),
        "@HISTORY@": repr(history),
        "@STEPS@": _listed(steps),
        "@DATE@": _LOGICAL_DATE,
        "@NAME@": repr(f"gpl_{_identifier(source.config)}"),
        "@RETRIES@": "3",
    }
    text = _DAG
    for mark, value in values.items():
        text = text.replace(mark, value)
    return text


def _listed(values: Mapping[str, str]) -> str:
    return "{\n" + "".join(f"    {k!r}: {v!r},\n" for k, v in values.items()) + "}"


def _identifier(config: str) -> str:
    name = config.rsplit("/", 1)[-1].removesuffix(".yaml").removesuffix(".yml")
    return "".join(c if c.isalnum() else "_" for c in name)
