"""The three SID workers on real Delta tables; in this process, and under the DeepSpeed launcher with two ranks."""

from __future__ import annotations

import io
import json
import os
import socket
import subprocess
import sys
from dataclasses import dataclass, field, replace
from datetime import UTC, date, datetime
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import yaml
from PIL import Image

from gpl_core.cli import main
from gpl_core.config import load_config
from gpl_core.contracts.contract import load_contract
from gpl_core.errors import ConflictError, ContractError, GateError, LineageError, MissingInputError, UsageError
from gpl_core.graph.planner import Planner
from gpl_core.graph.step_run import Counts, StepContext
from gpl_core.graph.steps import find_step
from gpl_core.lakehouse.artifacts import ArtifactStore
from gpl_core.lakehouse.lake import Lake
from gpl_core.lakehouse.marks import WHOLE, SliceMark
from gpu_workers import assign_sids, encode_items, train_tokenizer
from gpu_workers.ranks import start_ranks
from gpu_workers.worker import worker_of
from tests.support import ODD, doubled, put, run_of

ROOT = Path(__file__).parents[2]
DAY = "2026-01-02"
LENGTH = 12
pytestmark = pytest.mark.usefixtures("one_rank")
BODIES = {"encode_items": encode_items.run, "train_tokenizer": train_tokenizer.run, "assign_sids": assign_sids.run}


def micros(text: str) -> int:
    return int(datetime.fromisoformat(text).replace(tzinfo=UTC).timestamp() * 1_000_000)


def item(index: int, vector, *, content: str = "a", day: str = "2026-01-01", **more):
    return {
        "item_id": f"i{index}", "item_index": index, "title": "", "description": "", "category": "", "brand": "",
        "text": f"item {index}", "image": b"", "image_uri": "", "image_embedding": [float(v) for v in vector],
        "content_hash": f"{content}{index}", "updated_at": micros(day), "withdrawn_at": -1, **more,
    }  # fmt: skip


@dataclass
class House:
    """One small lakehouse and the command that runs a worker on it."""

    folder: Path
    changes: dict = field(default_factory=dict)

    @property
    def lake(self) -> Lake:
        return Lake(str(self.folder / "lake"))

    def write_items(self, rows) -> None:
        contract = load_contract("items")
        self.lake.create(contract)
        with self.lake.writer(contract, {}, dims={}, row_group_rows=16) as writer:
            writer.write(pa.Table.from_pylist(rows, schema=contract.arrow_schema(partitions=False)))
        self.lake.commit(contract, writer.parts, mark=SliceMark("ingest", {WHOLE: "x"}, "r"), mode="overwrite")

    def config_file(self) -> Path:
        config = {
            "lakehouse": {"root": str(self.folder / "lake")},
            "run": {"start_date": "2026-01-01", "end_date": "2026-01-05"},
            "encoder": {"parts": [{"name": "precomputed", "options": {"dim": LENGTH}}]},
            "tokenizer": {
                "codes": 16, "levels": 3, "epochs": 40, "batch_size": 64,
                "gates": {"min_perplexity_share": 0.2, "max_dead_share": 0.6, "max_collision_share": 1.0},
            },
        }  # fmt: skip
        for key, value in self.changes.items():
            section, name = key.split(".")
            config[section] = {**config[section], name: value}
        path = self.folder / "config.yaml"
        path.write_text(yaml.safe_dump(config))
        return path

    def run(self, worker: str, day: str = DAY) -> Counts | None:
        """Runs the worker's body in this process as its only rank; None when the tables say that it is done."""
        planner = Planner(load_config(str(self.config_file())))
        run_date = date.fromisoformat(day)
        state = planner.state(find_step(worker), run_date)
        if state.status == "done":
            return None
        assert state.status != "blocked", state.reason
        context = StepContext(planner, worker, run_date, state, "run")
        BODIES[worker](context, start_ranks())
        return context.counts

    def rows(self, table: str) -> list[dict]:
        return self.lake.open(table).read().to_pylist()

    def tokenizers(self) -> list[str]:
        return sorted(p.parent.name for p in (self.folder / "lake" / "artifacts" / "tokenizer").glob("*/manifest.json"))


def clustered(count: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    centers = rng.normal(size=(6, LENGTH))
    return centers[rng.integers(6, size=count)] + 0.4 * rng.normal(size=(count, LENGTH))


@pytest.fixture
def house(tmp_path, monkeypatch):
    """Trains, in this process, with an RQ-VAE of a size for vectors of a few numbers."""
    usual = train_tokenizer.settings_of
    monkeypatch.setattr(
        train_tokenizer, "settings_of",
        lambda config, items: replace(usual(config, items), hidden=(32,), latent=8, warmup_epochs=5),
    )  # fmt: skip
    folder = tmp_path / ODD
    folder.mkdir()
    return House(folder)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_items_become_embeddings_then_a_tokenizer_then_sids(house):
    vectors = clustered(100)
    vectors[7] = vectors[3]  # one content twice
    rows = [item(n, v) for n, v in enumerate(vectors)]
    for n in (5, 6):
        rows[n]["image_embedding"] = [0.0] * LENGTH
    house.write_items(rows)

    report = house.run("encode_items")
    assert report.rows_in == 100 == report.details["encoded"] + report.rows_dropped
    embeddings = {r["item_index"]: r for r in house.rows("item_embeddings")}
    assert sorted(embeddings) == [n for n in range(100) if n not in (5, 6)]
    for n in (0, 99):
        np.testing.assert_allclose(embeddings[n]["embedding"], vectors[n] / np.linalg.norm(vectors[n]), atol=1e-6)
    rejects = {r["key"]: r["reason"] for r in house.rows("worker_rejects")}
    assert rejects == {f"item_index={n}": "no precomputed embedding" for n in (5, 6)}

    trained = house.run("train_tokenizer")
    assert len(house.tokenizers()) == 1
    assert trained.details["items"] == 98
    manifest = json.loads(
        (house.folder / "lake/artifacts/tokenizer" / house.tokenizers()[0] / "manifest.json").read_text()
    )
    assert manifest["lineage"] == {"encoder_version": embeddings[0]["encoder_version"]}
    assert manifest["trained_through"] == "2026-01-01"
    assert list((house.folder / "lake/work").glob("train_tokenizer/*/tensorboard/*tfevents*"))

    house.run("assign_sids")
    sids = {r["item_index"]: r for r in house.rows("item_sids")}
    assert sorted(sids) == sorted(embeddings)
    assert {r["sid_version"] for r in sids.values()} == set(house.tokenizers())
    assert sids[3]["sid"] == sids[7]["sid"]
    assert sids[3]["bucket_size"] == sids[7]["bucket_size"] == 2
    assert all(len(r["sid"]) == 3 and max(r["sid"]) < 16 for r in sids.values())

    # A second run of anything is a recorded no-op that writes nothing.
    versions = [house.lake.open(t).version for t in ("item_embeddings", "item_sids", "worker_rejects")]
    for worker in ("encode_items", "train_tokenizer", "assign_sids"):
        assert house.run(worker) is None
    assert versions == [house.lake.open(t).version for t in ("item_embeddings", "item_sids", "worker_rejects")]

    # The next day: a new item, an item that changed a little, and one that became something else.
    opposite = -vectors[20]
    rows[10] = item(10, vectors[10] * 1.001, content="b", day="2026-01-02")
    rows[20] = item(20, opposite, content="b", day="2026-01-02")
    rows.append(item(100, vectors[30], day="2026-01-02"))  # a newcomer with item 30's content
    rows.append(item(101, vectors[31] + 0.01, day="2026-01-02"))
    house.write_items(rows)
    before = {r["item_index"]: r for r in house.rows("item_sids")}
    assert house.run("encode_items", "2026-01-03").details["encoded"] == 4
    kept = [r for r in house.rows("item_embeddings") if r["content_hash"].startswith("a") and r["item_index"] < 100]
    assert sorted(kept, key=lambda r: r["item_index"]) == [embeddings[n] for n in sorted(embeddings)]
    report = house.run("assign_sids", "2026-01-03")
    assert (report.details["issued"], report.details["reissued"]) == (3, 1)
    after = house.rows("item_sids")
    in_force = {r["item_index"]: r for r in after if r["retired_at"] == 0}
    for n, row in before.items():
        if n != 20:
            assert in_force[n] == row  # published rows stay as they were
    assert in_force[20]["issue"] == 1
    (retired,) = [r for r in after if r["retired_at"]]
    assert {**retired, "retired_at": 0} == before[20]
    assert in_force[100]["sid"] == before[30]["sid"]
    others = {tuple(r["sid"]) for n, r in in_force.items() if n not in (101,)}
    assert tuple(in_force[101]["sid"]) not in others

    # Ingest rewrites its table without a change: nothing is encoded or issued again, and the rows stay what they are.
    house.write_items(rows)
    assert house.run("encode_items", "2026-01-03").details["encoded"] == 0
    assert house.run("assign_sids", "2026-01-04") is None or house.rows("item_sids") == after

    # An item whose content comes back is current again, though it was encoded before.
    rows[10] = item(10, vectors[10], day="2026-01-04")
    house.write_items(rows)
    assert house.run("encode_items", "2026-01-05").details["encoded"] == 1
    house.run("assign_sids", "2026-01-05")
    key = lambda r: (r["item_index"], r["issue"])  # noqa: E731
    assert sorted(house.rows("item_sids"), key=key) == sorted(after, key=key)


@pytest.mark.parametrize("count", [1, 2, 10])
def test_tiny_catalogs_go_all_the_way(house, count):
    """Fewer items than the 16 codes; with ten, two are one content."""
    vectors = clustered(count, seed=3)
    vectors[-1] = vectors[-1] if count < 10 else vectors[0]
    house.write_items([item(n, v) for n, v in enumerate(vectors)])
    for worker in BODIES:
        house.run(worker)
    rows = sorted(house.rows("item_sids"), key=lambda r: r["item_index"])
    assert len(rows) == count
    assert len({tuple(r["sid"]) for r in rows}) == min(count, 9)
    assert [r["bucket_size"] for r in rows] == [1] * count if count < 10 else [2] + [1] * 8 + [2]


def test_a_catalog_without_a_usable_item_is_refused_by_name(house):
    house.write_items([item(n, [0.0] * LENGTH) for n in range(3)])
    assert house.run("encode_items").details["encoded"] == 0
    with pytest.raises(MissingInputError, match=r"item_embeddings.*no embeddings of encoder_version.*run encode_items"):
        house.run("train_tokenizer")


def test_two_tokenizer_versions_live_side_by_side(house):
    """Consumers of old dates stay with the old version while the new one is taken over; a late item gets both."""
    rows = [item(n, v) for n, v in enumerate(clustered(60))]
    house.write_items(rows)
    for worker in BODIES:
        house.run(worker)
    (old,) = house.tokenizers()
    issued = sorted(house.rows("item_sids"), key=lambda r: r["item_index"])
    assert house.run("train_tokenizer", "2026-01-20") is None, "old enough to be trained again, of the same catalog"

    house.changes["tokenizer.epochs"] = 41
    house.run("train_tokenizer", "2026-01-20")
    (new,) = set(house.tokenizers()) - {old}
    house.run("assign_sids", "2026-01-20")
    by_version = {v: [r for r in house.rows("item_sids") if r["sid_version"] == v] for v in (old, new)}
    assert sorted(by_version[old], key=lambda r: r["item_index"]) == issued
    assert len(by_version[new]) == 60

    house.write_items([*rows, item(60, clustered(1, seed=9)[0], day="2026-01-02")])
    house.run("encode_items", "2026-01-20")
    for day in ("2026-01-04", "2026-01-20"):  # before the new version was trained, and after
        house.run("assign_sids", day)
    assert sorted((r["sid_version"], r["item_index"]) for r in house.rows("item_sids")) == [
        (v, n) for v in sorted((old, new)) for n in range(61)
    ]
    assert all(r["retired_at"] == 0 for r in house.rows("item_sids"))

    house.changes["tokenizer.epochs"] = 42
    house.run("train_tokenizer")
    saw = [m.saw != "" for m in ArtifactStore(house.lake.root).manifests("tokenizer")]
    assert saw == [True, False, True], "what a later date would see of item 60 the last one of this date has not"


def test_items_unlike_the_published_ones_ask_for_a_new_tokenizer(house, caplog):
    rows = [item(n, v) for n, v in enumerate(clustered(80))]
    house.write_items(rows)
    for worker in BODIES:
        house.run(worker)
    alike = [item(80 + n, v, day="2026-01-02") for n, v in enumerate(clustered(80)[:40] + 0.01)]
    house.write_items([*rows, *alike])
    house.run("encode_items", "2026-01-03")
    assert house.run("assign_sids", "2026-01-03").details["warning"] == ""
    unlike = np.random.default_rng(5).normal(size=(40, LENGTH)) - 3  # another corner of the space
    house.write_items([*rows, *alike, *(item(120 + n, v, day="2026-01-03") for n, v in enumerate(unlike))])
    house.run("encode_items", "2026-01-04")
    report = house.run("assign_sids", "2026-01-04")
    assert report.details["issued"] == 40
    assert "train a new tokenizer version" in report.details["warning"]
    assert report.details["warnings"] == [report.details["warning"]]
    assert report.details["warning"] in caplog.text
    mark = house.lake.open("item_sids").mark(WHOLE, "assign_sids")
    assert mark[1].details["drift"]["residual"] > 1.6


@pytest.mark.parametrize("moment", ["before it reads", "before it commits"])
def test_of_two_runs_at_once_one_writes_and_the_other_ends_as_a_noop(house, monkeypatch, moment):
    """The other run takes place after this one has seen the tables: what is new is encoded, issued and retired once."""
    vectors = clustered(60)
    rows = [item(n, v) for n, v in enumerate(vectors)]
    house.write_items(rows)
    assert two_at_once(house, monkeypatch, "encode_items", moment) == ["done", "noop"]
    house.run("train_tokenizer")
    assert two_at_once(house, monkeypatch, "assign_sids", moment) == ["done", "noop"]

    rows[20] = item(20, -vectors[20], content="b", day="2026-01-02")  # its SID is retired: rows are replaced
    house.write_items([*rows, item(60, clustered(1, seed=9)[0], day="2026-01-02")])
    for step in ("encode_items", "assign_sids"):
        assert two_at_once(house, monkeypatch, step, moment, "2026-01-03") == ["done", "noop"]
        assert house.run(step, "2026-01-03") is None
    assert len(house.rows("item_embeddings")) == len(house.rows("item_sids")) == 62
    assert [doubled(house.lake, t) for t in ("item_embeddings", "item_sids", "worker_rejects")] == [[], [], []]


def two_at_once(house: House, monkeypatch, step: str, moment: str, day: str = DAY) -> list[str]:
    """Ends of two runs, first of the one that takes place within the other."""
    config, run_date = load_config(str(house.config_file())), date.fromisoformat(day)
    module = sys.modules[BODIES[step].__module__]
    ends: list[str] = []

    def other() -> None:
        ends.append(run_of(config, step, run_date, lambda context: BODIES[step](context, start_ranks()), "other"))

    def body(context: StepContext) -> None:
        if moment == "before it reads":
            other()
        BODIES[step](context, start_ranks())

    def commit(*given, commit_rows=module.commit_rows) -> None:
        patch.undo()
        other()
        commit_rows(*given)

    with monkeypatch.context() as patch:
        if moment == "before it commits":
            patch.setattr(module, "commit_rows", commit)
        ends.append(run_of(config, step, run_date, body))
    return ends


def test_a_run_that_others_have_overtaken_says_so_and_is_run_again(house):
    """Meanwhile new items came, and the other run has encoded those too."""
    rows = [item(n, v) for n, v in enumerate(clustered(60))]
    house.write_items(rows[:50])
    config = load_config(str(house.config_file()))

    def overtaken(context: StepContext) -> None:
        house.write_items(rows)
        house.run("encode_items")
        encode_items.run(context, start_ranks())

    with pytest.raises(ConflictError, match=r"worker_rejects.*another run.*run the step again"):
        run_of(config, "encode_items", date.fromisoformat(DAY), overtaken)
    assert house.run("encode_items") is None
    assert len(house.rows("item_embeddings")) == 60
    assert doubled(house.lake, "item_embeddings") == []


def test_items_with_two_sids_are_refused_until_they_are_repaired(house):
    """As two runs at once left them in earlier releases: the same rows, appended twice."""
    rows = [item(n, v) for n, v in enumerate(clustered(60))]
    house.write_items(rows)
    for worker in BODIES:
        house.run(worker)
    issued = house.rows("item_sids")
    partition = {"sid_version": issued[0]["sid_version"]}
    put(house.lake, "item_sids", issued[:3], partition=partition, mode="append")
    house.write_items([*rows, item(60, clustered(1, seed=9)[0], day="2026-01-02")])
    house.run("encode_items", "2026-01-03")
    with pytest.raises(ContractError, match=r"item_sids.*3 items with two semantic IDs.*run gpl repair"):
        house.run("assign_sids", "2026-01-03")
    assert main(["repair", "--config", str(house.config_file())]) == 0
    house.run("assign_sids", "2026-01-03")
    assert doubled(house.lake, "item_sids") == []
    assert len(house.rows("item_sids")) == 61


def test_sids_of_another_encoder_are_refused(house):
    house.write_items([item(n, v) for n, v in enumerate(clustered(60))])
    for worker in BODIES:
        house.run(worker)
    house.changes["encoder.parts"] = [{"name": "precomputed", "weight": 2.0, "options": {"dim": LENGTH}}]
    house.run("encode_items", "2026-01-03")
    with pytest.raises(LineageError, match=r"was trained on encoder_version .* run train_tokenizer for this encoder"):
        house.run("assign_sids", "2026-01-03")


def launch(script: Path, house: House, ranks: int, *arguments: str, **more: str) -> subprocess.CompletedProcess:
    """The command of a scheduler: the DeepSpeed launcher and an entry point."""
    folder = Path(sys.executable).parent
    command = [
        str(folder / "deepspeed"), "--num_accelerators", str(ranks), "--master_port", str(free_port()), str(script),
        "--config", str(house.config_file()), "--run-date", DAY, *arguments,
    ]  # fmt: skip
    env = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **more}
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        env.pop(name, None)
    return subprocess.run(command, cwd=house.folder, env=env, capture_output=True, text=True, timeout=300, check=False)


RUN = ROOT / "gpu_workers" / "run.py"
ALL_STEPS = ("--steps", ",".join(BODIES))


def said(done: subprocess.CompletedProcess) -> str:
    return done.stdout[-3000:] + done.stderr[-5000:]


@pytest.mark.deepspeed
@pytest.mark.parametrize(
    "launches",
    [[(RUN, *ALL_STEPS)], pytest.param([(ROOT / "gpu_workers" / f"{w}.py",) for w in BODIES], marks=pytest.mark.slow)],
    ids=["together", "one by one"],
)
def test_two_launched_ranks_write_what_one_rank_writes(tmp_path, launches):
    rows = [item(n, v) for n, v in enumerate(clustered(90, seed=1))]
    house, launched = House(tmp_path / "alone"), House(tmp_path / "launched")
    for one in (house, launched):
        one.folder.mkdir(exist_ok=True)
        one.write_items(rows)
    for worker in BODIES:
        house.run(worker)
    for script, *arguments in launches:
        done = launch(script, launched, 2, *arguments)
        assert done.returncode == 0, said(done)
    assert_same_tables(house, launched)
    assert {(r["step"], r["status"]) for r in launched.rows("job_runs")} == {(name, "done") for name in BODIES}
    # Each rank ended with rank 0's codebooks, or the training would have failed; and they are those of one rank.
    assert weights(house) == weights(launched)


@pytest.mark.slow
@pytest.mark.deepspeed
def test_two_ranks_read_what_rank_0_has_pinned_though_another_run_ends_meanwhile(house):
    """Nobody waits for a rank that has read another version: both see their work done by the other run, and leave."""
    house.write_items([item(n, v) for n, v in enumerate(clustered(60))])
    done = launch(ROOT / "tests/gpu_workers/overtaken.py", house, 2, *ALL_STEPS)
    assert done.returncode == 0, said(done)
    ends = sorted((r["step"], r["run_id"] == "other", r["status"]) for r in house.rows("job_runs"))
    assert ends == [
        ("assign_sids", False, "noop"), ("assign_sids", True, "done"), ("encode_items", False, "noop"),
        ("encode_items", True, "done"), ("train_tokenizer", False, "done"),
    ]  # fmt: skip
    assert len(house.rows("item_embeddings")) == len(house.rows("item_sids")) == 60
    assert [doubled(house.lake, t) for t in ("item_embeddings", "item_sids")] == [[], []]


def assert_same_tables(house: House, other: House) -> None:
    for table in ("item_embeddings", "item_sids"):
        expected, found = (sorted(h.rows(table), key=lambda r: r["item_index"]) for h in (house, other))
        assert len(found) == len(expected) > 0
        for a, b in zip(expected, found, strict=True):
            assert b.pop("residual_norm", 0) == pytest.approx(a.pop("residual_norm", 0), abs=1e-5)
            assert a == b


@pytest.mark.slow
@pytest.mark.deepspeed
def test_a_failing_step_ends_its_launch_with_its_code_and_leaves_the_ones_before_committed(house):
    house.write_items([item(n, v) for n, v in enumerate(clustered(60))])
    house.changes |= {"tokenizer.gates": {"min_reconstruction_cosine": 0.9999}, "tokenizer.epochs": 41}
    done = launch(RUN, house, 2, *ALL_STEPS)
    assert done.returncode == GateError.exit_code, said(done)
    found = {r["step"]: (r["status"], r["error_class"]) for r in house.rows("job_runs")}
    assert found == {"encode_items": ("done", ""), "train_tokenizer": ("failed", "GateError")}
    assert len(house.rows("item_embeddings")) == 60
    assert house.tokenizers() == []
    assert not house.lake.exists("item_sids")


KILLED = """
import os, signal
from gpl_core.lakehouse.lake import Lake
from gpu_workers.train_tokenizer import DeepSpeedEngine
from gpu_workers.worker import run_workers

commit, scalars = Lake.commit, DeepSpeedEngine.scalars


def die_at(place):
    if place == os.environ["KILL_AT"]:
        os.kill(os.getpid(), signal.SIGKILL)


def dying_commit(lake, contract, *given, **more):
    die_at(contract.name)
    return commit(lake, contract, *given, **more)


def dying_scalars(engine, figures, step):
    scalars(engine, figures, step)
    die_at(f"epoch {step}")


Lake.commit, DeepSpeedEngine.scalars = dying_commit, dying_scalars
run_workers("run.py")
"""


@pytest.mark.slow
@pytest.mark.deepspeed
def test_a_launch_killed_in_each_of_its_steps_ends_with_the_same_tables(tmp_path):
    house, killed = House(tmp_path / "alone"), House(tmp_path / "killed")
    script = tmp_path / "killed.py"
    script.write_text(KILLED)
    for one in (house, killed):
        one.folder.mkdir()
        one.write_items([item(n, v) for n, v in enumerate(clustered(60))])
    for worker in BODIES:
        house.run(worker)
    temporary, left = tmp_path / "tmp", {}
    temporary.mkdir()
    for place in ("item_embeddings", "epoch 17", "item_sids"):
        done = launch(script, killed, 1, *ALL_STEPS, KILL_AT=place, TMPDIR=str(temporary))
        assert done.returncode != 0, said(done)
        left[place] = len(list(temporary.glob("gpl-scratch-*")))
    assert left == {"item_embeddings": 0, "epoch 17": 1, "item_sids": 0}, "the next run removes what a kill left"
    assert not killed.lake.exists("item_sids") or not killed.rows("item_sids")
    done = launch(RUN, killed, 1, *ALL_STEPS)
    assert done.returncode == 0, said(done)
    assert_same_tables(house, killed)
    assert weights(house) == weights(killed)
    ends = [(r["step"], r["attempt"], r["status"]) for r in killed.rows("job_runs")]
    assert sorted(ends) == [
        ("assign_sids", 1, "running"), ("assign_sids", 2, "done"), ("encode_items", 1, "running"),
        ("encode_items", 2, "done"), ("encode_items", 3, "noop"), ("encode_items", 4, "noop"),
        ("train_tokenizer", 1, "running"), ("train_tokenizer", 2, "done"), ("train_tokenizer", 3, "noop"),
    ]  # fmt: skip


def test_more_sids_than_can_be_numbered_are_refused_before_training():
    with pytest.raises(UsageError, match="8 levels of 256 codes"):
        train_tokenizer.settings_of(load_config("quickstart", ["tokenizer.levels=8", "tokenizer.codes=256"]), 1000)


def test_a_spark_step_is_refused_by_name(tmp_path):
    with pytest.raises(UsageError, match="samples is a Spark job: start it with spark-submit"):
        worker_of("samples")


def test_a_failed_gate_refuses_and_keeps_the_tokenizer_in_force(house):
    house.write_items([item(n, v) for n, v in enumerate(clustered(60))])
    house.run("encode_items")
    house.run("train_tokenizer")
    published = house.tokenizers()
    house.changes |= {"tokenizer.gates": {"min_reconstruction_cosine": 0.9999}, "tokenizer.epochs": 41}
    with pytest.raises(GateError, match="reconstruction: mean cosine"):
        house.run("train_tokenizer", "2026-01-20")
    assert house.tokenizers() == published


def weights(house: House) -> bytes:
    (version,) = house.tokenizers()
    return (house.folder / "lake/artifacts/tokenizer" / version / "tokenizer.safetensors").read_bytes()


class Killed(BaseException):
    pass


def test_a_killed_training_publishes_what_an_undisturbed_one_does(tmp_path, monkeypatch):
    bytes_of = []
    for name in ("undisturbed", "killed"):
        house = House(tmp_path / name)
        house.folder.mkdir()
        house.write_items([item(n, v) for n, v in enumerate(clustered(60))])
        house.run("encode_items")
        if name == "killed":
            with monkeypatch.context() as patch:
                write, done = train_tokenizer.DeepSpeedEngine.scalars, []

                def kill_at_17(engine, figures, step, write=write, done=done):
                    write(engine, figures, step)
                    done.append(step)
                    if step == 17:
                        raise Killed

                patch.setattr(train_tokenizer.DeepSpeedEngine, "scalars", kill_at_17)
                with pytest.raises(Killed):
                    house.run("train_tokenizer")
                assert house.tokenizers() == []
                house.run("train_tokenizer")
                assert done[17:] == list(range(18, 41))
        else:
            house.run("train_tokenizer")
        bytes_of.append(weights(house))
    assert bytes_of[0] == bytes_of[1]


def test_a_second_training_is_refused_while_the_first_is_under_way(house, monkeypatch):
    """Both would write one checkpoint."""
    house.write_items([item(n, v) for n, v in enumerate(clustered(60))])
    house.run("encode_items")
    config = load_config(str(house.config_file()))
    write, ends = train_tokenizer.DeepSpeedEngine.scalars, []

    def run(run_id: str) -> str:
        body = BODIES["train_tokenizer"]
        return run_of(config, "train_tokenizer", date.fromisoformat(DAY), lambda c: body(c, start_ranks()), run_id)

    def scalars(engine, figures, step):
        write(engine, figures, step)
        if step == 17:
            with pytest.raises(ConflictError, match="another run of this work is in progress here; run the step again"):
                run("second")
            ends.append("refused")

    monkeypatch.setattr(train_tokenizer.DeepSpeedEngine, "scalars", scalars)
    assert (run("first"), ends, run("third")) == ("done", ["refused"], "noop")


def test_the_tokenizer_sees_no_content_from_the_run_date_on(house):
    vectors = clustered(60)
    house.write_items([item(n, v, day="2026-01-02" if n >= 50 else "2026-01-01") for n, v in enumerate(vectors)])
    house.run("encode_items")
    assert house.run("train_tokenizer").details["items"] == 50


def test_an_item_without_a_picture_borrows_that_of_the_complete_item_most_like_it(house):
    def drawn(color: str) -> bytes:
        out = io.BytesIO()
        Image.new("RGB", (20, 10), color).save(out, "PNG")
        return out.getvalue()

    house.changes["encoder.parts"] = [{"name": "precomputed", "options": {"dim": 2}}, {"name": "hog_color"}]
    house.write_items([
        item(0, [1.0, 0.0], image=drawn("green")), item(1, [0.0, 1.0], image=drawn("red")),
        item(2, [0.9, 0.2]), item(3, [0.0, 0.0], image=drawn("darkred")),
    ])  # fmt: skip
    report = house.run("encode_items")
    assert (report.details["without_precomputed"], report.details["without_hog_color"]) == (1, 1)
    assert "warnings" not in report.details
    vectors = {r["item_index"]: np.array(r["embedding"]) for r in house.rows("item_embeddings")}
    np.testing.assert_allclose(vectors[2][2:], vectors[0][2:], atol=1e-6)
    np.testing.assert_allclose(vectors[3][:2], vectors[1][:2], atol=1e-6)


def test_without_a_complete_item_a_missing_part_stays_0_and_the_run_says_so(house):
    house.changes["encoder.parts"] = [{"name": "precomputed", "options": {"dim": 2}}, {"name": "hog_color"}]
    house.write_items([item(0, [1.0, 0.0]), item(1, [0.0, 1.0])])
    report = house.run("encode_items")
    (warning,) = report.details["warnings"]
    assert warning.startswith("no complete item among the first from before this date")
    assert all(np.abs(r["embedding"][2:]).max() == 0 for r in house.rows("item_embeddings"))


def test_a_broken_picture_is_left_out_with_its_reason(house):
    house.changes["encoder.parts"] = [{"name": "hog_color"}]
    picture = io.BytesIO()
    Image.new("RGB", (20, 10), "green").save(picture, "PNG")
    house.write_items(
        [item(0, [0.0], image=picture.getvalue()), item(1, [0.0], image=b"no picture"), item(2, [0.0])],
    )
    report = house.run("encode_items")
    assert (report.details["encoded"], report.details["rejected"]) == (1, 2)
    reasons = {r["key"]: r["reason"] for r in house.rows("worker_rejects")}
    assert "cannot be decoded" in reasons["item_index=1"]
    assert reasons["item_index=2"] == "no picture"
