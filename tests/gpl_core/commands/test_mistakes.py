"""Mistakes of a first day: the message says what is wrong, where, and what to do, without a traceback.

Others stand where their step is tested: quarantine and missing columns (test_ingest), gates (test_sid_workers), too
little random exposure (test_fit_calibrator), a raw table's columns, types, partitions and slices (test_check_raw),
wrong names in SQL (test_query), a step's own arguments (test_runs).
"""

from __future__ import annotations

import errno
import os
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gpl_core.cli import main
from gpl_core.errors import UsageError, classified, exit_code_of
from gpl_core.graph import launch_runner as running
from gpl_core.graph.launches import script_path, tool
from gpl_core.graph.prerequisites import problems
from gpl_core.graph.step_run import exit_with
from gpl_core.lakehouse.lake import Lake
from tests.support import DAY, config_file, put, small_config


@pytest.fixture
def config(tmp_path) -> str:
    return str(config_file(tmp_path))


@pytest.mark.parametrize(
    ("arguments", "code", "expected"),
    [
        (["status", "--set", "anchors.cuont=3"], 2, "anchors.cuont: unknown key; did you mean count?"),
        (["status", "--set", "labels.calibrator.targetrate=1"], 2, "did you mean target_rate?"),
        (["status", "--set", "encoder.parts=[{name: minilm, wieght: 1}]"], 2, "did you mean weight?"),
        (["status", "--set", "tokeniser.codes=16"], 2, "tokeniser: unknown key; did you mean tokenizer?"),
        (["status", "--set", "labels.calibrator.target_rate=2%"], 2, "a valid number"),
        (["status", "--set", "run.start_date=2026-13-01"], 2, "month must be in 1..12"),
        (["status", "--set", "run.end_date=2025-01-01"], 2, "is before start_date"),
        (["status", "--set", "monitors.fail=off"], 2, "monitors.fail"),
        (["status", "--set", "monitors={fail: [coverage], ignore: [coverage]}"], 2, "coverage are listed under"),
        (["status", "--set", "lakehouse.root=gs2://b/x"], 2, "correct lakehouse.root"),
        (["status", "--set", "lakehouse.tables={raw_item: /x}"], 2, "no such table: raw_item"),
        (["run", "--only", "samples", "--set", "lakehouse.root=/dev/null/x"], 4, "/dev/null/x"),
        (["simulate", "--set", "lakehouse.root=/dev/null/x"], 2, "correct lakehouse.root"),
        (["status", "--set", "anchors.count=three"], 2, "a valid integer (got 'three')"),
        (["status", "--set", "launch.deepspeed=--num_accelerators 2"], 2, "expected a list, such as [a, b]"),
        (["status", "--set", "anchors=3"], 2, "anchors: expected a mapping of keys to values"),
        (["status", "--set", "anchors.count"], 2, "expected section.key=value"),
        (["run", "--run-date", "03.01.2026"], 2, "'03.01.2026' is not a date; expected YYYY-MM-DD"),
        (["run", "--start-date", "2026-01-05", "--end-date", "2026-01-03"], 2, "is before --start-date 2026-01-05"),
        (["run", "--start-date", "2026-01-05"], 2, "belong together"),
        (["run", "--only", "sample"], 2, "no step 'sample'; did you mean samples?"),
        (["sql", "DROP TABLE items"], 2, "gpl sql only reads"),
        (["sql", "SELECT", "x.py", "y.py", "FROM", "items"], 2, "put the statement in quotes"),
        (["sql", "SELECT * FROM itmes"], 2, "did you mean items?"),
        (["rollback", "calibrator", "2026-01-01-nosuch"], 4, "no version 2026-01-01-nosuch; existing: none"),
        (["sql", "SELECT * FROM items"], 4, "run the step ingest first"),
        (["explain", "--user", "u", "--item", "i", "--run-date", "2026-01-03"], 4, "pseudo_labels"),
    ],
)  # fmt: skip
def test_a_mistake_is_explained_in_one_message(config, monkeypatch, capsys, arguments, code, expected):
    if "not on PATH" in expected:
        monkeypatch.setattr(running, "command", lambda *given, **named: ["/nowhere/spark-submit", "x.py"])
    assert main([arguments[0], "--config", config, *arguments[1:]]) == code
    error = capsys.readouterr().err
    assert expected in error
    assert error.startswith("error: ")
    assert "Traceback" not in error


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (b"", "lakehouse: required"),
        (b"\xff\xfe", "not text in UTF-8"),
        (b"- a\n- b\n", "expected a mapping of sections"),
        (b"run: [", "not valid YAML"),
        (b"run: {start_date: 2026-02-30, end_date: 2026-03-01}\n", "day is out of range"),
    ],
)
def test_a_file_that_is_no_configuration(tmp_path, capsys, body, expected):
    (tmp_path / "x.yaml").write_bytes(body)
    assert main(["status", "--config", str(tmp_path / "x.yaml")]) == 2
    error = capsys.readouterr().err
    assert expected in error
    assert "x.yaml" in error


def test_a_mistyped_shipped_configuration_is_named(capsys):
    assert main(["status", "--config", "quickstrat"]) == 2
    assert "did you mean quickstart?" in capsys.readouterr().err


def test_raw_tables_that_are_parquet_alone_or_empty_are_told_of(config, tmp_path, capsys):
    plain = tmp_path / "plain" / "dt=2026-01-03"
    plain.mkdir(parents=True)
    pq.write_table(pa.table({"user_id": ["u"]}), plain / "a.parquet")
    put(Lake(str(tmp_path / "lake")), "raw_items", [])
    given = f"lakehouse.tables={{raw_candidates: {plain.parent}}}"
    assert main(["check-raw", "--config", config, "--set", given]) == 3
    said = capsys.readouterr().out
    assert f"CONVERT TO DELTA parquet.`{plain.parent}` PARTITIONED BY (dt DATE)" in said
    assert "raw_items: it has no rows" in said
    assert "raw_impressions: there is no Delta table" in said


@pytest.mark.spark
def test_spark_without_deltas_jars_says_what_to_add(config):
    command = [tool("spark-submit"), "--master", "local[1]", script_path("spark_jobs/samples.py")]
    command += ["--config", config, "--run-date", DAY.isoformat()]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    assert done.returncode == 2, done.stdout
    assert "error: Delta's jars are not on the class path: start with spark-submit --packages" in done.stdout


def test_a_java_that_spark_cannot_use_is_named_with_what_it_says(tmp_path, monkeypatch):
    java = tmp_path / "java"
    java.write_text("#!/bin/sh\necho 'openjdk version \"11.0.2\" 2019-01-15' >&2\n")
    java.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    (problem,) = [p for p in problems() if "Java" in p]
    assert problem.startswith("Java 17 (or 21) is needed by Spark 4.0")
    assert '"11.0.2"' in problem


@pytest.fixture
def unchecked(monkeypatch) -> None:
    """A launch is started though its inputs are not there."""
    monkeypatch.setattr(running, "_refuse_blocked", lambda *given: None)


def test_a_launcher_that_is_not_installed_is_named(config, monkeypatch, unchecked, capsys):
    monkeypatch.setattr(running, "command", lambda *given, **named: ["no-such-launcher"])
    assert main(["run", "--config", config, "--only", "samples"]) == 2
    assert "error: no-such-launcher is not on PATH" in capsys.readouterr().err


@pytest.mark.parametrize("table", ["raw_impressions", "raw_candidates"])
def test_a_mistyped_run_date_is_warned_of(config, tmp_path, monkeypatch, unchecked, capsys, table):
    put(Lake(str(tmp_path / "lake")), table, 3)
    monkeypatch.setattr(running, "command", lambda *given, **named: [sys.executable, "-c", ""])
    assert main(["run", "--config", config, "--only", "samples", "--run-date", "2062-01-03"]) == 0
    assert f"warning: {table} has no rows for 2062-01-03; it has {DAY} to {DAY}" in capsys.readouterr().err
    assert main(["run", "--config", config, "--only", "samples", "--run-date", DAY.isoformat()]) == 0
    assert "warning" not in capsys.readouterr().err


def test_a_root_that_does_not_exist_is_noted(config, capsys):
    assert main(["status", "--config", config, "--run-date", "2026-01-03"]) == 0
    assert "does not exist yet" in capsys.readouterr().err


@pytest.mark.parametrize("command", [["summary"], ["status"], ["sql", "SELECT * FROM coverage"], ["run"]])
def test_a_relative_root_is_told_with_the_folder_it_was_looked_for_in(tmp_path, monkeypatch, capsys, command):
    path = str(config_file(tmp_path))
    arguments = [command[0], "--config", path, "--set", "lakehouse.root=some/lake", *command[1:]]
    monkeypatch.chdir(tmp_path)
    assert bool(main(arguments)) == (command != ["status"])
    note = f"note: lakehouse.root, some/lake, is relative: it was looked for in {tmp_path}, which has no such folder"
    assert note in capsys.readouterr().err
    (tmp_path / "some" / "lake").mkdir(parents=True)
    main(arguments)
    assert "note:" not in capsys.readouterr().err


def test_a_launch_that_dies_names_what_the_machine_lacks(config, monkeypatch, unchecked, capsys):
    monkeypatch.setattr(running, "command", lambda *given, **named: [sys.executable, "-c", "import sys; sys.exit(1)"])
    monkeypatch.setenv("PATH", "/nowhere")
    assert main(["run", "--config", config, "--only", "samples"]) == 1
    error = capsys.readouterr().err
    assert "missing: Java 17 is needed by Spark: install openjdk-17-jre-headless" in error
    assert "missing: a C++ compiler is needed" in error


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        ("java.lang.OutOfMemoryError: Java heap space", "--driver-memory"),
        ("torch.OutOfMemoryError: CUDA out of memory.", "tokens_per_batch"),
        ("RuntimeError: [Errno 98] Address already in use", "--master_port"),
        ("OSError: [Errno 28] No space left on device", "a disk is full"),
        ("java.lang.ClassNotFoundException: io.delta.sql.Delta", "--packages"),
    ],
)
def test_what_only_a_library_saw_is_told_once_with_what_to_do(config, monkeypatch, unchecked, capsys, words, hint):
    child = f"import sys; print({words!r}, file=sys.stderr); sys.exit(1)"
    monkeypatch.setattr(running, "command", lambda *given, **named: [sys.executable, "-c", child])
    assert main(["run", "--config", config, "--only", "samples"]) == 1
    hints = [line for line in capsys.readouterr().err.splitlines() if line.startswith("hint: ")]
    assert len(hints) == 1
    assert hint in hints[0]


def test_what_a_step_lists_below_its_error_reaches_the_terminal(config, monkeypatch, unchecked, capsys):
    said = "loaded\nerror: not published:\n  dead codes: 7\n  collisions: .3\nended\nerror: no slice"
    child = f"import sys; print({said!r}, file=sys.stderr); sys.exit(3)"
    monkeypatch.setattr(running, "command", lambda *given, **named: [sys.executable, "-c", child])
    assert main(["run", "--config", config, "--only", "samples"]) == 3
    assert "error: not published:\n  dead codes: 7\n  collisions: .3\nerror: no slice\n" in capsys.readouterr().err


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS, errno.ENOTDIR])
def test_a_step_on_a_read_only_lakehouse_says_which_path(number, capsys):
    error = OSError(number, os.strerror(number), "/lake/tables/items")
    assert isinstance(classified(error), UsageError)
    assert exit_with(error) == 2
    assert "error: /lake/tables/items: " in capsys.readouterr().err


def test_a_full_disk_stays_unexpected():
    assert exit_code_of(OSError(errno.ENOSPC, "No space left on device", "/lake")) == 1


def test_a_model_folder_that_is_none_is_named(tmp_path):
    pytest.importorskip("torch")
    from gpl_core.errors import MissingInputError
    from gpu_workers.inputs.interest import base_checkpoint

    config = small_config(tmp_path, {"interest": {"base_model": str(tmp_path / "qwen")}})
    with pytest.raises(MissingInputError, match=r"interest\.base_model: .*qwen is not a model folder .*config\.json"):
        base_checkpoint(config)
