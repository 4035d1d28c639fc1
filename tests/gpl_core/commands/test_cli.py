"""The `gpl` command: invalid arguments exit with 2, plans only print, runs pass on exit codes and skip what is done."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from gpl_core.cli import COMMANDS, main, make_parser
from gpl_core.commands.tables import dictionary
from gpl_core.errors import UsageError
from gpl_core.graph import launch_runner as running
from gpl_core.graph.launches import tool
from gpl_core.graph.planner import Planner
from gpl_core.graph.steps import STEPS
from gpl_core.graph.terminal import console
from tests.gpl_core.toy import Toy
from tests.support import DAY, ONE, config_file, put, small_config

ROOT = Path(__file__).parents[3]


@pytest.fixture
def config(tmp_path) -> str:
    return str(config_file(tmp_path))


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """Both run dates of `small_config` done in every step."""
    root = tmp_path_factory.mktemp("finished")
    toy = Toy(small_config(root))
    days = [DAY + i * ONE for i in range(-1, 3)]
    toy.raw(days)
    toy.run("ingest", days[0])
    toy.run_pending(days[1:3])
    return root


def tree(root: Path) -> dict[str, int]:
    return {str(p): p.stat().st_mtime_ns for p in root.rglob("*")}


# ---- words -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "named"),
    [
        (["paln"], "'paln'; did you mean plan?"),
        (["plan"], "--config"),
        (["plan", "--config", "nowhere.yaml"], "nowhere.yaml"),
        (["plan", "--config", "CONFIG", "--run-date", "tomorrow"], "'tomorrow' is not a date"),
        (["plan", "--config", "CONFIG", "--run-date", "2026-01-03", "--end-date", "2026-01-04"], "either --run-date"),
        (["plan", "--config", "CONFIG", "--start-date", "2026-01-03"], "belong together"),
        (["plan", "--config", "CONFIG", "--start-date", "2026-01-04", "--end-date", "2026-01-03"], "is before"),
        (["plan", "--config", "CONFIG", "--onyl", "samples"], "--onyl"),
        (["plan", "--config", "CONFIG", "--only", "smaples"], "no step 'smaples'; did you mean samples?"),
        (["plan", "--config", "CONFIG", "--from", "evaluate_truth"], "gpl judge"),
        (["run", "--config", "CONFIG", "--set", "anchors.cuont=1", "--set", "x"], "2 problems"),
        (["status", "--config", "CONFIG", "--set", "run.seed=x"], "run.seed"),
        (["simulate", "--config", "CONFIG", "--users", "many"], "--users"),
        (["simulate", "--config", "CONFIG", "--world", "flat"], "flat"),
        (["import-reviews", "--config", "CONFIG", "--items", "x"], "--sequences"),
        (["tables", "--config", "CONFIG"], "--config"),
    ],
)
def test_invalid_arguments_exit_2_and_are_named(config, given, named, capsys):
    assert main([config if g == "CONFIG" else g for g in given]) == 2
    said = capsys.readouterr()
    assert named in said.err
    assert said.err.startswith("error: ")
    assert said.out == ""


def test_a_misspelled_option_of_any_command_is_named_before_what_is_missing():
    parsers = next(a.choices for a in make_parser()._actions if isinstance(a.choices, dict))
    tried = 0
    for name, parser in parsers.items():
        assert all(action.help for action in parser._actions), name
        known = {o for action in parser._actions for o in action.option_strings if len(o) > 6}
        for option in known:
            wrong = f"{option[:4]}{option[5:]}"  # a letter is left out
            with pytest.raises(UsageError, match=f"gpl {name}: unknown argument {wrong}; did you mean --") as error:
                parser.parse_args([f"{wrong}=x"])
            tried += option in str(error.value).partition("usage")[0]
    assert tried > 100, "but where two are as near"


def test_a_configuration_that_is_missing_or_stands_before_the_command(monkeypatch, capsys):
    monkeypatch.delenv("GPL_CONFIG", raising=False)
    assert main(["explain", "--user", "u"]) == 2
    said = "required: --config, --item, --run-date; the environment variable GPL_CONFIG stands in for --config\n"
    assert said in capsys.readouterr().err
    assert main(["--config", "quickstart", "status"]) == 2
    assert "unknown argument --config; options come after the command: gpl COMMAND --config" in capsys.readouterr().err


def test_lines_that_go_to_a_file_are_not_broken(capsys):
    console().print("word " * 100)
    assert capsys.readouterr().out.count("\n") == 1


def test_bare_gpl_shows_the_commands_by_what_they_are_for(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    assert main([]) == 2
    said = capsys.readouterr().out
    assert all(f"\n  {name} " in said for name in COMMANDS)
    assert [line for line in said.splitlines() if re.fullmatch(r"\w+:", line)] == [
        "Start:", "Run:", "Results:", "Upkeep:", "Reference:", "examples:",
    ]  # fmt: skip
    with pytest.raises(SystemExit):
        main(["--help"])
    assert capsys.readouterr().out == said.removesuffix("\n")
    listed = said[: said.index("examples:")].splitlines()
    assert max(map(len, listed)) <= 60


@pytest.mark.parametrize("name", COMMANDS)
def test_the_examples_of_a_command_are_valid(name):
    assert COMMANDS[name].examples
    for example in COMMANDS[name].examples:
        assert make_parser().parse_args([name, *shlex.split(example.partition(">")[0])]).command == name


def test_the_configuration_may_come_from_the_environment(config, monkeypatch, capsys):
    monkeypatch.setenv("GPL_CONFIG", config)
    assert main(["plan", "--run-date", "2026-01-03"]) == 0
    assert f"--config {config}" in capsys.readouterr().out
    assert main(["plan", "--config", "nowhere.yaml"]) == 2


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_knows_every_command(shell, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["--print-completion", shell])
    script = tmp_path / "gpl"
    script.write_text(capsys.readouterr().out)
    assert all(name in script.read_text() for name in COMMANDS)
    if shutil.which(shell):
        subprocess.run([shell, "-n", str(script)], check=True)


def test_the_version_names_the_commit(capsys):
    with pytest.raises(SystemExit) as left:
        main(["--version"])
    assert left.value.code == 0
    head = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    expected = f"commit {head.stdout.strip()}" if not head.returncode else "commit unknown"
    assert re.fullmatch(rf"gpl \d+\.\d+\.\d+ \({expected}\w*(-dirty)?\)\n", capsys.readouterr().out)


def test_the_command_line_imports_neither_torch_nor_spark():
    code = (
        "import sys; import gpl_core.cli, gpl_core.simulation.marketplace, gpl_core.simulation.reviews; "
        "print(sorted({m.split('.')[0] for m in sys.modules} & "
        "{'torch', 'pyspark', 'transformers', 'peft', 'deepspeed', 'petastorm', 'delta'}))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_starting_gpl_does_not_import_the_simulation():
    code = "import sys, gpl_core.cli; print([m for m in sys.modules if m in ('PIL', 'gpl_core.simulation.recall')])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("name", [n for n, c in COMMANDS.items() if c.needs_config])
def test_every_command_offers_a_configuration_and_help(name, capsys):
    with pytest.raises(SystemExit) as left:
        main([name, "--help"])
    assert left.value.code == 0
    said = capsys.readouterr().out
    assert "--config" in said
    assert COMMANDS[name].help.split()[0] in said


def test_a_shadow_run_can_be_run_and_looked_at_and_nothing_else():
    allowed = {n for n, c in COMMANDS.items() if c.needs_config and c.in_shadow}
    assert allowed == {
        "plan", "run", "status", "shadow", "compare", "judge", "evaluate", "summary", "sql", "explain", "check-raw",
    }  # fmt: skip


def test_tables_prints_the_data_dictionary(capsys):
    assert main(["tables"]) == 0
    assert capsys.readouterr().out == dictionary() + "\n"


# ---- plan ------------------------------------------------------------------------------------------------------


def test_a_plan_prints_commands_that_begin_with_the_launcher_and_writes_nothing(config, tmp_path, capsys):
    before = tree(tmp_path)
    assert main(["plan", "--config", config, "--run-date", "2026-01-03", "--isolated"]) == 0
    lines = capsys.readouterr().out.splitlines()
    titles, commands = [x[2:] for x in lines if x.startswith("# ")], [x for x in lines if not x.startswith("# ")]
    assert titles == [s.name for s in STEPS]
    for step, line in zip(STEPS, commands, strict=True):
        words = [w for w in shlex.split(line) if not re.match(r"[A-Z_]+=", w)]
        assert Path(words[0]).name == {"spark": "spark-submit", "deepspeed": "deepspeed"}[step.launcher]
        assert str(ROOT / step.script) in words
        assert words[-2:] == ["--run-date", "2026-01-03"]
    assert tree(tmp_path) == before


def test_a_relative_configuration_is_printed_so_that_it_works_from_anywhere(config, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["plan", "--config", "test.yaml", "--only", "samples"]) == 0
    assert f"--config {config} " in capsys.readouterr().out


# ---- status ----------------------------------------------------------------------------------------------------


def test_status_shows_every_step_of_every_date(finished, tmp_path, capsys):
    shutil.copytree(finished / "lake", tmp_path / "lake")
    toy = Toy(small_config(tmp_path))
    assert main(["status", "--config", str(tmp_path / "test.yaml")]) == 0
    said = capsys.readouterr().out
    assert len(re.findall(r"│ done ", said)) == 2 * len(STEPS)
    toy.write("raw_candidates", DAY)
    assert main(["status", "--config", str(tmp_path / "test.yaml")]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "stale" in line]
    assert len(lines) == 1
    assert "2026-01-03" in lines[0]
    assert "ingest" in lines[0]


def test_status_names_an_artifact_that_is_damaged(finished, tmp_path, capsys, caplog):
    shutil.copytree(finished / "lake", tmp_path / "lake")
    config = str(config_file(tmp_path))
    manifest, other = (tmp_path / "lake" / "artifacts" / "calibrator").glob("*-*/manifest.json")
    for path in (manifest, other):
        path.write_text(path.read_text()[:-40])
    assert main(["status", "--config", config]) == 0
    assert f"{manifest} is broken" in caplog.text
    assert f"{manifest.parent.name} (damaged)" in re.sub(r"[\s│]+", " ", capsys.readouterr().out)


def test_status_without_tables_is_an_answer(config, capsys):
    assert main(["status", "--config", config, "--run-date", "2026-01-03"]) == 0
    assert capsys.readouterr().out.count("blocked") == len(STEPS)


def test_a_table_of_another_contract_exits_3(config, tmp_path, capsys):
    lake = Planner(small_config(tmp_path)).lake
    put(lake, "pair_scores", 1)
    shutil.move(lake.uri("pair_scores"), lake.uri("raw_impressions"))
    assert main(["status", "--config", config]) == 3
    assert "holds table 'pair_scores', not raw_impressions" in capsys.readouterr().err


def test_rolling_back_and_promoting_from_the_command_line(finished, tmp_path, capsys):
    shutil.copytree(finished / "lake", tmp_path / "lake")
    config = str(config_file(tmp_path))
    version = Planner(small_config(tmp_path)).artifacts.in_force("calibrator", DAY + ONE).version
    given = ["--config", config, "calibrator", version]
    assert main(["rollback", *given, "--reason", "labels too high", "--from-date", "2026-01-04"]) == 0
    assert "gpl status shows what is stale" in capsys.readouterr().out
    assert main(["status", "--config", config]) == 0
    stale = [line for line in capsys.readouterr().out.splitlines() if "│ stale" in line]
    assert len(stale) >= 2
    assert all("2026-01-04" in line for line in stale), "the day before goes on using it"
    assert main(["rollback", *given, "--from-date", "2026-01-04"]) == 0
    assert "already in that state" in capsys.readouterr().out
    assert main(["promote", *given]) == 0
    assert main(["status", "--config", config]) == 0
    assert "│ stale" not in capsys.readouterr().out
    assert main(["rollback", "--config", config, "calibrator", "none-such"]) == 4
    assert version in capsys.readouterr().err


def test_rows_that_are_wider_than_the_terminal_are_shown_field_by_field(finished, tmp_path, capsys, monkeypatch):
    shutil.copytree(finished / "lake", tmp_path / "lake")
    config = str(config_file(tmp_path))
    statement = "SELECT 'a[b]c' AS short, repeat('x', 90) AS long_text, 7 AS n"
    shown = {}
    for width in (60, 120):
        monkeypatch.setattr("gpl_core.graph.terminal._WIDTH", width)
        assert main(["sql", "--config", config, statement]) == 0
        shown[width] = capsys.readouterr().out.splitlines()
    assert shown[60][1:] == ["short      a[b]c", "long_text  " + "x" * 90, "n          7"]
    assert shown[60][0].startswith("row 1 ")
    assert any("a[b]c" in line and "x" * 90 in line and "7" in line for line in shown[120])


# ---- run -------------------------------------------------------------------------------------------------------


def test_a_run_with_nothing_to_do_starts_nothing_writes_nothing_and_says_so(finished, tmp_path, capsys, monkeypatch):
    shutil.copytree(finished / "lake", tmp_path / "lake")
    config = str(config_file(tmp_path))
    before = tree(tmp_path)
    monkeypatch.setattr(running, "_launch", lambda *given: pytest.fail(f"started {given[0]}"))
    assert main(["run", "--config", config]) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert tree(tmp_path) == before


def stub(monkeypatch, code: str) -> list[list[str]]:
    """Make every launch run `code` in Python instead; the real commands in order."""
    commands: list[list[str]] = []
    real = running.command

    def command(*given, **more):
        commands.append(real(*given, **more))
        return [sys.executable, "-c", code, *commands[-1][1:]]

    monkeypatch.setattr(running, "command", command)
    monkeypatch.setattr(running, "_refuse_blocked", lambda *given: None)  # these run without tables
    return commands


REPORT = {
    "step": "samples", "run_date": "2026-01-03", "status": "done", "seconds": 1.5, "rows_out": 1234,
    "rows_quarantined": 5,
}  # fmt: skip


def test_a_run_shows_each_steps_report_and_keeps_its_output(config, tmp_path, monkeypatch, capsys):
    text = f"print({json.dumps(REPORT)!r}); print('{{noise'); print('[]'); import sys; print('a log', file=sys.stderr)"
    commands = stub(monkeypatch, text)
    assert main(["run", "--config", config, "--only", "samples", "--only", "encode_items"]) == 0
    said = capsys.readouterr().out
    assert [Path(c[0]).name for c in commands] == ["deepspeed", "spark-submit"]
    assert "samples 2026-01-03: done, 1,234 rows, 5 quarantined, 1.5 s" in said
    logs = sorted((tmp_path / "lake" / "logs").glob("*/*.log"))
    assert [p.name for p in logs] == ["01-encode_items.log", "02-samples.log"]
    assert "a log" in logs[0].read_text()
    assert "{noise" in logs[0].read_text()


WARNED = {**REPORT, "details": {"warnings": ["coverage 0.1 is below 0.8", "late [rows]"]}}


@pytest.mark.parametrize(("given", "code"), [([], 0), (["--fail-on-alarm"], 3)])
def test_warnings_stand_with_their_step_and_again_at_the_end(config, monkeypatch, capsys, given, code):
    stub(monkeypatch, f"print({json.dumps(WARNED)!r})")
    arguments = ["run", "--config", config, "--only", "samples", "--run-date", "2026-01-03"]
    assert main([*arguments, *given]) == code
    lines = capsys.readouterr().out.splitlines()
    at = next(i for i, line in enumerate(lines) if "samples 2026-01-03: done" in line)
    assert lines[at + 1 : at + 3] == ["    warning coverage 0.1 is below 0.8", "    warning late [rows]"]
    assert lines[-3:] == [
        "2 warnings:", "  samples 2026-01-03: coverage 0.1 is below 0.8", "  samples 2026-01-03: late [rows]",
    ]  # fmt: skip


def test_an_interrupted_run_ends_with_one_line_that_says_how_to_go_on(config):
    """As Ctrl-C in a terminal does: SIGINT to gpl, whose launch is in a process group of its own."""
    run = subprocess.Popen(
        [sys.executable, "-c", ENDED, config], env={**os.environ, "PYTHONPATH": str(ROOT)}, text=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
    )  # fmt: skip
    child = psutil.Process(int(run.stderr.readline()))
    run.send_signal(signal.SIGINT)
    assert run.wait(timeout=30) == 130
    said = run.stderr.read()
    run.stderr.close()
    assert re.fullmatch(r"interrupted: .* run the same command to continue; log: \S+01-samples.log\n", said), said
    _, alive = psutil.wait_procs([child], timeout=30)
    assert not alive


def test_a_bar_is_shown_where_there_is_a_terminal_and_none_in_a_log_file(config, monkeypatch, capsys):
    stub(monkeypatch, f"print({json.dumps(REPORT)!r})")
    arguments = ["run", "--config", config, "--only", "samples", "--run-date", "2026-01-03"]
    assert main(arguments) == 0
    said = capsys.readouterr().out
    assert "samples 2026-01-03: done" in said
    assert "\x1b" not in said
    assert "1/1" not in said
    monkeypatch.setenv("FORCE_COLOR", "1")  # makes rich take our output for a terminal
    monkeypatch.setenv("TERM", "xterm")
    assert main(arguments) == 0
    assert "1/1" in capsys.readouterr().out


def test_a_step_is_shown_while_its_launch_is_running(config, monkeypatch, tmp_path):
    """The launch ends only after the report of its first step has been shown."""
    shown = tmp_path / "shown"
    child = (
        f"import os, signal; signal.alarm(60); os.mkfifo({str(shown)!r})\n"
        f"print({json.dumps(REPORT)!r}, flush=True); open({str(shown)!r}).read()"
    )
    stub(monkeypatch, child)
    real = running._print_result

    def say(console, line):
        real(console, line)
        os.close(os.open(shown, os.O_WRONLY))

    monkeypatch.setattr(running, "_print_result", say)
    assert main(["run", "--config", config, "--only", "samples", "--run-date", "2026-01-03"]) == 0


@pytest.mark.parametrize("code", [1, 2, 3, 4])
def test_a_failing_launch_ends_the_run_with_its_exit_code(config, monkeypatch, capsys, code):
    text = f"import sys; print('error: table x: column y', file=sys.stderr); sys.exit({code})"
    commands = stub(monkeypatch, text)
    assert main(["run", "--config", config]) == code
    said = capsys.readouterr()
    assert len(commands) == 1, "nothing is started after a failure"
    assert f"failed with exit code {code}" in said.out
    assert "error: table x: column y" in said.err


BACKFILL = """
import datetime, json, sys
from gpl_core.graph.arguments import parse_arguments
from gpl_core.graph.step_run import run_steps
from gpl_core.errors import GateError
args = parse_arguments("x", sys.argv[sys.argv.index("--config"):])
bad = {datetime.date(2026, 1, int(d)) for d in BAD}


def run_one(name, dates):
    status = "failed" if dates[0] in bad else "done"
    print(json.dumps({"step": "x", "run_date": str(dates[0]), "status": status, "seconds": 0.0, "rows_out": 0,
                      "rows_quarantined": 0, "error_class": "GateError"}), flush=True)
    if dates[0] in bad:
        raise GateError(f"bad {dates[0]}")


try:
    code = run_steps(("x",), args, run_one)
except GateError as error:
    print(f"error: {error}", file=sys.stderr)
    code = 3
sys.exit(code)
"""


@pytest.mark.parametrize(
    ("allowed", "bad", "launches"),
    [
        (0, [4], ["encode_items"]),
        (1, [4], ["encode_items", "assign_sids", "samples"]),
        (1, [4, 5], ["encode_items"]),
        (2, [4, 5], ["encode_items", "assign_sids", "samples"]),
    ],
)
def test_a_backfill_goes_on_without_as_many_failed_dates_as_are_allowed(
    config, monkeypatch, capsys, allowed, bad, launches
):
    """Dates 3 to 6; every launch fails for the `bad` ones, and leaves out those that failed in an earlier launch."""
    commands = stub(monkeypatch, BACKFILL.replace("BAD", repr(bad)))
    only = [a for n in ("encode_items", "assign_sids", "samples") for a in ("--only", n)]
    dates = ["--start-date", "2026-01-03", "--end-date", "2026-01-06", "--max-failures", str(allowed)]
    assert main(["run", "--config", config, "--isolated", *only, *dates]) == 3
    said = capsys.readouterr()
    assert [Path(next(a for a in c if a.endswith(".py"))).stem for c in commands] == launches
    assert "error: bad 2026-01-04" in said.err
    for words in commands[1:]:
        assert [words[i + 1] for i, w in enumerate(words) if w == "--skip-date"] == [f"2026-01-0{d}" for d in bad]
        assert "--max-failures" not in words, "none of the failures allowed is left"
    if len(launches) > 1:
        assert f"continuing without {', '.join(f'2026-01-0{d}' for d in bad)}" in said.out.replace("\n", " ")
        assert said.out.count("finished") == 2


def test_a_launch_that_ends_early_is_a_failure_of_the_run_whatever_is_allowed(config, monkeypatch, capsys):
    """It reports one date of four: the others were never tried."""
    report = json.dumps({**REPORT, "status": "failed", "error_class": "OSError"})
    commands = stub(monkeypatch, f"import sys; print({report!r}); sys.exit(1)")
    dates = ["--start-date", "2026-01-03", "--end-date", "2026-01-06", "--max-failures", "3"]
    assert main(["run", "--config", config, "--only", "samples", "--only", "assign_sids", *dates]) == 1
    assert len(commands) == 1
    assert "continuing" not in capsys.readouterr().out


def test_maintenance_starts_its_spark_jobs_for_the_dates_it_is_given(finished, tmp_path, monkeypatch):
    shutil.copytree(finished / "lake", tmp_path / "lake")
    config, dates = str(config_file(tmp_path)), ["--start-date", "2026-01-03", "--end-date", "2026-01-04"]
    commands = stub(monkeypatch, "pass")
    assert main(["optimize", "--config", config, *dates]) == 0
    assert main(["quarantine", "retry", "--config", config, "--run-date", "2026-01-03"]) == 0
    assert [Path(next(a for a in c if a.endswith(".py"))).name for c in commands] == [
        "optimize.py", "retry_quarantine.py",
    ]  # fmt: skip
    assert {*dates} <= set(commands[0])
    assert {"--run-date", "2026-01-03"} <= set(commands[1])


def test_words_in_brackets_are_shown_as_they_are(config, monkeypatch, capsys):
    stub(monkeypatch, "pass")
    given = ["--set", "launch.env={A: '[bold]x[/]'}", "--set", "launch.spark_submit=[a]"]
    assert main(["run", "--config", config, "--only", "samples", *given]) == 0
    said = capsys.readouterr().out
    assert "launch.spark_submit=[a]" in said
    assert "[bold]x[/]" in said


def test_only_dates_that_are_not_done_are_started_and_what_was_done_once_says_why(
    finished, tmp_path, monkeypatch, capsys
):
    shutil.copytree(finished / "lake", tmp_path / "lake")
    toy = Toy(small_config(tmp_path))
    toy.write("raw_candidates", DAY + ONE)
    commands = stub(monkeypatch, "pass")
    assert main(["run", "--config", str(tmp_path / "test.yaml")]) == 0
    assert len(commands) == 1
    assert Path(next(a for a in commands[0] if a.endswith(".py"))).name == "ingest.py"
    assert commands[0][commands[0].index("--run-date") + 1] == "2026-01-04"
    why = "ingest 2026-01-04: quarantine@3 is out of date: table raw_candidates has changed"
    assert why in capsys.readouterr().out
    commands.clear()
    assert main(["run", "--config", str(tmp_path / "test.yaml"), "--only", "samples", "--force"]) == 0
    assert commands[0][-1] == "--force"


def test_a_forced_run_from_a_step_on_starts_that_step_and_all_after_it(config, monkeypatch):
    commands = stub(monkeypatch, "pass")
    assert main(["run", "--config", config, "--run-date", "2026-01-03", "--from", "anchor_requests", "--force"]) == 0
    started = []
    for command in commands:
        (script,) = [Path(a).stem for a in command if a.endswith(".py")]
        started += command[command.index("--steps") + 1].split(",") if script == "run" else [script]
        assert (command[command.index("--run-date") + 1], command[-1]) == ("2026-01-03", "--force")
    names = [step.name for step in STEPS]
    assert started == names[names.index("anchor_requests") :]


ENDED = """
import sys
from gpl_core import cli
from gpl_core.errors import UsageError
from gpl_core.graph import launch_runner as running
child = "import os, signal, sys; print(os.getpid(), file=sys.stderr, flush=True); signal.pause()"
running.command = lambda *given, **more: [sys.executable, "-c", child]
running._refuse_blocked = lambda *given: None
sys.exit(cli.main(["run", "--config", sys.argv[1], "--only", "samples", "--verbose"]))
"""


def test_ending_a_run_ends_what_it_started(config):
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    run = subprocess.Popen([sys.executable, "-c", ENDED, config], env=env, text=True, stdout=subprocess.DEVNULL,
                           stderr=subprocess.PIPE)  # fmt: skip
    child = psutil.Process(int(run.stderr.readline()))
    run.send_signal(signal.SIGTERM)
    assert run.wait(timeout=30) == 128 + signal.SIGTERM
    run.stderr.close()
    _, alive = psutil.wait_procs([child], timeout=30)
    assert not alive


WITH_A_CHILD = "import subprocess, sys; subprocess.run([sys.executable, *sys.argv[1:]])"
KILLED = """
import sys
from gpl_core import cli
from gpl_core.errors import UsageError
from gpl_core.graph import launch_runner as running
running.command = lambda *given, **more: sys.argv[2:]
running._refuse_blocked = lambda *given: None
sys.exit(cli.main(["run", "--config", sys.argv[1], "--only", "samples", "--verbose"]))
"""


@pytest.mark.parametrize(
    ("launcher", "processes"),
    [
        pytest.param([sys.executable, "-c", WITH_A_CHILD], 1, id="a launcher with a child"),
        pytest.param(
            [tool("deepspeed"), "--num_accelerators", "2"], 2, id="deepspeed",
            marks=[pytest.mark.deepspeed, pytest.mark.slow],
        ),
        pytest.param(
            [tool("spark-submit"), "--master", "local[1]"], 1, id="spark-submit",
            marks=[pytest.mark.spark, pytest.mark.slow],
        ),
    ],
)  # fmt: skip
def test_a_killed_run_leaves_nothing_behind_of_what_it_started(config, tmp_path, launcher, processes):
    step = tmp_path / "step.py"
    step.write_text(
        # One write: the launcher's Python is unbuffered, and two processes' lines would run into each other.
        "import os, signal; signal.alarm(120); os.write(2, b'the step runs\\n'); signal.pause()"
    )
    run = subprocess.Popen(
        [sys.executable, "-uc", KILLED, config, *launcher, str(step)], text=True, stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu"},
        stderr=subprocess.STDOUT,  # spark-submit says on its output what the step says on either
    )  # fmt: skip
    for _ in range(processes):
        assert any("the step runs" in line for line in iter(run.stdout.readline, ""))
    started = psutil.Process(run.pid).children(recursive=True)
    assert len(started) > processes
    run.kill()
    _, alive = psutil.wait_procs(started, timeout=30)
    assert not alive
    run.communicate()


def test_without_raw_tables_a_run_exits_4_and_starts_nothing(config, tmp_path, capsys):
    before = tree(tmp_path)
    for command in ("run", "judge", "summary"):
        assert main([command, "--config", config, "--run-date", "2026-01-03"]) == 4, command
        said = capsys.readouterr()
        assert said.out == ""
        assert said.err.startswith("error: ")
        assert str(tmp_path / "lake") in said.err
    assert tree(tmp_path) == before
