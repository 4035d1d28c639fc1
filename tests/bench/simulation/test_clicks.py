"""Ranks within a user, as the study makes them."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from tests.bench.simulation.clicks import ranks_within


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 4)), min_size=1, max_size=30))
def test_ranks_within_a_user_equal_a_loop_over_the_users_other_pairs(pairs: list[tuple[int, int]]) -> None:
    user, score = (np.array(values) for values in zip(*pairs, strict=True))
    found = ranks_within(user, score.astype(float))
    for n, rank in enumerate(found):
        others = [s for m, (u, s) in enumerate(pairs) if u == user[n] and m != n]
        below, ties = sum(s < score[n] for s in others), sum(s == score[n] for s in others)
        np.testing.assert_allclose(rank, (below + ties / 2 + 0.5) / (len(others) + 1))
