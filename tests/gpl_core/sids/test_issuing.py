"""Issuing beside published SIDs: who keeps, who shares, who moves; and the drift report."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpl_core.sids.issuing import drift, issue
from gpl_core.sids.tokenizer import TokenizedItems


def unit(rng: np.random.Generator, count: int) -> np.ndarray:
    x = rng.normal(size=(count, 6)).astype(np.float32)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def encoded(rng: np.random.Generator, codes: np.ndarray) -> TokenizedItems:
    return TokenizedItems(codes.astype(np.int32), np.ones(len(codes), np.float32), rng.normal(size=(len(codes), 3)))


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 2**31), st.integers(0, 12), st.integers(0, 12))
def test_contents_and_sids_are_one_to_one_after_every_day(seed, yesterday, today):
    """Contents repeat within a day and across days; 16 last codes leave room for all in each of two prefixes."""
    rng = np.random.default_rng(seed)
    contents, book = unit(rng, 8), rng.normal(size=(16, 3))
    code_of = np.stack([rng.integers(0, 2, size=8), rng.integers(0, 3, size=8)], axis=1)  # a content's own code
    published, known = np.empty((0, 2), np.int32), np.empty(0, np.int64)
    for count in (yesterday, today):
        new = rng.integers(8, size=count)
        noise = 1e-6 * rng.normal(size=(count, 6)).astype(np.float32)  # of another batch
        found = issue(encoded(rng, code_of[new]), contents[new] + noise, book, published, contents[known])
        np.testing.assert_array_equal(found.sids[:, 0], code_of[new][:, 0])  # meaning down to the last level
        assert found.shared == 0
        published, known = np.concatenate([published, found.sids]), np.concatenate([known, new])
        sids = [tuple(r) for r in published.tolist()]
        by_content = {c: {s for s, k in zip(sids, known, strict=True) if k == c} for c in set(known.tolist())}
        assert all(len(s) == 1 for s in by_content.values())
        assert len({next(iter(s)) for s in by_content.values()}) == len(by_content)
        assert found.bucket_size.tolist() == [sids.count(s) for s in sids[len(sids) - count :]]


def test_a_full_prefix_shares_and_counts_it():
    rng = np.random.default_rng(0)
    contents = unit(rng, 5)
    codes = np.array([[0, 0], [0, 1], [0, 0]])
    found = issue(encoded(rng, codes), contents[:3], rng.normal(size=(2, 3)), np.array([[0, 0]]), contents[4:])
    assert (found.moved, found.shared) == (0, 2)  # the second content has the last free code to itself
    assert found.bucket_size.tolist() == [3, 1, 3]


def test_drift_is_told_by_residuals_and_codes():
    rng = np.random.default_rng(0)
    published = rng.integers(0, 16, size=(500, 3))
    norms = rng.uniform(0.9, 1.1, size=500)
    alike = drift(rng.integers(0, 16, size=(100, 3)), rng.uniform(0.9, 1.1, size=100), published, norms, 16)
    assert alike.residual_ratio == pytest.approx(1, abs=0.03)
    assert alike.perplexity_ratio > 0.8
    assert alike.message(1.25, 1.6) == ""
    narrow = drift(np.zeros((100, 3), int), np.ones(100), published, norms, 16)
    assert "drifts away" in narrow.message(1.25, 1.6)
    for ratio, said in ((1.3, "the catalog drifts away"), (2.0, "train a new tokenizer version")):
        far = drift(rng.integers(0, 16, size=(100, 3)), np.full(100, ratio), published, norms, 16)
        assert said in far.message(1.25, 1.6)
        assert "100 new items leave" in far.message(1.25, 1.6)
        assert far.message(3.0, 4.0) == ""
    few = drift(np.zeros((29, 3), int), np.full(29, 5.0), published, norms, 16)
    assert few.message(1.25, 1.6) == ""  # a handful of items says nothing
    assert drift(published, norms, published[:0], norms[:0], 16) is None
    assert drift(published[:0], norms[:0], published, norms, 16) is None
