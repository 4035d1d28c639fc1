"""Plans for schedulers: JSON that can be run, and a DAG file that needs nothing of ours."""

from __future__ import annotations

import ast
import itertools
import json
import shlex
import sys
import types
from datetime import UTC, datetime
from pathlib import Path

import pytest

from gpl_core.cli import main
from gpl_core.pipeline import STEPS
from tests.support import config_file


@pytest.fixture
def plan(tmp_path, capsys):
    """Print a plan; returns exit code, stdout and stderr."""
    config = str(config_file(tmp_path, {"run": {"history_start": "2025-12-24"}}))

    def run(*arguments: str) -> tuple[int, str, str]:
        code = main(["plan", "--config", config, *arguments])
        said = capsys.readouterr()
        return code, said.out, said.err

    return run


def test_the_json_plan_holds_the_commands_of_the_shell_plan(plan):
    commands = [line for line in plan()[1].splitlines() if not line.startswith("# ")]
    launches = json.loads(plan("--format", "json")[1])
    assert [shlex.split(c)[-len(x["argv"]) :] for c, x in zip(commands, launches, strict=True)] == [
        x["argv"] for x in launches
    ]
    assert [s for x in launches for s in x["steps"]] == [s.name for s in STEPS]
    assert launches[0]["dates"][0] == "2025-12-24"


class _Recorder:
    """Stands for Airflow's names where the file uses them: Airflow itself is no dependency of this project."""

    def __init__(self, *given, **named):
        self.given, self.named = given, named

    def __enter__(self):
        return self

    def __exit__(self, *given):
        return None


def load(text: str, monkeypatch, context: dict) -> dict:
    """Run a DAG file against stand-ins; returns its names."""
    made: dict = {"order": []}

    class Task(str):
        def __rshift__(self, other):
            made["order"].append((str(self), str(other)))

    def task(function):
        made["function"] = function
        function.override = lambda task_id: lambda step: Task(task_id)
        return function

    errors = {
        n: type(n, (Exception,), {}) for n in ("AirflowException", "AirflowFailException", "AirflowSkipException")
    }
    sdk = types.ModuleType("airflow.sdk")
    sdk.__dict__.update(DAG=_Recorder, task=task, get_current_context=lambda: context)
    exceptions = types.ModuleType("airflow.sdk.exceptions")
    exceptions.__dict__.update(errors)
    timetables = types.ModuleType("airflow.timetables.interval")
    timetables.__dict__.update(CronDataIntervalTimetable=lambda *given, **named: (*given, named))
    for module in (types.ModuleType("airflow"), sdk, exceptions, timetables):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    names: dict = {}
    exec(compile(text, "dag.py", "exec"), names)
    return {**names, **made}


def test_the_dag_file_imports_only_airflow_and_the_standard_library(plan):
    code, text, _ = plan("--format", "airflow")
    assert code == 0
    modules = {
        (node.module if isinstance(node, ast.ImportFrom) else node.names[0].name).split(".")[0]
        for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Import | ast.ImportFrom)
    }  # fmt: skip
    assert modules - set(sys.stdlib_module_names) == {"airflow"}


def test_the_dag_runs_every_step_in_order_for_its_logical_date(plan, monkeypatch, tmp_path):
    found = load(plan("--format", "airflow")[1], monkeypatch, {})
    names = [s.name for s in STEPS]
    assert list(found["STEPS"]) == names
    assert found["order"] == list(itertools.pairwise(names))
    assert found["FIRST"] == (2026, 1, 3)
    assert found["dag"].named["catchup"] is True
    # the run date is the day that has ended, not the day on which the run starts
    assert found["dag"].named["schedule"] == ("0 0 * * *", {"timezone": "UTC"})
    assert found["dag"].named["default_args"]["retries"] == 3
    words = shlex.split(found["STEPS"]["samples"])
    assert Path(words[0]).name == "spark-submit"
    assert words[-2:] == ["--run-date", "%RUN_DATE%"]
    assert "--bulk-through 2026-01-02" in found["HISTORY"]


@pytest.mark.parametrize(("day", "history"), [(3, ["history"]), (4, [])])
def test_a_task_runs_its_step_for_the_interval_and_history_on_the_first_date_alone(plan, monkeypatch, day, history):
    ti = types.SimpleNamespace(try_number=4, max_tries=3)
    context = {"data_interval_start": datetime(2026, 1, day, tzinfo=UTC), "ti": ti}
    found = load(plan("--format", "airflow")[1], monkeypatch, context)
    names = found["function"].__globals__
    ran: list[tuple] = []
    names.update(HISTORY="history", STEPS={"ingest": "ingest"}, launch=lambda *given: ran.append(given))
    found["function"]("ingest")
    assert ran == [(command, f"2026-01-0{day}", True) for command in [*history, "ingest"]]


@pytest.mark.parametrize(
    ("code", "last_try", "raised"),
    [(0, False, None), (1, False, "AirflowException"), (2, False, "AirflowFailException"),
     (3, True, "AirflowFailException"), (4, False, "AirflowException"), (4, True, "AirflowSkipException")],
)  # fmt: skip
def test_exit_codes_are_what_airflow_is_told(plan, monkeypatch, code, last_try, raised):
    found = load(plan("--format", "airflow", "--only", "samples")[1], monkeypatch, {})
    script = f"import sys; assert sys.argv[1] == '2026-01-05'; sys.exit({code})"
    command = shlex.join([sys.executable, "-c", script, "%RUN_DATE%"])
    if raised is None:
        found["launch"](command, "2026-01-05", last_try)
        return
    with pytest.raises(found[raised]) as caught:
        found["launch"](command, "2026-01-05", last_try)
    assert type(caught.value).__name__ == raised


def test_a_dag_with_force_or_an_unknown_format_is_refused(plan):
    code, _, error = plan("--format", "airflow", "--force")
    assert code == 2
    assert "--force would run every step anew" in error
    assert plan("--format", "yaml")[0] == 2
