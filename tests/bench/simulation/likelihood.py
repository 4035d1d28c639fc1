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

from gpl_core.interest.search import Anchors, BeamSearch, _Beams, _Kept
from gpl_core.interest.trie_scoring import child_log_probs
from gpl_core.sids.trie import Trie


class VisitedSearch(BeamSearch):
    """A beam search that also keeps the scores it visits."""

    def search_with_likelihoods(
        self, histories: Sequence[np.ndarray], items: Sequence[np.ndarray]
    ) -> tuple[Anchors, np.ndarray, np.ndarray]:
        """Anchors as `search`; ln p of every SID float32 [U x S], backed off; the same from level 1 alone."""
        parts: list[Anchors] = []
        order: list[np.ndarray] = []
        likelihood, first = np.empty((2, len(histories), self.trie.size), dtype=np.float32)
        self._visited: list[np.ndarray] = []
        for users, found in self.batches(histories, items):
            parts.append(found)
            order.append(users)
            likelihood[users] = backed_off(self.trie.trie, self._visited)
            nothing = [np.full_like(v, -np.inf) for v in self._visited[1:]]
            first[users] = backed_off(self.trie.trie, [self._visited[0], *nothing])
        for name, found_log_p in (("all levels", likelihood), ("level 1", first)):
            total = np.exp(found_log_p.astype(np.float64)).sum(axis=1)
            assert np.allclose(total, 1.0, atol=1e-3), f"{name}: the SIDs' probabilities sum to {total.min()} or more"
        place = np.argsort(np.concatenate(order))
        anchors = Anchors(*(np.concatenate(arrays)[place] for arrays in zip(*parts, strict=True)))
        return anchors, likelihood, first

    def _extend(
        self, level: int, hidden: Tensor, query: Tensor | None, beams: _Beams, kept: _Kept
    ) -> tuple[_Beams, _Kept]:
        asked = query.repeat_interleave(beams.score.shape[1], dim=0) if query is not None else None
        children, own = child_log_probs(self.model, self.trie, level, beams.node.flatten(), hidden, asked)
        score = beams.score.flatten()[:, None].to(own.dtype) + own
        users, width = beams.score.shape
        nodes = len(self.trie.tokens[level])
        real = children.valid & torch.isfinite(score)
        user = torch.arange(users, device=score.device).repeat_interleave(width)[:, None].expand_as(real)
        seen = torch.full((users, nodes), -torch.inf, device=score.device)
        seen[user[real], children.node[real]] = score[real].float()
        self._visited = [*(self._visited if level else []), seen.cpu().numpy()]
        return super()._extend(level, hidden, query, beams, kept)


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
