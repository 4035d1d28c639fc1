"""The readers under docs/examples: each finds what the manifest promises, also after the table has moved on."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gpl_core.lakehouse.marks import SliceMark
from spark_jobs import training_feed
from spark_jobs.common.manifests import manifest_path
from tests.spark_jobs.label_lake import FeedLake
from tests.spark_jobs.tiny_lake import D

ROOT = Path(__file__).parents[1]
TRAINER = ROOT / "docs" / "examples" / "trainer.py"  # test_pipeline.py runs it
EXAMPLES = sorted({*(ROOT / "docs" / "examples").glob("*.py")} - {TRAINER})
pytestmark = pytest.mark.spark


@pytest.fixture(scope="module")
def manifest(tmp_path_factory, spark) -> dict:
    """A feed of 9 rows in several files; a later commit then empties the slice."""
    lake = FeedLake(tmp_path_factory.mktemp("examples"), spark, "feed.rows_per_file=3")
    lake.exposed(*[("r1", "u1", n, n % 2) for n in range(5)])
    lake.unexposed(*[("r1", "u1", n) for n in range(5, 9)])
    lake.labels(*[("u1", n, 0.1 * (n - 4), 0.5 * (n - 4)) for n in range(5, 9)])
    lake.sids((0, 0, (1, 1, 1), 0))
    assert lake.run("training_feed", training_feed.run) == "done"
    made = json.loads((lake.root / manifest_path(lake.lake, D)).read_text())
    contract = lake.lake.open("training_feed").contract
    mark = SliceMark("training_feed", {D.isoformat(): "later"}, "later")
    lake.lake.commit(contract, [], mark=mark, mode="overwrite", partition={"dt": D.isoformat()})
    assert lake.feed("item_id") == []
    return made


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.stem)
def test_every_reader_run_as_it_says_finds_what_the_manifest_promises(manifest, path, tmp_path, monkeypatch, capsys):
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    monkeypatch.setattr(sys, "argv", [str(path), str(tmp_path / "manifest.json")])
    module = runpy.run_path(str(path), run_name="__main__")
    assert f"{path.relative_to(ROOT)} lakehouse/quickstart/manifests/" in module["__doc__"]
    assert capsys.readouterr().out.strip()
    assert len(manifest["files"]) > 1
    assert manifest["rows"] == 9
    promised = {k: manifest[k] for k in ("rows", "label_sum", "pseudo_label_sum", "weight_sum")}
    assert module["totals"](manifest) == pytest.approx(promised)


@pytest.mark.slow
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.stem)
def test_every_reader_is_a_program_of_its_own(manifest, path, tmp_path):
    """In a fresh process: no session, no import of another test is there to help."""
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    done = subprocess.run(
        [sys.executable, str(path), "manifest.json"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "9" in done.stdout or manifest["location"] in done.stdout, "its rows, or where they lie"


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.stem)
def test_examples_are_short(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 40
    assert len(TRAINER.read_text(encoding="utf-8").splitlines()) <= 60


def test_five_readers():
    assert len(EXAMPLES) == 5


@pytest.mark.parametrize(
    ("name", "rows", "refused"),
    [
        ("b.parquet", {"target": [0.5, 1.0]}, ""),
        ("b,c.parquet", {"target": [0.5, 1.0]}, "a glob or a comma"),
        ("b[0].parquet", {"target": [0.5, 1.0]}, "a glob or a comma"),
        ("b.parquet", {"target": [0.5, None]}, "nulls"),
        ("b.parquet", {"target": ["0.5", "1.0"]}, "schemas"),
    ],
)
def test_what_torcheasyrec_would_misread_is_refused(tmp_path, name, rows, refused):
    floats = {c: [0.5, 1.0] for c in ("target", "label", "pseudo_label", "sample_weight")}
    pq.write_table(pa.table(floats), tmp_path / "a.parquet")
    pq.write_table(pa.table(floats | rows), tmp_path / name)
    manifest = {"location": str(tmp_path), "files": [{"path": "a.parquet"}, {"path": name}]}
    totals = runpy.run_path(str(ROOT / "docs/examples/torcheasyrec_config.py"))["totals"]
    if refused:
        with pytest.raises(AssertionError, match=refused):
            totals(manifest)
    else:
        assert totals(manifest) == {"rows": 4, "label_sum": 3.0, "pseudo_label_sum": 3.0, "weight_sum": 3.0}
