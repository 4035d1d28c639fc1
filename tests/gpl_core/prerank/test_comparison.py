"""Rows of evaluations: by seed, over seeds, differences; the order of slices and what may be called better."""

from __future__ import annotations

import numpy as np
import pytest

from gpl_core.prerank import metrics
from gpl_core.prerank.comparison import ALL_SEEDS, compared, difference_text, figure_text, ordered_slices, too_small


def _found(lift: float) -> dict[tuple[str, int], list[metrics.Figure]]:
    rng = np.random.default_rng(0)
    user = np.repeat(np.arange(150), 8)
    clicks = (rng.random(len(user)) < 0.3).astype(float)
    scores = {
        (model, seed): rng.normal(size=len(user)) + (1.0 + lift * (model == "gpl")) * clicks
        for seed in (3, 7) for model in ("exposed_only", "gpl")
    }  # fmt: skip
    lists, keys = np.arange(len(user)) // 4, np.arange(len(user))
    return {
        key: [metrics.auc(s, clicks, user), metrics.ranked("hr", s, clicks, lists, keys, 3, user)]
        for key, s in scores.items()
    }


@pytest.mark.parametrize(("lift", "verdict"), [(1.0, " better"), (-1.0, " worse"), (0.0, "")])
def test_means_and_paired_differences_over_seeds(lift: float, verdict: str) -> None:
    found = _found(lift)
    rows = compared(found, [("gpl", "exposed_only")])
    of = {(r["metric"], r["model"], r["against"], r["seed"]): r for r in rows}
    assert len(of) == len(rows) == 2 * (4 + 2 + 1)
    base, ours = (np.mean([found[m, s][0].value for s in (3, 7)]) for m in ("exposed_only", "gpl"))
    assert of["auc", "gpl", "", ALL_SEEDS]["value"] == pytest.approx(ours)
    difference = of["auc", "gpl", "exposed_only", ALL_SEEDS]
    assert difference["value"] == pytest.approx(ours - base)
    assert difference["low"] < difference["value"] < difference["high"]
    assert difference_text(difference) == (
        f"{ours - base:+.4f} [{difference['low']:+.4f}, {difference['high']:+.4f}]{verdict}"
    )
    for row in rows:
        assert row["clicks"] == found["gpl", 3][0].clicks > 200
        if row["metric"] == "hr@3":  # lists of four
            assert row["value"] is row["low"] is None
            assert figure_text(row) == "absent: 3 is half of a list's 4.0 candidates or more"
            assert difference_text(row) == ""


def test_the_largest_slice_stands_first_and_one_with_few_clicks_says_so() -> None:
    rows = [{"slice": s, "clicks": c} for s, c in (("tail", 900.0), ("uniform", 199.0), ("exposed", 200.0), ("b", 1.0))]
    assert ordered_slices(rows) == ["tail", "exposed", "uniform", "b"]
    assert too_small(rows[1:2]) == "too small: 199 clicks, fewer than 200"
    assert too_small(rows[2:3]) == ""
    assert too_small([{"slice": "unexposed"}]) == "", "the simulated truth counts no clicks"
