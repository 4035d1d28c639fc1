"""Alignment tasks: an item's title predicts its SID, and its SID the title, in addition to the next SID.

An option (as in LC-Rec and MiniOneRec), each task with its own weight. The loss of words is over the base's whole
vocabulary, that of SIDs follows `trie_scoring`. Legend: n items, L levels, M title tokens, V base tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from gpl_core.errors import UsageError
from gpl_core.interest.interest_model import InterestModel
from gpl_core.interest.objective import hidden_of, interest_loss, target_scores
from gpl_core.interest.packing import Pack, pack_rows
from gpl_core.interest.trie_scoring import DeviceTrie
from gpl_core.interest.vocabulary import SidVocabulary

MOST_TOKENS = 32  # longer titles are cut: their beginning names the item


@dataclass(frozen=True, eq=False)
class TitlePack:
    """Both tasks of some items in one row of tokens."""

    pack: Pack
    words: np.ndarray  # int64 [M]: title tokens to predict, each title closed by the end-of-text token
    word_places: np.ndarray  # int64 [M]: the packed position whose hidden state predicts that token


@dataclass(frozen=True, eq=False)
class Titles:
    """The titles of a bounded pool of items, as tokens."""

    vocabulary: SidVocabulary
    tokens: Sequence[np.ndarray]  # n times int64 [1 .. MOST_TOKENS]
    sids: np.ndarray  # int [n x L]

    @classmethod
    def of(cls, model: InterestModel, titles: Sequence[str], sids: np.ndarray) -> Titles:
        """``titles`` and ``sids`` (int [n x L]) of the same items; UsageError where none has a title.

        Items without a title are left out.
        """
        tokenizer: Any = model.tokenizer
        ids = [np.array(tokenizer.encode(t, add_special_tokens=False)[:MOST_TOKENS], dtype=np.int64) for t in titles]
        known = [n for n, row in enumerate(ids) if len(row)]
        if not known:
            raise UsageError("alignment: no item has a title; set interest.title_to_sid and sid_to_title to 0.")
        return cls(model.vocabulary, [ids[n] for n in known], np.asarray(sids)[known])

    def packs(self, token_budget: int, *, seed: Sequence[int]) -> Iterator[TitlePack]:
        """Endless packs of about ``token_budget`` tokens, items in random order; same seed, same packs."""
        random = np.random.default_rng(seed)
        mean = float(np.mean([len(row) for row in self.tokens]))
        items = max(1, min(len(self.tokens), int(token_budget / (2 * (mean + self.vocabulary.levels)))))
        waiting = np.empty(0, dtype=np.int64)
        while True:
            if len(waiting) < items:
                waiting = np.concatenate([waiting, random.permutation(len(self.tokens))])
            yield title_pack(self.vocabulary, [self.tokens[n] for n in waiting[:items]], self.sids[waiting[:items]])
            waiting = waiting[items:]


def title_pack(vocabulary: SidVocabulary, titles: Sequence[np.ndarray], sids: np.ndarray) -> TitlePack:
    """Each item twice: [title, SID], predicting the SID's codes, and [SID, title, end], predicting title and end.

    ``titles``: int64 token ids, none empty; ``sids`` int [n x L]. The last token of a row predicts nothing and is left
    out, so the two rows of an item have len(title) + L - 1 and len(title) + L tokens.
    """
    levels = vocabulary.levels
    codes = vocabulary.ids(sids)
    rows, places, words, word_places = [], [], [], []
    start = 0
    for title, code in zip(titles, codes, strict=True):
        closed = np.append(title, vocabulary.eos_id)
        rows += [np.concatenate([title, code[:-1]]), np.concatenate([code, title])]
        places.append(start + len(title) - 1 + np.arange(levels))
        start += len(rows[-2])
        words.append(closed)
        word_places.append(start + levels - 1 + np.arange(len(closed)))
        start += len(rows[-1])
    pack = pack_rows(rows, np.asarray(sids, dtype=np.int64), np.stack(places))
    return TitlePack(pack, np.concatenate(words), np.concatenate(word_places))


def alignment_losses(model: InterestModel, trie: DeviceTrie, titles: TitlePack) -> tuple[Tensor, Tensor]:
    """Mean negative log-likelihood in nats: per SID given its title, per title token given SID and tokens before."""
    hidden = hidden_of(model, titles.pack)
    to_sid = interest_loss(target_scores(model, trie, hidden, titles.pack))
    seen = hidden[torch.from_numpy(titles.word_places).to(hidden.device)]
    words = torch.from_numpy(titles.words).to(hidden.device)
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    to_title = cross_entropy((seen @ model.word_rows.T.to(seen.dtype)).to(dtype), words)
    return to_sid, to_title
