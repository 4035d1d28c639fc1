"""The interest model's two workers on real Delta tables: what they publish, skip, refuse and survive.

Most tests call a worker's body in this process, as one rank; the launcher, two ranks and kill -9 have a test each.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from gpl_core.checkpoint import read_checkpoint
from gpl_core.contracts.contract import load_contract
from gpl_core.errors import ConflictError, LineageError, MissingInputError
from gpl_core.graph.planner import Planner
from gpl_core.graph.step_run import StepContext
from gpl_core.graph.steps import find_step
from gpl_core.interest.base_model import TinySettings, make_tiny_checkpoint
from gpl_core.interest.content import NeighborGraph, leaf_content
from gpl_core.interest.model_files import load_bundle
from gpl_core.interest.packing import UserHistory
from gpl_core.interest.search import BeamSearch, SearchSettings
from gpl_core.interest.training import TEMPERATURES, TrainingProgress, Walks
from gpl_core.interest.trie_scoring import DeviceTrie
from gpl_core.lakehouse.artifacts import ArtifactStore, Manifest
from gpl_core.lakehouse.key_hashes import hash_keys
from gpl_core.sids.content_table import ContentTable
from gpl_core.sids.item_catalog import ItemCatalog
from gpu_workers import generate_anchors, train_interest_model
from gpu_workers.inputs.interest import HELD_OUT, TRAIN, LatestSequences, base_checkpoint
from gpu_workers.ranks import Ranks
from tests.gpu_workers.interest_lake import CODES, DAY, LENGTH, LEVELS, InterestLake, User
from tests.support import DAMAGES, doubled, planted_pickle, run_of

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def ranks(one_rank: Ranks) -> Ranks:
    """This process as the only rank."""
    return one_rank


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, ranks: Ranks) -> InterestLake:
    """A lakehouse whose interest model has been trained; tests add their own requests, each for a date of its own."""
    lake = InterestLake(tmp_path_factory.mktemp("trained"))
    users = lake.users(120)
    lake.write_users(users)
    call(lake, train_interest_model, ranks)
    lake.lake.create(load_contract("interest_anchors"))
    return lake


def call(lake: InterestLake, worker, ranks: Ranks, *overrides: str, day: date = DAY) -> StepContext:
    """Run a worker's body as the entry point does, without a process of its own."""
    planner = Planner(lake.config(*overrides))
    state = planner.state(find_step(worker.STEP), day)
    if state.status == "blocked":
        raise MissingInputError(state.reason)
    context = StepContext(planner, worker.STEP, day, state, "test-run")
    worker.run(context, ranks)
    return context


def state_of(lake: InterestLake, step: str, day: date = DAY) -> str:
    return Planner(lake.config()).state(find_step(step), day).status


def model_of(lake: InterestLake) -> Manifest:
    return ArtifactStore(str(lake.root)).manifests("interest_model")[-1]


def weights_of(lake: InterestLake) -> dict[str, torch.Tensor]:
    return load_file(ArtifactStore(str(lake.root)).fetch(model_of(lake)) / "adapter.safetensors")


def curve_of(lake: InterestLake, name: str) -> np.ndarray:
    csv = next(p for p in lake.root.rglob("*.csv") if p.name.endswith(f"{name}.csv"))
    return np.array([float(line.split(",")[1]) for line in csv.read_text().splitlines()[1:]])


def anchors_of(lake: InterestLake, day: date) -> dict[str, dict]:
    snapshot = lake.lake.open("interest_anchors")
    rows = snapshot.read(snapshot.select(start=day, end=day)).to_pylist()
    assert len({r["user_id"] for r in rows}) == len(rows)
    return {r["user_id"]: r for r in rows}


# --- training


def test_a_model_is_published_with_its_lineage_and_nothing_of_the_day_itself(trained: InterestLake) -> None:
    manifest = model_of(trained)
    assert manifest.lineage["sid_version"] == trained.version
    assert manifest.lineage["encoder_version"] == "encoder-1"
    assert manifest.trained_through == DAY - timedelta(days=1)
    assert sorted(manifest.files) == ["adapter.safetensors", "interest_model.json"]
    assert manifest.metrics["train"] + manifest.metrics["held_out"] == 120
    assert manifest.metrics["held_out"] > 5
    assert state_of(trained, "train_interest_model") == "done"


def test_loss_falls_and_the_monitors_are_written(trained: InterestLake) -> None:
    logs = [p for p in trained.root.rglob("*") if "logs" in p.parts]
    curves = {name: curve_of(trained, name) for name in ("valid_loss", "tempered_loss")}
    assert len(curves["valid_loss"]) == len(curves["tempered_loss"]) == 3
    assert curves["valid_loss"][-1] < curves["valid_loss"][0]
    assert (curves["tempered_loss"] <= curves["valid_loss"]).all()
    assert any(p.name.startswith("events.out.tfevents") for p in logs)


def test_the_same_inputs_train_the_same_weights(tmp_path: Path, trained: InterestLake, ranks: Ranks) -> None:
    again = InterestLake(tmp_path)
    users = again.users(120)
    again.write_users(users)
    call(again, train_interest_model, ranks)
    mine, first = weights_of(again), weights_of(trained)
    assert all(torch.equal(mine[name], first[name]) for name in first)


KILLED_IN_THE_THIRD_EPOCH = """
import os, pathlib, signal, sys
from gpu_workers import train_interest_model as worker

forward = worker.TrainingObjective.forward
root = pathlib.Path(sys.argv[1])

def deadly(self, *packs):
    if any(root.rglob("checkpoints/epoch-0002-step-00000002/rank-0.safetensors")):
        os.kill(os.getpid(), signal.SIGKILL)
    return forward(self, *packs)

worker.TrainingObjective.forward = deadly
worker.worker_main(worker.STEP, worker.run, sys.argv[2:])
"""


@pytest.mark.deepspeed
def test_kill_9_in_an_epoch_then_again_gives_the_weights_of_an_undisturbed_run(
    tmp_path: Path, trained: InterestLake, ranks: Ranks, caplog: pytest.LogCaptureFixture
) -> None:
    lake = InterestLake(tmp_path)
    users = lake.users(120)
    lake.write_users(users)
    often = "interest.checkpoint_steps=2"
    command = [
        sys.executable, "-c", KILLED_IN_THE_THIRD_EPOCH, str(tmp_path), "--run-date", DAY.isoformat(),
        *lake.arguments(often),
    ]  # fmt: skip
    env = {k: v for k, v in os.environ.items() if k not in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT")}
    env |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(torch.get_num_threads())}  # sums of as many parts
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr[-3000:]
    assert not ArtifactStore(str(tmp_path)).manifests("interest_model")
    with caplog.at_level("INFO"):
        call(lake, train_interest_model, ranks, often)
    assert "resumed after epoch 2, step 2" in caplog.text
    mine, undisturbed = weights_of(lake), weights_of(trained)
    assert all(torch.equal(mine[name], undisturbed[name]) for name in undisturbed)


@pytest.mark.parametrize("damage", [None, *DAMAGES])
def test_a_training_killed_before_it_publishes_ends_the_same_from_a_whole_or_damaged_checkpoint(
    tmp_path: Path, trained: InterestLake, ranks: Ranks, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture, damage: str | None,
) -> None:  # fmt: skip
    """A whole one holds the best epoch too: nothing is trained again. Pickles among the checkpoints never run."""
    lake = InterestLake(tmp_path / "lake")
    users = lake.users(120)
    lake.write_users(users)

    def no_publish(*args: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(train_interest_model, "publish", no_publish)
        with pytest.raises(KeyboardInterrupt):
            call(lake, train_interest_model, ranks)
    (checkpoint,) = lake.root.rglob("checkpoints/*/rank-0.safetensors")
    folder = checkpoint.parents[1]
    held = read_checkpoint(checkpoint)["engine"]["module"]
    assert not [name for name in held if name.endswith("token_adapter.base_layer.weight")], "the base's embedding"
    if damage:
        DAMAGES[damage](checkpoint)
    for name in ("epoch-9/mp_rank_00_model_states.pt", "epoch-9/bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt"):
        planted_pickle(folder / name, tmp_path / "ran")
    planted_pickle(folder / "epoch-9999/rank-0.safetensors", tmp_path / "ran")
    (folder / "latest").write_text("epoch-9")
    steps: list[int] = []
    forward = train_interest_model.TrainingObjective.forward
    monkeypatch.setattr(
        train_interest_model.TrainingObjective, "forward", lambda self, *a: steps.append(1) or forward(self, *a)
    )
    with caplog.at_level("INFO"):
        call(lake, train_interest_model, ranks)
    assert bool(steps) == bool(damage)
    assert f"{folder / 'epoch-9999/rank-0.safetensors'} is damaged" in caplog.text
    assert (f"{checkpoint} is damaged" in caplog.text) == (damage not in (None, "missing"))
    assert not (tmp_path / "ran").exists()
    assert not folder.exists()
    mine, undisturbed = weights_of(lake), weights_of(trained)
    assert all(torch.equal(mine[name], undisturbed[name]) for name in undisturbed)


def test_a_user_s_latest_row_counts_and_held_out_users_are_never_trained_on(tmp_path: Path) -> None:
    """u1 and u2 on an older day, u1 again on the newer one, u3 of another tokenizer.

    dt = 1st: u1 (0, 1)   u2 (8, 9)
    dt = 2nd: u1 (0, 1, 2)   u3 (16, 17; other)
    """
    lake = InterestLake(tmp_path)
    lake.write_sequences([User("u1", [0, 1]), User("u2", [8, 9])], DAY - timedelta(days=1))
    lake.write_sequences([User("u1", [0, 1, 2]), User("u3", [16, 17], sid_version="other")])
    snapshot = lake.lake.open("user_sequences")
    keep = np.ones(len(lake.sids))

    def read(share: float, use: int, through: date = DAY) -> list[list[list[int]]]:
        found = LatestSequences(snapshot, snapshot.select(end=through), lake.version, share)
        whole = found.shares(1, seed=0, epoch=0)[0]
        return sorted(h.sids.tolist() for h in found.histories(whole, use, keep, LEVELS, seed=0, epoch=0))

    latest = sorted([lake.sids[[0, 1, 2]].tolist(), lake.sids[[8, 9]].tolist()])
    assert read(0, TRAIN) == latest
    assert read(1, HELD_OUT) == latest
    assert read(1, TRAIN) == read(0, HELD_OUT) == []
    assert read(0, TRAIN, DAY - timedelta(days=1)) == sorted([lake.sids[[0, 1]].tolist(), lake.sids[[8, 9]].tolist()])
    found = LatestSequences(snapshot, snapshot.files, lake.version, 0).found
    assert (found.train, found.superseded, found.other_sid_version, found.events) == (2, 1, 1, 5)


def test_latest_rows_do_not_depend_on_the_number_of_passes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lake = InterestLake(tmp_path)
    for back in (2, 1, 0):
        lake.write_sequences(lake.users(30, seed=back)[: 30 - 5 * back], DAY - timedelta(days=back))
    snapshot = lake.lake.open("user_sequences")
    once = LatestSequences(snapshot, snapshot.files, lake.version, 0.3)
    monkeypatch.setattr("gpu_workers.inputs.interest._KEYS_AT_A_TIME", 7)
    often = LatestSequences(snapshot, snapshot.files, lake.version, 0.3)
    assert often.found == once.found
    assert all((often._use[path] == once._use[path]).all() for path in once._use)
    assert once.found.train + once.found.held_out == 30


def test_down_sampling_drops_targets_by_keep_u_and_keeps_the_context(tmp_path: Path) -> None:
    lake = InterestLake(tmp_path)
    lake.write_sequences([User("u", [0, 1, 2, 3])])  # keep_u: 0, .7, .4, .1
    snapshot = lake.lake.open("user_sequences")
    data = LatestSequences(snapshot, snapshot.files, lake.version, 0)
    share = data.shares(1, seed=0, epoch=0)[0]
    (history,) = data.histories(share, TRAIN, np.full(len(lake.sids), 0.5), LEVELS, seed=0, epoch=0)
    assert history.is_target.tolist() == [True, False, True, True]
    assert len(history.sids) == 4


def test_training_stops_when_neither_loss_nor_hit_rate_gets_better_and_keeps_the_best_loss() -> None:
    """epoch      0     1     2     3     4
    loss         2.0   1.5   1.6   nan   1.7
    hit rate     .1    .1    .2    .2    .1     better until epoch 2
    """
    progress, over = TrainingProgress(), []
    for loss, hit_rate in ((2.0, 0.1), (1.5, 0.1), (1.6, 0.2), (float("nan"), 0.2), (1.7, 0.1)):
        progress = progress.after(loss, hit_rate, {"valid_loss": loss})
        over.append(progress.is_over(patience=2))
    assert over == [False, False, False, False, True]
    assert (progress.best_epoch, progress.best_loss, progress.better_epoch) == (1, 1.5, 2)
    assert len(progress.history) == progress.epoch == 5


def test_the_epoch_that_is_best_at_its_own_temperature_is_published(
    tmp_path: Path, ranks: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second epoch has the higher loss as it is, and the lower one at a temperature of two."""
    lake = InterestLake(tmp_path)
    users = lake.users(60)
    lake.write_users(users)
    rising = iter([{1.0: 3.0, 2.0: 2.5}, {1.0: 3.5, 2.0: 2.0}, {1.0: 4.0, 2.0: 2.2}])
    packs = train_interest_model.training_packs
    epoch: dict[float, float] = {}

    def losses(model, trie, pack, content):
        mean = torch.tensor([epoch.get(t, 9.0) for t in TEMPERATURES], dtype=torch.float64)
        return mean * len(pack.target_sids), len(pack.target_sids)

    def held_out(vocabulary, histories, *limits):
        if isinstance(histories, list):  # what `validate` packs
            epoch.update(next(rising))
        return packs(vocabulary, histories, *limits)

    monkeypatch.setattr(train_interest_model, "tempered_losses", losses)
    monkeypatch.setattr(train_interest_model, "training_packs", held_out)
    call(lake, train_interest_model, ranks, "interest.epochs=3")
    metrics = model_of(lake).metrics
    assert (metrics["best_epoch"], metrics["valid_loss"], metrics["tempered_loss"]) == (1, 3.5, 2.0)


def test_without_a_held_out_target_the_training_loss_decides(
    tmp_path: Path, ranks: Ranks, caplog: pytest.LogCaptureFixture
) -> None:
    """Users were held out, but of one event each: their loss of 0 in every epoch would publish the first."""
    lake = InterestLake(tmp_path)
    users = lake.users(60)
    held_out = (hash_keys(np.array([u.user_id for u in users])) >> np.uint64(11)) / 2.0**53 < 0.2
    lake.write_users([replace(u, items=u.items[:1]) if out else u for u, out in zip(users, held_out, strict=True)])
    call(lake, train_interest_model, ranks)
    metrics = model_of(lake).metrics
    assert metrics["held_out"] == held_out.sum() > 5
    assert metrics["valid_targets"] == 0 < metrics["best_epoch"] == curve_of(lake, "train_loss").argmin()
    assert "no held-out target" in caplog.text


def test_what_cannot_be_learnt_from_is_counted(tmp_path: Path, ranks: Ranks, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two users with one event, which nothing precedes, and one whose second event is of no SID in the catalog."""
    lake = InterestLake(tmp_path)
    users = lake.users(20)
    lake.write_stats(users)
    retired = next(c for c in np.ndindex(CODES, CODES, CODES) if not (lake.sids == c).all(axis=1).any())
    monkeypatch.setattr(lake, "sids", np.concatenate([lake.sids, [retired]]))
    lake.write_sequences([*users, User("one", [3]), User("uno", [4]), User("gone", [5, len(lake.sids) - 1])])
    call(lake, train_interest_model, ranks, "interest.epochs=1", "interest.valid_share=0", "interest.walks=0")
    metrics = model_of(lake).metrics
    assert (metrics["targets_outside"], metrics["users_without_target"], metrics["train"]) == (1, 2, 23)


def test_users_that_left_before_the_last_snapshot_of_all_are_not_learned_from(tmp_path: Path, ranks: Ranks) -> None:
    lake = InterestLake(tmp_path)
    users = lake.users(30)
    lake.write_stats(users)
    lake.write_sequences([User("gone", [0, 1, 2])], DAY - timedelta(days=7))
    lake.write_sequences(users)
    call(lake, train_interest_model, ranks, "interest.epochs=1", "interest.valid_share=0", "interest.walks=0")
    assert model_of(lake).metrics["train"] == 30


@pytest.mark.parametrize("without", ["interest.content=false", "interest.walks=0"])
def test_each_ingredient_can_be_left_out(tmp_path: Path, ranks: Ranks, without: str) -> None:
    lake = InterestLake(tmp_path)
    users = lake.users(30)
    lake.write_users(users)
    call(lake, train_interest_model, ranks, without, "interest.epochs=1")
    assert ("content.read.weight" in weights_of(lake)) == (without != "interest.content=false")


def test_a_checkpoint_gets_an_adapter_and_stays_as_it_is(tmp_path: Path, ranks: Ranks) -> None:
    """Published: LoRA, SID rows, scales and heads, not one tensor of the base; the base's files are untouched."""
    base = tmp_path / "llama"
    make_tiny_checkpoint(base, TinySettings(hidden=32, heads=4, kv_heads=2, intermediate=40, family="llama"))
    files = {file.name: file.read_bytes() for file in base.iterdir()}
    lake = InterestLake(tmp_path / "lake")
    users = lake.users(40)
    lake.write_users(users)
    call(lake, train_interest_model, ranks, f"interest.base_model={base}", "interest.epochs=1")
    assert {file.name: file.read_bytes() for file in base.iterdir()} == files
    published = weights_of(lake)
    assert sum("lora_" in name for name in published) == 2 * 2 * 7  # A and B, two layers, seven matrices each
    rest = [tensor for name, tensor in published.items() if "lora_" not in name]
    shapes = {tuple(tensor.shape) for tensor in load_file(base / "model.safetensors").values() if tensor.ndim == 2}
    assert not shapes & {tuple(tensor.shape) for tensor in rest}


def test_walks_are_mixed_among_the_users_at_their_rate(tmp_path: Path) -> None:
    lake = InterestLake(tmp_path)
    catalog = ItemCatalog(np.arange(len(lake.sids)), lake.sids, CODES)
    content = ContentTable(lake.vectors, np.arange(len(lake.vectors)))
    graph = NeighborGraph.build(content, catalog.item_index, seed=0)
    real = [UserHistory(lake.sids[[n, n]], np.ones(2, dtype=bool), np.array([n, n])) for n in range(20)]
    for rate in (0.25, 1.0, 1.5):
        mixed = list(Walks(graph, catalog, rate).mixed(iter(real), [0, 1]))
        walks = [h for h in mixed if len(h.items) == 3]
        assert [h for h in mixed if len(h.items) == 2] == real
        assert len(walks) == int(20 * rate)
        assert all((lake.sids[h.items] == h.sids).all() and h.is_target.all() for h in walks)


def test_walks_follow_the_users_trained_on_and_no_held_out_one(
    tmp_path: Path, ranks: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    lake = InterestLake(tmp_path)
    users = lake.users(60)
    lake.write_users(users)
    graphs = []
    build = NeighborGraph.build

    def kept(*args: Any, **options: Any) -> NeighborGraph:
        graphs.append((args[2], build(*args, **options)))
        return graphs[-1][1]

    monkeypatch.setattr(NeighborGraph, "build", kept)
    call(lake, train_interest_model, ranks, "interest.epochs=1")
    (histories, graph), metrics = graphs[0], ArtifactStore(str(tmp_path)).manifests("interest_model")[-1].metrics
    assert len(histories) == metrics["train"] == 60 - metrics["held_out"] < 60
    assert {tuple(h) for h in histories} <= {tuple(u.items) for u in users}
    assert len(graph.together)


def test_sequences_of_another_tokenizer_are_refused_naming_both(tmp_path: Path, ranks: Ranks) -> None:
    lake = InterestLake(tmp_path)
    users = [replace(u, sid_version="sid-old") for u in lake.users(5)]
    lake.write_users(users)
    with pytest.raises(LineageError, match=f"sid-old.*{lake.version}"):
        call(lake, train_interest_model, ranks)
    assert not ArtifactStore(str(tmp_path)).manifests("interest_model")


@pytest.mark.deepspeed
@pytest.mark.slow
def test_two_ranks_under_the_launcher_learn_what_one_learns(tmp_path: Path, ranks: Ranks) -> None:
    """Two files of different length: the shorter rank must neither hang nor drop a target.

    Stated tolerance: held-out loss within 5 % of one rank's; the batches differ, the updates are as large and as many.
    """
    alone, lake = InterestLake(tmp_path / "alone"), InterestLake(tmp_path / "two")
    users = lake.users(120)
    alone.write_sequences(users)
    lake.write_sequences(users[:30], DAY - timedelta(days=1))
    lake.write_sequences(users[30:])
    alone.write_stats(users)
    lake.write_stats(users)
    enough = "interest.epochs=6"  # for the order of the batches not to matter
    call(alone, train_interest_model, ranks, enough)
    launch(lake, "gpu_workers/train_interest_model.py", enough, ranks=2)
    one, two = model_of(alone).metrics, model_of(lake).metrics
    assert two["train"] == one["train"]
    assert abs(two["valid_loss"] / one["valid_loss"] - 1) < 0.05
    assert two["tempered_loss"] <= two["valid_loss"]
    assert abs(two["tempered_loss"] / one["tempered_loss"] - 1) < 0.05
    # The cache is the same, too, whoever generates it.
    model = model_of(lake)
    lake.write_requests(users[:9], model.version, DAY)
    launch(lake, "gpu_workers/generate_anchors.py", enough, ranks=2)
    found = anchors_of(lake, DAY)
    expected = search_directly(lake, users[:9], model)
    assert {u: r["anchor_sids"] for u, r in found.items()} == expected


def launch(
    lake: InterestLake, script: str, *overrides: str, ranks: int, day: date = DAY, steps: Sequence[str] = ()
) -> None:  # fmt: skip
    """Start a worker under the DeepSpeed launcher, and end all its ranks when it takes too long."""
    command = [
        str(Path(sys.executable).parent / "deepspeed"), "--num_accelerators", str(ranks),
        "--master_port", str(29900 + os.getpid() % 90), script, "--run-date", day.isoformat(), *steps,
        *lake.arguments(*overrides),
    ]  # fmt: skip
    env = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT"):
        env.pop(name, None)
    with subprocess.Popen(
        command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    ) as process:
        try:
            output, _ = process.communicate(timeout=600)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            raise
    assert process.returncode == 0, output[-5000:]


# --- the cache


def search_directly(lake: InterestLake, users: list[User], model: Manifest) -> dict[str, list[int]]:
    """Anchors from the library, without the worker."""
    folder = ArtifactStore(str(lake.root)).fetch(model)
    loaded = load_bundle(folder, base_checkpoint(lake.config()), sid_version=lake.version)
    content = ContentTable(lake.vectors, np.arange(len(lake.vectors)))
    catalog = ItemCatalog(np.arange(len(lake.sids)), lake.sids, CODES)
    trie = DeviceTrie(catalog.trie, content=leaf_content(catalog, content))
    search = BeamSearch(loaded, trie, SearchSettings(5, LENGTH), content)
    found = search.search([lake.sids[list(u.items)] for u in users], [np.array(u.items) for u in users])
    return {u.user_id: s.ravel().tolist() for u, s in zip(users, found.sids, strict=True)}


def test_anchors_are_those_of_the_search(trained: InterestLake, ranks: Ranks) -> None:
    day, users, model = DAY + timedelta(days=1), trained.users(20, seed=3), model_of(trained)
    trained.write_requests(users, model.version, day)
    context = call(trained, generate_anchors, ranks, day=day)
    rows = anchors_of(trained, day)
    assert {u: r["anchor_sids"] for u, r in rows.items()} == search_directly(trained, users, model)
    for row in rows.values():
        assert row["model_version"] == model.version
        assert row["sid_version"] == trained.version
        assert row["anchor_count"] == 5
        assert row["log_prob"] == sorted(row["log_prob"], reverse=True)
        prefixes = np.array(row["prefixes"]).reshape(-1, LEVELS)
        first = (prefixes[:, 0] >= 0) & (prefixes[:, 1] < 0)
        assert np.exp(row["prefix_log_probs"])[first].sum() == pytest.approx(1, abs=2**-11)  # stored to 2^-10 of a nat
    assert context.counts.rows_in == context.counts.rows_out == 20
    assert state_of(trained, "generate_anchors", day) == "done"


def test_keys_that_the_cache_holds_are_not_generated_again(
    trained: InterestLake, ranks: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twelve users cached; then the same twelve and one whose sequence has changed: one is searched."""
    first, second = DAY + timedelta(days=2), DAY + timedelta(days=3)
    users, model = trained.users(12, seed=4), model_of(trained)
    trained.write_requests(users, model.version, first)
    call(trained, generate_anchors, ranks, day=first)
    changed = User(users[0].user_id, [*users[0].items[1:], 95])
    trained.write_requests([changed, *users[1:]], model.version, second)
    searched: list[int] = []
    search = BeamSearch.search

    def counted(self: BeamSearch, histories, items):
        searched.append(len(histories))
        return search(self, histories, items)

    monkeypatch.setattr(BeamSearch, "search", counted)
    context = call(trained, generate_anchors, ranks, day=second)
    assert searched == [1]
    assert list(anchors_of(trained, second)) == [changed.user_id]
    assert context.counts.rows_in == context.counts.rows_out + context.counts.rows_dropped == 12


def test_the_worker_looks_only_at_what_the_cache_got_since_the_requests(trained: InterestLake, ranks: Ranks) -> None:
    """Requests compared with the cache as it is are taken as they are; with the version before, one user is found."""
    days, model = [DAY + timedelta(days=n) for n in (12, 13, 14)], model_of(trained)
    before = trained.lake.open("interest_anchors").version
    users = [User(f"since-{u.user_id}", u.items) for u in trained.users(2, seed=10)]
    trained.write_requests(users[:1], model.version, days[0], cache_version=before)
    call(trained, generate_anchors, ranks, day=days[0])
    for day, known, generated in ((days[1], before, 1), (days[2], before + 2, 2)):
        trained.write_requests(users, model.version, day, cache_version=known)
        assert call(trained, generate_anchors, ranks, day=day).counts.details["generated"] == generated


def test_wider_beams_find_anchors_that_are_at_least_as_likely(trained: InterestLake, ranks: Ranks) -> None:
    """The first of 96 beams, which are every SID of the catalog, against one beam; up to the cache's rounding."""
    first, second = DAY + timedelta(days=10), DAY + timedelta(days=11)
    users, model = trained.users(30, seed=9), model_of(trained)
    trained.write_requests([User(f"n{u.user_id}", u.items) for u in users], model.version, first)
    call(trained, generate_anchors, ranks, "anchors.count=1", day=first)
    trained.write_requests([User(f"w{u.user_id}", u.items) for u in users], model.version, second)
    call(trained, generate_anchors, ranks, "anchors.count=96", day=second)
    narrow, wide = anchors_of(trained, first), anchors_of(trained, second)
    gains = [np.subtract(wide[f"w{u.user_id}"]["log_prob"][:1], narrow[f"n{u.user_id}"]["log_prob"]) for u in users]
    assert (np.array(gains) > -5e-4).all()
    assert (np.array(gains) > 1e-3).any()


def test_of_two_runs_at_once_one_caches_the_anchors(trained: InterestLake, ranks: Ranks) -> None:
    """The other run ends after this one has looked at the cache: for the same date, then for the date after it."""
    day, day_after = DAY + timedelta(days=60), DAY + timedelta(days=61)
    config, users = trained.config(), [replace(u, user_id=f"two-{u.user_id}") for u in trained.users(30, seed=60)]
    trained.write_requests(users[:20], model_of(trained).version, day)
    trained.write_requests(users, model_of(trained).version, day_after)
    ends = []

    def run(day: date, other: date | None = None) -> str:
        def body(context: StepContext) -> None:
            if other:
                ends.append(run(other))
            generate_anchors.run(context, ranks)

        return run_of(config, "generate_anchors", day, body)

    ends.append(run(day, other=day))
    assert ends == ["done", "noop"]
    assert set(anchors_of(trained, day)) == {u.user_id for u in users[:20]}

    trained.write_requests(users[10:], model_of(trained).version, day)  # the requests of both dates hold the last ten
    with pytest.raises(ConflictError, match=r"interest_anchors.*another run.*run the step again"):
        run(day, other=day_after)
    assert ends[2:] == ["done"]
    assert set(anchors_of(trained, day_after)) == {u.user_id for u in users[20:]}
    assert run(day) == "done"
    assert run(day) == "noop"
    assert not [key for key in doubled(trained.lake, "interest_anchors") if key[0].startswith("two-")]


@pytest.mark.slow
@pytest.mark.deepspeed
def test_two_ranks_leave_when_another_run_has_cached_the_anchors_meanwhile(trained: InterestLake) -> None:
    day, users = DAY + timedelta(days=65), trained.users(30, seed=65)
    trained.write_requests(users, model_of(trained).version, day)
    launch(trained, "tests/gpu_workers/overtaken.py", ranks=2, day=day, steps=("--steps", "generate_anchors"))
    ends = sorted(r["status"] for r in trained.lake.open("job_runs").read().to_pylist() if r["run_date"] == day)
    assert ends == ["done", "noop"]
    assert set(anchors_of(trained, day)) == {u.user_id for u in users}  # and each once


@pytest.mark.parametrize(
    ("setting", "column", "counts"),
    [("anchors.count", "log_prob", (5, 3)), ("anchors.prefixes", "prefix_log_probs", (256, 7))],
)
def test_another_number_of_anchors_or_prefixes_is_not_in_the_cache(
    trained: InterestLake, ranks: Ranks, setting: str, column: str, counts: tuple[int, int]
) -> None:
    start = DAY + timedelta(days=8 if setting == "anchors.count" else 40)
    users, model = trained.users(6, seed=start.toordinal()), model_of(trained)
    for day, count in zip((start, start + timedelta(days=1)), counts, strict=True):
        trained.write_requests(users, model.version, day)
        call(trained, generate_anchors, ranks, f"{setting}={count}", day=day)
        rows = anchors_of(trained, day)
        assert set(rows) == {u.user_id for u in users}
        assert {len(r[column]) for r in rows.values()} == {count}


def test_finished_units_survive_a_crash_and_are_not_computed_again(
    trained: InterestLake, ranks: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Units of 5 users; the first attempt dies in the third unit, the second computes the last two only."""
    day, users, model = DAY + timedelta(days=4), trained.users(20, seed=5), model_of(trained)
    trained.write_requests(users, model.version, day)
    monkeypatch.setattr(generate_anchors, "UNIT_ROWS", 5)
    search = BeamSearch.search
    calls: list[int] = []

    def dying(self: BeamSearch, histories, items):
        calls.append(len(histories))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return search(self, histories, items)

    monkeypatch.setattr(BeamSearch, "search", dying)
    with pytest.raises(KeyboardInterrupt):
        call(trained, generate_anchors, ranks, day=day)
    snapshot = trained.lake.open("interest_anchors")
    assert not snapshot.select(start=day, end=day), "nothing may be visible before the commit"
    context = call(trained, generate_anchors, ranks, day=day)
    assert calls == [5, 5, 5, 5, 5]
    assert context.counts.details["resumed"] == 10
    assert {u: r["anchor_sids"] for u, r in anchors_of(trained, day).items()} == search_directly(trained, users, model)


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("damaged", ["part", "record"])
def test_a_damaged_part_or_record_of_a_finished_unit_is_made_again(
    trained: InterestLake, ranks: Ranks, monkeypatch: pytest.MonkeyPatch, damaged: str, damage: str
) -> None:
    number = 2 * [*DAMAGES].index(damage) + (damaged == "part")
    day, users, model = DAY + timedelta(days=100 + number), trained.users(4, seed=100 + number), model_of(trained)
    trained.write_requests(users, model.version, day)

    def no_commit(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    work = trained.root / "work/generate_anchors"
    before = {*work.rglob("*.safetensors")}
    with monkeypatch.context() as patch:
        patch.setattr(generate_anchors, "commit_parts", no_commit)
        with pytest.raises(KeyboardInterrupt):
            call(trained, generate_anchors, ranks, day=day)
    (part,) = (trained.root / "tables/interest_anchors").rglob(f"dt={day}/*.parquet")
    (record,) = {*work.rglob("*.safetensors")} - before
    DAMAGES[damage]({"part": part, "record": record}[damaged])
    context = call(trained, generate_anchors, ranks, day=day)
    assert context.counts.details["resumed"] == 0
    assert set(anchors_of(trained, day)) == {u.user_id for u in users}
    # Run by force once more: all is in the cache now, and no part is added a second time.
    context = call(trained, generate_anchors, ranks, day=day)
    assert context.counts.details["generated"] == context.counts.rows_out == 0
    assert set(anchors_of(trained, day)) == {u.user_id for u in users}


def test_requests_of_other_versions_are_refused_naming_both(trained: InterestLake, ranks: Ranks) -> None:
    day, model = DAY + timedelta(days=6), model_of(trained)
    trained.write_requests([User("a", [1, 2], sid_version="sid-old")], model.version, day)
    with pytest.raises(LineageError, match=f"sid_version sid-old.*{trained.version}"):
        call(trained, generate_anchors, ranks, day=day)
    trained.write_requests([User("a", [1, 2])], "model-old", day)
    with pytest.raises(LineageError, match=f"model_version model-old.*{model.version}"):
        call(trained, generate_anchors, ranks, day=day)
    assert not anchors_of(trained, day)


def test_unusable_sequences_are_rejected_by_name_and_the_rest_goes_on(
    trained: InterestLake, ranks: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A code beyond C, as a damaged table would hold."""
    day, model = DAY + timedelta(days=7), model_of(trained)
    sids = trained.sids.copy()
    monkeypatch.setattr(trained, "sids", np.where(np.arange(len(sids))[:, None] == 50, 99, sids))
    trained.write_requests([User("good", [1, 2]), User("bad", [3, 50])], model.version, day)
    context = call(trained, generate_anchors, ranks, day=day)
    assert list(anchors_of(trained, day)) == ["good"]
    rejects = trained.lake.open("worker_rejects").read().to_pylist()
    assert [(r["key"], r["reason"], r["step"]) for r in rejects if r["dt"] == day] == [
        ("user_id=bad", "unusable sequence", "generate_anchors")
    ]
    assert "code 99" in rejects[0]["detail"]
    assert (context.counts.rows_in, context.counts.rows_dropped) == (2, 1)
