"""The lakehouse: a slice appears whole or not at all, whatever happens to its writer, and marks tell who wrote it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import uuid
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, date, datetime
from functools import partial
from pathlib import Path

import deltalake
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpl_core.contracts.contract import load_contract
from gpl_core.errors import ConflictError, ContractError, MissingInputError, classified, exit_code_of
from gpl_core.lakehouse.files import DataFile, digest_of
from gpl_core.lakehouse.lake import Lake
from gpl_core.lakehouse.marks import SliceMark
from gpl_core.lakehouse.snapshot import Snapshot
from tests.support import DAY, DIMS, ONE, data_table, legal_rows, put

TABLE = "pair_scores"
CONTRACT = load_contract(TABLE)


@pytest.fixture
def lake(tmp_path) -> Lake:
    return Lake(str(tmp_path))


def rows_of(lake: Lake, day: date, version: int | None = None) -> list[dict]:
    snapshot = lake.open(TABLE, version)
    rows = snapshot.read(snapshot.select(start=day, end=day)).to_pylist()
    return sorted(rows, key=str)


def files_on_disk(lake: Lake, table: str = TABLE) -> set[str]:
    base = Path(lake.uri(table))
    return {p.relative_to(base).as_posix() for p in base.rglob("*.parquet")}


def at_once(*jobs: Callable[[], object]) -> list[object]:
    """Run `jobs` in threads that start together; each one's result or error."""
    barrier, results = threading.Barrier(len(jobs)), [None] * len(jobs)

    def go(i: int) -> None:
        barrier.wait()
        try:
            results[i] = jobs[i]()
        except Exception as error:
            results[i] = error

    threads = [threading.Thread(target=go, args=(i,)) for i in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


# ---- slices ----------------------------------------------------------------------------------------------------


def test_what_is_written_is_read_back_with_its_partition(lake):
    rows = legal_rows(CONTRACT, 30, partition={"dt": DAY})
    commit = put(lake, TABLE, rows)
    assert rows_of(lake, DAY) == sorted(rows, key=str)
    assert (commit.rows, commit.version_before, commit.version_after) == (30, 0, 1)
    assert commit.size == sum(f.size for f in lake.open(TABLE).files) > 0


def test_overwriting_one_slice_leaves_the_others(lake):
    put(lake, TABLE, 5)
    other = legal_rows(CONTRACT, 4, partition={"dt": DAY + ONE})
    put(lake, TABLE, other, day=DAY + ONE)
    kept = lake.open(TABLE).select(start=DAY + ONE)
    put(lake, TABLE, 2, seed=1)
    assert len(rows_of(lake, DAY)) == 2
    assert rows_of(lake, DAY + ONE) == sorted(other, key=str)
    assert lake.open(TABLE).select(start=DAY + ONE) == kept, "the other slice's files, and so its digest, must not move"


def test_an_empty_slice_is_written_and_marked(lake):
    put(lake, TABLE, 5)
    put(lake, TABLE, 0, fingerprint="empty")
    snapshot = lake.open(TABLE)
    assert snapshot.files == ()
    assert snapshot.slices() == ()
    assert snapshot.mark(DAY.isoformat())[1].slices == {DAY.isoformat(): "empty"}
    assert snapshot.read().schema == CONTRACT.arrow_schema()


def test_a_pinned_version_stays_readable_after_an_overwrite(lake):
    rows = legal_rows(CONTRACT, 5, partition={"dt": DAY})
    version = put(lake, TABLE, rows).version_after
    put(lake, TABLE, 3, seed=1)
    assert rows_of(lake, DAY, version) == sorted(rows, key=str)


def test_select_covers_the_dates_it_says(lake):
    for i in range(4):
        put(lake, TABLE, 1, day=DAY + i * ONE)
    snapshot = lake.open(TABLE)

    def days(**bounds) -> list[str]:
        return [f.partition["dt"] for f in snapshot.select(**bounds)]

    names = [(DAY + i * ONE).isoformat() for i in range(4)]
    assert days() == names
    assert days(start=DAY + ONE) == names[1:]
    assert days(end=DAY + ONE) == names[:2]
    assert days(start=DAY + ONE, end=DAY + ONE) == names[1:2]
    assert days(start=DAY + 9 * ONE) == []
    assert days(where={"dt": names[2]}) == names[2:3]
    assert snapshot.slices() == tuple(DAY + i * ONE for i in range(4))


def test_dates_that_no_calendar_of_python_holds_belong_to_no_slice(lake, tmp_path):
    """The log of a platform's table may name them: they must not stop the others."""
    put(lake, TABLE, 1)
    log = Path(lake.uri(TABLE), "_delta_log", f"{1:020d}.json")
    lines = log.read_text().splitlines()
    (added,) = [json.loads(line) for line in lines if line.startswith('{"add"')]
    for number, day in enumerate(("+10000-01-01", "-0001-01-01", "0000-01-01")):
        added["add"] |= {"path": f"other-{number}.parquet", "partitionValues": {"dt": day}}
        lines.append(json.dumps(added))
    log.write_text("\n".join(lines))
    assert len(lake.open(TABLE).files) == 4
    assert lake.open(TABLE).slices() == (DAY,)


def test_as_of_leaves_out_files_that_hold_nothing_earlier_and_keeps_those_without_statistics(lake, tmp_path):
    """Statistics as a platform's writer leaves them: microseconds or timestamps; none in files of ours."""
    base = datetime(2026, 1, 3, tzinfo=UTC)
    for hour in (0, 24, 48):
        table = pa.table(
            {
                "at": pa.array([base.replace(day=3 + hour // 24)], pa.timestamp("us", tz="UTC")),
                "us": [hour * 3600 * 10**6],
            }
        )
        deltalake.write_deltalake(str(tmp_path / "t"), table, mode="append")
    snapshot = Snapshot(str(tmp_path / "t"), CONTRACT)
    assert len(snapshot.select(before=("at", base))) == 0
    assert len(snapshot.select(before=("at", base.replace(hour=1)))) == 1
    assert len(snapshot.select(before=("at", base.replace(day=5, hour=1)))) == 3
    assert len(snapshot.select(before=("us", datetime(1970, 1, 2, tzinfo=UTC)))) == 1
    put(lake, "raw_items", 3)
    assert len(lake.open("raw_items").select(before=("updated_at", datetime(1970, 1, 1, tzinfo=UTC)))) == 1


@given(st.lists(st.integers(0, 9), max_size=6), st.randoms())
def test_digest_ignores_order_and_sees_every_file(numbers, rng):

    files = [DataFile(f"p{n}", {}, 1, 1, {}) for n in numbers]
    shuffled = rng.sample(files, len(files))
    assert digest_of(files) == digest_of(shuffled)
    assert digest_of([*files, DataFile("new", {}, 1, 1, {})]) != digest_of(files)


# ---- refusals --------------------------------------------------------------------------------------------------


def test_a_row_that_breaks_the_contract_leaves_no_file(lake):
    good, bad = legal_rows(CONTRACT, 3), legal_rows(CONTRACT, 3, seed=1)
    bad[1]["similarity"] = 1.5
    put(lake, TABLE, 1)
    before = files_on_disk(lake)
    with (  # noqa: PT012
        pytest.raises(ContractError, match=r"pair_scores.*similarity: 1 row.*1\.5"),
        lake.writer(CONTRACT, {"dt": DAY.isoformat()}, dims=DIMS, file_rows=2) as writer,
    ):
        writer.write(data_table(CONTRACT, good))  # finishes one file, leaves one open
        writer.write(data_table(CONTRACT, bad))
    assert files_on_disk(lake) == before
    assert len(rows_of(lake, DAY)) == 1


def test_any_error_of_the_caller_leaves_no_file(lake):
    with pytest.raises(ZeroDivisionError), lake.writer(CONTRACT, {"dt": "2026-01-03"}, dims=DIMS) as writer:  # noqa: PT012
        writer.write(data_table(CONTRACT, legal_rows(CONTRACT, 3)))
        raise ZeroDivisionError
    assert files_on_disk(lake) == set()
    assert not lake.exists(TABLE)


def test_a_part_of_another_slice_is_refused_and_nothing_is_committed(lake):
    put(lake, TABLE, 2)
    with lake.writer(CONTRACT, {"dt": "2026-01-04"}, dims=DIMS) as writer:
        writer.write(data_table(CONTRACT, legal_rows(CONTRACT, 2)))
    mark = SliceMark("score_candidates", {"2026-01-03": "f"}, "r")
    with pytest.raises(ContractError, match="not of the slice"):
        lake.commit(CONTRACT, writer.parts, mark=mark, mode="overwrite", partition={"dt": "2026-01-03"})
    assert lake.open(TABLE).version == 1


def test_an_overwrite_without_a_partition_must_say_that_it_means_the_whole_table(lake):
    put(lake, TABLE, 2)
    with pytest.raises(ContractError, match="whole table"):
        lake.commit(CONTRACT, [], mark=SliceMark("x", {"2026-01-03": "f"}, "r"), mode="overwrite")
    lake.commit(CONTRACT, [], mark=SliceMark("x", {"*": "f"}, "r"), mode="overwrite")
    assert lake.open(TABLE).files == ()


@pytest.mark.parametrize("partition", [{}, {"dt": "2026-01-03", "step": "x"}, {"day": "2026-01-03"}])
def test_a_writer_needs_exactly_the_partition_columns(lake, partition):
    with pytest.raises(ContractError, match="partitioned by"):
        lake.writer(CONTRACT, partition, dims=DIMS)


@pytest.mark.parametrize("value", ["a b", "a/b", "a%20b", "..", "", "é", "a\n"])
def test_partition_values_that_paths_would_escape_are_refused(lake, value):
    with pytest.raises(ContractError, match="step="):
        lake.writer(load_contract("worker_rejects"), {"dt": "2026-01-03", "step": value}, dims={})


def test_a_table_of_another_contract_version_is_refused_naming_both(lake):
    put(lake, TABLE, 1)
    with pytest.raises(ContractError, match=r"pair_scores.*version 2.*version 7.*migrate"):
        lake.open(TABLE, contract=replace(CONTRACT, version=7))


def test_a_table_of_another_contract_is_refused_naming_both(lake):
    put(lake, TABLE, 1)
    wrong = Lake(lake.root, {"items": lake.uri(TABLE)})
    with pytest.raises(ContractError, match=r"'pair_scores', not items"):
        wrong.open("items")


def test_a_foreign_table_without_a_needed_column_is_refused_naming_it(tmp_path):
    deltalake.write_deltalake(str(tmp_path / "mine"), pa.table({"item_id": ["a"], "title": ["b"]}))
    with pytest.raises(ContractError, match=r"(?s)raw_items.*missing column 'updated_at' .*it has item_id, title"):
        Lake(str(tmp_path), {"raw_items": str(tmp_path / "mine")}).open("raw_items")


def test_a_foreign_table_may_lack_columns_that_may_be_null(tmp_path):
    at = pa.array([datetime(2026, 1, 3, tzinfo=UTC)], pa.timestamp("us", tz="UTC"))
    deltalake.write_deltalake(str(tmp_path / "mine"), pa.table({"item_id": ["a"], "updated_at": at}))
    (row,) = Lake(str(tmp_path), {"raw_items": str(tmp_path / "mine")}).open("raw_items").read().to_pylist()
    assert (row["item_id"], row["brand"], row["image_embedding"]) == ("a", None, None)


def impressions(days: list[date | None]) -> pa.Table:
    """Raw impressions as a platform's writer makes them, one row per day."""
    contract = load_contract("raw_impressions")
    rows = legal_rows(contract, len(days))
    return pa.Table.from_pylist(
        [{**r, "dt": d} for r, d in zip(rows, days, strict=True)], schema=contract.arrow_schema()
    )


def test_rows_without_a_date_belong_to_the_day_of_their_time(tmp_path):
    """A platform's table may hold them; ours may not."""
    rows = impressions([DAY, None])
    deltalake.write_deltalake(str(tmp_path / "mine"), rows, partition_by=["dt"])
    snapshot = Lake(str(tmp_path), {"raw_impressions": str(tmp_path / "mine")}).open("raw_impressions")
    (time,) = (row["event_time"] for row in rows.to_pylist() if row["dt"] is None)
    assert snapshot.slices() == tuple(sorted({DAY, time.date()}))
    assert len(snapshot.select(start=DAY, end=DAY)) == len(snapshot.select(start=time.date(), end=time.date())) == 1
    assert len(snapshot.files) == 2


def test_a_missing_table_names_its_place_and_who_makes_it(lake):
    with pytest.raises(MissingInputError, match=rf"pair_scores.*{lake.root}.*score_candidates"):
        lake.open(TABLE)
    with pytest.raises(MissingInputError, match="platform's input"):
        lake.open("raw_items")


# ---- writers at the same time ----------------------------------------------------------------------------------


def test_of_runs_that_create_one_table_at_once_each_has_it(tmp_path):
    for trial in range(20):
        lake = Lake(str(tmp_path / str(trial)))
        assert at_once(*[lambda lake=lake: lake.create(CONTRACT).version] * 4) == [0] * 4


def test_of_two_writers_of_one_slice_one_wins_whole_and_the_other_is_told(lake, monkeypatch):
    """Both have read the same version before either commits: no chance of one simply coming later."""
    put(lake, TABLE, 1)
    barrier, open_ = threading.Barrier(2, timeout=30), Lake.create
    first = threading.local()

    def create(self, *args):
        snapshot = open_(self, *args)
        if not getattr(first, "done", False):
            first.done = True
            barrier.wait()
        return snapshot

    monkeypatch.setattr(Lake, "create", create)
    results = at_once(lambda: put(lake, TABLE, 2, seed=2), lambda: put(lake, TABLE, 3, seed=3))
    errors = [r for r in results if isinstance(r, Exception)]
    (winner,) = [r for r in results if not isinstance(r, Exception)]
    assert [type(e) for e in errors] == [ConflictError]
    assert "pair_scores" in str(errors[0])
    assert "2026-01-03" in str(errors[0])
    assert len(rows_of(lake, DAY)) == winner.rows


def test_writers_of_different_slices_both_land(lake):
    put(lake, TABLE, 1)
    for seed in range(3):
        results = at_once(*(partial(put, lake, TABLE, 2, day=DAY + d * ONE, seed=seed) for d in range(3)))
        assert [type(r).__name__ for r in results] == ["Commit"] * 3, results
    snapshot = lake.open(TABLE)
    assert len(snapshot.read()) == 6
    assert {next(iter(m.slices)) for _, m in snapshot.marks()} == {(DAY + d * ONE).isoformat() for d in range(3)}


APPEND = """
import sys
from gpl_core.contracts.contract import load_contract
from gpl_core.lakehouse.files import digest_of, rows_in
from gpl_core.lakehouse.lake import Lake
from gpl_core.lakehouse.marks import SliceMark
from tests.support import data_table, legal_rows

root, name, commits = sys.argv[1], sys.argv[2], int(sys.argv[3])
lake, contract = Lake(root), load_contract("job_runs")
print("ready", flush=True)
sys.stdin.readline()
for i in range(commits):
    with lake.writer(contract, {}, dims={}) as writer:
        writer.write(data_table(contract, [{**r, "run_id": f"{name}-{i}"} for r in legal_rows(contract, 1)]))
    lake.commit(contract, writer.parts, mark=SliceMark("job_runs", {}, name), mode="append", app_id=name)
"""


def python(code: str, *args: object) -> subprocess.Popen:
    """A Python process with the project on its path, its pipes open."""
    root = str(Path(__file__).parents[3])
    env = {**os.environ, "PYTHONPATH": root}
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, args)],
        cwd=root, env=env, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def test_appends_of_two_processes_all_land_even_while_the_table_is_made(lake):
    writers = [python(APPEND, lake.root, name, 4) for name in ("a", "b")]
    for writer in writers:
        assert writer.stdout.readline() == "ready\n"
    for writer in writers:
        writer.stdin.write("go\n")
        writer.stdin.flush()
    for writer in writers:
        assert writer.communicate(timeout=60)[1] == ""
        assert writer.returncode == 0
    runs = lake.open("job_runs").read(columns=["run_id"]).column("run_id").to_pylist()
    assert sorted(runs) == [f"{name}-{i}" for name in ("a", "b") for i in range(4)]


# ---- a writer that is killed -----------------------------------------------------------------------------------

KILLED = """
import sys
from gpl_core.contracts.contract import load_contract
from gpl_core.lakehouse.files import digest_of, rows_in
from gpl_core.lakehouse.lake import Lake
from tests.support import DIMS, data_table, legal_rows

contract = load_contract("pair_scores")
with Lake(sys.argv[1]).writer(contract, {"dt": "2026-01-03"}, dims=DIMS, file_rows=3) as writer:
    writer.write(data_table(contract, legal_rows(contract, 8, seed=5)))
    print(len(writer.parts), flush=True)
    sys.stdin.readline()
"""


def test_a_killed_writer_leaves_readers_alone_and_the_rerun_gives_the_same_rows(lake):
    old = legal_rows(CONTRACT, 2, partition={"dt": DAY})
    version = put(lake, TABLE, old).version_after
    writer = python(KILLED, lake.root)
    assert writer.stdout.readline() == "2\n", "two files finished, one open"
    writer.send_signal(signal.SIGKILL)
    assert writer.wait(timeout=30) == -signal.SIGKILL
    writer.communicate()
    assert len(files_on_disk(lake)) >= 3, "its files are still there"
    assert rows_of(lake, DAY) == sorted(old, key=str)
    assert lake.open(TABLE).version == version
    put(lake, TABLE, 8, seed=5)
    assert rows_of(lake, DAY) == sorted(legal_rows(CONTRACT, 8, seed=5), key=str)


# ---- marks -----------------------------------------------------------------------------------------------------


@given(
    st.text(), st.dictionaries(st.text(), st.text()), st.text(),
    st.dictionaries(st.text(), st.one_of(st.integers(), st.text(), st.none())),
)  # fmt: skip
def test_marks_survive_their_json(step, slices, run_id, details):
    mark = SliceMark(step, slices, run_id, details)
    assert SliceMark.from_json(mark.to_json()) == mark


@pytest.mark.parametrize("text", [None, "", "hello", "[]", "{}", '{"gpl": 1}', '{"gpl": {"step": "x"}}', "null"])
def test_commits_of_others_carry_no_mark_of_ours(text):
    assert SliceMark.from_json(text) is None


def test_the_newest_mark_of_a_slice_counts_and_steps_are_told_apart(lake):
    put(lake, TABLE, 1, fingerprint="old", step="a")
    put(lake, TABLE, 1, fingerprint="other", step="a", day=DAY + ONE)
    put(lake, TABLE, 1, fingerprint="new", step="b")
    snapshot = lake.open(TABLE)
    assert snapshot.mark("2026-01-03")[1].slices["2026-01-03"] == "new"
    assert snapshot.mark("2026-01-03", "a")[1].slices["2026-01-03"] == "old"
    assert snapshot.mark("2026-01-09") is None
    assert [v for v, _ in snapshot.marks()] == [3, 2, 1]


def test_a_run_takes_back_what_it_wrote_and_never_what_another_has_written_since(lake):
    both = [(DAY + n * ONE).isoformat() for n in (0, 1)]
    put(lake, TABLE, 3, fingerprint="a", details={"seen": 3})
    two = SliceMark("score_candidates", dict.fromkeys(both, "b"), "bulk", {"seen": 3})
    with lake.writer(CONTRACT, {"dt": both[0]}, dims=DIMS) as writer:
        writer.write(data_table(CONTRACT, legal_rows(CONTRACT, 1)))
    bulk = lake.commit(CONTRACT, writer.parts, mark=two, mode="append").version_after
    later = put(lake, TABLE, 2, day=DAY + ONE, fingerprint="c").version_after

    def overtaken(newest: Snapshot, mark: SliceMark) -> None:
        """As when a commit to another date comes first, time and again."""
        put(lake, TABLE, 1, day=DAY + 2 * ONE)
        raise deltalake.exceptions.CommitFailedError("overtaken")

    with pytest.raises(ConflictError, match="15 other commits"):
        lake.refuse(TABLE, "bulk", later, "ContractError", overtaken)
    before = lake.open(TABLE)
    assert before.history.refused == {}
    lake.refuse(TABLE, "bulk", bulk, "ContractError")
    table = lake.open(TABLE)
    assert table.mark(both[0])[1] == replace(two, slices={both[0]: ""}, details={"seen": 3, "refused": "ContractError"})
    assert table.mark(both[1])[1].slices == {both[1]: "c"}
    assert table.history.refused == {both[0]: table.version}
    assert {f.path for f in table.files} == {f.path for f in before.files}
    assert table.changes_since(before.version) == {}, "no row has changed"
    lake.refuse(TABLE, "bulk", bulk, "ContractError")
    assert lake.open(TABLE).version == table.version, "once"


def test_a_pinned_version_knows_its_own_marks_under_their_own_versions(lake):
    """delta-rs' history() numbers all commits downwards from the loaded version: marks must not come from there."""
    versions = {f"f{i}": put(lake, TABLE, 1, fingerprint=f"f{i}").version_after for i in range(3)}
    pinned = lake.open(TABLE, versions["f1"])
    put(lake, TABLE, 1, fingerprint="later")
    assert [(v, m.slices["2026-01-03"]) for v, m in pinned.marks()] == [(versions["f1"], "f1"), (versions["f0"], "f0")]
    assert lake.open(TABLE, 0).marks() == []


def test_the_application_transaction_counts_up_with_each_write_of_a_slice(lake):
    app_id = f"score_candidates:{TABLE}:2026-01-03"
    assert put(lake, TABLE, 1).version_after == 1
    assert lake.open(TABLE).transaction_version(app_id) == 0
    put(lake, TABLE, 1)
    put(lake, TABLE, 1, day=DAY + ONE)
    assert lake.open(TABLE).transaction_version(app_id) == 1


def test_a_caller_that_built_on_an_older_transaction_is_told(lake):
    put(lake, TABLE, 1)
    mark = SliceMark("x", {"*": "f"}, "r")
    commit = partial(lake.commit, CONTRACT, [], mark=mark, mode="append", app_id="a")
    commit(last=-1)
    with pytest.raises(ConflictError, match="a is at 0, not -1"):
        commit(last=-1)
    commit(last=0)


# ---- part files ------------------------------------------------------------------------------------------------


def test_files_and_row_groups_are_cut_where_asked(lake):
    with lake.writer(CONTRACT, {"dt": "2026-01-03"}, dims=DIMS, file_rows=10, row_group_rows=4, rank=3) as writer:
        for chunk in range(5):
            writer.write(data_table(CONTRACT, legal_rows(CONTRACT, 5, seed=chunk)))
    assert [p["rows"] for p in writer.parts] == [10, 10, 5]
    assert all(p["path"].startswith("dt=2026-01-03/part-00003-") for p in writer.parts)
    for part in writer.parts:
        meta = pq.read_metadata(f"{lake.uri(TABLE)}/{part['path']}")
        assert meta.num_rows == part["rows"]
        assert max(meta.row_group(g).num_rows for g in range(meta.num_row_groups)) <= 4
        assert "dt" not in meta.schema.names, "partition columns are not in the files"


def test_columns_of_a_batch_may_come_in_any_order(lake):
    rows = legal_rows(CONTRACT, 4, partition={"dt": DAY})
    table = data_table(CONTRACT, rows)
    with lake.writer(CONTRACT, {"dt": "2026-01-03"}, dims=DIMS) as writer:
        writer.write(table.select(sorted(table.column_names)))
    mark = SliceMark("x", {"2026-01-03": "f"}, "r")
    lake.commit(CONTRACT, writer.parts, mark=mark, mode="overwrite", partition={"dt": "2026-01-03"})
    assert rows_of(lake, DAY) == sorted(rows, key=str)


def test_overrides_point_a_table_elsewhere_and_create_keeps_what_is_there(tmp_path):
    lake = Lake(str(tmp_path / "root"), {TABLE: str(tmp_path / "elsewhere/")})
    put(lake, TABLE, 2)
    assert (tmp_path / "elsewhere" / "_delta_log").is_dir()
    assert lake.create(CONTRACT).version == 1


@pytest.mark.parametrize("rows", [10, 20_000])
def test_a_full_disk_is_told_and_leaves_nothing(lake, monkeypatch, rows):
    """/dev/full stands in for the second part file: few rows fail when it is closed, many while they are written."""
    names = [uuid.UUID(int=n) for n in range(2)]
    monkeypatch.setattr("gpl_core.lakehouse.writer.uuid.uuid4", iter(names).__next__)
    folder = Path(lake.uri(TABLE), f"dt={DAY}")
    folder.mkdir(parents=True)
    (folder / f"part-00000-{names[1]}.parquet").symlink_to("/dev/full")
    both = data_table(CONTRACT, legal_rows(CONTRACT, 2 * rows - 1))
    writer = lake.writer(CONTRACT, {"dt": DAY.isoformat()}, dims=DIMS, file_rows=rows)
    with pytest.raises(OSError) as caught, writer:
        writer.write(both)
    assert "No space left on device; free up space" in str(classified(caught.value))
    assert exit_code_of(caught.value) == 1
    assert list(folder.iterdir()) == []
