"""Groups of bounded size."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from gpl_core.grouping import grouped, runs


@given(sizes=st.lists(st.integers(0, 9), max_size=12), most=st.integers(1, 12))
def test_groups_keep_every_item_in_order_and_exceed_the_bound_only_alone(sizes, most):
    groups = list(grouped(enumerate(sizes), lambda item: item[1], most))
    assert [item for group in groups for item in group] == list(enumerate(sizes))
    totals = [sum(size for _, size in group) for group in groups]
    assert all(total <= most or len(group) == 1 for total, group in zip(totals, groups, strict=True))
    assert all(total + after[0][1] > most for total, (_, after) in zip(totals, pairwise(groups), strict=False))
    of_array = [list(enumerate(sizes))[run] for run in runs(np.array(sizes, dtype=np.int64), most)]
    assert of_array == groups
