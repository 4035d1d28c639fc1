"""`gpl forget`: a person is removed from every table and file, after a vacuum from old ones too; others lose no row."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from deltalake import DeltaTable, write_deltalake
from deltalake.exceptions import CommitFailedError

from gpl_core.checkpoint import write_checkpoint
from gpl_core.cli import main
from gpl_core.commands import forget as command
from gpl_core.commands.forget import forget
from gpl_core.contracts.contract import NO_STATISTICS, all_contracts, load_contract
from gpl_core.errors import ContractError
from gpl_core.graph.job_runs import Counts, JobRun
from gpl_core.lakehouse import rewrite
from gpl_core.lakehouse.files import rows_in
from gpl_core.lakehouse.lake import Lake
from gpl_core.lakehouse.log import read_log
from gpl_core.lakehouse.marks import SliceMark
from gpl_core.lakehouse.person import Person
from spark_jobs.common.manifests import build_manifest
from tests.persons import files_with
from tests.support import DAY, DIMS, ONE, config_file, data_table, legal_rows, put, small_config, truncated

GONE, STAYS = "u-gone-1", "u-gone-10"  # one id begins with the other
MESSAGES = {"job_runs", "artifact_decisions"}  # rows that only quote the id: they stay, without it
NAMING = [n for n, c in all_contracts().items() if Person(GONE).traces(c) and n not in MESSAGES]
OURS = [n for n in NAMING if all_contracts()[n].owner != "platform"]


def named(table: str, user: Any) -> dict:
    """The column that identifies the person."""
    if table == "quarantine":
        return {"row_json": json.dumps({"item_id": "i", "user_id": user})}
    if table == "worker_rejects":
        return {"key": f"user_id={user}"}
    return {"user_id": user}


def fill(lake: Lake, table: str, user: str) -> None:
    """Two dates of `table`: the first has both persons, the second only the one to forget."""
    contract = load_contract(table)
    for day, users in ((DAY, (user, STAYS, user)), (DAY + ONE, (user,))):
        dated = {"dt": day} if "dt" in contract.partition_by else {}
        partition = {**{n: "v1" for n in contract.partition_by if n != "dt"}, **dated}
        rows = legal_rows(contract, len(users), seed=day.day, partition=partition)
        filled = [{**row, **named(table, user)} for row, user in zip(rows, users, strict=True)]
        put(lake, table, filled, day=day, partition=partition, mode="append")


@pytest.fixture(scope="module")
def filled(tmp_path_factory) -> Path:
    """A lakehouse with every table that names users."""
    root = tmp_path_factory.mktemp("filled")
    made = Lake(small_config(root).lakehouse.root)
    for table in NAMING:
        fill(made, table, GONE)
    return root


@pytest.fixture
def lake(filled, tmp_path) -> Lake:
    shutil.copytree(filled / "lake", tmp_path / "lake")
    return Lake(small_config(tmp_path).lakehouse.root)


@pytest.fixture
def gpl_forget(lake, tmp_path, capsys) -> Callable[..., tuple[int, str]]:
    """Runs the command; returns its exit code and all that it says."""
    config = str(config_file(tmp_path))

    def run(*arguments: str, user: str = GONE) -> tuple[int, str]:
        code = main(["forget", "--config", config, "--user", user, *arguments])
        said = capsys.readouterr()
        return code, said.out + said.err

    return run


@pytest.fixture
def no_raw(lake) -> None:
    """The platform has removed the person."""
    for table in set(NAMING) - set(OURS):
        shutil.rmtree(lake.uri(table))


def holding(lake: Lake, user: str) -> set[str]:
    """Tables whose newest version holds `user`."""
    found = set()
    for table in NAMING:
        traces = Person(user).traces(load_contract(table))
        found |= {table} if lake.exists(table) and any(traces.mask(lake.open(table).read()).to_pylist()) else set()
    return found


def test_every_table_with_a_user_is_looked_at():
    columns = {n for n, c in all_contracts().items() if "user_id" in c.column_names}
    assert columns | {"quarantine", "worker_rejects"} == set(NAMING)
    assert all(Person(GONE).traces(load_contract(t)) for t in MESSAGES)


def test_forgetting_removes_the_person_everywhere_and_nobody_else(lake, gpl_forget):
    platform = set(NAMING) - set(OURS)
    marks = {t: lake.open(t).mark(DAY.isoformat()) for t in NAMING}
    before = {t: lake.open(t).version for t in NAMING}

    code, said = gpl_forget("--dry-run")
    assert code == 0
    assert "pseudo_labels: 3 rows would be removed" in said
    assert holding(lake, GONE) == set(NAMING)
    assert {t: lake.open(t).version for t in NAMING} == before

    code, said = gpl_forget()
    assert code == 3, "the next ingest would bring the person back"
    assert holding(lake, GONE) == platform
    assert holding(lake, STAYS) == set(NAMING)
    assert all(rows_in(lake.open(t).files) == len(lake.open(t).read()) == 1 for t in OURS)
    assert {t: lake.open(t).mark(DAY.isoformat()) for t in NAMING} == marks
    assert "pseudo_labels: 3 rows removed" in said
    assert "left: raw_impressions still has 3 rows" in said
    assert "raw_opt_outs" not in said, "it keeps the person out"
    assert "left: old versions still have the rows" in said
    assert f"gpl run --start-date {DAY} --end-date {DAY + ONE}" in said
    assert said.index("training_feed") < said.index("pseudo_labels") < said.index("quarantine")

    old = [lake.open(t, before[t]) for t in OURS]
    assert all(len(s.read()) == 4 for s in old)
    code, said = gpl_forget("--vacuum-hours", "0")
    assert files_with(Path(lake.root), f"{GONE}'") == files_with(Path(lake.root), f'{GONE}"') == []
    for snapshot in old:
        with pytest.raises(ContractError, match="is gone"):
            snapshot.read()


def test_what_others_have_in_old_versions_stays_readable(lake, gpl_forget, no_raw):
    contract, before = load_contract("user_stats"), lake.open("user_stats").version
    put(lake, "user_stats", [{**r, "user_id": STAYS} for r in legal_rows(contract, 2)], day=DAY - ONE)
    put(lake, "user_stats", 1, day=DAY - ONE)
    code, said = gpl_forget("--vacuum-hours", "0")
    assert (code, "user_stats: 3 rows removed, 2 old files deleted" in said) == (0, True)
    kept = lake.open("user_stats", before + 1)
    assert kept.read(kept.select(end=DAY - ONE))["user_id"].to_pylist() == [STAYS, STAYS]


@pytest.mark.parametrize("arguments", [(), ("--dry-run",), ("--vacuum-hours", "0")])
def test_a_user_who_is_nowhere_is_said(lake, gpl_forget, arguments):
    before = sorted(Path(lake.root).rglob("*"))
    code, said = gpl_forget(*arguments, user="u-gone")
    assert code == 4
    assert "user 'u-gone' is in no table and no file of" in said
    assert sorted(Path(lake.root).rglob("*")) == before


def test_after_all_is_done_there_is_nobody_to_forget(lake, gpl_forget, no_raw):
    assert gpl_forget("--vacuum-hours", "0")[0] == 0
    assert gpl_forget("--vacuum-hours", "0")[0] == 4


def test_a_folder_without_a_lakehouse_is_said(tmp_path, capsys):
    assert main(["forget", "--config", str(config_file(tmp_path)), "--user", GONE]) == 4
    assert f"{tmp_path}/lake has no tables of this project; correct lakehouse.root" in capsys.readouterr().err


# ---- ids of other types ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "ids", "user", "rows"),
    [
        (pa.int64(), [501, 5010, None], "501", 1),
        (pa.float64(), [501.0, 501.5], "501", 1),
        (pa.float64(), [501.0, 501.5], "501.0", 0),
        (pa.float64(), [12345701.0], "12345701", 1),
        (pa.float32(), [0.1, 501.0], "501", 1),
        (pa.decimal128(10, 2), [Decimal(501), Decimal(502)], "501", 1),
        (pa.decimal128(10, 2), [Decimal(501), Decimal(502)], "12345678901", 0),
        (pa.bool_(), [True, False, False], "false", 2),
    ],
)  # fmt: skip
def test_raw_ids_are_compared_as_ingest_casts_them(lake, gpl_forget, kind, ids, user, rows):
    shutil.rmtree(lake.uri("raw_impressions"))
    contract = load_contract("raw_impressions")
    body = pa.Table.from_pylist(legal_rows(contract, len(ids)), schema=contract.arrow_schema())
    at = body.schema.get_field_index("user_id")
    body = body.set_column(at, "user_id", pa.array(ids).cast(kind))
    write_deltalake(lake.uri("raw_impressions"), body, partition_by=["dt"])
    code, said = gpl_forget(user=user)
    assert (code, f"raw_impressions still has {rows} rows" in said) == ((3, True) if rows else (4, False)), said


@pytest.mark.parametrize(
    ("row", "is_theirs"),
    [
        ({"user_id": 501}, True), ({"user_id": "501"}, True), ({"user_id": 501.0}, True),
        ({"user_id": 5010}, False), ({"item_id": 501}, False),
        ({"user_id": None}, False),
    ],
)  # fmt: skip
def test_a_quarantined_row_is_compared_by_value(lake, gpl_forget, no_raw, row, is_theirs):
    shutil.rmtree(lake.uri("quarantine"))
    bad = [{**legal_rows(load_contract("quarantine"), 1)[0], "row_json": json.dumps(row)}]
    put(lake, "quarantine", bad)
    assert gpl_forget(user="501")[0] == (0 if is_theirs else 4)
    assert len(lake.open("quarantine").read()) == (0 if is_theirs else 1)


# ---- beside others, and again ----------------------------------------------------------------------------------


def test_a_raw_table_that_cannot_be_read_does_not_stop_the_rest(lake, gpl_forget):
    for path in Path(lake.uri("raw_candidates")).rglob("*.parquet"):
        truncated(path)
    code, said = gpl_forget()
    assert code == 3
    assert "left: raw_candidates could not be searched" in said
    assert "left: raw_interactions still has 3 rows" in said
    assert holding_of_ours(lake) == set()


def holding_of_ours(lake: Lake) -> set[str]:
    return {t for t in OURS if any(Person(GONE).traces(load_contract(t)).mask(lake.open(t).read()).to_pylist())}


def test_a_table_of_ours_that_cannot_be_read_does_not_stop_the_rest(lake, gpl_forget, no_raw):
    (broken, *_) = Path(lake.uri("pair_scores")).rglob("*.parquet")
    whole = broken.read_bytes()
    truncated(broken)
    code, said = gpl_forget()
    assert (code, "left: pair_scores could not be searched" in said) == (3, True)
    assert "when that is done, run the same command again to finish" in said
    broken.write_bytes(whole)
    assert holding(lake, GONE) == {"pair_scores"}
    assert gpl_forget()[0] == 0
    assert holding(lake, GONE) == set()


def test_a_running_step_is_refused_until_it_has_ended(lake, gpl_forget, no_raw):
    run = JobRun(lake, "score_candidates", DAY, "night-7")
    run.begin()
    code, said = gpl_forget()
    assert (code, holding(lake, GONE)) == (3, set(OURS))
    assert f"run night-7 (score_candidates for {DAY}) is in progress" in said
    assert "--ended night-7" in said
    assert gpl_forget("--dry-run")[0] == 0
    assert gpl_forget("--ended", "night-7")[0] == 0
    assert holding(lake, GONE) == set()


@pytest.mark.parametrize("behind", [0, 1])
def test_a_run_that_began_meanwhile_is_named(lake, gpl_forget, no_raw, monkeypatch, behind):
    """It has read the person before and writes them back after: the next forget removes them again.

    behind: hours that the clock of the run's machine is late.
    """

    def with_a_step(*given: Any, **options: Any) -> Any:
        run = JobRun(lake, "score_candidates", DAY, "night-8", datetime.now(UTC) - timedelta(hours=behind))
        yield from forget(*given, **options)
        fill(lake, "pair_scores", GONE)
        run.end("done", Counts())

    monkeypatch.setattr(command, "forget", with_a_step)
    code, said = gpl_forget()
    assert (code, holding(lake, GONE)) == (3, {"pair_scores"})
    assert f"run night-8 (score_candidates for {DAY}) was active in the meantime" in said
    monkeypatch.undo()
    assert gpl_forget()[0] == 0
    assert holding(lake, GONE) == set()


def test_a_commit_whose_answer_was_lost_keeps_its_files(lake, gpl_forget, no_raw, monkeypatch):
    """An object store is asked a second time, and says that the version exists."""
    real = rewrite.transact

    def unheard(*given: Any, **options: Any) -> None:
        real(*given, **options)
        raise CommitFailedError("version exists")

    monkeypatch.setattr(rewrite, "transact", unheard)
    assert gpl_forget()[0] == 0
    assert holding(lake, GONE) == set()
    assert holding(lake, STAYS) == set(OURS)


def test_a_commit_in_between_is_no_matter_and_many_stop_one_table_alone(lake, gpl_forget, no_raw, monkeypatch):
    """A writer that always comes first makes pair_scores a conflict; the others are done, and the next run does it."""
    real = rewrite.transact
    commits = []

    def beaten(table: DeltaTable, *given: Any, **options: Any) -> None:
        if table.metadata().name == "pair_scores" and len(commits) < 9:
            commits.append(1)
            fill(lake, "pair_scores", STAYS)
        real(table, *given, **options)

    monkeypatch.setattr(rewrite, "transact", beaten)
    code, said = gpl_forget()
    assert (code, "left: pair_scores could not be searched: table pair_scores: written by other runs" in said) == (
        3,
        True,
    )
    assert holding(lake, GONE) == {"pair_scores"}
    assert gpl_forget()[0] == 0, "beaten four times more, of five"
    assert holding(lake, GONE) == set()
    assert len(lake.open("pair_scores").read()) == 1 + 9 * 4


class Killed(BaseException):
    """Ends the command as a kill does: nothing catches it."""


def remains(lake: Lake) -> None:
    """What else holds the person: a manifest, a log, a record of a killed run."""
    manifest = Path(lake.path("manifests", "training_feed", f"{DAY}.json"))
    log = Path(lake.path("logs", "r1", "01-ingest.log"))
    for path, text in ((manifest, "{}"), (log, f"refused: user_id = {GONE}, {STAYS}\n")):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def assert_gone(lake: Lake) -> None:
    assert holding(lake, GONE) == set()
    assert holding(lake, STAYS) == set(OURS)
    assert all(len(lake.open(t).read()) == 1 for t in OURS), "nobody else lost or got a row"
    assert not Path(lake.path("manifests", "training_feed", f"{DAY}.json")).exists()
    assert files_with(Path(lake.root), f"{GONE}'") == files_with(Path(lake.root), f'{GONE}"') == []


@pytest.mark.parametrize("every", [5, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("when", ["before", "after"])
def test_killed_at_any_commit_it_is_completed_by_the_next_run(
    lake, gpl_forget, no_raw, tmp_path, monkeypatch, when, every
):
    real, done = rewrite.transact, []

    def killed_at(number: int) -> Callable[..., None]:
        def commit(*given: Any, **options: Any) -> None:
            done.append(1)
            if when == "after":
                real(*given, **options)
            if len(done) == number:
                raise Killed
            if when == "before":
                real(*given, **options)

        return commit

    remains(lake)
    shutil.copytree(lake.root, tmp_path / "whole")
    for number in range(1, len(OURS) + 1, every):
        shutil.rmtree(lake.root)
        shutil.copytree(tmp_path / "whole", lake.root)
        done.clear()
        monkeypatch.setattr(rewrite, "transact", killed_at(number))
        with pytest.raises(Killed):
            gpl_forget("--vacuum-hours", "0")
        monkeypatch.undo()
        assert gpl_forget("--vacuum-hours", "0")[0] == 0, number
        assert_gone(lake)


@pytest.mark.parametrize("commits", [1, 9])
def test_killed_by_the_system_it_is_completed_by_the_next_run(lake, gpl_forget, no_raw, tmp_path, commits):
    remains(lake)
    script = f"""
import os, signal
from gpl_core.cli import main
from gpl_core.lakehouse import rewrite
real, done = rewrite.transact, []
def commit(*given, **options):
    real(*given, **options)
    done.append(1)
    if len(done) == {commits}:
        os.kill(os.getpid(), signal.SIGKILL)
rewrite.transact = commit
main(["forget", "--config", {str(config_file(tmp_path))!r}, "--user", {GONE!r}, "--vacuum-hours", "0"])
"""
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == -signal.SIGKILL
    assert len(holding(lake, GONE)) == len(OURS) - commits
    assert gpl_forget("--vacuum-hours", "0")[0] == 0
    assert_gone(lake)


# ---- beside the tables -----------------------------------------------------------------------------------------


def test_what_killed_workers_left_is_found(lake, gpl_forget, no_raw):
    contract, root = load_contract("interest_anchors"), Path(lake.root)
    partition = {"model_version": "v1", "dt": DAY.isoformat()}
    writer = lake.writer(contract, partition, dims=DIMS)
    with writer:
        writer.write(data_table(contract, [{**r, "user_id": GONE} for r in legal_rows(contract, 1)]))
    torn = Path(lake.uri("pair_scores"), "dt=2026-01-03", "part-00000-torn.parquet")
    torn.write_bytes((root / "tables/interest_anchors" / writer.parts[0]["path"]).read_bytes()[:-9])
    shutil.rmtree(root / "tables/score_requests/_delta_log")  # killed before it made the table
    journal = root / "work/generate_anchors/f/0.safetensors"
    for name, user in ((journal, GONE), (journal.with_name("1.safetensors"), STAYS)):
        write_checkpoint(name, {"done": {"rejects": [{"key": f"user_id={user}"}]}, "digests": torch.zeros(3)})
    shutil.copy(journal, journal.with_name(".2.safetensors.4711"))

    code, said = gpl_forget("--vacuum-hours", "0")
    assert (code, "2 journals deleted" in said) == (0, True)
    assert [p.name for p in journal.parent.iterdir()] == ["1.safetensors"]
    assert not torn.exists()
    assert not list((root / "tables/score_requests").rglob("*.parquet"))
    assert files_with(root, f"{GONE}'") == files_with(root, f'{GONE}"') == []


@pytest.mark.parametrize("user", [GONE, 'ü"<&1', "501"])
def test_messages_logs_and_reports_no_longer_quote_the_person(lake, gpl_forget, no_raw, user):
    row = json.dumps({"item_id": "i", "user_id": user})
    error = ContractError(f"refused, e.g. user_id = {user} in {row}; 501 rows")
    counts = Counts(rows_in=501, details={"reasons": {"raw_items": [f"e.g. {row}"]}, "rows_in": 501})
    JobRun(lake, "ingest", DAY, "r1", datetime(2026, 1, 3, tzinfo=UTC)).end("failed", counts, error)
    (before,) = lake.open("job_runs").read().to_pylist()
    log, report = Path(lake.path("logs", "r1", "01-ingest.log")), Path(lake.path("reports", f"{DAY}.html"))
    for path in (log, report):
        path.parent.mkdir(parents=True)
    log.write_bytes(json.dumps({**before, "dt": ""}, default=str).encode() + b"\n\xff 501 rows\n" + row.encode())
    report.write_text(f"<p>{row.replace('&', '&amp;').replace('<', '&lt;').replace(chr(34), '&quot;')}</p>501")

    code, said = gpl_forget("--vacuum-hours", "0", user=user)
    assert code == 0, said
    (after,) = lake.open("job_runs").read().to_pylist()
    told = ("error_message", "details")
    assert {k: v for k, v in after.items() if k not in told} == {k: v for k, v in before.items() if k not in told}
    assert after["error_message"].startswith("refused, e.g. user_id = [forgotten] in {")
    assert after["error_message"].endswith("; 501 rows")
    details = json.loads(after["details"])
    assert details["rows_in"] == 501
    assert '"user_id": "[forgotten]"' in details["reasons"]["raw_items"][0]
    assert log.read_bytes().count(b"[forgotten]") == 4
    assert b"\n\xff 501 rows\n" in log.read_bytes()
    assert "[forgotten]" in report.read_text()
    assert report.read_text().endswith("501")
    assert gpl_forget("--vacuum-hours", "0", user=user)[0] == 4


def test_the_log_of_a_table_from_an_earlier_release_loses_its_statistics(lake, gpl_forget, no_raw):
    """They name the smallest and largest user of each file; checkpoints repeat them."""
    rows = lake.open("user_stats").read().drop(["dt"])
    shutil.rmtree(lake.uri("user_stats"))
    contract = load_contract("user_stats")
    lake.create(contract, dict.fromkeys(NO_STATISTICS, "32"))
    whole = pa.Table.from_pylist([{**r, "dt": DAY} for r in rows.to_pylist()], schema=contract.arrow_schema())
    write_deltalake(lake.uri("user_stats"), whole, mode="append")
    DeltaTable(lake.uri("user_stats")).create_checkpoint()
    log = Path(lake.uri("user_stats"), "_delta_log")
    (log / "00000000000000000001.crc").write_text(json.dumps({"allFiles": [{"stats": GONE}]}))
    marks, changes = lake.open("user_stats").marks(), [*read_log(lake.uri("user_stats"), 1)]
    assert len(files_with(log.parent, GONE)) > 3

    assert gpl_forget("--vacuum-hours", "0")[0] == 0
    assert files_with(Path(lake.root), f"{GONE}'") == files_with(Path(lake.root), f'{GONE}"') == []
    assert lake.open("user_stats").read()["user_id"].to_pylist() == [STAYS]
    assert lake.open("user_stats").properties.items() >= NO_STATISTICS.items()
    assert [m for _, m in lake.open("user_stats").marks() if m in [x for _, x in marks]] == [m for _, m in marks]
    assert [*read_log(lake.uri("user_stats"), 1)] == changes, "which commits changed rows"


def test_a_log_that_was_cleaned_by_hand_is_left_and_said(lake, gpl_forget, no_raw):
    uri = Path(lake.uri("user_stats"))
    table = DeltaTable(str(uri))
    table.alter.set_table_properties(dict.fromkeys(NO_STATISTICS, "32"))
    write_deltalake(table, lake.open("user_stats").read(), mode="append")
    DeltaTable(str(uri)).create_checkpoint()
    (uri / "_delta_log" / f"{0:020d}.json").unlink()
    code, said = gpl_forget("--vacuum-hours", "0")
    assert code == 3
    assert "left: user_stats could not be searched" in said
    assert "commits are missing, so statistics of columns cannot be taken out of it" in said


def test_a_feed_slice_that_lost_rows_gets_no_manifest_of_its_old_sums(lake):
    contract = all_contracts()["training_feed"]
    partition = {"dt": DAY.isoformat()}
    rows = [{**r, **named("training_feed", u)} for r, u in zip(legal_rows(contract, 2), (GONE, STAYS), strict=True)]
    with lake.writer(contract, partition, dims=DIMS) as writer:
        writer.write(data_table(contract, rows))
    mark = SliceMark("training_feed", {DAY.isoformat(): "f"}, "r", {"rows": 2})
    lake.commit(contract, writer.parts, mark=mark, mode="overwrite", partition=partition)
    assert build_manifest(lake, DAY, contract)["rows"] == 2
    list(forget(lake, Person(GONE)))
    with pytest.raises(ContractError, match=r"has 1 rows, its commit \d+ promised 2.*run training_feed for 2026-01-03"):
        build_manifest(lake, DAY, contract)


def test_only_manifests_from_before_the_removal_are_deleted(lake, gpl_forget, no_raw):
    """Also by a second run, when the first was killed in between; a manifest made since is kept."""
    manifests = [Path(lake.path("manifests", "training_feed", f"{d}.json")) for d in (DAY, DAY + ONE, DAY - ONE)]
    manifests[0].parent.mkdir(parents=True)
    list(forget(lake, Person(GONE)))
    newest = lake.open("training_feed").version
    for path, version in zip(manifests, (newest - 1, newest, 0), strict=True):
        path.write_text(json.dumps({"table_version": version}))
    list(forget(lake, Person(GONE)))
    assert [p.exists() for p in manifests] == [False, True, True]


def test_petastorm_reads_what_is_left(lake):
    pytest.importorskip("petastorm")
    from gpu_workers.inputs.feed import read_batches

    list(forget(lake, Person(GONE)))
    for table in ("training_feed", "user_sequences", "score_requests"):
        snapshot = lake.open(table)
        columns = [c for c in snapshot.contract.column_names if c not in snapshot.contract.partition_by]
        (batch,) = read_batches(snapshot, snapshot.files, columns)
        assert batch["user_id"].tolist() == [STAYS]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "--user"),
        (["--user", ""], "--user is empty"),
        (["--user", "u", "--vacuum-hours", "-1"], "expected 0 or more"),
    ],
)
def test_wrong_words_are_refused(tmp_path, capsys, arguments, said):
    assert main(["forget", "--config", str(config_file(tmp_path)), *arguments]) == 2
    assert said in capsys.readouterr().err
