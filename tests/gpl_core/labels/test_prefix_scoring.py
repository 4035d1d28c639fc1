"""The probability of a candidate's SID by the cached nodes, against a loop over the catalog's leaves."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gpl_core.labels import prefix_scoring
from gpl_core.labels.prefix_scoring import PrefixKeys, prefix_log_prob, rounded
from gpl_core.sids.trie import Trie

USERS = 2


@given(st.integers(0, 2**31), st.integers(1, 4), st.integers(1, 5), st.integers(0, 8), st.booleans())
def test_every_sid_has_its_part_of_its_longest_cached_prefix(
    seed: int, levels: int, codes: int, kept: int, dense: bool
) -> None:
    """Of true probabilities, each leaf gets the mean of the leaves that share its longest cached node; the sum is 1."""
    rng = np.random.default_rng(seed)
    trie = Trie.build(rng.integers(0, codes, (rng.integers(1, 25), levels)), codes)
    sids, every = trie.sids(), trie.prefixes()
    p = rng.dirichlet(np.full(trie.size, 0.3), USERS)
    anchors = min(3, trie.size)
    leaves = np.stack([rng.permutation(trie.size)[:anchors] for _ in range(USERS)])
    cached = [_prefixes(trie, row, every[rng.permutation(len(every))[:kept]], 8) for row in p]
    prefixes, prefix_log_probs = (np.stack(of) for of in zip(*cached, strict=True))
    candidates = np.stack([rng.permutation(trie.size) for _ in range(USERS)])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prefix_scoring, "_MOST_CELLS", 2**27 if dense else 0)
        keys = PrefixKeys(trie)
    found = prefix_log_prob(
        torch.tensor(sids[leaves]), torch.ones(USERS, anchors, dtype=torch.bool),
        torch.tensor(np.log(np.take_along_axis(p, leaves, axis=1))), torch.tensor(prefixes),
        torch.tensor(prefix_log_probs), torch.tensor(sids[candidates]), keys,
    )  # fmt: skip
    for u in range(USERS):
        cached = [tuple(c for c in row if c >= 0) for row in prefixes[u].tolist()] + [tuple(s) for s in sids[leaves[u]]]
        longest = [max((x for x in [(), *cached] if x == tuple(sid[: len(x)])), key=len) for sid in sids]
        for place, leaf in enumerate(candidates[u]):
            same = [n for n in range(trie.size) if longest[n] == longest[leaf]]
            assert math.exp(found[u, place]) == pytest.approx(p[u, same].mean(), abs=2e-6)
        assert found[u].double().exp().sum().item() == pytest.approx(1, abs=1e-5)


@given(st.integers(0, 2**31), st.integers(0, 5))
def test_it_sums_to_one_when_the_catalog_has_changed_since(seed: int, gone: int) -> None:
    """Anchors without an item, prefixes that the catalog no longer has, and masses that cannot all be true."""
    rng = np.random.default_rng(seed)
    trie = Trie.build(rng.integers(0, 3, (9, 3)), 3)
    sids, every = trie.sids(), np.concatenate([trie.prefixes(), [[4, -1, -1], [0, 3, -1]]])
    prefixes = every[rng.permutation(len(every))[:5]][None]
    anchors = sids[rng.permutation(trie.size)[:2]][None]
    found = prefix_log_prob(
        torch.tensor(anchors), torch.tensor([[gone % 2 == 0, gone < 3]]), torch.tensor(np.log(rng.random((1, 2)))),
        torch.tensor(prefixes), torch.tensor(np.log(rng.random((1, 5)))),
        torch.tensor(np.concatenate([sids, [[-1, -1, -1]]]))[None], PrefixKeys(trie),
    )  # fmt: skip
    assert torch.isfinite(found).all()
    assert found[0, :-1].double().exp().sum().item() == pytest.approx(1, abs=1e-5)
    assert found[0, -1].item() == pytest.approx(-math.log(trie.size))  # without a SID: as if nothing were known


@given(st.integers(0, 2**31), st.integers(1, 4), st.integers(2, 6), st.integers(0, 12), st.floats(0.003, 3.0))
def test_rounding_prefixes_changes_no_sid_by_much_and_no_order(
    seed: int, levels: int, codes: int, kept: int, spread: float
) -> None:
    """Of very uneven probabilities too, where a node's cached children leave next to nothing of it."""
    rng = np.random.default_rng(seed)
    trie = Trie.build(rng.integers(0, codes, (rng.integers(2, 40), levels)), codes)
    sids, every = trie.sids(), trie.prefixes()
    p = rng.dirichlet(np.full(trie.size, spread)) + 1e-4
    p /= p.sum()
    anchors = rng.permutation(trie.size)[: trie.size // 3]
    chosen = every[rng.permutation(len(every))[:kept]]
    prefixes, exact = (of[None] for of in _prefixes(trie, p, chosen, 12))
    cached = (sids[anchors][None], np.log(p[anchors])[None], prefixes)
    stored = rounded(*cached, exact, PrefixKeys(trie))
    assert stored.dtype == np.float32
    assert (stored[0, len(chosen) :] == -100).all()
    before, after = (_of_all_sids(trie, *cached, found) for found in (exact, stored.astype(np.float64)))
    assert np.abs(after - before).max() <= 2.0**-11 * (len(chosen) + 1) + 1e-4
    apart = before[:, None] - before > 1e-3  # nearer ones are apart by less than a float32 says
    assert (after[:, None] - after)[apart].min(initial=1.0) > 0


def test_only_differences_need_fine_digits() -> None:
    """Two SIDs below (0, 0) have all but a millionth of it: (1,) and (2,) need fewer digits."""
    trie = Trie.build(np.array([[0, 0, 0], [0, 0, 1], [0, 0, 2], [0, 1, 0], [1, 0, 0], [2, 0, 0], [3, 0, 0]]), 4)
    prefixes = np.array([[[0, 0, -1], [1, -1, -1], [2, -1, -1], [-1, -1, -1]]])
    exact = np.log(np.array([[0.1, 0.0123, 0.0321, np.exp(-100)]]))
    anchors = np.array([[[0, 0, 0], [0, 0, 1]]])
    stored = rounded(anchors, np.log(np.array([[0.06, 0.04 - 1e-7]])), prefixes, exact, PrefixKeys(trie))
    assert (stored[0, 1:3] * 2**10 % 1 == 0).all()
    assert stored[0, 1:3] == pytest.approx(exact[0, 1:3], abs=2.0**-11)
    assert stored[0, 0] == pytest.approx(exact[0, 0], abs=2.0**-21)
    assert stored[0, 3] == -100


def _prefixes(trie: Trie, p: np.ndarray, chosen: np.ndarray, columns: int) -> tuple[np.ndarray, np.ndarray]:
    """The ``chosen`` prefixes [n x L] and their log-probabilities as the cache has them, in ``columns`` places.

    ``p`` [SIDs]: the probability of each SID.
    """
    prefixes, log_probs = np.full((columns, trie.levels), -1), np.full(columns, -100.0)
    prefixes[: len(chosen)] = chosen
    log_probs[: len(chosen)] = [np.log(p[_below(trie.sids(), prefix)].sum()) for prefix in chosen]
    return prefixes, log_probs


def _of_all_sids(
    trie: Trie, anchors: np.ndarray, log_prob: np.ndarray, prefixes: np.ndarray, found: np.ndarray
) -> np.ndarray:
    """`prefix_log_prob` of every SID of the catalog, for the one user of a block, [SIDs]."""
    mask = torch.ones(anchors.shape[:2], dtype=torch.bool)
    inputs = (torch.tensor(of) for of in (log_prob, prefixes, found, trie.sids()[None]))
    return prefix_log_prob(torch.tensor(anchors), mask, *inputs, PrefixKeys(trie))[0].double().numpy()


def _below(sids: np.ndarray, prefix: np.ndarray) -> np.ndarray:
    known = prefix[prefix >= 0]
    return (sids[:, : len(known)] == known).all(axis=1)
