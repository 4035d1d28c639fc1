"""Slow and obvious versions of what gpl_core.interest computes: full sequences, full recomputation, no packing."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from gpl_core.interest.attention import CausalPlan
from gpl_core.interest.interest_model import InterestModel
from gpl_core.interest.training import TargetScores


class Content(NamedTuple):
    """What a model that reads content knows: every item's vector and SID, and the history's items."""

    vectors: np.ndarray  # float [N x d], NaN where an item has none
    sids: np.ndarray  # int [N x L]
    history: np.ndarray  # int [n]


def next_code_log_probs(
    model: InterestModel,
    trie_sids: np.ndarray,
    history: np.ndarray,
    prefix: tuple[int, ...],
    content: Content | None = None,
) -> dict[int, float]:
    """log p of every valid next code: the whole sequence through the model, softmax over the prefix' children."""
    level, vocabulary = len(prefix), model.vocabulary
    children = sorted({int(s[level]) for s in trie_sids if tuple(s[:level]) == prefix})
    ids = [*vocabulary.ids(history).ravel()]
    ids += [vocabulary.first_id + i * vocabulary.codes + c for i, c in enumerate(prefix)]
    with torch.no_grad():
        read = None
        if content:
            known = np.flatnonzero(~np.isnan(content.vectors[content.history, 0]))
            places, vectors = known * vocabulary.levels + vocabulary.levels - 1, content.vectors[content.history[known]]
            read = (torch.from_numpy(places), torch.from_numpy(vectors))
        hidden = model.hidden(torch.tensor(ids), torch.arange(len(ids)), CausalPlan(np.array([len(ids)])), read)[-1]
        logits = (model.level_rows(level) @ hidden)[children] * model.scale[level]
        if content:
            before = len(ids) - level  # the state after the history alone asks
            alone = model.hidden(
                torch.tensor(ids[:before]), torch.arange(before), CausalPlan(np.array([before])), read
            )[-1]
            query = model.content.query(alone)
            logits = logits + model.content.share[level] * torch.stack([
                torch.from_numpy(mean_below(content, (*prefix, c))) @ query for c in children
            ])  # fmt: skip
        return dict(zip(children, logits.log_softmax(0).tolist(), strict=True))


def mean_below(content: Content, prefix: tuple[int, ...]) -> np.ndarray:
    """The mean vector of the items whose SID begins so; of the shorter prefix where none of them has a vector."""
    inside = (content.sids[:, : len(prefix)] == prefix).all(axis=1) & ~np.isnan(content.vectors[:, 0])
    return content.vectors[inside].mean(axis=0) if inside.any() else mean_below(content, prefix[:-1])


def textbook_beams(
    model: InterestModel,
    trie_sids: np.ndarray,
    history: np.ndarray,
    widths: tuple[int, ...],
    content: Content | None = None,
) -> list[tuple[tuple[int, ...], float]]:
    """Beam search as in a textbook: every beam is its own sequence; ties go to the smaller SID."""
    beams: list[tuple[tuple[int, ...], float]] = [((), 0.0)]
    for width in widths:
        longer = [
            ((*prefix, code), score + log_p)
            for prefix, score in beams
            for code, log_p in next_code_log_probs(model, trie_sids, history, prefix, content).items()
        ]
        beams = sorted(longer, key=lambda beam: (-beam[1], beam[0]))[:width]
    return beams


def interest_loss(scores: TargetScores) -> torch.Tensor:
    """Mean negative log-likelihood per target SID, in nats; 0 (still differentiable) for a pack without targets."""
    return -scores.log_prob.sum() / max(len(scores.log_prob), 1)
