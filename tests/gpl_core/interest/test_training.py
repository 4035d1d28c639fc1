"""Packing and loss: every next SID in one pass, the same numbers as one forward pass per target."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from gpl_core.errors import ContractError, UsageError
from gpl_core.interest.down_sampling import keep_probability
from gpl_core.interest.interest_model import ModelSettings, build_interest_model
from gpl_core.interest.packing import (
    UserHistory,
    budget_batches,
    most_events,
    pack_targets,
    training_packs,
    unflatten,
)
from gpl_core.interest.training import target_log_probs
from gpl_core.interest.trie_scoring import DeviceTrie
from gpl_core.sids.trie import Trie
from tests.gpl_core.interest.conftest import World, each_family
from tests.gpl_core.interest.oracle import interest_loss, next_code_log_probs


def all_targets(history: np.ndarray) -> UserHistory:
    return UserHistory(history, np.ones(len(history), dtype=bool))


@each_family
def test_one_pass_equals_one_forward_pass_per_target(world: World) -> None:
    """Each target's log p, from full histories recomputed one by one."""
    pack = pack_targets(world.model.vocabulary, [all_targets(h) for h in world.histories], max_events=6)
    with torch.no_grad():
        scores = target_log_probs(world.model, world.trie, pack)
    sids = world.trie.trie.sids()
    expected = []
    for history in world.histories:
        kept = history[-6:]
        for event in range(1, len(kept)):
            target = tuple(map(int, kept[event]))
            expected.append(
                [next_code_log_probs(world.model, sids, kept[:event], target[:l])[target[l]] for l in range(3)]  # noqa: E741
            )
    assert scores.outside == 0
    np.testing.assert_allclose(scores.log_prob, expected, atol=1e-9)


def test_loss_does_not_depend_on_the_packing(world: World) -> None:
    rows = [all_targets(h) for h in world.histories]
    with torch.no_grad():
        parts = [
            target_log_probs(world.model, world.trie, p).log_prob
            for p in training_packs(world.model.vocabulary, rows, 20, token_budget=20)
        ]
        whole = target_log_probs(world.model, world.trie, pack_targets(world.model.vocabulary, rows, 20)).log_prob
    np.testing.assert_allclose(torch.cat(parts).sum(), whole.sum(), atol=1e-9)
    assert len(parts) > 1


def test_targets_outside_the_catalog_are_counted_and_cost_nothing(world: World) -> None:
    sids = world.trie.trie.sids()
    absent = next(s for s in np.ndindex(8, 8, 8) if world.trie.trie.leaf_of(np.array([s]))[0] < 0)
    history = np.array([sids[0], absent, sids[1]])
    with torch.no_grad():
        scores = target_log_probs(
            world.model, world.trie, pack_targets(world.model.vocabulary, [all_targets(history)], 9)
        )
    assert scores.outside == 1
    assert scores.log_prob.shape == (1, 3)
    assert torch.isfinite(scores.log_prob).all()


def test_only_chosen_events_are_targets_and_the_context_keeps_all(world: World) -> None:
    history = next(h for h in world.histories if len(h) >= 4)[:4]
    chosen = np.array([True, False, False, True])
    vocabulary = world.model.vocabulary
    with torch.no_grad():
        some = target_log_probs(
            world.model, world.trie, pack_targets(vocabulary, [UserHistory(history, chosen)], 9)
        ).log_prob
        every = target_log_probs(world.model, world.trie, pack_targets(vocabulary, [all_targets(history)], 9)).log_prob
    np.testing.assert_allclose(some, every[-1:], atol=1e-12)


def test_a_single_child_has_no_gradient_and_nothing_becomes_nan(world: World) -> None:
    pack = pack_targets(world.model.vocabulary, [all_targets(h) for h in world.histories], 20)
    loss = interest_loss(target_log_probs(world.model, world.trie, pack))
    gradients = torch.autograd.grad(loss, [p for p in world.model.parameters() if p.requires_grad])
    assert all(torch.isfinite(g).all() for g in gradients)


def test_a_pack_without_targets_has_loss_zero(world: World) -> None:
    pack = pack_targets(
        world.model.vocabulary, [UserHistory(world.histories[0], np.zeros(len(world.histories[0]), bool))], 9
    )
    assert interest_loss(target_log_probs(world.model, world.trie, pack)).item() == 0


class Operations(TorchDispatchMode):
    """Counts what runs, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.ran: Counter[str] = Counter()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.ran[operation.name()] += 1
        return operation(*args, **(kwargs or {}))


def test_recomputation_gives_the_same_gradients_and_computes_again_only_what_it_names(checkpoint: Path) -> None:
    rows = [all_targets(np.random.default_rng(n).integers(0, 8, (n, 3))) for n in (2, 5, 9)]
    trie = DeviceTrie(Trie.build(np.concatenate([h.sids for h in rows]), 8))
    gradients, again, kept = {}, {}, {}
    for what in ("nothing", "elementwise", "layers"):
        model = build_interest_model(checkpoint, ModelSettings(3, 8, lora_rank=4, dropout=0.5)).train()
        if what != "nothing":
            model.recompute(what)
        torch.manual_seed(0)
        saved: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, saved=saved: saved.append(t.numel()) or t, lambda t: t):
            loss = interest_loss(target_log_probs(model, trie, pack_targets(model.vocabulary, rows, 20)))
        kept[what] = sum(saved)
        with Operations() as counted:
            loss.backward()
        gradients[what] = [p.grad for p in model.parameters() if p.requires_grad]
        attention = {name for name in counted.ran if "scaled_dot_product" in name and "backward" not in name}
        again[what] = (counted.ran["aten::silu"], bool(attention))
    # What `elementwise` keeps, torch's selective checkpointing holds aside: the hook does not see it.
    assert kept["layers"] < kept["nothing"] / 2
    layers = model.config.num_hidden_layers
    assert again == {"nothing": (0, False), "elementwise": (layers, False), "layers": (layers, True)}
    for other in ("elementwise", "layers"):
        assert all(torch.equal(a, b) for a, b in zip(gradients["nothing"], gradients[other], strict=True))


# --- packing


def test_a_pack_drawn(world: World) -> None:
    """Events, truncated from the old end; the last token is left out.

    user A: events a0 a1 a2, only the newest 2 kept      user B: one event, nothing to predict
    """
    vocabulary = world.model.vocabulary
    a = np.array([[1, 2, 3], [4, 5, 6], [7, 0, 1]])
    b = np.array([[2, 2, 2]])
    pack = pack_targets(vocabulary, [all_targets(a), all_targets(b)], max_events=2)
    kept = vocabulary.ids(a[1:]).ravel().tolist()
    assert pack.token_ids.tolist() == [*kept[:-1], *vocabulary.ids(b[0])[:-1]]
    assert pack.lengths.tolist() == [5, 2]
    assert pack.positions.tolist() == [*range(5), *range(2)]
    assert pack.target_sids.tolist() == [[7, 0, 1]]
    assert pack.target_places.tolist() == [[2, 3, 4]]


@given(
    lengths=st.lists(st.integers(1, 12), max_size=30),
    budget=st.integers(1, 80),
    max_events=st.integers(1, 8),
)
@settings(deadline=None, max_examples=50)
def test_packs_hold_every_user_with_targets_once_within_the_budget(
    model, lengths: list[int], budget: int, max_events: int
) -> None:
    rows = [all_targets(np.full((n, 3), i % 8)) for i, n in enumerate(lengths)]
    packs = list(training_packs(model.vocabulary, rows, max_events, budget))
    wanted = [min(n, max_events) for n in lengths if min(n, max_events) > 1]
    assert [int(n) for p in packs for n in p.lengths] == [n * 3 - 1 for n in wanted]
    assert all(len(p.token_ids) <= budget or len(p.lengths) == 1 for p in packs)
    assert sum(len(p.target_sids) for p in packs) == sum(n - 1 for n in wanted)


@given(sizes=st.lists(st.integers(1, 50), max_size=40), budget=st.integers(1, 120))
def test_budget_batches_partition_the_users(sizes: list[int], budget: int) -> None:
    batches = budget_batches(np.array(sizes, dtype=np.int64), budget)
    assert sorted(int(u) for b in batches for u in b) == list(range(len(sizes)))
    assert all(len(b) == 1 or sum(sizes[u] for u in b) <= budget for b in batches)


def test_table_rows_are_checked() -> None:
    np.testing.assert_array_equal(unflatten(np.array([1, 2, 3, 4, -1, -1]), 2, 2), [[1, 2], [3, 4]])
    for sid, length in (([1, 2, 3], 1), ([1, 2, -1, -1], 2), ([1, 2, 3, 4], 1), ([1, 2], 2)):
        with pytest.raises(ContractError, match="sid"):
            unflatten(np.array(sid), length, 2)


def test_histories_must_fit_the_model_s_context(model) -> None:
    assert most_events(model.vocabulary, 10, 33) == 10
    with pytest.raises(UsageError, match="between 1 and 9"):
        most_events(model.vocabulary, 10, 32)


# --- target down-sampling


@given(
    counts=st.lists(st.integers(0, 1000), min_size=1, max_size=40).filter(lambda c: sum(c) > 0),
    share=st.floats(0.05, 1.0),
)
def test_the_wanted_share_of_targets_is_kept_and_popular_items_lose_most(counts: list[int], share: float) -> None:
    f = np.array(counts) / sum(counts)
    keep = keep_probability(np.array(counts), share)
    assert math.isclose((f * keep).sum(), share, rel_tol=1e-9)
    assert ((keep >= 0) & (keep <= 1)).all()
    order = np.argsort(counts)
    assert (np.diff(keep[order]) <= 1e-12).all()
    # One tau for all: p_keep = min(1, sqrt(tau / f)).
    cut = keep < 1 - 1e-12
    if cut.any():
        tau = (keep[cut] ** 2 * f[cut])[0]
        np.testing.assert_allclose(keep[f > 0], np.minimum(1, np.sqrt(tau / f[f > 0])), rtol=1e-6)


def test_a_count_may_stand_for_several_items() -> None:
    counts, items = np.array([1, 5, 200]), np.array([40, 7, 3])
    one_by_one = keep_probability(np.repeat(counts, items), 0.6)
    np.testing.assert_allclose(np.repeat(keep_probability(counts, 0.6, items), items), one_by_one, rtol=1e-12)


def test_a_share_of_no_targets_is_refused() -> None:
    with pytest.raises(UsageError, match="target_share = 0"):
        keep_probability(np.array([1]), 0)
