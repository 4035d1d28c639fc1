"""A candidate's own SID likelihood, from what the beam search computes anyway: tried beside the anchors.

The search scores every child of every beam. Here all of these scores are kept, so that any SID has ln p of the deepest
prefix that was visited. What lies below it is taken as equally likely (ours):

    ln p(SID) = ln p(deepest visited prefix) - ln(number of SIDs below that prefix)

Level 1 is always visited: its probabilities come with the prefill.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from gpl_core.interest.objective import level_logits
from gpl_core.interest.scoring import child_log_probs
from gpl_core.interest.search import Anchors, BeamSearch, _Beams
from gpl_core.sids.trie import Trie


class VisitedSearch(BeamSearch):
    """A beam search that also keeps the scores it visits."""

    def search_with_likelihoods(
        self, histories: Sequence[np.ndarray], items: Sequence[np.ndarray]
    ) -> tuple[Anchors, np.ndarray, np.ndarray]:
        """Anchors as `search`; ln p of every SID float32 [U x S], backed off; the same from level 1 alone."""
        beams, levels = self.settings.beams, self.trie.levels
        sids = np.full((len(histories), beams, levels), -1, dtype=np.int32)
        log_prob = np.full((len(histories), beams), -100.0, dtype=np.float32)
        likelihood, first = np.empty((2, len(histories), self.trie.size), dtype=np.float32)
        self._visited: list[np.ndarray] = []
        for users, found in self.batches(histories, items):
            sids[users], log_prob[users] = found
            likelihood[users] = backed_off(self.trie.trie, self._visited)
            nothing = [np.full_like(v, -np.inf) for v in self._visited[1:]]
            first[users] = backed_off(self.trie.trie, [self._visited[0], *nothing])
        for name, found_log_p in (("all levels", likelihood), ("level 1", first)):
            total = np.exp(found_log_p.astype(np.float64)).sum(axis=1)
            assert np.allclose(total, 1.0, atol=1e-3), f"{name}: the SIDs' probabilities sum to {total.min()} or more"
        return Anchors(sids, log_prob), likelihood, first

    def _extend(self, level: int, hidden: Tensor, beams: _Beams) -> _Beams:
        children = self.trie.children(level, beams.node.flatten())
        own = child_log_probs(level_logits(self.model, hidden, level), children)
        score = beams.score.flatten()[:, None].to(own.dtype) + own
        users, width = beams.score.shape
        nodes = len(self.trie.tokens[level])
        real = children.valid & torch.isfinite(score)
        user = torch.arange(users, device=score.device).repeat_interleave(width)[:, None].expand_as(real)
        seen = torch.full((users, nodes), -torch.inf, device=score.device)
        seen[user[real], children.node[real]] = score[real].float()
        self._visited = [*(self._visited if level else []), seen.cpu().numpy()]
        return super()._extend(level, hidden, beams)


def backed_off(trie: Trie, visited: Sequence[np.ndarray]) -> np.ndarray:
    """ln p of every leaf float32 [U x S]; visited: per level ln p of its nodes [U x n], -inf where not visited."""
    node = np.arange(trie.size)
    out = visited[-1].copy()
    for level in range(trie.levels - 2, -1, -1):
        node = np.searchsorted(trie.offsets[level + 1], node, side="right") - 1
        below = np.bincount(node, minlength=visited[level].shape[1])
        prefix = (visited[level] - np.log(np.maximum(below, 1)))[:, node]
        out = np.where(np.isneginf(out), prefix, out)
    return out.astype(np.float32)


def from_anchors(trie: Trie, leaf: np.ndarray, log_prob: np.ndarray) -> np.ndarray:
    """ln p of every leaf float32 [S] from one user's anchors alone: leaf int [K] (-1: none), log_prob [K].

    A prefix has the mass of the anchors below it; a SID takes an equal part of its deepest prefix that has mass. What
    shares no prefix with any anchor shares the rest of the mass. A score for ranking: siblings of an anchor count its
    mass too, so it does not sum to 1.
    """
    kept = leaf >= 0
    mass = np.bincount(leaf[kept], np.exp(log_prob[kept].astype(np.float64)), minlength=trie.size)
    rest = max(1.0 - float(mass.sum()), 1e-6)
    node = np.arange(trie.size)
    out = np.log(mass, where=mass > 0, out=np.full(trie.size, -np.inf))
    for level in range(trie.levels - 2, -1, -1):
        parent = np.searchsorted(trie.offsets[level + 1], np.arange(len(trie.tokens[level + 1])), side="right") - 1
        mass = np.bincount(parent, mass, minlength=len(trie.tokens[level]))
        node = parent[node]
        share = (mass / np.bincount(node, minlength=len(mass)).clip(min=1))[node]
        prefix = np.log(share, where=share > 0, out=np.full(trie.size, -np.inf))
        out = np.where(np.isneginf(out), prefix, out)
    return np.where(np.isneginf(out), np.log(rest / trie.size), out).astype(np.float32)
