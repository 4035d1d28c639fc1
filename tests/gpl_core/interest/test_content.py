"""Content vectors at the input, and walks between items of like content."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from gpl_core.errors import UsageError
from gpl_core.interest.content import NeighborGraph
from gpl_core.interest.interest_model import (
    InterestModel,
    ModelSettings,
    adapter_state,
    build_interest_model,
    load_adapter_state,
)
from gpl_core.interest.objective import interest_loss, target_log_probs
from gpl_core.interest.packing import UserHistory, pack_targets
from gpl_core.interest.search import BeamSearch, SearchSettings
from gpl_core.interest.trie_scoring import DeviceTrie
from gpl_core.sids.content_table import ContentTable
from gpl_core.sids.trie import Trie

ITEMS, WIDTH = 30, 5


@pytest.fixture(scope="module")
def table() -> ContentTable:
    """30 items; item 7 has no vector."""
    vectors = np.random.default_rng(0).normal(size=(ITEMS, WIDTH)).astype(np.float32)
    row_of = np.arange(ITEMS)
    row_of[7] = -1
    return ContentTable(vectors, row_of)


@pytest.fixture
def reader(checkpoint: Path) -> InterestModel:
    """A model that reads content, its projection not 0."""
    settings = ModelSettings(3, 8, lora_rank=4, content_width=WIDTH)
    model = build_interest_model(checkpoint, settings, dtype=torch.float64).eval()
    with torch.no_grad():
        model.content.weight.normal_(generator=torch.Generator().manual_seed(2))
    return model


def make_sids() -> np.ndarray:
    return np.random.default_rng(3).integers(0, 8, (ITEMS, 3))


def history(items: list[int]) -> UserHistory:
    return UserHistory(make_sids()[items], np.ones(len(items), dtype=bool), np.array(items))


def test_untrained_content_changes_nothing(checkpoint: Path, table: ContentTable) -> None:
    settings = ModelSettings(3, 8, lora_rank=4)
    without = build_interest_model(checkpoint, settings)
    reading = build_interest_model(checkpoint, ModelSettings(3, 8, lora_rank=4, content_width=WIDTH))
    trie = DeviceTrie(Trie.build(make_sids(), 8))
    pack = pack_targets(without.vocabulary, [history([1, 2, 3])], 9)
    plain = target_log_probs(without, trie, pack).log_prob
    assert torch.equal(target_log_probs(reading, trie, pack, table).log_prob, plain)


def test_an_event_s_content_reaches_later_targets_only(reader: InterestModel, table: ContentTable) -> None:
    """Two histories with the same SIDs, whose second item differs in content: the first target cannot know."""
    trie = DeviceTrie(Trie.build(make_sids(), 8))
    one = history([1, 2, 3, 4])
    two = UserHistory(one.sids, one.is_target, np.array([1, 20, 3, 4]))
    with torch.no_grad():
        a, b = (
            target_log_probs(reader, trie, pack_targets(reader.vocabulary, [h], 9), table).log_prob for h in (one, two)
        )
    assert torch.equal(a[0], b[0])
    assert (a[1:] != b[1:]).any(dim=1).all()


def test_search_and_training_see_the_same_content(reader: InterestModel, table: ContentTable) -> None:
    """Teacher-forced log p with content = the beams' log p with content; item 7 has none and is passed over."""
    trie = DeviceTrie(Trie.build(make_sids(), 8))
    searcher = BeamSearch(reader, trie, SearchSettings(6, max_events=3), table)
    items = [[1, 2], [5, 7, 9, 11, 7], [7]]
    anchors = searcher.search([make_sids()[i] for i in items], [np.array(i) for i in items])
    rows = [
        UserHistory(
            np.concatenate([make_sids()[i][-3:], sid[None]]),
            np.arange(len(i[-3:]) + 1) == len(i[-3:]),
            np.array([*i[-3:], 0]),
        )
        for i, sids in zip(items, anchors.sids, strict=True)
        for sid in sids
    ]
    with torch.no_grad():
        forced = target_log_probs(reader, trie, pack_targets(reader.vocabulary, rows, 4), table).log_prob.sum(1)
    np.testing.assert_allclose(anchors.log_prob.ravel(), forced, atol=1e-9)
    without = BeamSearch(reader, trie, SearchSettings(6, max_events=3), table)
    other = without.search([make_sids()[i] for i in items], [np.full(len(i), 7) for i in items])
    assert not np.allclose(other.log_prob[0], anchors.log_prob[0])


def test_the_projection_learns_and_is_saved(checkpoint: Path, table: ContentTable, reader: InterestModel) -> None:
    trie = DeviceTrie(Trie.build(make_sids(), 8))
    pack = pack_targets(reader.vocabulary, [history([1, 2, 3, 4])], 9)
    interest_loss(target_log_probs(reader, trie, pack, table)).backward()
    assert reader.content.weight.grad.abs().sum() > 0
    again = build_interest_model(checkpoint, reader.settings, dtype=torch.float64)
    load_adapter_state(again, adapter_state(reader))
    assert torch.equal(again.content.weight, reader.content.weight)


def test_a_search_without_the_content_its_model_needs_is_refused(reader: InterestModel, table: ContentTable) -> None:
    trie = DeviceTrie(Trie.build(make_sids(), 8))
    with pytest.raises(UsageError, match="content"):
        BeamSearch(reader, trie, SearchSettings(2, max_events=3))
    with pytest.raises(UsageError, match="item_index"):
        BeamSearch(reader, trie, SearchSettings(2, max_events=3), table).search([make_sids()[:2]])


def test_walks_go_to_near_items_or_stay_one_step_in_six(table: ContentTable) -> None:
    graph = NeighborGraph.build(table, np.arange(ITEMS), seed=0, neighbors=3)
    walks = graph.walks(400, seed=[1], length=4)
    assert walks.shape == (400, 4)
    assert set(walks[:, 0]) == set(range(ITEMS)) - {7}
    assert 7 not in walks
    cosine = table.vectors @ table.vectors.T
    np.fill_diagonal(cosine, -np.inf)
    cosine[:, 7] = -np.inf
    for here, there in walks[:, [0, 1]].tolist() + walks[:, [2, 3]].tolist():
        assert here == there or (cosine[here] > cosine[here, there]).sum() < 3
    assert 0.13 < (walks[:, 1:] == walks[:, :-1]).mean() < 0.21
    np.testing.assert_array_equal(walks, graph.walks(400, seed=[1], length=4))
    assert not np.array_equal(walks, graph.walks(400, seed=[2], length=4))


def test_the_graph_does_not_depend_on_its_blocks(table: ContentTable, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = NeighborGraph.build(table, np.arange(ITEMS), seed=0)
    monkeypatch.setattr("gpl_core.interest.content._BLOCK", 7)
    np.testing.assert_array_equal(NeighborGraph.build(table, np.arange(ITEMS), seed=0).near, whole.near)


def test_walks_stay_within_their_pool(table: ContentTable) -> None:
    graph = NeighborGraph.build(table, np.arange(ITEMS), seed=0, pool=6, neighbors=2)
    assert set(np.unique(graph.walks(200, seed=[0]))) <= set(graph.items)
    assert len(graph.items) == 6
    with pytest.raises(UsageError, match="at least 2"):
        NeighborGraph.build(table, np.array([3, 7]), seed=0)
