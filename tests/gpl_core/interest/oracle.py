"""Slow and obvious versions of what gpl_core.interest computes: full sequences, full recomputation, no packing."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from gpl_core.interest.attention import CausalPlan
from gpl_core.interest.content import RECENT
from gpl_core.interest.interest_model import InterestModel
from gpl_core.interest.training import TargetScores

Sid = tuple[int, ...]


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
            query = model.content.share * model.content.query(alone)
            held = {tuple(map(int, s)) for s in trie_sids}
            events = [tuple(map(int, s)) for s in history[::-1][:RECENT]]
            recent = {age: sid for age, sid in enumerate(events) if sid in held}
            below = [log_sum_below(model, content, (*prefix, c), query, recent) for c in children]
            logits = logits + torch.stack(below)
        return dict(zip(children, logits.log_softmax(0).tolist(), strict=True))


def log_sum_below(
    model: InterestModel, content: Content, prefix: Sid, query: torch.Tensor, recent: dict[int, Sid]
) -> torch.Tensor:
    """log of the summed exp(content logit) of the SIDs that begin so. ``recent``: age -> SID of the newest events."""
    below = {tuple(map(int, s)) for s in content.sids if tuple(s[: len(prefix)]) == prefix}
    return torch.stack([content_logit(model, content, sid, query, recent) for sid in sorted(below)]).logsumexp(0)


def content_logit(
    model: InterestModel, content: Content, sid: Sid, query: torch.Tensor, recent: dict[int, Sid]
) -> torch.Tensor:
    """<query, v> + log(1 + sum over the events of exp(age + own + sharpness (cos(v_j, v) - 1)))."""
    heads = model.content

    def vector(sid: Sid) -> torch.Tensor:
        return torch.from_numpy(mean_below(content, sid) - mean_below(content, ()))

    def cosine(one: Sid, other: Sid) -> torch.Tensor:
        return torch.nn.functional.cosine_similarity(vector(one), vector(other), dim=0)

    like = [
        heads.age[age] + heads.own[age] * (other == sid) + heads.sharpness[0] * (cosine(other, sid) - 1)
        for age, other in recent.items()
    ]
    return vector(sid) @ query + torch.stack([torch.zeros(()).double(), *like]).logsumexp(0)


def mean_below(content: Content, prefix: tuple[int, ...]) -> np.ndarray:
    """The mean over the SIDs that begin so, each its items' mean; of the shorter prefix where no item has a vector."""
    known = content.sids[~np.isnan(content.vectors[:, 0])].tolist()
    inside = sorted({tuple(sid) for sid in known if tuple(sid[: len(prefix)]) == prefix})
    if not inside:
        return mean_below(content, prefix[:-1])
    means = [np.nanmean(content.vectors[(content.sids == sid).all(axis=1)], axis=0) for sid in inside]
    return np.mean(means, axis=0)


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
