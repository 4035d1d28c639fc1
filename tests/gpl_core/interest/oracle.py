"""Slow and obvious versions of what gpl_core.interest computes: full sequences, full recomputation, no packing."""

from __future__ import annotations

import numpy as np
import torch

from gpl_core.interest.attention import CausalPlan
from gpl_core.interest.interest_model import InterestModel


def next_code_log_probs(
    model: InterestModel, trie_sids: np.ndarray, history: np.ndarray, prefix: tuple[int, ...]
) -> dict[int, float]:
    """log p of every valid next code: the whole sequence through the model, softmax over the prefix' children."""
    level, vocabulary = len(prefix), model.vocabulary
    children = sorted({int(s[level]) for s in trie_sids if tuple(s[:level]) == prefix})
    ids = [*vocabulary.ids(history).ravel()]
    ids += [vocabulary.first_id + i * vocabulary.codes + c for i, c in enumerate(prefix)]
    with torch.no_grad():
        hidden = model.hidden(torch.tensor(ids), torch.arange(len(ids)), CausalPlan(np.array([len(ids)])))[-1]
        logits = (model.scale[level] * (model.level_rows(level) @ hidden))[children]
        return dict(zip(children, logits.log_softmax(0).tolist(), strict=True))


def textbook_beams(
    model: InterestModel, trie_sids: np.ndarray, history: np.ndarray, widths: tuple[int, ...]
) -> list[tuple[tuple[int, ...], float]]:
    """Beam search as in a textbook: every beam is its own sequence; ties go to the smaller SID."""
    beams: list[tuple[tuple[int, ...], float]] = [((), 0.0)]
    for width in widths:
        longer = [
            ((*prefix, code), score + log_p)
            for prefix, score in beams
            for code, log_p in next_code_log_probs(model, trie_sids, history, prefix).items()
        ]
        beams = sorted(longer, key=lambda beam: (-beam[1], beam[0]))[:width]
    return beams
