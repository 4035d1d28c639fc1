"""Titles and SIDs predict each other: the packed losses are those of one forward pass per token."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from gpl_core.errors import UsageError
from gpl_core.interest.alignment import MOST_TOKENS, Titles, alignment_losses, title_pack
from gpl_core.interest.attention import CausalPlan
from gpl_core.interest.interest_model import InterestModel, ModelSettings, build_interest_model
from gpl_core.interest.trie_scoring import DeviceTrie
from gpl_core.sids.trie import Trie
from tests.gpl_core.interest.conftest import World

SIDS = np.array([[1, 2, 3], [1, 2, 4], [5, 0, 0]])
TITLES = ["Oil filter", "Air", "Drill, 12 V"]


def last_hidden(model: InterestModel, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        row = torch.tensor(ids)
        return model.hidden(row, torch.arange(len(ids)), CausalPlan(np.array([len(ids)])))[-1]


def test_losses_are_those_of_one_forward_pass_per_token(model: InterestModel) -> None:
    vocabulary, tokenizer = model.vocabulary, model.tokenizer
    titles = Titles.of(model, TITLES, SIDS)
    trie = DeviceTrie(Trie.build(SIDS, vocabulary.codes))
    with torch.no_grad():
        to_sid, to_title = alignment_losses(model, trie, title_pack(vocabulary, titles.tokens, titles.sids))
    sid_scores, word_scores = [], []
    for text, sid in zip(TITLES, SIDS, strict=True):
        title, codes = tokenizer.encode(text, add_special_tokens=False), vocabulary.ids(sid).tolist()
        for level in range(3):
            siblings = sorted({int(s[level]) for s in SIDS if (s[:level] == sid[:level]).all()})
            logits = (model.scale[level] * model.level_rows(level)).detach() @ last_hidden(model, title + codes[:level])
            sid_scores.append(logits[siblings].log_softmax(0)[siblings.index(sid[level])])
        for place, word in enumerate([*title, vocabulary.eos_id]):
            logits = model.word_rows @ last_hidden(model, codes + title[:place])
            word_scores.append(logits.log_softmax(0)[word])
    torch.testing.assert_close(to_sid, -torch.stack(sid_scores).sum() / len(SIDS), rtol=0, atol=1e-9)
    torch.testing.assert_close(to_title, -torch.stack(word_scores).mean(), rtol=0, atol=1e-9)


def test_both_tasks_are_learnt_and_the_base_s_words_stay(checkpoint: Path) -> None:
    model = build_interest_model(checkpoint, ModelSettings(levels=3, codes=8, lora_rank=4))
    titles = Titles.of(model, TITLES, SIDS)
    trie = DeviceTrie(Trie.build(SIDS, 8))
    pack = title_pack(model.vocabulary, titles.tokens, titles.sids)
    words = model.word_rows.clone()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(10):
        both = alignment_losses(model, trie, pack)
        losses.append([x.item() for x in both])
        optimizer.zero_grad()
        sum(both).backward()
        optimizer.step()
    assert (np.array(losses[-1]) < 0.98 * np.array(losses[0])).all()
    assert torch.equal(model.word_rows, words)


def test_every_item_comes_once_before_any_comes_again(world: World) -> None:
    titles = Titles.of(world.model, [f"item number {n}" for n in range(12)], world.trie.trie.sids()[:12])
    mean = np.mean([len(t) for t in titles.tokens])
    four = int(4 * 2 * (mean + 3)) + 1
    packs = list(islice(titles.packs(four, seed=[1, 2]), 3))
    assert sorted(map(tuple, np.concatenate([p.pack.target_sids for p in packs]))) == sorted(map(tuple, titles.sids))
    again = list(islice(titles.packs(four, seed=[1, 2]), 3))
    assert all((a.pack.token_ids == b.pack.token_ids).all() for a, b in zip(packs, again, strict=True))
    other = next(titles.packs(four, seed=[1, 3]))
    assert not np.array_equal(other.pack.token_ids, packs[0].pack.token_ids)


def test_long_titles_are_cut_and_items_without_one_left_out(model: InterestModel) -> None:
    titles = Titles.of(model, ["", "x" * 100, "ok"], SIDS)
    assert [len(t) for t in titles.tokens] == [MOST_TOKENS, 2]
    np.testing.assert_array_equal(titles.sids, SIDS[1:])
    with pytest.raises(UsageError, match="no item has a title"):
        Titles.of(model, ["", ""], SIDS[:2])
