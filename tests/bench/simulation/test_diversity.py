"""Figures about the top of the lists, against plain loops and known extremes."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpl_core.errors import ContractError
from tests.bench.simulation import diversity

ITEMS = 6
ROWS = st.lists(
    st.tuples(st.sampled_from("abc"), st.integers(0, ITEMS - 1), st.sampled_from([0.0, 1.0, 2.0])),
    min_size=1,
    unique_by=lambda row: row[:2],
)


def _lists(rows, k: int) -> list[list[int]]:
    return [
        [item for _, item, _ in sorted((r for r in rows if r[0] == name), key=lambda r: (-r[2], r[1]))[:k]]
        for name in sorted({row[0] for row in rows})
    ]


@given(ROWS, st.integers(1, 4), st.randoms(use_true_random=False))
def test_figures_equal_plain_loops_in_any_row_order(rows, k: int, random) -> None:
    lists = _lists(rows, k)
    random.shuffle(rows)
    top = diversity.top_of_lists([r[2] for r in rows], [r[1] for r in rows], [r[0] for r in rows], k)
    found = [sorted(top.item[top.group == n].tolist()) for n in range(top.lists)]
    assert found == [sorted(items) for items in lists]
    shown = [item for items in lists for item in items]
    assert diversity.coverage(top, ITEMS) == pytest.approx(len(set(shown)) / ITEMS)
    counts = [shown.count(item) for item in range(ITEMS)]
    mean_difference = sum(abs(a - b) for a in counts for b in counts) / ITEMS**2
    assert diversity.gini(top, ITEMS) == pytest.approx(mean_difference / (2 * np.mean(counts)))
    tail = np.arange(ITEMS) >= 4
    assert diversity.share_of(top, tail) == pytest.approx(np.mean([item >= 4 for item in shown]))
    vectors = np.random.default_rng(0).normal(size=(ITEMS, 3))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    distances = [
        np.mean([1 - vectors[a] @ vectors[b] for a, b in itertools.combinations(items, 2)])
        for items in lists
        if len(items) > 1
    ]
    assert diversity.intra_list_diversity(top, vectors) == pytest.approx(np.mean(distances) if distances else 0.0)


def test_the_extremes_of_concentration() -> None:
    even = diversity.top_of_lists(np.zeros(ITEMS), np.arange(ITEMS), np.arange(ITEMS), 1)
    assert (diversity.gini(even, ITEMS), diversity.coverage(even, ITEMS)) == (pytest.approx(0.0), 1.0)
    one = diversity.top_of_lists(np.zeros(9), np.full(9, 2), np.arange(9), 1)
    assert diversity.gini(one, ITEMS) == pytest.approx((ITEMS - 1) / ITEMS)


def test_lengths_and_k_are_checked() -> None:
    with pytest.raises(ContractError, match="k 0"):
        diversity.top_of_lists([1.0], [1], [1], 0)
    with pytest.raises(ContractError, match="lengths 2, 1, 1"):
        diversity.top_of_lists([1.0, 2.0], [1], [1])
