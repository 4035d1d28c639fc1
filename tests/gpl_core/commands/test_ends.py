"""Ends that are clear: damaged files, disks that are full or read-only, hosts that do not exist, dates out of range.

One message, no traceback, and the exit code that says who can repair it.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from gpl_core.cli import main
from gpl_core.config import load_config
from gpl_core.errors import ContractError, MissingInputError
from gpl_core.graph import launch_runner as running
from gpl_core.graph.launches import spark_submit
from gpl_core.lakehouse.lake import Lake
from gpl_core.lakehouse.log_index import INDEX
from tests.gpl_core.analyst_lake import AnalystLake
from tests.support import DAY, ODD, config_file, emptied, put, truncated

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def analyzed(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("analyzed")
    AnalystLake(root)
    return root / "lake"


@pytest.fixture
def lake(analyzed, tmp_path) -> Path:
    """A lakehouse of one date; `test.yaml` beside it is its configuration."""
    config_file(tmp_path, {"tokenizer": {"levels": 3}, "anchors": {"count": 2, "prefixes": 1}})
    return Path(shutil.copytree(analyzed, tmp_path / "lake"))


@pytest.fixture
def gpl(lake, capsys) -> Callable[..., tuple[int, str]]:
    """A command on that lakehouse: exit code and what it said to stderr."""

    def run(command: str, *given: str) -> tuple[int, str]:
        code = main([command, "--config", str(lake.parent / "test.yaml"), *given])
        return code, capsys.readouterr().err

    return run


def one_message(error: str) -> str:
    assert [line[:7] for line in error.splitlines()].count("error: ") == 1, error
    assert "Traceback" not in error
    assert "\x1b" not in error
    return error


# ---- SQL -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sql", "named"),
    [
        ("SELECT 1/0", "Divide by zero"),
        ("SELECT CAST(user_id AS INT) FROM pseudo_labels", "Cannot cast string 'u1'"),
        ("SELECT (SELECT user_id FROM pseudo_labels)", "more than one row"),
        ("SELECT regexp_match(user_id, '(') FROM pseudo_labels", "unclosed group"),
        ("SELECT arrow_cast(4000000, 'Date32')", "out of range"),
    ],
)
@pytest.mark.parametrize("form", [[], ["--json"], ["--csv"]])
def test_a_statement_that_fails_while_it_runs(gpl, sql, named, form):
    code, error = gpl("sql", sql, *form)
    assert code == 2
    assert one_message(error).startswith("error: SQL: ")
    assert named in error


# ---- damaged files ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", [emptied, truncated])
@pytest.mark.parametrize("commit", ["00000000000000000000.json", "00000000000000000001.json"])
@pytest.mark.parametrize("command", [["sql", "SELECT * FROM pseudo_labels"], ["status"], ["summary"]])
def test_a_damaged_commit_is_named_and_never_passed_over(gpl, lake, damage, commit, command):
    path = lake / "tables" / "pseudo_labels" / "_delta_log" / commit
    damage(path)
    code, error = gpl(*command)
    assert code == 3
    assert f"the commit {path} is damaged; restore it from a copy" in one_message(error)


def test_a_damaged_commit_before_a_checkpoint_is_named_where_the_log_is_read(tmp_path):
    made = Lake(str(tmp_path / "lake"))
    for seed in range(3):
        put(made, "user_stats", 2, seed=seed)
    made.open("user_stats")._table.create_checkpoint()
    path = tmp_path / "lake" / "tables" / "user_stats" / "_delta_log" / "00000000000000000001.json"
    path.write_bytes(b'{"commitInfo":' + path.read_bytes()[40:])
    assert len(made.open("user_stats").read()) == 2
    assert len(made.open("user_stats").marks()) == 3, "from the index"
    Path(made.uri("user_stats"), INDEX).unlink()
    with pytest.raises(ContractError, match=f"the commit {path} is damaged"):
        made.open("user_stats").marks()


def footer_garbled(path: Path) -> None:
    """Leave a Parquet file whose footer has its length and no meaning: pyarrow calls that an OSError."""
    content = path.read_bytes()
    path.write_bytes(content[:-60] + b"\xff" * 52 + content[-8:])


@pytest.mark.parametrize("damage", [emptied, truncated, footer_garbled, Path.unlink])
def test_a_damaged_data_file_is_named(gpl, lake, damage):
    (path,) = (lake / "tables" / "pseudo_labels").rglob("*.parquet")
    damage(path)
    code, error = gpl("sql", "SELECT max(pseudo_label) FROM pseudo_labels")
    assert code == 3
    assert path.name in one_message(error)
    snapshot = Lake(str(lake)).open("pseudo_labels")
    with pytest.raises(ContractError, match=f"table pseudo_labels: file {path} of version 1 (is gone|cannot be read)"):
        snapshot.read()
    with pytest.raises(ContractError, match=f"file {path} of version 1"):
        list(snapshot.row_groups(snapshot.files, ["user_id"]))


# ---- disks -----------------------------------------------------------------------------------------------------


def on_a_disk(folder: Path, *commands: str) -> subprocess.CompletedProcess[str]:
    """Run shell `commands` where a disk of 8 MB is mounted at `folder`, seen by them alone."""
    mount = f"mount -t tmpfs -o size=8m none {shlex.quote(str(folder))}"
    if subprocess.run(["unshare", "-rm", "sh", "-c", mount], capture_output=True, check=False).returncode:
        pytest.skip("no disk can be mounted here")
    script = " && ".join([mount, *commands])
    return subprocess.run(["unshare", "-rm", "sh", "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)


FILL = "{ dd if=/dev/zero of=$DISK/fill bs=1k 2>/dev/null; true; }"


def decide(lake: Path, action: str) -> str:
    version = next((lake / "artifacts" / "calibrator").iterdir()).name
    return f"{sys.executable} -m gpl_core.cli {action} --config {lake.parent}/test.yaml calibrator {version}"


@pytest.mark.parametrize(
    ("then", "code", "said"),
    [("mount -o remount,ro $DISK", 2, "Read-only file system"), (FILL, 1, "No space left on device")],
)
@pytest.mark.parametrize("place", ["tables", "tables/artifact_decisions/_delta_log"])
def test_a_disk_that_takes_nothing_is_one_message(gpl, lake, monkeypatch, place, then, code, said):
    """Data files are ours to write, commits are delta-rs': it has errors of its own."""
    assert gpl("rollback", "calibrator", next((lake / "artifacts" / "calibrator").iterdir()).name)[0] == 0
    disk, aside = lake / place, lake.parent / "aside"
    shutil.copytree(disk, aside)
    monkeypatch.setenv("DISK", str(disk))
    done = on_a_disk(disk, f"cp -r {aside}/. $DISK", then, decide(lake, "promote"))
    assert done.returncode == code, done.stderr
    assert said in one_message(done.stderr)


@pytest.mark.slow
@pytest.mark.spark
@pytest.mark.parametrize(
    ("then", "code", "said"),
    [("mount -o remount,ro $DISK", 2, "Read-only file system"), (FILL, 1, "No space left on device")],
)
def test_a_spark_job_on_a_disk_that_takes_nothing(tmp_path, monkeypatch, then, code, said):
    made, disk = Lake(str(tmp_path / "aside" / "lake")), tmp_path / "disk"
    for table in ("raw_items", "raw_impressions", "raw_candidates"):
        put(made, table, 3)
    config = config_file(tmp_path, {"lakehouse": {"root": str(disk / "lake")}})
    disk.mkdir()
    monkeypatch.setenv("DISK", str(disk))
    monkeypatch.setenv("PYSPARK_PYTHON", sys.executable)
    job = ["--config", str(config), "--run-date", DAY.isoformat()]
    command = spark_submit(load_config(str(config)), "spark_jobs/ingest.py", job)
    done = on_a_disk(disk, f"cp -r {tmp_path}/aside/. $DISK", then, shlex.join(command))
    assert done.returncode == code, done.stdout
    line = next(line for line in done.stdout.splitlines() if line.startswith("error: "))
    assert said in line
    assert f"{disk}/lake/tables/" in line or code == 1
    assert "Traceback" not in done.stdout


def test_an_array_on_a_full_temporary_disk_is_an_error_and_no_signal(tmp_path, monkeypatch):
    code = (
        "from gpl_core.graph.step_run import exit_with, leave; from gpl_core.lakehouse.scratch import *\n"
        "try:\n"
        "    with scratch_folder() as folder: scratch_array(folder / 'vectors.npy', 'f4', (1000, 4096))[:] = 1\n"
        "except OSError as error: leave(exit_with(error))"
    )
    disk = tmp_path / "tmp"
    disk.mkdir()
    done = on_a_disk(disk, f"TMPDIR={disk} {sys.executable} -c {shlex.quote(code)}")
    assert done.returncode == 1, done.stderr
    assert "vectors.npy: No space left on device; free up space under lakehouse.root" in one_message(done.stderr)


# ---- hosts and roots -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "endpoint"), [(["status"], ""), (["sql", "SELECT * FROM items"], "https://no-such-host.invalid:9000")]
)
def test_a_host_that_does_not_exist_is_one_message(gpl, monkeypatch, command, endpoint):
    for name in [n for n in os.environ if n.lower().endswith("_proxy") or n.startswith("AWS_")]:
        monkeypatch.delenv(name)
    given = {"AWS_REGION": "nowhere-1", "AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b"}
    for name, value in {**given, **({"AWS_ENDPOINT_URL": endpoint} if endpoint else {})}.items():
        monkeypatch.setenv(name, value)
    code, error = gpl(*command, "--set", "lakehouse.root=s3://bucket/lake")
    assert code == 2
    assert "correct AWS_ENDPOINT_URL, the region or the bucket's name" in one_message(error)


def test_a_root_with_odd_characters_works(analyzed, tmp_path, capsys):
    """Other steps on such a root: tests/spark_jobs/test_ingest.py, tests/gpu_workers/test_sid_workers.py."""
    config = str(config_file(tmp_path / ODD, {"tokenizer": {"levels": 3}, "anchors": {"count": 2, "prefixes": 1}}))
    shutil.copytree(analyzed, tmp_path / ODD / "lake")
    assert main(["sql", "--config", config, "--json", "SELECT count(*) AS n FROM pseudo_labels"]) == 0
    assert json.loads(capsys.readouterr().out)["n"] > 0
    pair = ["--user", "u1", "--item", "i2", "--run-date", DAY.isoformat()]
    for command, *given in (["status"], ["summary"], ["explain", *pair]):
        assert main([command, "--config", config, *given]) == 0
    assert "tokenizer 2026" in capsys.readouterr().out, "the artifacts are found"


@pytest.mark.parametrize("place", ["root", "tables.items"])
@pytest.mark.parametrize(
    "folder", ["/a%20b", "/a#b", "/a?b", "/a`b", "/a\\b", "/a\nb", "/a[b]", "/a<b", "/a^b", "s3://bucket/a%2Fb"]
)
def test_a_root_that_engines_would_read_differently_is_refused(gpl, folder, place):
    code, error = gpl("status", "--set", f"lakehouse.{place}={json.dumps(folder)}")
    assert code == 2
    assert "engines read" in one_message(error)


# ---- dates -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("day", ["0001-01-01", "1582-10-10", "9999-12-31"])
@pytest.mark.parametrize("command", ["status", "plan", "run", "summary", "evict", "check-raw"])
def test_a_run_date_out_of_range(gpl, command, day):
    code, error = gpl(command, "--run-date", day)
    assert code == 2
    assert f"{day} is out of range; expected a date from 1970-01-02" in one_message(error)
    if command == "evict":
        return
    code, error = gpl(command, "--set", f"run.start_date={day}", "--set", f"run.end_date={day}")
    assert code == 2
    assert "run.start_date" in one_message(error)


def test_a_window_longer_than_history(gpl):
    code, error = gpl("status", "--set", "sequences.history_days=1000000")
    assert code == 2
    assert "sequences.history_days" in one_message(error)


# ---- launches --------------------------------------------------------------------------------------------------


def test_a_jvm_out_of_code_cache_is_told_what_to_set(gpl, monkeypatch):
    words = "java.lang.VirtualMachineError: Out of space in CodeCache for adapters"
    child = f"import sys; print({words!r}, file=sys.stderr); sys.exit(50)"
    monkeypatch.setattr(running, "command", lambda *given, **named: [sys.executable, "-c", child])
    monkeypatch.setattr(running, "_refuse_blocked", lambda *given: None)
    code, error = gpl("run", "--only", "samples")
    assert code == 50
    assert "hint: the JVM ran out of space for compiled code: put -XX:ReservedCodeCacheSize=256m" in error


# ---- the end of the process ------------------------------------------------------------------------------------

ENDS = """
import threading, time, sys
from gpl_core import cli
class Late:
    def __del__(self): raise SystemError("the interpreter was taken down")
late = Late()
def left_behind():
    while True: time.sleep(1)
threading.Thread(target=left_behind).start()
sys.argv = ["gpl", *sys.argv[1:]]
cli.entry()
"""


@pytest.mark.parametrize(
    ("given", "code", "said"), [("tables", 0, "training_feed"), ("paln", 2, ""), ("--help", 0, "usage")]
)
def test_gpl_ends_although_threads_of_libraries_run(given, code, said):
    command = [sys.executable, "-c", ENDS, given]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == code
    assert said in done.stdout
    assert "taken down" not in done.stderr


def test_a_reader_that_has_enough_is_no_error():
    done = subprocess.run(
        ["sh", "-c", f"{sys.executable} -m gpl_core.cli tables | head -1; exit ${{PIPESTATUS:-0}}"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0
    assert done.stderr == ""


def test_missing_is_still_missing(gpl):
    assert gpl("sql", "SELECT * FROM anchor_requests")[0] == MissingInputError.exit_code
