"""Shadow runs: tables of their own from one step on, the published ones unchanged, and the two compared."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpl_core.cli import main
from gpl_core.commands.compare import compare, rank_correlation
from gpl_core.commands.shadow import shadow_config
from gpl_core.config import Config, load_config
from gpl_core.contracts.contract import load_contract
from gpl_core.errors import MissingInputError, UsageError
from gpl_core.graph.arguments import StepArguments
from gpl_core.graph.planner import Planner
from gpl_core.graph.step_run import run_step
from gpl_core.graph.steps import STEPS, find_step
from gpl_core.lakehouse.artifacts import ArtifactStore
from gpl_core.lakehouse.lake import LOCATIONS, Lake
from tests.gpl_core.toy import Toy
from tests.support import DAY, ONE, config_file, default_partition, legal_rows, put, small_config

OWN = ("anchor_requests", "interest_anchors", "score_requests", "pair_scores", "pseudo_labels", "training_feed")


@pytest.fixture(scope="module")
def done(tmp_path_factory) -> Path:
    """A lakehouse in which one run date is done in every step."""
    root = tmp_path_factory.mktemp("done")
    made = Toy(small_config(root))
    made.raw([DAY, DAY + ONE])
    made.run_pending([DAY])
    return root


@pytest.fixture
def toy(done, tmp_path) -> Toy:
    shutil.copytree(done, tmp_path, dirs_exist_ok=True)
    return Toy(small_config(tmp_path))


def files(folder: Path) -> dict[str, int]:
    """Every file under `folder` except those of a shadow run, with its time."""
    return {str(p): p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file() and "shadow" not in p.parts}


def candidate(toy: Toy) -> str:
    """An interest model that is published and rolled back, so that no run uses it."""
    store = toy.planner.artifacts
    old = store.in_force("interest_model", DAY)
    made = store.publish("interest_model", store.fetch(old), trained_through=old.trained_through,
                         fingerprint="c" * 24, config_hash="other", lineage=old.lineage)  # fmt: skip
    store.decide("interest_model", made.version, "rollback")
    return made.version


def test_a_rolled_back_model_runs_beside_the_published_one(toy):
    version = candidate(toy)
    root = Path(toy.config.lakehouse.root)
    before = files(root)
    shadow = Toy(shadow_config(toy.config, "new-model", "anchor_requests", {"interest_model": version}))
    shadow.run_pending([DAY])
    own = {p.name for p in (root / "shadow/new-model/tables").iterdir()}
    assert own >= set(OWN)
    assert own & {"items", "impressions", "exposed_samples", "user_sequences", "item_sids"} == set()
    assert shadow.not_done([DAY]) == {}
    assert shadow.state("samples", DAY).reason.endswith(f"read from {root}")
    used = shadow.state("pseudo_labels", DAY).inputs
    assert used["artifact:interest_model"]["version"] == version
    assert (
        used["artifact:calibrator"]["version"]
        != toy.state("pseudo_labels", DAY).inputs["artifact:calibrator"]["version"]
    )
    assert files(root) == before
    assert toy.not_done([DAY]) == {}


def test_a_shadow_trains_a_model_of_its_own_under_other_settings(toy):
    config = toy.config.model_copy(update={"interest": toy.config.interest.model_copy(update={"epochs": 1})})
    shadow = Toy(shadow_config(config, "one-epoch", "train_interest_model", {}))
    shadow.run_pending([DAY])
    assert shadow.not_done([DAY]) == {}
    own, theirs = (p.artifacts.in_force("interest_model", DAY).version for p in (shadow.planner, toy.planner))
    assert own != theirs
    assert shadow.planner.artifacts.in_force("tokenizer", DAY) == toy.planner.artifacts.in_force("tokenizer", DAY)
    assert toy.not_done([DAY]) == {}


def test_a_decision_about_an_artifact_that_is_not_pinned_counts_in_the_shadow_too(toy):
    shadow = shadow_config(toy.config, "s", "pseudo_labels", {})
    calibrator = toy.planner.artifacts.in_force("calibrator", DAY).version
    assert Planner(shadow).artifacts.in_force("calibrator", DAY).version == calibrator
    toy.planner.artifacts.decide("calibrator", calibrator, "rollback")
    assert Planner(shadow).artifacts.in_force_or_none("calibrator", DAY) is None


@pytest.mark.parametrize("step", ["ingest", "samples", "train_interest_model"])
def test_a_step_that_would_write_what_is_only_read_is_refused(toy, step):
    shadow = shadow_config(toy.config, "s", "anchor_requests", {})
    before = files(Path(toy.config.lakehouse.root))
    with pytest.raises(UsageError, match=rf"step {step} writes .* only reads from .*--from"):
        run_step(Planner(shadow), step, DAY, StepArguments(shadow, (DAY,), "r", force=True), lambda context: None)
    assert files(Path(toy.config.lakehouse.root)) == before
    with pytest.raises(UsageError, match="interest_model: this shadow run only reads it"):
        Planner(shadow).artifacts.publish("interest_model", Path("."), trained_through=DAY, fingerprint="f",
                                          config_hash="c", lineage={})  # fmt: skip


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (("a b", "score_requests", {}), "--name a b"),
        (("s", "frob", {}), "no step 'frob'"),
        (("s", "optimize", {}), "not a step of the graph"),
        (("s", "anchor_requests", {"calibrator": "v"}), "no step before anchor_requests publishes it"),
        (("s", "score_requests", {"interest_model": "v"}), "begin with --from anchor_requests"),
    ],
)
def test_what_makes_no_shadow_is_refused(toy, given, said):
    with pytest.raises(UsageError, match=said):
        shadow_config(toy.config, *given)


def test_an_unknown_version_names_the_known_ones(toy):
    known = toy.planner.artifacts.in_force("interest_model", DAY).version
    for name in ("v9", f"{known}/"):
        with pytest.raises(MissingInputError, match=f"no version {name}; existing: {known}"):
            shadow_config(toy.config, "s", "anchor_requests", {"interest_model": name})


def test_the_command_prints_a_configuration_that_loads_and_compares(toy, tmp_path, capsys):
    path, shadow = config_file(tmp_path), tmp_path / "shadow.yaml"
    assert main(["shadow", "--config", str(path), "--name", "s", "--from", "anchor_requests"]) == 0
    shadow.write_text(capsys.readouterr().out)
    loaded = load_config(str(shadow))
    assert loaded == shadow_config(load_config(str(path)), "s", "anchor_requests", {})
    assert main(["vacuum", "--config", str(shadow)]) == 2
    assert "cannot be used on a shadow run" in capsys.readouterr().err
    given = ["compare", "--config", str(path), "--with", str(shadow), "--run-date", DAY.isoformat()]
    assert main(given) == 4
    assert "pseudo_labels" in capsys.readouterr().err
    Toy(loaded).run_pending([DAY])
    assert main(given) == 0
    assert "rank correlation" in capsys.readouterr().out


def labeled(config: Config, labels: dict[str, float], anchors: list[int]) -> None:
    """Labels of user u's items, and the three one-level anchors that they came from."""
    lake = Planner(config).lake
    contract = load_contract("pseudo_labels")
    base = legal_rows(contract, 1, partition={"dt": DAY})[0] | {"user_id": "u", "source": "unexposed"}
    put(lake, "pseudo_labels", [base | {"item_id": i, "pseudo_label": v} for i, v in labels.items()])
    asked = legal_rows(load_contract("score_requests"), 1, partition={"dt": DAY})[0]
    sids = [c for a in anchors for c in (a, 0, 0)]
    put(lake, "score_requests", [asked | {"user_id": "u", "anchor_sids": sids, "log_prob": [-1.0] * len(anchors)}])


def test_figures_of_two_labelings(tmp_path):
    house = small_config(tmp_path)
    pair = legal_rows(
        load_contract("unexposed_samples"), 1, partition=default_partition(load_contract("unexposed_samples"))
    )
    put(Planner(house).lake, "unexposed_samples", [pair[0] | {"user_id": "u", "item_id": i} for i in "abcd"])
    shadow = shadow_config(house, "s", "anchor_requests", {})
    labeled(house, {"a": 0.1, "b": 0.2, "c": 0.3, "d": 0.4}, [1, 2])
    labeled(shadow, {"a": 0.3, "b": 0.2, "c": 0.1}, [2, 3])
    found = {figure: values for figure, *values in compare(house, shadow, DAY)}
    assert found["unexposed pairs labeled"] == ["4", "3"]
    assert found["share of unexposed pairs labeled"] == ["100.0%", "75.0%"]
    assert found["mean pseudo_label"] == ["0.2500", "0.2000"]
    assert found["pseudo_label, quantile 0.5"] == ["0.2500", "0.2000"]
    assert found["pairs in both"][1] == "3"
    assert found["rank correlation of labels"][1] == found["the same within a user, mean"][1] == "-1.0000"
    assert found["mean absolute difference"][1] == "0.1333"
    assert found["anchors in common, mean Jaccard"][1] == "0.3333"


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=2, max_size=30))
@settings(max_examples=50, deadline=None)
def test_the_rank_correlation_is_scipys(pairs):
    from scipy.stats import spearmanr

    a, b = (np.array(x, float) for x in zip(*pairs))
    ours = rank_correlation(a, b)
    if len(set(a)) < 2 or len(set(b)) < 2:
        assert np.isnan(ours)
    else:
        assert ours == pytest.approx(spearmanr(a, b).statistic)


def test_tables_that_lie_elsewhere_are_found_there_and_outputs_are_the_shadows_own(tmp_path):
    places = {"raw_items": "catalog://shop.items", "items": "/there/items", "pair_scores": "/there/scores"}
    house = small_config(tmp_path, {"lakehouse": {"tables": places}})
    with pytest.raises(MissingInputError, match="gpl register"):
        shadow_config(house, "s", "anchor_requests", {})
    (tmp_path / "lake").mkdir()
    (tmp_path / "lake" / LOCATIONS).write_text('{"catalog://shop.items": "s3://shop/items"}')
    lake = Lake.of(shadow_config(house, "s", "anchor_requests", {}).lakehouse)
    assert [lake.uri(t) for t in ("raw_items", "items", "user_stats", "pair_scores")] == [
        "s3://shop/items", "/there/items",
        f"{house.lakehouse.root}/tables/user_stats", f"{lake.root}/tables/pair_scores",
    ]  # fmt: skip


def test_every_step_can_be_the_first(toy):
    for step in STEPS[1:]:
        config = shadow_config(toy.config, "s", step.name, {})
        own = {*find_step(step.name).writes, *find_step(step.name).also_writes}
        assert own & set(config.lakehouse.shadow.tables) == set(), step.name
    assert ArtifactStore(toy.config.lakehouse.root).manifests("tokenizer")
