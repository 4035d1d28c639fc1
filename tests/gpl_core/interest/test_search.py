"""The shared-prefix search finds the beams of textbook beam search, and only SIDs of the catalog."""

from __future__ import annotations

import logging
from copy import deepcopy
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import LogitsProcessorList

from gpl_core.errors import ContractError, GplError, UsageError
from gpl_core.interest.attention import ATTENTION
from gpl_core.interest.interest_model import InterestModel
from gpl_core.interest.packing import UserHistory, pack_targets
from gpl_core.interest.search import PAD_LOG_PROB, Anchors, BeamSearch, SearchSettings
from gpl_core.interest.training import target_log_probs
from gpl_core.interest.trie_scoring import DeviceTrie
from gpl_core.sids.trie import Trie
from tests.gpl_core.interest.conftest import World, each_family, make_world
from tests.gpl_core.interest.oracle import next_code_log_probs, textbook_beams

slow_but_few = settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def search(world: World, beams: int, **options: object) -> Anchors:
    return BeamSearch(world.model, world.trie, SearchSettings(beams, max_events=20, **options)).search(world.histories)


def as_beams(anchors: Anchors, user: int) -> list[tuple[tuple[int, ...], float]]:
    real = anchors.sids[user, :, 0] >= 0
    return [
        (tuple(map(int, s)), float(p))
        for s, p in zip(anchors.sids[user][real], anchors.log_prob[user][real], strict=True)
    ]


def assert_same_beams(found: list, expected: list, tolerance: float = 1e-9) -> None:
    assert [sid for sid, _ in found] == [sid for sid, _ in expected]
    np.testing.assert_allclose([p for _, p in found], [p for _, p in expected], atol=tolerance)


@each_family
@slow_but_few
@given(seed=st.integers(0, 10_000), items=st.integers(1, 40), beams=st.integers(1, 6))
def test_equals_textbook_beam_search(model: InterestModel, seed: int, items: int, beams: int) -> None:
    world = make_world(model, np.random.default_rng(seed), items, users=2)
    anchors = search(world, beams)
    for user, history in enumerate(world.histories):
        expected = textbook_beams(model, world.trie.trie.sids(), history, (beams,) * 3)
        assert_same_beams(as_beams(anchors, user), expected)


@slow_but_few
@given(seed=st.integers(0, 10_000), items=st.integers(1, 40), beams=st.integers(1, 4), most=st.integers(1, 20))
def test_kept_prefixes_are_the_likeliest_that_were_scored(
    model: InterestModel, seed: int, items: int, beams: int, most: int
) -> None:
    world = make_world(model, np.random.default_rng(seed), items, users=2)
    anchors, sids = search(world, beams, prefixes=most), world.trie.trie.sids()
    for user, history in enumerate(world.histories):
        first = next_code_log_probs(model, sids, history, ())
        scored = {(c,): p for c, p in first.items()}
        for (c,), p in textbook_beams(model, sids, history, (beams,)):
            scored |= {(c, d): p + q for d, q in next_code_log_probs(model, sids, history, (c,)).items()}
        best = sorted(scored, key=lambda x: -scored[x])[:most]
        expected = [(x, scored[x]) for x in sorted(best, key=lambda x: (len(x), x))]
        real = anchors.prefixes[user, :, 0] >= 0
        found = [tuple(c for c in row if c >= 0) for row in anchors.prefixes[user][real].tolist()]
        assert_same_beams(list(zip(found, anchors.prefix_log_probs[user][real], strict=True)), expected)
        assert (anchors.prefix_log_probs[user][~real] == PAD_LOG_PROB).all()
    plain = search(world, beams)
    np.testing.assert_array_equal(anchors.sids, plain.sids)
    assert plain.prefixes.shape == (2, 0, 3)


@each_family
def test_as_many_beams_as_sids_is_brute_force_and_probabilities_sum_to_one(world: World) -> None:
    """K = all: every SID of the catalog comes back with its teacher-forced probability."""
    anchors = search(world, world.trie.size)
    every = world.trie.trie.sids()
    for user, history in enumerate(world.histories):
        found = as_beams(anchors, user)
        assert {sid for sid, _ in found} == {tuple(map(int, s)) for s in every}
        np.testing.assert_allclose(np.exp([p for _, p in found]).sum(), 1.0, atol=1e-9)
        pack = pack_targets(world.model.vocabulary, [one_target(history, sid) for sid, _ in found], max_events=20)
        with torch.no_grad():
            forced = target_log_probs(world.model, world.trie, pack).log_prob.sum(1)
        np.testing.assert_allclose([p for _, p in found], forced, atol=1e-9)


def test_teacher_forced_log_probs_agree_in_float32(world: World) -> None:
    model = world.model.float()
    try:
        anchors = search(world, 10)
        histories = [one_target(h, s) for h, sids in zip(world.histories, anchors.sids, strict=True) for s in sids]
        with torch.no_grad():
            pack = pack_targets(model.vocabulary, histories, max_events=20)
            forced = target_log_probs(model, world.trie, pack).log_prob.sum(1)
        np.testing.assert_allclose(anchors.log_prob.ravel(), forced, atol=1e-5)
    finally:
        world.model.double()


@pytest.mark.parametrize("prefixes", [0, 9])
def test_a_model_in_bf16_is_searched_too(world: World, prefixes: int) -> None:
    exact = search(world, 60, prefixes=prefixes)
    found = search(replace(world, model=deepcopy(world.model).bfloat16()), 60, prefixes=prefixes)
    assert {found.log_prob.dtype, found.prefix_log_probs.dtype} == {np.dtype(np.float32)}
    for close, true in zip(np.exp(found.log_prob).sum(1), np.exp(exact.log_prob).sum(1), strict=True):
        np.testing.assert_allclose(close, true, atol=1e-5)


def one_target(history: np.ndarray, sid: object) -> UserHistory:
    return UserHistory(np.concatenate([history, np.array([sid])]), np.arange(len(history) + 1) == len(history))


@each_family
def test_equals_hugging_face_generate_with_the_trie_constraint(world: World) -> None:
    """The library's own beam search, constrained to the trie and renormalized over what the constraint allows."""
    model, vocabulary = world.model, world.model.vocabulary
    scale = model.scale.detach().clone()
    model.scale.data.fill_(1.0)  # the library knows none
    sids = {tuple(map(int, s)) for s in world.trie.trie.sids()}
    anchors = search(world, 6)
    plain = model.body.get_base_model()
    plain.set_attn_implementation("sdpa")
    try:
        for user, history in enumerate(world.histories):
            prompt = vocabulary.ids(history).ravel().tolist()

            def allowed(_: int, ids: torch.Tensor, start: int = len(prompt)) -> list[int]:
                prefix = tuple(int(i) - vocabulary.first_id - n * vocabulary.codes for n, i in enumerate(ids[start:]))
                level = len(prefix)
                codes = sorted({s[level] for s in sids if s[:level] == prefix})
                return [vocabulary.first_id + level * vocabulary.codes + c for c in codes]

            def scaled(ids: torch.Tensor, scores: torch.Tensor, start: int = len(prompt)) -> torch.Tensor:
                return scores * model.scale[ids.shape[1] - start].detach()

            out = plain.generate(
                torch.tensor([prompt]),
                attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
                num_beams=6, num_return_sequences=6, max_new_tokens=3, length_penalty=0.0, do_sample=False,
                renormalize_logits=True, logits_processor=LogitsProcessorList([scaled]),
                prefix_allowed_tokens_fn=allowed, pad_token_id=0,
                eos_token_id=None, return_dict_in_generate=True, output_scores=True,
            )  # fmt: skip
            tokens = out.sequences[:, len(prompt) :].numpy() - vocabulary.first_id - np.arange(3) * vocabulary.codes
            np.testing.assert_array_equal(tokens, anchors.sids[user])
            np.testing.assert_allclose(out.sequences_scores, anchors.log_prob[user], atol=1e-5)  # theirs: float32
    finally:
        plain.set_attn_implementation(ATTENTION)
        model.scale.data.copy_(scale)


@slow_but_few
@given(seed=st.integers(0, 10_000), items=st.integers(1, 60), beams=st.integers(1, 90))
def test_anchors_are_valid_unique_and_sorted(model: InterestModel, seed: int, items: int, beams: int) -> None:
    world = make_world(model, np.random.default_rng(seed), items, users=3)
    anchors = search(world, beams)
    for user in range(3):
        found = as_beams(anchors, user)
        # Beam search keeps `beams` prefixes per level, and each leads to a SID: nothing valid is lost but by width.
        assert len(found) == min(beams, world.trie.size)
        assert len({sid for sid, _ in found}) == len(found)
        assert (world.trie.trie.leaf_of(np.array([sid for sid, _ in found])) >= 0).all()
        assert all(a >= b for (_, a), (_, b) in pairwise(found))
    assert (anchors.sids[:, world.trie.size :] == -1).all()
    assert (anchors.log_prob[:, world.trie.size :] == PAD_LOG_PROB).all()
    assert np.isfinite(anchors.log_prob).all()


def test_a_batch_of_one_gives_what_a_batch_of_many_gives(world: World) -> None:
    together = search(world, 8)
    for user, history in enumerate(world.histories):
        alone = search(World(world.model, world.trie, [history]), 8)
        assert_same_beams(as_beams(alone, 0), as_beams(together, user))


@pytest.mark.parametrize("budget", [1, 40, 100, 10_000])
def test_the_token_budget_changes_nothing(world: World, budget: int) -> None:
    expected, found = search(world, 8), search(world, 8, token_budget=budget)
    np.testing.assert_array_equal(found.sids, expected.sids)
    np.testing.assert_allclose(found.log_prob, expected.log_prob, atol=1e-9)


def test_the_same_search_twice_is_the_same_to_the_bit(world: World) -> None:
    first, second = search(world, 8), search(world, 8)
    np.testing.assert_array_equal(first.sids, second.sids)
    np.testing.assert_array_equal(first.log_prob, second.log_prob)


def test_ties_fall_to_the_smaller_sid(world: World) -> None:
    """All output rows 0: every child is equally likely, so the beams are the first SIDs of a regular trie."""
    sids = np.array([[a, b, c] for a in range(4) for b in range(4) for c in range(4)])
    trie = DeviceTrie(Trie.build(sids, world.model.vocabulary.codes))
    saved = world.model.input_rows.data.clone()
    try:
        world.model.input_rows.data.zero_()
        anchors = search(World(world.model, trie, world.histories), 5)
    finally:
        world.model.input_rows.data.copy_(saved)
    for user in range(len(world.histories)):
        # Level 1 keeps all of 0..3, level 2 the first 5 prefixes (0,0) .. (1,0), level 3 their first 5 children.
        np.testing.assert_array_equal(anchors.sids[user], [[0, 0, 0], [0, 0, 1], [0, 0, 2], [0, 0, 3], [0, 1, 0]])


def test_a_catalog_of_one_item_has_probability_one(model: InterestModel) -> None:
    sid = np.array([[3, 1, 7]])
    world = World(model, DeviceTrie(Trie.build(sid, 8)), [sid])
    anchors = search(world, 4)
    np.testing.assert_array_equal(anchors.sids[0], [[3, 1, 7], [-1] * 3, [-1] * 3, [-1] * 3])
    np.testing.assert_allclose(anchors.log_prob[0], [0, PAD_LOG_PROB, PAD_LOG_PROB, PAD_LOG_PROB])


def test_a_prefix_with_one_child_costs_no_probability(model: InterestModel) -> None:
    """(1, 2) has the single child 5: its log p is that of the prefix."""
    sids = np.array([[1, 2, 5], [1, 3, 0], [1, 3, 1], [4, 0, 0]])
    trie = DeviceTrie(Trie.build(sids, 8))
    found = dict(as_beams(search(World(model, trie, [sids[:2]]), 4), 0))
    expected = dict(textbook_beams(model, sids, sids[:2], (4, 4)))
    np.testing.assert_allclose(found[(1, 2, 5)], expected[(1, 2)], atol=1e-9)


def test_only_the_newest_events_are_read(world: World) -> None:
    long = np.concatenate(world.histories)
    settings_ = SearchSettings(6, max_events=4)
    cut = BeamSearch(world.model, world.trie, settings_).search([long, long[-4:]])
    np.testing.assert_array_equal(cut.sids[0], cut.sids[1])
    assert not np.array_equal(cut.sids[0], search(World(world.model, world.trie, [long]), 6).sids[0])


def test_out_of_memory_halves_the_budget_and_loses_nobody(
    world: World, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A model that has memory for 50 tokens at a time."""
    expected = search(world, 8)
    hidden = type(world.model).hidden

    def limited(self: InterestModel, token_ids: torch.Tensor, *rest: object) -> torch.Tensor:
        if len(token_ids) > 50:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return hidden(self, token_ids, *rest)

    monkeypatch.setattr(type(world.model), "hidden", limited)
    searcher = BeamSearch(world.model, world.trie, SearchSettings(8, max_events=20))
    with caplog.at_level(logging.WARNING):
        found = searcher.search(world.histories)
    np.testing.assert_array_equal(found.sids, expected.sids)
    assert searcher.token_budget < 16_384
    assert "token budget is now" in caplog.text


def test_one_user_too_large_for_the_memory_is_an_error_that_says_so(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: InterestModel, *rest: object) -> torch.Tensor:
        raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(type(world.model), "hidden", full)
    with pytest.raises(GplError, match="out of memory on one user"):
        search(world, 8)


def test_other_errors_of_the_model_are_not_taken_for_missing_memory(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: InterestModel, *rest: object) -> torch.Tensor:
        raise RuntimeError("shape mismatch")

    monkeypatch.setattr(type(world.model), "hidden", broken)
    with pytest.raises(RuntimeError, match="shape mismatch"):
        search(world, 8)


def test_bad_input_is_refused(world: World) -> None:
    with pytest.raises(ContractError, match="empty"):
        search(World(world.model, world.trie, [world.histories[0][:0]]), 3)
    with pytest.raises(ContractError, match=r"code 8, expected \[0, 8\)"):
        search(World(world.model, world.trie, [np.array([[0, 8, 0]])]), 3)
    with pytest.raises(UsageError, match=r"sequences\.max_length = 1000"):
        BeamSearch(world.model, world.trie, SearchSettings(3, max_events=1000))
    with pytest.raises(ContractError, match="no SID"):
        DeviceTrie(Trie.build(np.empty((0, 3), dtype=np.int64), 8))
