"""The lakehouse on S3 (moto's server): slices, artifacts, decisions, maintenance and lost races, without Spark."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest

from gpl_core.cli import main
from gpl_core.commands.evict import evict
from gpl_core.commands.forget import forget
from gpl_core.commands.migrate import migrate
from gpl_core.commands.optimize import compact
from gpl_core.commands.vacuum import vacuum
from gpl_core.config import load_config
from gpl_core.contracts.contract import load_contract
from gpl_core.errors import ConflictError, ContractError, MissingInputError
from gpl_core.lakehouse.artifacts import ArtifactStore, Manifest
from gpl_core.lakehouse.lake import Lake
from gpl_core.lakehouse.person import Person
from gpl_core.lakehouse.query import Query
from gpl_core.lakehouse.storage import filesystem, read_text, write_whole
from spark_jobs.common.manifests import ensure_manifest, manifest_path
from tests.gpl_core.commands.test_migrate import ROWS, V1, V2
from tests.gpl_core.lakehouse.test_lake import APPEND, at_once, python
from tests.gpl_core.toy import Toy
from tests.object_store import bucket
from tests.support import DAY, ONE, legal_rows, put, small_config

ROOT = Path(__file__).parents[3]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def store() -> Iterator[str]:
    with bucket() as location:
        yield location


def test_init_finds_the_tables_of_a_bucket(store, tmp_path):
    toy = Toy(small_config(tmp_path, {"lakehouse": {"root": f"{store}/shop"}}))
    toy.raw([DAY, DAY + ONE])
    out = tmp_path / "shop.yaml"
    assert main(["init", f"{store}/shop", "--out", str(out), "--root", f"{store}/gpl", "--yes"]) == 0
    lakehouse = load_config(str(out)).lakehouse
    raw = ("raw_items", "raw_impressions", "raw_candidates", "raw_interactions")
    assert lakehouse.tables == {table: f"{store}/shop/tables/{table}" for table in raw}
    assert lakehouse.root == f"{store}/gpl"


def test_the_graph_is_done_on_s3_and_stays_done_through_maintenance(store, tmp_path):
    """Every step's slices and artifacts for one date; then compaction, vacuum, rollback, promote, forget, evict."""
    toy = Toy(small_config(tmp_path, {"lakehouse": {"root": f"{store}/graph"}}), files=2)
    toy.raw([DAY, DAY + ONE])
    toy.run_pending([DAY])
    assert toy.not_done([DAY]) == {}
    lake, artifacts = toy.planner.lake, toy.planner.artifacts
    rows = sorted(map(repr, lake.open("pair_scores").read().to_pylist()))
    assert len(rows) == 2

    assert compact(lake, load_contract("pair_scores"), [DAY], 2**30)[1] == 1
    assert {f.table: f.files for f in vacuum(lake, 0)}["pair_scores"] == 2
    assert sorted(map(repr, lake.open("pair_scores").read().to_pylist())) == rows
    assert toy.not_done([DAY]) == {}
    assert Query(lake).rows("SELECT count(*) AS n FROM pair_scores") == [{"n": 2}]

    calibrator = artifacts.in_force("calibrator", DAY).version
    assert artifacts.decide("calibrator", calibrator, "rollback")
    assert toy.state("pseudo_labels", DAY).status == "blocked"
    assert artifacts.decide("calibrator", calibrator, "promote")
    assert toy.not_done([DAY]) == {}

    for user in lake.open("pair_scores").read(columns=["user_id"])["user_id"].to_pylist():
        write_whole(lake.path("reports", "day.html"), f"<b>{user}</b>".encode())
        found = {f.place: (f.found, f.done) for f in forget(lake, Person(user))}
        assert found["pair_scores"] == (1, "1 rows removed, 0 old files deleted")
        assert found[lake.path("reports")] == (1, "1 files cleaned")
    assert lake.open("pair_scores").read().num_rows == 0
    assert read_text(lake.path("reports", "day.html")) == "<b>[forgotten]</b>"
    evict(toy.planner, DAY)
    assert {f.table: f.files for f in vacuum(lake, 0)}["pair_scores"] == 2, "one of the two rows each"
    orphan = f"{lake.uri('truth')}/dt={DAY}/part-0.parquet"  # of a writer that was killed before it made the table
    write_whole(orphan, b"PAR1")
    assert {f.table: f.files for f in vacuum(lake, 0)}["truth"] == 1
    # pyarrow leaves an empty object where a folder's last file was deleted: no file that a vacuum could delete.
    assert {f.files for f in vacuum(lake, 0)} == {0}


def test_a_bundle_comes_back_with_its_files_and_a_damaged_one_is_refused(store, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    (tmp_path / "made" / "adapter").mkdir(parents=True)
    (tmp_path / "made" / "adapter" / "w.bin").write_bytes(bytes(range(256)))
    artifacts = ArtifactStore(f"{store}/bundles")

    def publish(fingerprint: str) -> Manifest:
        return artifacts.publish("tokenizer", tmp_path / "made", trained_through=DAY, fingerprint=fingerprint,
                                 config_hash="c", lineage={})  # fmt: skip

    whole, damaged = publish("whole"), publish("damaged")
    both = at_once(lambda: artifacts.fetch(whole), lambda: artifacts.fetch(whole))
    assert [(folder / "adapter" / "w.bin").read_bytes() for folder in both] == [bytes(range(256))] * 2
    fs, base = filesystem(f"{artifacts.root}/tokenizer/{damaged.version}/adapter/w.bin")
    fs.rm(base)
    assert artifacts.fetch(damaged).is_dir(), "this machine has a whole copy"
    assert len(list(Path(tempfile.gettempdir()).glob("*/*"))) == 2, "copies that lost the race are gone"
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "another machine"))
    with pytest.raises(ContractError, match=r"adapter/w\.bin is missing"):
        artifacts.fetch(damaged)
    fs.pipe_file(base, bytes(range(256)))
    assert artifacts.fetch(damaged).is_dir(), "restored, it is copied again"


def test_a_table_is_migrated(store):
    lake = Lake(f"{store}/migrated")
    for day, rows in ROWS.items():
        put(lake, "user_stats", [{**r, "dt": day} for r in rows], day=day, contract=V1, file_rows=1)
    assert migrate(lake, V2, {}).rows == 3
    moved = lake.open("user_stats", contract=V2).read(columns=["positives"])["positives"].to_pylist()
    assert sorted(moved) == [1, 2, 3]


def test_appends_of_two_processes_all_land(store):
    """Each commit is a PUT that S3 refuses when the version is there: the one of two that loses goes on to the next."""
    lake = Lake(f"{store}/appends")
    lake.create(load_contract("job_runs"))
    writers = [python(APPEND, lake.root, name, 4) for name in ("a", "b")]
    for writer in writers:
        assert writer.stdout.readline() == "ready\n"
    for writer in writers:
        writer.stdin.write("go\n")
        writer.stdin.flush()
    for writer in writers:
        assert writer.communicate(timeout=120)[1] == ""
    runs = lake.open("job_runs").read(columns=["run_id"]).column("run_id").to_pylist()
    assert sorted(runs) == [f"{name}-{i}" for name in ("a", "b") for i in range(4)]


def test_of_two_writers_of_one_slice_one_wins_whole_and_the_other_is_told(store, monkeypatch):
    lake, create = Lake(f"{store}/race"), Lake.create
    put(lake, "pair_scores", 1)
    known = lake.open("pair_scores")
    monkeypatch.setattr(Lake, "create", lambda self, *a: known)  # both have read this version before either commits
    put(lake, "pair_scores", 2, seed=2)
    with pytest.raises(ConflictError, match=r"pair_scores.*2026-01-03"):
        put(lake, "pair_scores", 3, seed=3)
    monkeypatch.setattr(Lake, "create", create)
    assert lake.open("pair_scores").read().num_rows == 2


def test_workers_stream_what_lies_there(store):
    from gpu_workers.inputs.feed import read_batches

    lake = Lake(f"{store}/streamed")
    put(lake, "pair_scores", 5, file_rows=2)
    snapshot = lake.open("pair_scores")
    streamed = [u for batch in read_batches(snapshot, snapshot.files, ["user_id"]) for u in batch["user_id"]]
    assert sorted(streamed) == sorted(snapshot.read(columns=["user_id"])["user_id"].to_pylist())


def test_petastorm_reads_every_row_that_the_manifest_names_once(store):
    """The example as a trainer starts it: the manifest's files alone, though the table has moved on since."""
    lake, contract = Lake(f"{store}/feed"), load_contract("training_feed")
    # Of as many rows, powers of two have their sum only when each occurs once.
    weights = [0.5**n for n in range(11)]
    sums = {"label_sum": 0.0, "pseudo_label_sum": 2.75, "weight_sum": sum(weights)}
    rows = [
        {**row, "label": 0.0, "pseudo_label": 0.25, "sample_weight": weight}
        for row, weight in zip(legal_rows(contract, len(weights)), weights)
    ]
    put(lake, "training_feed", rows, file_rows=4, details={"rows": len(rows), **sums})
    manifest = ensure_manifest(lake, DAY, contract)
    put(lake, "training_feed", 5, seed=2)
    assert manifest["location"].startswith("s3://")
    assert sorted(f["rows"] for f in manifest["files"]) == [3, 4, 4]

    command = [sys.executable, "docs/examples/petastorm_pytorch.py", manifest_path(lake, DAY)]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    promised = {name: manifest[name] for name in ("rows", *sums)}
    assert ast.literal_eval(done.stdout) == promised == {"rows": 11, **sums}


def test_what_is_not_there_is_said_as_on_a_disk(store):
    lake = Lake(f"{store}/nothing")
    assert not lake.exists("pair_scores")
    with pytest.raises(MissingInputError, match=r"no Delta table at s3://.*score_candidates"):
        lake.open("pair_scores")
    assert ArtifactStore(lake.root).in_force_or_none("tokenizer", DAY + timedelta(days=9)) is None


def test_a_page_has_its_type_so_that_a_browser_shows_it(store):
    page = f"{store}/reports/index.html"
    write_whole(page, b"<p>")
    fs, path = filesystem(page)
    with fs.fs.open_input_stream(path) as stream:
        assert stream.metadata()["Content-Type"] == b"text/html; charset=utf-8"
        assert stream.read() == b"<p>"
