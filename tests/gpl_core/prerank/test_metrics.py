"""Metrics against brute force over pairs and lists; undefined figures are absent."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpl_core.errors import ContractError
from gpl_core.prerank import metrics

SCORES = st.lists(st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0]), min_size=2, max_size=9)


def _pairs_auc(scores, p) -> float | None:
    """Expected AUC over all ordered pairs of distinct rows."""
    wins = mass = 0.0
    for i in range(len(scores)):
        for j in range(len(scores)):
            if i != j:
                weight = p[i] * (1 - p[j])
                mass += weight
                wins += weight * ((scores[i] > scores[j]) + 0.5 * (scores[i] == scores[j]))
    return wins / mass if mass > 1e-12 else None


@given(SCORES, st.data(), st.booleans())
def test_auc_equals_counting_all_pairs(scores, data, soft: bool) -> None:
    values = [0.0, 0.3, 0.9, 1.0] if soft else [0.0, 1.0]
    p = [data.draw(st.sampled_from(values)) for _ in scores]
    expected = _pairs_auc(scores, p)
    figure = metrics.auc(scores, p)
    if expected is None:
        assert figure.value is None
        assert "one class only" in figure.note
    else:
        assert figure.value == pytest.approx(expected)


@given(SCORES, st.data())
def test_snips_auc_counts_each_row_by_its_inverse_propensity(scores, data) -> None:
    clicks = [data.draw(st.sampled_from([0.0, 1.0])) for _ in scores]
    propensity = [data.draw(st.sampled_from([0.1, 0.5, 1.0, 0.0, float("nan")])) for _ in scores]
    kept = [n for n, p in enumerate(propensity) if p > 0]
    wins = mass = 0.0
    for i in kept:
        for j in kept:
            if clicks[i] == 1 and clicks[j] == 0:
                weight = 1 / (propensity[i] * propensity[j])
                mass += weight
                wins += weight * ((scores[i] > scores[j]) + 0.5 * (scores[i] == scores[j]))
    figure = metrics.snips_auc(scores, clicks, propensity)
    assert figure.rows == len(kept)
    assert figure.value == (pytest.approx(wins / mass) if mass else None)
    assert figure.note


def test_snips_auc_undoes_a_biased_exposure() -> None:
    """Exposure follows one feature: among the shown its AUC is wrong, weighted it is that of all pairs."""
    rng = np.random.default_rng(3)
    seen, hidden = rng.normal(size=(2, 200_000))
    click = (rng.random(200_000) < 1 / (1 + np.exp(1 - seen - hidden))).astype(float)
    propensity = 1 / (1 + np.exp(1 - 2 * seen))
    shown = rng.random(200_000) < propensity
    everywhere = metrics.auc(seen, click).value
    assert abs(metrics.auc(seen[shown], click[shown]).value - everywhere) > 0.03
    weighted = metrics.snips_auc(seen[shown], click[shown], propensity[shown]).value
    assert weighted == pytest.approx(everywhere, abs=0.01)


def test_expected_auc_is_the_mean_over_drawn_clicks() -> None:
    rng = np.random.default_rng(0)
    p = rng.uniform(0.02, 0.4, 400)
    scores = p + rng.normal(0, 0.1, 400)
    drawn = [metrics.auc(scores, (rng.random(400) < p).astype(float)).value for _ in range(400)]
    assert metrics.auc(scores, p).value == pytest.approx(np.mean(drawn), abs=4 * np.std(drawn) / 20)


@given(st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from([0.0, 0.5, 1.0]), st.booleans()), min_size=1))
def test_gauc_is_the_row_weighted_mean_of_defined_users(rows) -> None:
    users, scores, labels = ([row[n] for row in rows] for n in range(3))
    y = np.array(labels, dtype=float)
    found, weights = [], []
    for user in sorted(set(users)):
        at = [n for n, u in enumerate(users) if u == user]
        value = _pairs_auc([scores[n] for n in at], y[at])
        if value is not None:
            found.append(value)
            weights.append(len(at))
    figure = metrics.gauc(scores, y, users)
    if not found:
        assert figure.value is None
        assert "one class only" in figure.note
    else:
        assert figure.value == pytest.approx(np.average(found, weights=weights))
        assert figure.rows == sum(weights)


@given(
    st.lists(
        st.tuples(st.sampled_from("ab"), st.sampled_from([0.0, 0.5, 1.0]), st.booleans()), min_size=1, max_size=12
    ),
    st.integers(1, 4),
    st.randoms(use_true_random=False),
)
def test_lists_equal_a_plain_sort_in_any_row_order(rows, k: int, random) -> None:
    keyed = [(*row, n) for n, row in enumerate(rows)]
    hits, gains, sizes = [], [], []
    for name in sorted({row[0] for row in rows}):
        ranked = sorted((row for row in keyed if row[0] == name), key=lambda row: (-row[1], row[3]))
        positives = [n for n, row in enumerate(ranked) if row[2]]
        if positives:
            hits.append(float(positives[0] < k))
            best = sum(1 / np.log2(n + 2) for n in range(min(k, len(positives))))
            gains.append(sum(1 / np.log2(n + 2) for n in positives if n < k) / best)
            sizes.append(len(ranked))
    random.shuffle(keyed)
    lists, scores, labels, keys = ([row[n] for row in keyed] for n in range(4))
    hr = metrics.ranked("hr", scores, np.array(labels, float), lists, keys, k)
    gain = metrics.ranked("ndcg", scores, np.array(labels, float), lists, keys, k)
    assert hr.metric == f"hr@{k}"
    if not hits:
        assert (hr.value, gain.value) == (None, None)
        assert "has a positive" in hr.note
    elif 2 * k >= np.mean(sizes):
        assert (hr.value, gain.value) == (None, None)
        assert f"{k} is half" in gain.note
        assert gain.candidate_set_size == pytest.approx(np.mean(sizes))
    else:
        assert hr.value == pytest.approx(np.mean(hits))
        assert gain.value == pytest.approx(np.mean(gains))
        assert hr.candidate_set_size == pytest.approx(np.mean(sizes))


def test_no_rows_is_absent_everywhere() -> None:
    for figure in (
        metrics.auc([], []),
        metrics.gauc([], [], []),
        metrics.ranked("hr", [], [], [], []),
        metrics.ranked("ndcg", [], [], [], []),
    ):
        assert figure.value is None
        assert figure.note


@pytest.mark.parametrize(
    ("scores", "labels", "message"),
    [
        ([np.nan, 1.0], [0.0, 1.0], "1 of 2 scores are not finite"),
        ([0.0, 1.0], [0.0, 2.0], r"outside \[0, 1\]"),
        ([0.0], [0.0, 1.0], "one length"),
    ],
)
def test_bad_input_is_refused(scores, labels, message: str) -> None:
    with pytest.raises(ContractError, match=message):
        metrics.auc(scores, labels)
