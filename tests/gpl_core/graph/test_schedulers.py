"""Plans for schedulers: JSON that can be run, and a DAG file that needs nothing of ours."""

from __future__ import annotations

import ast
import itertools
import json
import os
import shlex
import subprocess
import sys
import types
from datetime import UTC, datetime
from pathlib import Path

import pytest

from gpl_core.cli import main
from gpl_core.graph.steps import STEPS
from tests.support import config_file

AIRFLOW = os.environ.get("GPL_AIRFLOW_PYTHON") or Path(__file__).parents[3] / ".venv-airflow" / "bin" / "python"


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

    errors = {n: type(n, (Exception,), {}) for n in ("AirflowException", "AirflowFailException")}
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


def test_the_dag_runs_every_launch_in_order_for_its_logical_date(plan, monkeypatch, tmp_path):
    found = load(plan("--format", "airflow")[1], monkeypatch, {})
    names = list(found["TASKS"])
    assert [step for name in names for step in name.split("-")] == [s.name for s in STEPS]
    assert "encode_items-train_tokenizer-assign_sids" in names
    assert len(names) == 11
    assert found["order"] == list(itertools.pairwise(names))
    assert found["FIRST"] == (2026, 1, 3)
    assert found["dag"].named["catchup"] is True
    # the run date is the day that has ended, not the day on which the run starts
    assert found["dag"].named["schedule"] == ("0 0 * * *", {"timezone": "UTC"})
    assert found["dag"].named["default_args"]["retries"] == 3
    words = shlex.split(found["TASKS"]["samples-sequences"])
    assert Path(words[0]).name == "spark-submit"
    assert words[-2:] == ["--run-date", "%RUN_DATE%"]
    assert "--bulk-through 2026-01-02" in found["HISTORY"]


def test_an_isolated_dag_has_a_task_per_step(plan, monkeypatch):
    found = load(plan("--format", "airflow", "--isolated")[1], monkeypatch, {})
    assert list(found["TASKS"]) == [s.name for s in STEPS]


@pytest.mark.parametrize(("day", "history"), [(3, ["history"]), (4, [])])
def test_a_task_runs_its_step_for_the_logical_date_and_history_on_the_first_date_alone(plan, monkeypatch, day, history):
    context = {"dag_run": types.SimpleNamespace(logical_date=datetime(2026, 1, day, tzinfo=UTC))}
    found = load(plan("--format", "airflow")[1], monkeypatch, context)
    names = found["function"].__globals__
    ran: list[tuple] = []
    names.update(HISTORY="history", TASKS={"ingest": "ingest"}, launch=lambda *given: ran.append(given))
    found["function"]("ingest")
    assert ran == [(command, f"2026-01-0{day}") for command in [*history, "ingest"]]
    context["dag_run"].logical_date = None
    with pytest.raises(found["AirflowFailException"], match="with a logical date"):
        found["function"]("ingest")


@pytest.mark.parametrize(
    ("code", "raised"),
    [(0, None), (1, "AirflowException"), (137, "AirflowException"), *((n, "AirflowFailException") for n in (2, 3, 4))],
)
def test_exit_codes_are_what_airflow_is_told(plan, monkeypatch, code, raised):
    found = load(plan("--format", "airflow", "--only", "samples")[1], monkeypatch, {})
    script = f"import sys; assert sys.argv[1] == '2026-01-05'; sys.exit({code})"
    command = shlex.join([sys.executable, "-c", script, "%RUN_DATE%"])
    if raised is None:
        found["launch"](command, "2026-01-05")
        return
    with pytest.raises(found[raised]) as caught:
        found["launch"](command, "2026-01-05")
    assert type(caught.value).__name__ == raised


@pytest.mark.slow
@pytest.mark.skipif(not Path(AIRFLOW).exists(), reason=f"{AIRFLOW} is not there: make .venv-airflow")
def test_airflow_itself_loads_the_dag_and_runs_it_for_a_date(plan, tmp_path):
    """The plan's DAG file in Airflow's own bag, then run by Airflow; its commands only note themselves and leave."""
    dags, ran = tmp_path / "dags", tmp_path / "ran"
    dags.mkdir()
    text = plan("--format", "airflow", "--isolated")[1]
    start = text.index("TASKS = {")
    names = [s.name for s in STEPS]
    # On the second date `samples` breaks a contract.
    script = "import sys; print(*sys.argv[1:], file=open(sys.argv[1], 'a')); sys.exit(3 * (sys.argv[2:] == BAD))"
    script = script.replace("BAD", "['samples', '2026-01-04']")
    steps = {n: shlex.join([sys.executable, "-c", script, str(ran), n, "%RUN_DATE%"]) for n in names}
    text = text[:start] + f"TASKS = {steps!r}\n" + text[text.index("\n}\n", start) + 3 :]
    history = next(line for line in text.splitlines() if line.startswith("HISTORY = "))
    text = text.replace(history, f"HISTORY = {shlex.join([sys.executable, '-c', script, str(ran), 'history', ''])!r}")
    (dags / "gpl.py").write_text(text, encoding="utf-8")
    env = {
        "PATH": os.environ["PATH"], "HOME": str(tmp_path), "AIRFLOW_HOME": str(tmp_path),
        "AIRFLOW__CORE__LOAD_EXAMPLES": "False", "AIRFLOW__CORE__DAGS_FOLDER": str(dags),
    }  # fmt: skip
    probe = [AIRFLOW, str(Path(__file__).with_name("airflow_run.py")), str(dags), "2026-01-03", "2026-01-04"]
    for command in ([AIRFLOW, "-m", "airflow", "db", "migrate"], probe):
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["errors"] == {}
    assert found["upstream"] == {n: [] if before is None else [before] for before, n in zip([None, *names], names)}
    assert (found["retries"], found["depends_on_past"], found["catchup"]) == ([3], [True], True)
    assert found["dates"] == ["2026-01-03", "2026-01-04", "2026-01-05"]
    good, bad = found["runs"]
    assert (good["state"], set(good["tasks"].values())) == ("success", {"success"})
    assert bad["state"] == "failed"
    place = names.index("samples")
    assert [bad["tasks"][n] for n in names] == (
        ["success"] * place + ["failed"] + ["upstream_failed"] * (len(names) - place - 1)
    )
    lines = [line.split()[1:] for line in ran.read_text(encoding="utf-8").splitlines()]
    days = ("2026-01-03", "2026-01-04")
    assert lines == [["history"], *([n, days[0]] for n in names), *([n, days[1]] for n in names[: place + 1])]


def test_a_dag_with_force_or_an_unknown_format_is_refused(plan):
    code, _, error = plan("--format", "airflow", "--force")
    assert code == 2
    assert "--force would repeat every step" in error
    assert plan("--format", "yaml")[0] == 2
