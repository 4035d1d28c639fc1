"""The trie and the catalog against plain Python sets and dictionaries."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpl_core.errors import ContractError
from gpl_core.sids.item_catalog import ItemCatalog
from gpl_core.sids.trie import Trie


@st.composite
def sid_tables(draw):
    levels = draw(st.integers(1, 4))
    codes = draw(st.sampled_from([1, 2, 3, 5, 2**15]))
    row = st.lists(st.integers(0, min(codes, 4) - 1), min_size=levels, max_size=levels)
    rows = draw(st.lists(row, min_size=0, max_size=30))
    return np.array(rows, dtype=np.int64).reshape(-1, levels), codes


@settings(deadline=None)
@given(sid_tables())
def test_trie_holds_exactly_the_given_sids(table):
    sids, codes = table
    trie = Trie.build(sids, codes)
    expected = sorted({tuple(r) for r in sids.tolist()})
    assert [tuple(r) for r in trie.sids().tolist()] == expected
    assert trie.size == len(expected)
    assert trie.levels == sids.shape[1]
    # Walking the CSR arrays from the root finds every prefix's children, in order.
    prefixes = [()]
    for level in range(trie.levels):
        children = []
        for node, prefix in enumerate(prefixes):
            span = slice(trie.offsets[level][node], trie.offsets[level][node + 1])
            tokens = trie.tokens[level][span].tolist()
            assert tokens == sorted({s[level] for s in expected if s[:level] == prefix})
            children += [(*prefix, t) for t in tokens]
        prefixes = children
        assert len(trie.tokens[level]) == len(prefixes)
    assert prefixes == expected


@settings(deadline=None)
@given(sid_tables(), st.integers(0, 2**31))
def test_leaf_of_finds_members_and_only_members(table, seed):
    sids, codes = table
    trie = Trie.build(sids, codes)
    order = {s: i for i, s in enumerate(sorted({tuple(r) for r in sids.tolist()}))}
    probe = np.random.default_rng(seed).integers(-1, min(codes, 5) + 1, size=(50, trie.levels))
    probe = np.concatenate([probe, sids])
    assert trie.leaf_of(probe).tolist() == [order.get(tuple(r), -1) for r in probe.tolist()]


def test_trie_refuses_padding_and_foreign_codes():
    with pytest.raises(ContractError, match=r"row 1 .*\[0, 4\)"):
        Trie.build(np.array([[0, 1], [2, -1]]), 4)
    with pytest.raises(ContractError, match="expected codes"):
        Trie.build(np.array([[0, 4]]), 4)
    with pytest.raises(ContractError, match="shape"):
        Trie.build(np.array([0, 1]), 4)
    with pytest.raises(ContractError, match="8 levels of 256 codes"):
        Trie.build(np.zeros((1, 8), dtype=np.int64), 256)


def test_catalog_maps_items_and_sids_both_ways():
    # item 7 and item 2 share a SID; items 0, 1, 3..6 have none
    catalog = ItemCatalog(np.array([7, 9, 2]), np.array([[1, 0], [0, 3], [1, 0]]), codes=4)
    assert catalog.trie.leaf_of(np.array([[1, 0], [0, 3], [3, 3]])).tolist() == [1, 0, -1]
    assert np.split(catalog.leaf_items, catalog.leaf_offsets[1:-1])[1].tolist() == [2, 7]
    assert np.split(catalog.leaf_items, catalog.leaf_offsets[1:-1])[0].tolist() == [9]
    assert catalog.sids_of(np.array([[9, 2], [-1, 3]])).tolist() == [[[0, 3], [1, 0]], [[-1, -1], [-1, -1]]]
    assert catalog.leaf_of_item(np.array([7, 9, 100])).tolist() == [1, 0, -1]


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 2**31), st.integers(1, 40))
def test_anchor_embedding_is_the_unit_mean_of_its_items(seed, count):
    rng = np.random.default_rng(seed)
    index = rng.permutation(60)[:count]
    sids = rng.integers(0, 3, size=(count, 2))
    embeddings = rng.normal(size=(60, 5)).astype(np.float32)
    embeddings /= np.linalg.norm(embeddings, axis=1, keepdims=True)
    catalog = ItemCatalog(index, sids, codes=3)
    anchors = catalog.anchor_embeddings(embeddings)
    for leaf, sid in enumerate(catalog.trie.sids().tolist()):
        mean = embeddings[[i for i, s in zip(index, sids.tolist(), strict=True) if s == sid]].mean(axis=0)
        np.testing.assert_allclose(anchors[leaf], mean / np.linalg.norm(mean), atol=1e-5)
    some = rng.integers(0, catalog.trie.size, size=7)
    np.testing.assert_allclose(catalog.anchor_embeddings(embeddings, some), anchors[some], atol=1e-6)


def test_anchor_embeddings_do_not_depend_on_the_chunk_size(monkeypatch):
    rng = np.random.default_rng(0)
    embeddings = rng.normal(size=(100, 4)).astype(np.float32)
    catalog = ItemCatalog(np.arange(100), rng.integers(0, 3, size=(100, 2)), codes=3)
    whole = catalog.anchor_embeddings(embeddings)
    monkeypatch.setattr("gpl_core.sids.item_catalog._SUM_ROWS", 5)
    np.testing.assert_array_equal(catalog.anchor_embeddings(embeddings), whole)


def test_opposite_items_of_one_sid_still_have_a_direction():
    embeddings = np.array([[1, 0], [-1, 0]], dtype=np.float32)
    anchors = ItemCatalog(np.array([0, 1]), np.array([[0], [0]]), codes=1).anchor_embeddings(embeddings)
    assert anchors.tolist() == [[1, 0]]


def test_an_empty_catalog_answers_with_nothing():
    catalog = ItemCatalog(np.empty(0, dtype=int), np.empty((0, 3), dtype=int), codes=8)
    assert catalog.trie.size == 0
    assert catalog.leaf_of_item(np.array([0])).tolist() == [-1]
    assert catalog.anchor_embeddings(np.empty((0, 4), dtype=np.float32)).shape == (0, 4)


def test_catalog_refuses_an_item_with_two_sids():
    with pytest.raises(ContractError, match="item_index: 3 occurs more than once"):
        ItemCatalog(np.array([3, 3]), np.array([[0], [1]]), codes=2)
