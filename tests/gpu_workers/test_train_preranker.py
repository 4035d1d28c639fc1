"""train_preranker: two fair variants from the feed, an artifact numpy can serve, figures that admit being undefined."""

import itertools
import random
from datetime import UTC, date, datetime, time, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from gpl_core.commands.score import score
from gpl_core.config import load_config
from gpl_core.contracts.contract import Column, load_contract
from gpl_core.errors import ConflictError, ContractError, LineageError, MissingInputError
from gpl_core.lakehouse.snapshot import Snapshot
from gpl_core.prerank.comparison import ALL_SEEDS
from gpl_core.prerank.export import load_variant
from gpl_core.prerank.features import user_buckets
from gpl_core.prerank.serving import ServedModel
from gpu_workers import train_preranker
from gpu_workers.inputs.prerank import FeedRows
from gpu_workers.ranks import Ranks
from tests.gpu_workers.labels_lake import DAY, SIDS, H, L, LabelsLake

NEXT = DAY + timedelta(days=1)


@pytest.fixture
def lake(tmp_path: Path) -> LabelsLake:
    return LabelsLake(tmp_path / "lake")


def _user(number: int) -> str:
    return f"user-{number:02d}"


def _likes(user: int, item: int) -> float:
    """Even users click even items."""
    return 0.9 if user % 2 == item % 2 else 0.1


def _feed_row(
    lake: LabelsLake, request: str, user: int, item: int, exposed: bool, target: float, day: date, **more: Any
) -> dict[str, Any]:
    return {
        "request_id": request, "item_id": f"i{item}", "user_id": _user(user), "item_index": item,
        "is_exposed": exposed, "is_random": False, "has_label": exposed, "label": target * exposed,
        "pseudo_label": target * (not exposed), "target": target, "sample_weight": 1.0,
        "sampling_probability": 1.0 if exposed else (1.0, 0.5)[item % 2],
        "coherence": 1.0, "consistency": 1.0, "llm_confidence": 1.0, "sid": SIDS[item].tolist(), "channel": "c",
        "position": 0 if exposed else -1, "event_time": 0, "dt_copy": day.isoformat(),
        "sid_version": lake.tokenizer, "model_version": "" if exposed else lake.model,
        "calibrator_version": "" if exposed else "cal-1", **more,
    }  # fmt: skip


def write_feed(
    lake: LabelsLake, day: date = DAY, rows: int = 240, unexposed: float = 0.6, hint: bool = False, **same: Any
) -> None:
    """A feed slice: odd-even tastes, exposed rows only of items 0-3, unexposed ones with the truth as pseudo-label.

    hint: with a passthrough column of that name that holds the target.
    """
    rng = np.random.default_rng(day.toordinal())
    out = []
    for number in range(rows):
        user, exposed = int(rng.integers(20)), rng.random() >= unexposed
        item = int(rng.integers(0, 4) if exposed else rng.integers(4, 8))
        target = float(rng.random() < _likes(user, item)) if exposed else _likes(user, item)
        hinted = {"hint": target} if hint else {}
        out.append(
            _feed_row(
                lake,
                f"r{number}",
                user,
                item,
                exposed,
                target,
                day,
                shuffle_key=number + 1000 * day.toordinal(),
                **same,
                **hinted,
            )
        )
    extra = (Column("hint", "double", nullable=True, comment="passed through"),) if hint else ()
    contract = load_contract("training_feed").with_columns(extra)
    lake.write("training_feed", {"dt": day.isoformat()}, out, files=2, contract=contract)


def write_impressions(
    lake: LabelsLake,
    day: date = NEXT,
    requests: int = 60,
    clicked: int | None = None,
    propensity: float | None = None,
    hint: bool = False,
) -> None:
    """Impressions of all items 0-9, a fifth of the requests uniformly exposed.

    propensity: in a column shown_with; hint: a column of that name holds the click.
    """
    rng = np.random.default_rng(5)
    out = []
    for number in range(requests):
        user = int(rng.integers(20))
        for position, item in enumerate(rng.permutation(10)[:5].tolist()):
            click = int(rng.random() < _likes(user, item)) if clicked is None else clicked
            out.append(
                {
                    "request_id": f"q{number}", "item_id": f"i{item}", "item_index": item, "user_id": _user(user),
                    "event_time": datetime.combine(day, time(12), UTC), "position": position, "clicked": click,
                    "is_random": number % 5 == 0,
                }
            )  # fmt: skip
    names = [*(["shown_with"] if propensity is not None else []), *(["hint"] if hint else [])]
    extra = tuple(Column(n, "double", nullable=True, comment="passed through") for n in names)
    rows = [{**row, **{n: propensity if n == "shown_with" else float(row["clicked"]) for n in names}} for row in out]
    lake.write("impressions", {"dt": day.isoformat()}, rows, contract=load_contract("impressions").with_columns(extra))


def write_sequences(lake: LabelsLake, day: date = DAY, shift: int = 0) -> None:
    """user_sequences: everyone's history is one item."""
    rows = [
        {"user_id": _user(n), "sid": SIDS[n % 2].tolist() + [-1] * (H - 1) * L,
         "item_index": [n % 2 + shift] + [-1] * (H - 1),
         "keep_u": [0.5] + [-1.0] * (H - 1), "length": 1, "last_event_time": 0, "sequence_hash": "s",
         "sid_version": lake.tokenizer, "day": 0}
        for n in range(20)
    ]  # fmt: skip
    lake.write("user_sequences", {"dt": day.isoformat()}, rows)


def _figures(lake: LabelsLake) -> dict[tuple[str, str, str], dict[str, Any]]:
    """Of the only seed's mean; what stands for the seed itself is the same."""
    rows = lake.read("evaluations")
    of = {(r["model"], r["slice"], r["metric"]): r for r in rows if r["seed"] == ALL_SEEDS and not r["against"]}
    assert of == {
        (r["model"], r["slice"], r["metric"]): {**r, "seed": ALL_SEEDS} for r in rows if r["seed"] != ALL_SEEDS
    }
    return of


def _bundle(lake: LabelsLake) -> Path:
    (manifest,) = lake.store.manifests("preranker")
    return lake.store.fetch(manifest)


def test_trains_both_variants_publishes_and_judges(lake: LabelsLake, one_rank: Ranks) -> None:
    write_sequences(lake, DAY - timedelta(days=1))
    write_feed(lake)
    write_feed(lake, DAY - timedelta(days=1), rows=100, sid_version="older")
    write_impressions(lake)
    overrides = ("prerank.steps=150", "prerank.learning_rate=0.02")
    context = lake.run("train_preranker", train_preranker.run, *overrides, ranks=one_rank)
    (manifest,) = lake.store.manifests("preranker")
    assert manifest.trained_through == DAY
    assert dict(manifest.lineage) == {
        "sid_version": lake.tokenizer, "encoder_version": "encoder-1", "model_version": lake.model,
        "calibrator_version": "cal-1",
    }  # fmt: skip
    assert context.counts.details["rows_of_other_sid_version"] == 100
    assert context.counts.details["exposed_rows"] + context.counts.details["unexposed_rows"] == 340

    figures = _figures(lake)
    assert {key[1] for key in figures} == {"exposed", "uniform", "tail"}
    assert {key[2] for key in figures} == {"auc", "gauc", "hr@3", "hr@10", "ndcg@3", "ndcg@10"}
    # Half the impressions are of items that were never exposed: only the pseudo-labels speak about them.
    assert figures["gpl", "tail", "auc"]["value"] > figures["exposed_only", "tail", "auc"]["value"] + 0.1
    assert figures["gpl", "uniform", "gauc"]["value"] > 0.6
    for k in (3, 10):  # half of five candidates or more
        assert figures["gpl", "exposed", f"hr@{k}"]["candidate_set_size"] == 5.0
        assert figures["gpl", "exposed", f"hr@{k}"]["value"] is None
    (difference,) = [
        r
        for r in lake.read("evaluations")
        if (r["against"], r["slice"], r["metric"]) == ("exposed_only", "tail", "auc")
    ]
    assert difference["model"] == "gpl"
    assert 0.0 < difference["low"] < difference["value"] < difference["high"]

    folder = _bundle(lake)
    served = ServedModel(folder, "gpl-seed0")
    model = load_variant(folder, "gpl-seed0")
    assert len(served.items) == 8  # item 9 came after the day, 8 has no embedding
    assert torch.isfinite(model.user.id.weight).all()
    pairs = [(user, item) for user in range(20) for item in range(4, 8)]
    scores = served.score_pairs([_user(user) for user, _ in pairs], np.array([item for _, item in pairs]))
    liked = np.array([user % 2 == item % 2 for user, item in pairs])
    assert scores[liked].mean() > scores[~liked].mean() + 0.3


def _write_requests(lake: LabelsLake, unexposed: int, files: int) -> None:
    """The feed of two dates: 12 requests each with the same 5 exposed rows, and `unexposed` rows beside them."""
    for day in (DAY - timedelta(days=1), DAY):
        rows = []
        for request, n in itertools.product(range(12), range(5 + unexposed)):
            rng = np.random.default_rng([day.toordinal(), request, n])
            item, exposed = int(rng.integers(8)), n < 5
            label = float(rng.random() < _likes(request, item))
            rows.append(
                _feed_row(
                    lake, f"{day}-{request}", request, item, exposed, label, day, shuffle_key=int(rng.integers(2**62))
                )
            )
        random.Random(unexposed).shuffle(rows)
        lake.write("training_feed", {"dt": day.isoformat()}, rows, files=files)


def test_the_baseline_depends_on_nothing_unexposed_bit_for_bit(lake: LabelsLake, tmp_path, one_rank: Ranks) -> None:
    """The same exposed rows beside 20 and beside 300 unexposed ones per request, in other files and another order."""
    other = lake.copied(tmp_path / "other")
    _write_requests(lake, 20, files=2)
    _write_requests(other, 300, files=5)
    for each in (lake, other):
        each.run("train_preranker", train_preranker.run, ranks=one_rank)
    for variant, same in (("exposed_only-seed0", True), ("gpl-seed0", False)):
        few, many = (load_variant(_bundle(each), variant) for each in (lake, other))
        equal = all(torch.equal(a, b) for a, b in zip(few.parameters(), many.parameters(), strict=True))
        assert equal == same, variant


def test_every_step_has_a_full_batch_of_exposed_rows_from_all_dates(lake, one_rank, monkeypatch) -> None:
    """120 exposed rows beside 480 others, in batches of 64: a shared batch would hold some 13 exposed rows."""
    _write_requests(lake, 20, files=3)
    seen: list[tuple[int, int]] = []
    taken = FeedRows.batches

    def recorded(rows: FeedRows, seed: int):
        for exposed, unexposed in taken(rows, seed):
            seen.append((len(exposed["target"]), len(unexposed["target"])))
            yield exposed, unexposed

    monkeypatch.setattr(FeedRows, "batches", recorded)
    lake.run("train_preranker", train_preranker.run, ranks=one_rank)
    assert seen == [(64, 64)] * 30


def test_lambda_zero_gives_the_exposed_only_weights_bit_for_bit(lake: LabelsLake, one_rank: Ranks) -> None:
    write_feed(lake)
    lake.run("train_preranker", train_preranker.run, "prerank.lambda=0", ranks=one_rank)
    plain, gpl = (load_variant(_bundle(lake), f"{name}-seed0") for name in ("exposed_only", "gpl"))
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), gpl.parameters(), strict=True))


def test_weights_that_are_all_zero_give_the_exposed_only_weights_bit_for_bit(lake, one_rank) -> None:
    write_feed(lake, sample_weight=0.0)
    lake.run("train_preranker", train_preranker.run, ranks=one_rank)
    plain, gpl = (load_variant(_bundle(lake), f"{name}-seed0") for name in ("exposed_only", "gpl"))
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), gpl.parameters(), strict=True))


def test_profiles_know_nothing_of_the_training_days_own_clicks(lake: LabelsLake, one_rank: Ranks) -> None:
    """The feed holds DAY - 1 and DAY: histories written for DAY contain clicks that its rows are labeled with."""
    write_feed(lake, DAY - timedelta(days=1))
    write_feed(lake)
    write_sequences(lake, DAY - timedelta(days=1))
    write_sequences(lake, DAY, shift=4)
    lake.run("train_preranker", train_preranker.run, "prerank.buckets=20000", ranks=one_rank)
    table = load_file(_bundle(lake) / "profiles.safetensors")["table"]
    used = table[user_buckets([_user(0)], len(table))[0]]
    assert used == pytest.approx(lake.vectors[0], abs=1e-6)


def test_profiles_of_a_window_that_begins_before_the_feed_are_those_of_its_first_day(lake, one_rank) -> None:
    """One date of the feed, three training days: what users had done before that date is known."""
    write_feed(lake)
    write_sequences(lake, DAY)
    given = ("prerank.train_days=3", "prerank.buckets=20000")
    lake.run("train_preranker", train_preranker.run, *given, ranks=one_rank)
    table = load_file(_bundle(lake) / "profiles.safetensors")["table"]
    assert (table != 0).any(axis=1).sum() > 1


def test_late_impressions_are_judged_without_training_again(lake: LabelsLake, one_rank: Ranks) -> None:
    write_feed(lake)
    first = lake.run("train_preranker", train_preranker.run, ranks=one_rank)
    assert lake.read("evaluations") == []
    write_impressions(lake)
    second = lake.run("train_preranker", train_preranker.run, ranks=one_rank)
    assert len(lake.store.manifests("preranker")) == 1
    assert first.artifact_digest == second.artifact_digest
    assert first.state.fingerprint != second.state.fingerprint
    assert len(_figures(lake)) == 2 * 3 * 6


def test_logged_propensities_add_an_off_policy_auc_and_a_sweep_adds_variants(lake: LabelsLake, one_rank: Ranks) -> None:
    write_feed(lake)
    write_impressions(lake, propensity=0.25)
    given = ("feed.passthrough={shown_with: double}", "prerank.propensity=shown_with", "prerank.lambda_sweep=[0, 4]")
    lake.run("train_preranker", train_preranker.run, *given, ranks=one_rank)
    figures = _figures(lake)
    assert {key[0] for key in figures} == {"exposed_only", "gpl", "gpl@0", "gpl@4"}
    for metric in ("auc", "gauc"):  # lambda 4 is the default, lambda 0 is exposed-only
        assert figures["gpl@0", "uniform", metric]["value"] == figures["exposed_only", "uniform", metric]["value"]
        assert figures["gpl@4", "uniform", metric]["value"] == figures["gpl", "uniform", metric]["value"]
    for part in ("exposed", "uniform", "tail"):  # all propensities are the same: it is the plain AUC
        found = figures["gpl", part, "snips_auc"]
        assert found["value"] == pytest.approx(figures["gpl", part, "auc"]["value"])
        assert f"{found['rows']} effective rows" in found["note"]


def test_features_of_a_pair_reach_the_model_its_judges_and_who_serves_it(lake: LabelsLake, one_rank: Ranks) -> None:
    write_feed(lake, hint=True)
    write_impressions(lake, hint=True)
    given = ("feed.passthrough={hint: double}", "prerank.steps=150", "prerank.learning_rate=0.02")
    lake.run("train_preranker", train_preranker.run, *given, ranks=one_rank)
    without = _figures(lake)["exposed_only", "exposed", "auc"]["value"]
    lake.run("train_preranker", train_preranker.run, *given, "prerank.pair_features=[hint]", ranks=one_rank)
    assert _figures(lake)["exposed_only", "exposed", "auc"]["value"] > without + 0.1
    newest = max(lake.store.manifests("preranker"), key=lambda m: m.created_at)
    served = ServedModel(lake.store.fetch(newest), "gpl-seed0")
    low, high = (served.score_pairs([_user(0)], np.array([0]), np.array([[x]], np.float32)) for x in (0.0, 1.0))
    assert high > low + 0.1
    with pytest.raises(ContractError, match="pair features hint"):
        served.score_pairs([_user(0)], np.array([0]))

    config = load_config("quickstart", lake.arguments(*given)[3::2])
    unexposed = [r for r in lake.read("training_feed") if not r["is_exposed"]]
    for _ in range(2):  # the second time replaces the slice
        assert score(config, DAY, "gpl") == (len(unexposed), "gpl-seed0", newest.version)
    with pytest.raises(MissingInputError, match="training_feed has no slice for 2031-01-01"):
        score(config, date(2031, 1, 1), "gpl")
    read = Snapshot.row_groups

    def overtaken(snapshot, *given):
        yield from read(snapshot, *given)
        write_feed(lake, hint=True)  # as gpl forget does, and a feed that is made again

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Snapshot, "row_groups", overtaken)
        with pytest.raises(ConflictError, match="was written by another run meanwhile; run gpl score"):
            score(config, DAY, "gpl")
    found = {r["request_id"]: r for r in lake.read("preranker_scores")}
    assert len(found) == len(unexposed)
    users, items, hints = ([r[c] for r in unexposed] for c in ("user_id", "item_index", "target"))
    logits = served.score_pairs(users, np.array(items), np.array(hints, np.float32)[:, None])
    assert [found[r["request_id"]]["score"] for r in unexposed] == pytest.approx(1 / (1 + np.exp(-logits)), abs=1e-6)
    assert {found[r["request_id"]]["pseudo_label"] - r["pseudo_label"] for r in unexposed} == {0.0}


def test_one_class_is_absent_with_the_reason(lake: LabelsLake, one_rank: Ranks) -> None:
    write_feed(lake)
    write_impressions(lake, clicked=0)
    lake.run("train_preranker", train_preranker.run, ranks=one_rank)
    figures = _figures(lake)
    assert len(figures) == 2 * 3 * 6
    for (_, _, metric), row in figures.items():
        assert row["value"] is None
        assert "one class" in row["note"] if "auc" in metric else "has a positive" in row["note"]
        assert row["low"] is row["high"] is None


@pytest.mark.parametrize("unexposed", [0.0, 1.0])
def test_a_date_with_rows_of_one_kind_trains(lake: LabelsLake, one_rank: Ranks, unexposed: float) -> None:
    write_feed(lake, unexposed=unexposed)
    lake.run("train_preranker", train_preranker.run, ranks=one_rank)
    plain, gpl = (load_variant(_bundle(lake), f"{name}-seed0") for name in ("exposed_only", "gpl"))
    same = all(torch.equal(a, b) for a, b in zip(plain.parameters(), gpl.parameters(), strict=True))
    assert same == (unexposed == 0.0)


def test_an_empty_feed_and_wrong_sids_are_refused(lake: LabelsLake, one_rank: Ranks) -> None:
    lake.write("training_feed", {"dt": DAY.isoformat()}, [])
    with pytest.raises(MissingInputError, match="no rows in the 2 day"):
        lake.run("train_preranker", train_preranker.run, ranks=one_rank)
    write_feed(lake, sid_version="another")
    with pytest.raises(LineageError, match=r"sid_version another, in force is"):
        lake.run("train_preranker", train_preranker.run, ranks=one_rank)
    assert lake.store.manifests("preranker") == []


@pytest.mark.deepspeed
def test_two_ranks_train_one_ranks_model(lake: LabelsLake, tmp_path: Path, one_rank: Ranks) -> None:
    write_sequences(lake, DAY - timedelta(days=1))
    write_feed(lake)
    write_impressions(lake)
    # The very same files: names are random, and their order decides which rows make a batch.
    other = lake.copied(tmp_path / "other")
    lake.run("train_preranker", train_preranker.run, "prerank.batch_size=63", ranks=one_rank)
    other.launch("train_preranker", "prerank.batch_size=63", ranks=2)
    for name in ("exposed_only-seed0", "gpl-seed0"):
        one, two = (load_variant(_bundle(house), name).state_dict() for house in (lake, other))
        for key, value in one.items():
            torch.testing.assert_close(two[key], value, atol=2e-4, rtol=1e-3)
    left, right = _figures(lake), _figures(other)
    assert left.keys() == right.keys()
    for key, row in left.items():
        assert right[key]["value"] == pytest.approx(row["value"], abs=0.01), key


def test_less_than_a_pass_over_the_exposed_rows_is_told(lake: LabelsLake, one_rank: Ranks, caplog) -> None:
    write_sequences(lake)
    write_feed(lake)
    write_impressions(lake)
    lake.run("train_preranker", train_preranker.run, "prerank.steps=1", "prerank.batch_size=8", ranks=one_rank)
    (told,) = [text for text in caplog.messages if text.startswith("prerank.steps")]
    exposed = int(told.split(" of the ")[1].split()[0])
    assert f"is 1: batches of 8 read only {100 / -(-exposed // 8):.1f} % of" in told
    assert 0.8 * 240 * 0.4 < exposed <= 240 * 0.4
