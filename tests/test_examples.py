"""The readers under docs/examples: each finds what the manifest promises, also after the table has moved on."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from gpl_core.lake import SliceMark
from spark_jobs import training_feed
from spark_jobs.manifests import manifest_path
from tests.spark_jobs.label_lake import FeedLake
from tests.spark_jobs.tiny_lake import D

EXAMPLES = sorted(Path(__file__).parents[1].joinpath("docs", "examples").glob("*.py"))
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
def test_every_reader_finds_what_the_manifest_promises(manifest, path):
    if path.stem.startswith("duckdb"):
        pytest.importorskip("duckdb", reason="duckdb is no dependency of this project: pip install duckdb to run this")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert len(manifest["files"]) > 1
    assert manifest["rows"] == 9
    promised = {k: manifest[k] for k in ("rows", "label_sum", "pseudo_label_sum", "weight_sum")}
    assert module.totals(manifest) == pytest.approx(promised)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.stem)
def test_examples_are_short(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 40


def test_five_readers():
    assert len(EXAMPLES) == 5
