"""Content vectors at the input and in the scores, and walks between items of like content."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from gpl_core.errors import ContractError, UsageError
from gpl_core.interest.attention import CausalPlan
from gpl_core.interest.content import RECENT, NeighborGraph, content_of, leaf_content
from gpl_core.interest.interest_model import (
    InterestModel,
    ModelSettings,
    adapter_state,
    build_interest_model,
    load_adapter_state,
)
from gpl_core.interest.packing import UserHistory, pack_targets, training_packs
from gpl_core.interest.search import Anchors, BeamSearch, SearchSettings
from gpl_core.interest.training import TEMPERATURES, target_log_probs, tempered_losses, without_targets
from gpl_core.interest.trie_scoring import DeviceTrie, child_log_probs, dense_scores
from gpl_core.sids.content_table import ContentTable
from gpl_core.sids.item_catalog import ItemCatalog
from tests.gpl_core.interest.conftest import each_family
from tests.gpl_core.interest.oracle import Content, content_logit, mean_below, textbook_beams

ITEMS, WIDTH, MOST = 30, 5, 12


@pytest.fixture(scope="module")
def table() -> ContentTable:
    """30 items; item 7 has no vector, nor has item 3, which is alone under its first code."""
    vectors = np.random.default_rng(0).normal(size=(ITEMS, WIDTH)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    row_of = np.arange(ITEMS)
    row_of[[3, 7]] = -1
    return ContentTable(vectors, row_of)


@pytest.fixture
def reader(checkpoint: Path) -> InterestModel:
    """A model that reads content and scores by it, as if trained."""
    settings = ModelSettings(3, 8, lora_rank=4, content_width=WIDTH)
    model = build_interest_model(checkpoint, settings, dtype=torch.float64).eval()
    random = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in (model.input_rows, *model.content.parameters(), model.scale):
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=random, dtype=torch.float64))
    return model


@pytest.fixture
def searcher(reader: InterestModel, table: ContentTable) -> BeamSearch:
    return make_search(reader, table, beams=6)


def make_search(reader: InterestModel, table: ContentTable, beams: int, budget: int = 16_384) -> BeamSearch:
    return BeamSearch(reader, make_trie(table), SearchSettings(beams, MOST, token_budget=budget), table)


def make_trie(table: ContentTable | None) -> DeviceTrie:
    catalog = ItemCatalog(np.arange(ITEMS), make_sids(), 8)
    return DeviceTrie(catalog.trie, content=leaf_content(catalog, table))


def make_sids() -> np.ndarray:
    """Codes of 0 .. 3, so that there are items that share a SID; item 3 alone begins with 7."""
    sids = np.random.default_rng(3).integers(0, 4, (ITEMS, 3))
    sids[3, 0] = 7
    return sids


def history(items: list[int]) -> UserHistory:
    return UserHistory(make_sids()[items], np.ones(len(items), dtype=bool), np.array(items))


def of(table: ContentTable, items: list[int]) -> Content:
    """What the oracle needs of a history."""
    vectors = np.where(table.row_of[:, None] >= 0, table.vectors.astype(np.float64), np.nan)
    return Content(vectors, make_sids(), np.array(items))


USERS = [[1, 2], [5, 7, 9, 11, 3], [7], [3, 3, 20, 8], [4, 9, 2, 2, 12, 13, 7, 15, 16, 2, 18]]
"""The last one has more events than ask by their content."""


def search(searcher: BeamSearch, users: list[list[int]] = USERS) -> Anchors:
    return searcher.search([make_sids()[i] for i in users], [np.array(i) for i in users])


def test_probabilities_with_content_are_brute_force_and_sum_to_one(reader: InterestModel, table: ContentTable) -> None:
    """Every SID of the catalog as a beam, and as a target; both are the oracle's, item by item."""
    every = {tuple(map(int, s)) for s in make_sids()}
    anchors = search(make_search(reader, table, beams=len(every)))
    for items, sids, log_probs in zip(USERS, anchors.sids, anchors.log_prob, strict=True):
        assert {tuple(s) for s in sids.tolist()} == every
        np.testing.assert_allclose(np.exp(log_probs).sum(), 1.0, atol=1e-6)
        expected = textbook_beams(reader, make_sids(), make_sids()[items], (len(every),) * 3, of(table, items))
        np.testing.assert_allclose(log_probs, [p for _, p in expected], atol=1e-6)
        assert [tuple(s) for s in sids.tolist()] == [s for s, _ in expected]
        carrier = {tuple(s): n for n, s in enumerate(make_sids().tolist())}
        rows = [history([*items, carrier[tuple(s)]]) for s in sids.tolist()]
        last = [UserHistory(h.sids, np.arange(len(h.sids)) == len(items), h.items) for h in rows]
        with torch.no_grad():
            forced = target_log_probs(reader, make_trie(table), pack_targets(reader.vocabulary, last, MOST + 1), table)
        np.testing.assert_allclose(forced.log_prob.sum(1), log_probs, atol=1e-6)


@pytest.mark.parametrize("gone", [[1], [0, 1, 2]])
def test_events_whose_sid_left_the_catalog_do_not_ask(
    reader: InterestModel, table: ContentTable, gone: list[int]
) -> None:
    """Some of a history, and all of it; the text-book's scores have no term for them."""
    items, every = [5, 9, 11], len({tuple(s) for s in make_sids().tolist()})
    sids = make_sids()[items]
    sids[gone] = 5
    found = make_search(reader, table, every).search([sids], [np.array(items)])
    expected = textbook_beams(reader, make_sids(), sids, (every,) * 3, of(table, items))
    np.testing.assert_allclose(found.log_prob[0], [p for _, p in expected], atol=1e-6)
    np.testing.assert_allclose(np.exp(found.log_prob[0]).sum(), 1.0, atol=1e-6)


@each_family
@pytest.mark.parametrize("beams", [1, 3, 8])
def test_beams_with_content_are_those_of_the_textbook(reader: InterestModel, table: ContentTable, beams: int) -> None:
    anchors = search(make_search(reader, table, beams))
    for user, items in enumerate(USERS):
        expected = textbook_beams(reader, make_sids(), make_sids()[items], (beams,) * 3, of(table, items))
        assert [tuple(s) for s in anchors.sids[user].tolist()] == [s for s, _ in expected]
        np.testing.assert_allclose(anchors.log_prob[user], [p for _, p in expected], atol=1e-6)


def test_neither_batch_nor_order_nor_packing_nor_blocks_change_scores_by_content(
    reader: InterestModel, table: ContentTable, searcher: BeamSearch, monkeypatch: pytest.MonkeyPatch
) -> None:
    together, alone = search(searcher), [search(searcher, [items]) for items in USERS]
    backwards, tight = search(searcher, USERS[::-1]), search(make_search(reader, table, 6, budget=30))
    rows = [history(items) for items in USERS]
    packed = torch.autograd.grad(losses(reader, table, rows, 1_000), [*reader.content.parameters()])
    monkeypatch.setattr("gpl_core.interest.trie_scoring._MOST_NUMBERS", 1)  # a row at a time
    others = [
        Anchors(*(np.concatenate(parts) for parts in zip(*alone, strict=True))),
        Anchors(*(values[::-1] for values in backwards)), tight, search(searcher),
    ]  # fmt: skip
    for other in others:
        np.testing.assert_array_equal(other.sids, together.sids)
        np.testing.assert_allclose(other.log_prob, together.log_prob, atol=1e-6)
    apart = torch.autograd.grad(losses(reader, table, rows[::-1], 1), [*reader.content.parameters()])
    for one, other in zip(apart, packed, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-9)


def losses(reader: InterestModel, table: ContentTable, rows: list[UserHistory], budget: int) -> torch.Tensor:
    """Summed over packs of ``budget`` tokens."""
    packs = training_packs(reader.vocabulary, rows, MOST + 1, budget)
    return sum(target_log_probs(reader, make_trie(table), pack, table).log_prob.sum() for pack in packs)


def test_what_all_items_share_changes_no_score(reader: InterestModel, table: ContentTable) -> None:
    moved = ContentTable(table.vectors + np.float32(2.0), table.row_of)
    one, two = make_trie(table), make_trie(moved)
    torch.testing.assert_close(one.content, two.content, rtol=0, atol=1e-5)


def test_at_the_last_level_the_item_nearest_to_the_query_leads(reader: InterestModel, table: ContentTable) -> None:
    """Siblings with the same code rows: content alone decides."""
    with torch.no_grad():
        reader.input_rows.zero_()
        reader.content.share.fill_(1.0)
    trie = make_trie(table)
    hidden = torch.randn(1, reader.config.hidden_size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    parent = int(np.diff(trie.trie.offsets[2]).argmax())
    nothing = torch.full((1, RECENT), -1)
    children, log_prob = child_log_probs(
        reader, trie, 2, torch.tensor([parent]), hidden, dense_scores(reader, trie, hidden, nothing)
    )  # fmt: skip
    query = reader.content.query(hidden)[0].detach().numpy()
    sids = trie.trie.sids()[children.node[0][children.valid[0]]]
    nearest = max(range(len(sids)), key=lambda n: mean_below(of(table, []), tuple(sids[n])) @ query)
    assert len(sids) > 1
    assert int(log_prob[0].argmax()) == nearest


def dense_retrieval(
    reader: InterestModel, trie: DeviceTrie, table: ContentTable, known: Content, row: UserHistory
) -> torch.Tensor:
    """log p of every leaf by content alone, in one softmax, after all events of ``row`` but its last."""
    pack = pack_targets(reader.vocabulary, [row], MOST + 1)
    with torch.no_grad():
        read = content_of(table, pack.items, pack.item_places, reader.device)
        tokens, positions = torch.from_numpy(pack.token_ids), torch.from_numpy(pack.positions)
        state = reader.hidden(tokens, positions, CausalPlan(pack.lengths), read)[pack.target_places[-1, 0]]
        query = reader.content.query(state) * reader.content.share
        events = [tuple(map(int, sid)) for sid in row.sids[:-1][-RECENT:][::-1]]
        leaves = [tuple(map(int, sid)) for sid in trie.trie.sids()]
        logits = [content_logit(reader, known, sid, query, dict(enumerate(events))) for sid in leaves]
        return torch.stack(logits).log_softmax(0)


def test_without_codes_to_tell_them_apart_sids_are_ranked_by_one_softmax_over_the_catalog(
    reader: InterestModel, table: ContentTable
) -> None:
    """However the trie groups them: what dense retrieval over all leaves would say."""
    with torch.no_grad():
        reader.scale.zero_()
    trie, every = make_trie(table), len({tuple(s) for s in make_sids().tolist()})
    anchors = search(make_search(reader, table, beams=every))
    for items, sids, log_probs in zip(USERS, anchors.sids, anchors.log_prob, strict=True):
        flat = dense_retrieval(reader, trie, table, of(table, []), history([*items, 0]))
        np.testing.assert_allclose(log_probs, flat[trie.trie.leaf_of(sids)], atol=1e-6)


@pytest.mark.parametrize("levels", [1, 2, 4])
def test_so_they_are_in_a_trie_of_any_depth(checkpoint: Path, table: ContentTable, levels: int) -> None:
    sids = np.random.default_rng(5).integers(0, 4, (ITEMS, levels))
    catalog = ItemCatalog(np.arange(ITEMS), sids, 8)
    trie = DeviceTrie(catalog.trie, content=leaf_content(catalog, table))
    settings = ModelSettings(levels, 8, lora_rank=4, content_width=WIDTH)
    model = build_interest_model(checkpoint, settings, dtype=torch.float64).eval()
    items = [1, 2, 5]
    with torch.no_grad():
        model.scale.zero_()
        model.content.share.fill_(3.0)
    found = BeamSearch(model, trie, SearchSettings(trie.size, 5), table).search([sids[items]], [np.array(items)])
    row = UserHistory(sids[[*items, 0]], np.ones(4, dtype=bool), np.array([*items, 0]))
    known = of(table, [])._replace(sids=sids)
    flat = dense_retrieval(model, trie, table, known, row)
    np.testing.assert_allclose(found.log_prob[0], flat[trie.trie.leaf_of(found.sids[0])], atol=1e-6)


def test_an_event_s_content_reaches_later_targets_only(reader: InterestModel, table: ContentTable) -> None:
    """Two histories with the same SIDs, whose second item differs in content: the first target cannot know."""
    trie = make_trie(table)
    one = history([1, 2, 3, 4])
    two = UserHistory(one.sids, one.is_target, np.array([1, 20, 3, 4]))
    with torch.no_grad():
        a, b = (
            target_log_probs(reader, trie, pack_targets(reader.vocabulary, [h], 9), table).log_prob for h in (one, two)
        )
    assert torch.equal(a[0], b[0])
    assert (a[1:] != b[1:]).any(dim=1).all()


def test_the_heads_learn_and_are_saved(checkpoint: Path, table: ContentTable, reader: InterestModel) -> None:
    losses(reader, table, [history([1, 2, 3, 4])], 1_000).backward()
    assert all(p.grad.abs().sum() > 0 for p in (*reader.content.parameters(), reader.scale))
    again = build_interest_model(checkpoint, reader.settings, dtype=torch.float64)
    load_adapter_state(again, adapter_state(reader))
    name, value = next(iter(adapter_state(reader).items()))
    for wrong in ({}, {**adapter_state(reader), name: value[:1]}):
        with pytest.raises(ContractError, match="do not fit this base and settings"):
            load_adapter_state(again, wrong)
    for mine, theirs in zip(again.content.parameters(), reader.content.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_a_search_without_the_content_its_model_needs_is_refused(reader: InterestModel, table: ContentTable) -> None:
    with pytest.raises(UsageError, match="content"):
        BeamSearch(reader, make_trie(table), SearchSettings(2, max_events=3))
    with pytest.raises(UsageError, match="item_index"):
        BeamSearch(reader, make_trie(table), SearchSettings(2, max_events=3), table).search([make_sids()[:2]])
    with pytest.raises(ContractError, match="without content"):
        search(BeamSearch(reader, make_trie(None), SearchSettings(2, max_events=5), table))


def test_losses_by_temperature_are_those_of_logits_divided_by_it(checkpoint: Path) -> None:
    """Of a model without content, whose logits are divided where its scales are."""
    model = build_interest_model(checkpoint, ModelSettings(3, 8, lora_rank=4), dtype=torch.float64).eval()
    pack = pack_targets(model.vocabulary, [history(items) for items in USERS], 6)
    scale = model.scale.detach().clone()
    with torch.no_grad():
        losses, targets = tempered_losses(model, make_trie(None), pack)
        for loss, temperature in zip(losses, TEMPERATURES, strict=True):
            model.scale.copy_(scale / temperature)
            scores = target_log_probs(model, make_trie(None), pack)
            assert targets == len(scores.log_prob) > 0
            torch.testing.assert_close(loss, -scores.log_prob.sum())


def test_a_pack_without_targets_has_gradients_of_zero(reader: InterestModel, table: ContentTable) -> None:
    """Of every parameter, as the ranks that still have targets wait for them."""
    pack = pack_targets(reader.vocabulary, [history([1, 2, 3])], 6)
    (target_log_probs(reader, make_trie(table), without_targets(pack), table).log_prob.sum() + 0.0).backward()
    assert all((p.grad == 0).all() for p in (*reader.content.parameters(), reader.scale))


def test_walks_go_to_near_items_or_stay_one_step_in_six(table: ContentTable) -> None:
    graph = NeighborGraph.build(table, np.arange(ITEMS), seed=0, neighbors=3)
    walks = graph.walks(400, seed=[1], length=4)
    assert walks.shape == (400, 4)
    assert set(walks[:, 0]) == set(range(ITEMS)) - {3, 7}
    assert not np.isin([3, 7], walks).any()
    cosine = table.vectors @ table.vectors.T
    np.fill_diagonal(cosine, -np.inf)
    cosine[:, [3, 7]] = -np.inf
    for here, there in walks[:, [0, 1]].tolist() + walks[:, [2, 3]].tolist():
        assert here == there or (cosine[here] > cosine[here, there]).sum() < 3
    assert 0.13 < (walks[:, 1:] == walks[:, :-1]).mean() < 0.21
    np.testing.assert_array_equal(walks, graph.walks(400, seed=[1], length=4))
    assert not np.array_equal(walks, graph.walks(400, seed=[2], length=4))


def test_every_other_step_goes_where_users_went(table: ContentTable) -> None:
    """To what a user had at most three places away, either way, as often as users had it; never to items outside."""
    users = [np.array([0, 0, 7, 2, 5, 4]), np.array([0, 2]), np.array([99, 0])]
    graph = NeighborGraph.build(table, np.arange(ITEMS), users, seed=0, neighbors=3)
    walks = graph.walks(20_000, seed=[1], length=2)
    near = {item: set(graph.items[graph.near[node]]) for node, item in enumerate(graph.items)}
    went = {0: {2, 5}, 2: {0, 5, 4}, 5: {0, 2, 4}, 4: {2, 5}}
    for item in graph.items:
        assert set(walks[walks[:, 0] == item, 1]) == near[item] | {item} | went.get(item, set())
    there = walks[walks[:, 0] == 0, 1]
    twos, fives = ((there == n).sum() for n in (2, 5))  # together with 0 three times and once
    assert not {2, 5} & near[0]
    assert 0.5 * 5 / 6 - 0.06 < (twos + fives) / len(there) < 0.5 * 5 / 6 + 0.06
    assert 2.2 < twos / fives < 4.0


def test_the_graph_does_not_depend_on_its_blocks(table: ContentTable, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = NeighborGraph.build(table, np.arange(ITEMS), seed=0)
    monkeypatch.setattr("gpl_core.interest.content._BLOCK", 7)
    np.testing.assert_array_equal(NeighborGraph.build(table, np.arange(ITEMS), seed=0).near, whole.near)


def test_walks_stay_within_their_pool(table: ContentTable) -> None:
    graph = NeighborGraph.build(table, np.arange(ITEMS), seed=0, pool=6, neighbors=2)
    assert set(np.unique(graph.walks(200, seed=[0]))) <= set(graph.items)
    assert len(graph.items) == 6
    users = [np.array([20, 21]), np.array([7, 99, 22]), np.array([23, 24])]
    graph = NeighborGraph.build(table, np.arange(ITEMS), users, seed=0, pool=6, neighbors=2)
    assert {20, 21, 22} <= set(graph.items), "the first users' items are half of the pool"
    assert len(graph.items) == 6
    assert len(graph.together) == 2
    with pytest.raises(UsageError, match="at least 2"):
        NeighborGraph.build(table, np.array([3, 7]), seed=0)
