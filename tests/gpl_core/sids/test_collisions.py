"""Collision repair against exhaustive search, and the promises it keeps."""

import itertools

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from gpl_core.sids.collisions import duplicates, published_twins, repair
from gpl_core.sids.health import collision_share


def brute_force(distance, own, free):
    """(moves, growth) of the best assignment of distinct free codes, by trying all."""
    best = None
    for codes in itertools.permutations(np.flatnonzero(free), len(own)):
        moves = sum(a != b for a, b in zip(codes, own, strict=True))
        growth = sum(distance[n, c] - distance[n, own[n]] for n, c in enumerate(codes))
        if best is None or (moves, growth) < best:
            best = (moves, growth)
    return best


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 2**31), st.integers(1, 4), st.integers(0, 2))
def test_one_crowded_prefix_is_repaired_at_the_least_cost(seed, contents, published):
    rng = np.random.default_rng(seed)
    codebook = rng.normal(size=(6, 3))
    residual = rng.normal(size=(contents, 3)) * 0.3  # near the origin: many want the same code
    distance = np.square(residual[:, None] - codebook[None]).sum(-1)
    own = distance.argmin(axis=1)
    codes = np.stack([np.full(contents, 2), own], axis=1)
    taken = np.stack([np.full(published, 2), rng.permutation(6)[:published]], axis=1)
    result = repair(codes, residual, codebook, taken=taken)
    last = result.codes[:, 1]
    free = ~np.isin(np.arange(6), taken[:, 1])
    assert len(set(last.tolist())) == contents
    assert free[last].all()
    moves, growth = brute_force(distance, own, free)
    assert result.moved == moves == (last != own).sum()
    assert np.isclose((distance[np.arange(contents), last] - distance[np.arange(contents), own]).sum(), growth)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**31), st.sampled_from([0, 512]))
def test_repair_leaves_no_collision_and_stays_in_the_prefix(seed, exact_limit):
    rng = np.random.default_rng(seed)
    codebook = rng.normal(size=(32, 2))  # room for all in one prefix
    codes = rng.integers(0, 3, size=(20, 3))  # nine prefixes with a little over two items each
    taken = np.unique(rng.integers(0, 3, size=(4, 3)), axis=0)
    result = repair(codes, rng.normal(size=(20, 2)), codebook, taken=taken, exact_limit=exact_limit)
    np.testing.assert_array_equal(result.codes[:, :-1], codes[:, :-1])
    sids = {tuple(r) for r in result.codes.tolist()}
    assert len(sids) == 20
    assert not sids & {tuple(r) for r in taken.tolist()}
    assert result.shared == 0
    # The fewest moves: a SID that k items want, and nobody has, keeps one of them.
    wanted, counts = np.unique(codes, axis=0, return_counts=True)
    free = [tuple(w) not in {tuple(r) for r in taken.tolist()} for w in wanted.tolist()]
    assert result.moved == (counts - free).sum()


def test_a_lone_item_and_an_item_beside_others_are_left_alone():
    codes = np.array([[0, 0], [0, 1], [1, 1]])
    result = repair(codes, np.zeros((3, 2)), np.zeros((2, 2)))
    np.testing.assert_array_equal(result.codes, codes)
    assert result.moved == 0


def test_the_mover_takes_the_nearest_free_code():
    codebook = np.array([[0.0], [1.0], [2.0], [9.0]])
    # Both want code 0; code 1 is published. Moving the second costs 2.4, moving the first 4.
    result = repair(np.array([[5, 0], [5, 0]]), np.array([[0.0], [0.4]]), codebook, taken=np.array([[5, 1]]))
    assert result.codes.tolist() == [[5, 0], [5, 2]]


def test_duplicates_share_one_sid_and_are_not_scattered():
    rng = np.random.default_rng(1)
    embeddings = rng.normal(size=(3, 4)).astype(np.float32)
    embeddings /= np.linalg.norm(embeddings, axis=1, keepdims=True)
    items = embeddings[[0, 1, 0, 2, 1, 0]]
    items[2] += 1e-6  # the noise of another batch
    codes = np.zeros((6, 2), dtype=np.int64)
    first = duplicates(codes, items)
    assert first.tolist() == [0, 1, 0, 3, 1, 0]
    result = repair(codes, items, rng.normal(size=(4, 4)), first=first)
    assert result.codes[0].tolist() == result.codes[2].tolist() == result.codes[5].tolist()
    assert result.codes[1].tolist() == result.codes[4].tolist()
    assert len({tuple(r) for r in result.codes.tolist()}) == 3
    assert collision_share(result.codes, first) == 0
    assert collision_share(codes, first) == 1


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 2**31), st.integers(1, 25))
def test_duplicates_equal_a_loop_over_all_pairs(seed, count):
    rng = np.random.default_rng(seed)
    kinds = rng.normal(size=(5, 3)).astype(np.float32)
    content = rng.integers(5, size=count)
    codes = (kinds[:, :1] > 0).astype(int)[content] + np.array([[0, 1]])  # one content, one SID; some SIDs hold several
    expected = [min(j for j in range(count) if content[j] == content[i]) for i in range(count)]
    assert duplicates(codes, kinds[content]).tolist() == expected


def test_a_newcomer_finds_its_published_twin_even_when_that_one_was_moved():
    new = np.array([[1.0, 0.0], [0.0, 1.0]], dtype=np.float32)
    old = np.array([[0.0, 1.0], [1.0, 0.0]], dtype=np.float32)
    twins = published_twins(np.array([[3, 0], [4, 0]]), new, np.array([[3, 9], [3, 7]]), old)
    assert twins.tolist() == [1, -1]  # the second has a published twin's embedding, but another prefix


def test_more_contents_than_codes_share_and_say_so():
    for exact_limit in (0, 512):
        result = repair(
            np.zeros((5, 2), int), np.arange(5.0)[:, None], np.arange(3.0)[:, None], exact_limit=exact_limit
        )
        assert set(result.codes[:, 1].tolist()) == {0, 1, 2}
        assert result.shared == 3  # three contents sit on one code


def test_greedy_and_exact_repair_agree_where_there_is_no_choice():
    rng = np.random.default_rng(3)
    codes, residual, codebook = rng.integers(0, 4, size=(60, 3)), rng.normal(size=(60, 2)), rng.normal(size=(16, 2))
    exact, greedy = (repair(codes, residual, codebook, exact_limit=limit) for limit in (512, 0))
    assert exact.moved == greedy.moved

    def growth(r):
        near = lambda c: np.square(residual - codebook[c[:, -1]]).sum()  # noqa: E731
        return near(r.codes) - near(codes)

    assert growth(exact) <= growth(greedy) + 1e-9


def test_nothing_to_repair():
    assert repair(np.empty((0, 3), int), np.empty((0, 2)), np.zeros((4, 2))).codes.shape == (0, 3)
