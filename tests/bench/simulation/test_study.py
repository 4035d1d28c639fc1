"""Shares above the constant and verdicts: only what stands above 0 with its whole interval is better."""

from __future__ import annotations

import numpy as np
import pytest

from gpl_core.prerank.bootstrap import REPLICATES
from tests.bench.simulation import study
from tests.bench.simulation.log import QUICK
from tests.bench.simulation.study import Found, difference, farther, gap_closed, joined, kept_seed

KEY = "unexposed/auc"


def _found(noise: float, **values: float) -> list[Found]:
    """Three seeds that shift all variants alike; users shift each by `noise`."""
    rng = np.random.default_rng(0)
    seeds = []
    for shift in (-0.05, 0.0, 0.05):
        drawn = {f"{name}:{KEY}": value + shift + noise * rng.normal(size=REPLICATES) for name, value in values.items()}
        seeds.append(Found({name: {KEY: value + shift} for name, value in values.items()}, drawn))
    return seeds


def test_the_share_is_counted_from_the_constant_on() -> None:
    results = joined(_found(0.001, exposed_only=0.6, constant=0.63, ours=0.66, oracle_hard=0.7))
    share, low, high = gap_closed(results, "ours", "auc", 0.4).values()
    assert share.value == pytest.approx(3 / 7)
    assert share.holds
    assert low.value < share.value < high.value
    (worse, *_) = gap_closed(results, "exposed_only", "auc", 0.0).values()
    assert worse.value == pytest.approx(-3 / 7)
    assert not worse.holds


def test_without_a_gap_nothing_is_closed() -> None:
    results = joined(_found(0.5, constant=0.6999, ours=0.9, oracle_hard=0.7))
    (share,) = gap_closed(results, "ours", "auc", 0.5).values()
    assert (share.value, share.holds) == (0.0, False)


@pytest.mark.parametrize(("noise", "holds"), [(0.001, True), (0.1, False)])
def test_better_needs_the_whole_interval(noise: float, holds: bool) -> None:
    """The seeds agree exactly; only the users can shake the difference."""
    mean, low, _ = difference(joined(_found(noise, ours=0.61, other=0.6)), "ours", "other", KEY).values()
    assert mean.value == pytest.approx(0.01)
    assert low.holds is holds


def test_a_figure_of_lists_has_an_interval_over_seeds_alone() -> None:
    seeds = [Found({"a": {"top10/coverage": v}, "b": {"top10/coverage": 0.5}}, {}) for v in (0.6, 0.7, 0.8)]
    mean, low, high = difference(joined(seeds), "a", "b", "top10/coverage").values()
    assert mean.value == pytest.approx(0.2)
    assert (low.value, high.value) == (pytest.approx(0.1), pytest.approx(0.3))


@pytest.mark.parametrize(("noise", "ours", "holds"), [(0.001, 0.59, False), (0.1, 0.59, True), (0.001, 0.61, True)])
def test_not_worse_fails_only_where_all_of_the_interval_is_below_0(noise: float, ours: float, holds: bool) -> None:
    *_, high = difference(joined(_found(noise, ours=ours, other=0.6)), "ours", "other", KEY, better=False).values()
    assert high.holds is holds


@pytest.mark.parametrize(("ours", "other", "farther_by"), [(0.5, 0.9, -0.2), (0.7, 0.5, 0.0), (0.65, 0.58, 0.03)])
def test_a_share_is_judged_by_how_far_it_is_from_the_truth(ours: float, other: float, farther_by: float) -> None:
    results = joined(_found(0.0, bayes=0.6, ours=ours, other=other))
    mean, low, high = farther(results, "ours", "other", KEY).values()
    assert [f.value for f in (mean, low, high)] == pytest.approx([farther_by] * 3)


def test_a_finished_seed_is_read_again_with_its_replicates(tmp_path, monkeypatch) -> None:
    made = _found(0.01, exposed_only=0.6)[0]
    monkeypatch.setattr(study, "run_seed", lambda *_: made)
    first = kept_seed(None, tmp_path, QUICK, 7, ("exposed_only",), "plain")
    monkeypatch.setattr(study, "run_seed", lambda *_: pytest.fail("ran again"))
    again = kept_seed(None, tmp_path, QUICK, 7, ("exposed_only",), "plain")
    assert first.figures == again.figures
    assert (again.drawn[f"exposed_only:{KEY}"] == made.drawn[f"exposed_only:{KEY}"]).all()
