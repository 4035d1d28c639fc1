"""score_block against a plain double-precision loop, and its edge cases."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gpl_core.errors import ContractError
from gpl_core.labels import pair_scoring
from gpl_core.labels.pair_scoring import PairBlock, PairScores, first_occurrence, score_block

LEVELS = 3


def _unit(rng: np.random.Generator, *shape: int) -> np.ndarray:
    vectors = rng.normal(size=shape)
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


def _loop(anchors, mask, log_prob, history, candidates, vectors) -> dict[tuple, float]:
    """The formulas of the module's docstring, one pair at a time in float64."""
    out: dict[tuple, float] = {}
    for u in range(len(anchors)):
        kept = [k for k in range(anchors.shape[1]) if mask[u, k]]
        past = [vectors[j] for j in history[u] if j >= 0]
        if not kept:
            continue
        p = [math.exp(log_prob[u, k]) for k in kept]
        w = [value / sum(p) for value in p]
        out["coherence", u] = float(np.linalg.norm(sum(w[n] * anchors[u, k] for n, k in enumerate(kept))))
        out["consistency", u] = sum(
            w[n] * max([max(0.0, float(anchors[u, k] @ e)) for e in past], default=0.0) for n, k in enumerate(kept)
        )
        for b, i in enumerate(candidates[u]):
            if i < 0:
                continue
            cosines = [float(vectors[i] @ anchors[u, k]) for k in kept]
            best = kept[int(np.argmax(cosines))]
            out["similarity", u, b] = max(cosines)
            out["anchor_rank", u, b] = best
            out["history_similarity", u, b] = max([float(vectors[i] @ e) for e in past], default=0.0)
            out["llm_confidence", u, b] = math.exp(log_prob[u, best]) ** (1 / LEVELS)
    return out


def _score(anchors, mask, log_prob, history, candidates, vectors) -> PairScores:
    anchors, log_prob, vectors = (torch.tensor(x, dtype=torch.float32) for x in (anchors, log_prob, vectors))
    block = PairBlock(anchors, torch.tensor(mask), log_prob, torch.tensor(history), torch.tensor(candidates))
    return score_block(block, vectors, LEVELS)


def _case(seed: int, users: int, k: int, h: int, b: int, items: int = 7, width: int = 5) -> tuple:
    rng = np.random.default_rng(seed)
    vectors = _unit(rng, items, width)
    vectors[0] = np.nan  # read for -1, and never seen
    mask = rng.random((users, k)) < 0.7
    anchors = _unit(rng, users, k, width)
    return (
        anchors,
        mask,
        rng.uniform(-9, 0, (users, k)),
        np.where(rng.random((users, h)) < 0.3, -1, rng.integers(1, items, (users, h))),
        np.where(rng.random((users, b)) < 0.3, -1, rng.integers(1, items, (users, b))),
        vectors,
    )


@settings(max_examples=80, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 4), st.integers(1, 4), st.integers(0, 4), st.integers(1, 5))
def test_equals_the_double_precision_loop(seed: int, users: int, k: int, h: int, b: int) -> None:
    case = _case(seed, users, k, h, b)
    found, expected = _score(*case), _loop(*case)
    pairs = {key[1:] for key in expected if key[0] == "similarity"}
    assert {tuple(at) for at in found.valid.nonzero().tolist()} == pairs
    for (name, *at), value in expected.items():
        assert getattr(found, name)[tuple(at)].item() == pytest.approx(value, abs=2e-6), (name, at)
    for name in ("similarity", "history_similarity", "llm_confidence"):
        values = getattr(found, name)
        assert torch.isfinite(values).all()
        assert (values[~found.valid] == 0).all()
        assert values.abs().max() <= 1
    for factor in (found.coherence, found.consistency):
        assert torch.isfinite(factor).all()
        assert ((factor >= 0) & (factor <= 1)).all()


def test_one_anchor_is_fully_coherent_and_padding_changes_nothing() -> None:
    anchors, _, log_prob, history, candidates, vectors = _case(3, 2, 1, 3, 4)
    vectors = _unit(np.random.default_rng(4), *vectors.shape)
    alone = _score(anchors, np.ones((2, 1), bool), log_prob, history, candidates, vectors)
    assert alone.coherence.tolist() == pytest.approx([1.0, 1.0], abs=1e-6)
    assert alone.anchor_rank.max() == 0
    padded = _score(
        np.concatenate([anchors, np.full((2, 3, 5), np.nan)], axis=1),
        np.array([[True, False, False, False]] * 2),
        np.concatenate([log_prob, np.full((2, 3), -100.0)], axis=1),
        np.concatenate([history, np.full((2, 2), -1)], axis=1),
        np.concatenate([candidates, np.full((2, 1), -1)], axis=1),
        vectors,
    )
    for name in ("similarity", "history_similarity", "llm_confidence", "anchor_rank"):
        torch.testing.assert_close(getattr(padded, name)[:, :-1], getattr(alone, name), atol=1e-6, rtol=0)
    assert padded.coherence.tolist() == pytest.approx(alone.coherence.tolist(), abs=1e-6)
    assert padded.consistency.tolist() == pytest.approx(alone.consistency.tolist(), abs=1e-6)
    assert not padded.valid[:, -1].any()


def test_duplicate_anchors_keep_the_likelier_rank() -> None:
    anchor = _unit(np.random.default_rng(0), 1, 1, 8)
    vectors = _unit(np.random.default_rng(1), 4, 8)
    found = _score(
        np.repeat(anchor, 2, axis=1),
        np.ones((1, 2), bool),
        np.log([[0.6, 0.3]]),
        np.array([[0]]),
        np.array([[1, 2, 3]]),
        vectors,
    )
    assert found.anchor_rank.tolist() == [[0, 0, 0]]
    assert found.coherence.item() == pytest.approx(1.0, abs=1e-6)
    assert found.llm_confidence[0].tolist() == pytest.approx([0.6 ** (1 / 3)] * 3, abs=1e-6)


def test_opposed_anchors_of_equal_probability_have_no_coherence() -> None:
    anchor = _unit(np.random.default_rng(0), 1, 1, 8)
    found = _score(
        np.concatenate([anchor, -anchor], axis=1),
        np.ones((1, 2), bool),
        np.log([[0.4, 0.4]]),
        np.array([[-1]]),
        np.array([[0]]),
        anchor[0],
    )
    assert found.coherence.item() == pytest.approx(0.0, abs=1e-6)
    assert found.consistency.item() == 0.0
    assert found.similarity.item() == pytest.approx(1.0, abs=1e-6)
    assert found.history_similarity.item() == 0.0


def test_a_user_without_anchors_has_no_valid_pair() -> None:
    case = list(_case(1, 2, 2, 2, 3))
    case[1] = np.array([[False, False], [True, True]])
    found = _score(*case)
    assert not found.valid[0].any()
    assert found.coherence[0] == 0
    assert torch.isfinite(found.consistency).all()


def test_half_precision_vectors_stay_within_their_rounding() -> None:
    case = list(_case(9, 3, 3, 3, 5, items=50, width=64))
    case[5] = np.nan_to_num(case[5])
    exact = _score(*case)
    arguments = [torch.tensor(value) for value in case]
    arguments[0], vectors = arguments[0].float(), arguments.pop().to(torch.bfloat16)
    found = score_block(PairBlock(*arguments), vectors, LEVELS)
    assert (found.similarity - exact.similarity).abs().max() < 2**-8
    assert found.similarity.dtype == torch.float32


def test_users_scored_in_parts_get_the_same_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    case = _case(2, 7, 3, 2, 4)
    whole = _score(*case)
    monkeypatch.setattr(pair_scoring, "_CPU_GATHER_BYTES", 2 * 4 * 5 * 4)  # two users at a time
    for name, part in zip(PairScores._fields, _score(*case), strict=True):
        torch.testing.assert_close(part, getattr(whole, name), msg=name)


def test_first_occurrence_of_each_candidate() -> None:
    rows = torch.tensor([[4, -1, 4, 2, 2, 4], [0, 1, 2, -1, -1, 3]])
    assert first_occurrence(rows).tolist() == [
        [True, False, False, True, False, False],
        [True, True, True, False, False, True],
    ]


def test_an_item_without_a_row_is_named() -> None:
    case = list(_case(1, 1, 2, 2, 1))
    case[4] = np.array([[99]])
    with pytest.raises(ContractError, match="item_index 99"):
        _score(*case)
