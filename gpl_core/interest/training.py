"""Training of the interest model, independent of launcher and tables: objective, data and progress.

One forward pass predicts every next SID, by the scoring rule of the search.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Self

import numpy as np
import torch
from torch import Tensor

from gpl_core.interest.attention import CausalPlan
from gpl_core.interest.content import NeighborGraph, content_of
from gpl_core.interest.interest_model import InterestModel
from gpl_core.interest.packing import Pack, UserHistory, pack_targets
from gpl_core.interest.trie_scoring import DeviceTrie, child_log_probs, dense_scores, in_parts, recent_leaves
from gpl_core.sids.content_table import ContentTable
from gpl_core.sids.item_catalog import ItemCatalog

TEMPERATURES = tuple(2 ** (step / 4) for step in range(-4, 9))
"""At which held-out losses are taken: from a half to four."""
_WALKS_AT_A_TIME = 4_096


class TargetScores(NamedTuple):
    """Teacher-forced scores of one pack's targets; E' of its E targets are in the catalog."""

    log_prob: Tensor  # [E' x L]: log p of each code given the history and the codes before it
    outside: int  # E - E': targets left out because the catalog does not hold their SID (retired items)


def target_log_probs(
    model: InterestModel, trie: DeviceTrie, pack: Pack, content: ContentTable | None = None
) -> TargetScores:
    """log p of every target code of ``pack``; differentiable. ``content``: for a model that reads item vectors."""
    targets = _targets(model, trie, pack, content)

    def scores(*targets: Tensor) -> Tensor:
        levels = _levels(model, trie, *targets)
        return torch.stack([log_prob.gather(1, child)[:, 0] for child, log_prob in levels], dim=1)

    log_prob = in_parts(scores, _parts(trie, targets))
    return TargetScores(log_prob, len(pack.target_sids) - len(log_prob))


@torch.no_grad()
def tempered_losses(
    model: InterestModel, trie: DeviceTrie, pack: Pack, content: ContentTable | None = None
) -> tuple[Tensor, int]:
    """(summed -log p of the targets in the catalog, nats, at each of TEMPERATURES; how many they are)."""
    targets = _targets(model, trie, pack, content)
    losses = torch.zeros(len(TEMPERATURES), dtype=torch.float64, device=model.device)
    for part in _parts(trie, targets):
        for child, log_prob in _levels(model, trie, *part):
            tempered = ((log_prob / t).log_softmax(dim=1).gather(1, child).sum().double() for t in TEMPERATURES)
            losses -= torch.stack([*tempered])
    return losses.cpu(), len(targets[0])


def _targets(
    model: InterestModel, trie: DeviceTrie, pack: Pack, content: ContentTable | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Of E' targets in the catalog: the states that predict their codes [E' x L x D], their nodes [E' x L + 1], and the
    leaves of the events before them [E' x RECENT] (`recent_leaves`).
    """
    device = model.device
    hidden = model.hidden(
        torch.from_numpy(pack.token_ids).to(device),
        torch.from_numpy(pack.positions).to(device),
        CausalPlan(pack.lengths, device),
        content_of(content, pack.items, pack.item_places, device),
    )
    nodes, found = trie.path(torch.from_numpy(pack.target_sids).to(device))
    recent = recent_leaves(trie, pack.event_sids, pack.recent)
    return hidden[torch.from_numpy(pack.target_places).to(device)[found]], nodes[found], recent[found]


def _parts(trie: DeviceTrie, targets: Sequence[Tensor]) -> list[tuple[Tensor, ...]]:
    return list(zip(*(of.split(trie.histories_at_once) for of in targets), strict=True))


def _levels(
    model: InterestModel, trie: DeviceTrie, states: Tensor, nodes: Tensor, recent: Tensor
) -> Iterator[tuple[Tensor, Tensor]]:
    """Per level, of targets as `_targets` has them: which child it is, int64 [E' x 1], and log p of all, [E' x m]."""
    dense = dense_scores(model, trie, states[:, 0], recent)
    for level in range(trie.levels):
        node, child = nodes[:, level], nodes[:, level + 1]
        log_prob = child_log_probs(model, trie, level, node, states[:, level], dense)[1]
        yield (child - trie.offsets[level][node])[:, None], log_prob


class TrainingObjective(torch.nn.Module):
    """The module that DeepSpeed wraps: from a pack of sequences to the summed log p of its targets, in nats."""

    def __init__(self, model: InterestModel, trie: DeviceTrie, content: ContentTable | None) -> None:
        super().__init__()
        self.model, self.trie, self.content = model, trie, content

    def forward(self, pack: Pack) -> tuple[Tensor, int, int]:
        """(summed log p, targets in the catalog, targets outside it: retired items, left out)."""
        scores = target_log_probs(self.model, self.trie, pack, self.content)
        return scores.log_prob.sum(), len(scores.log_prob), scores.outside


@dataclass(frozen=True)
class Walks:
    """Synthetic users who walk between related items, mixed among the real ones."""

    graph: NeighborGraph
    catalog: ItemCatalog
    per_user: float

    def mixed(self, histories: Iterator[UserHistory], seed: Sequence[int]) -> Iterator[UserHistory]:
        """Each of ``histories``, followed by ``per_user`` walks on average."""
        due, turn = 0.0, 0
        ready: list[UserHistory] = []
        for history in histories:
            yield history
            due += self.per_user
            while due >= 1:
                if not ready:
                    items = self.graph.walks(_WALKS_AT_A_TIME, seed=[*seed, turn])
                    sids = self.catalog.sids_of(items)
                    all_targets = np.ones(items.shape[1], dtype=bool)
                    ready = [UserHistory(s, all_targets, i) for s, i in zip(sids, items, strict=True)]
                    turn += 1
                yield ready.pop()
                due -= 1


@dataclass(frozen=True)
class TrainingProgress:
    """How far a training run is; saved with every checkpoint."""

    epoch: int = 0  # finished epochs
    best_epoch: int = -1
    """The one to publish, with the lowest loss at its own best temperature. A model that trains on grows too sure of
    itself while its ranking gets better still (Guo et al. 2017), and HR@10 of few users is noisy."""
    best_loss: float = math.inf
    best_hit_rate: float = -1.0
    better_epoch: int = -1  # the last one with a lower loss or a higher hit rate than all before it
    history: tuple[dict[str, float], ...] = ()
    step: int = 0  # optimizer steps of the unfinished epoch
    sums: tuple[float, float, float] = (0.0, 0.0, 0.0)
    """Over these steps and all ranks: loss, targets, targets outside the catalog."""

    def after(self, loss: float, hit_rate: float, figures: dict[str, float]) -> Self:
        """The progress after one more epoch with held-out ``loss`` and ``hit_rate``."""
        found = replace(self, epoch=self.epoch + 1, history=(*self.history, figures), step=0, sums=(0.0, 0.0, 0.0))
        if loss < self.best_loss:
            found = replace(found, best_epoch=self.epoch, best_loss=loss, better_epoch=self.epoch)
        if hit_rate > self.best_hit_rate:
            found = replace(found, best_hit_rate=hit_rate, better_epoch=self.epoch)
        return found

    def is_over(self, patience: int) -> bool:
        """Whether neither loss nor hit rate has improved for ``patience`` epochs."""
        return self.epoch > 0 and self.epoch - 1 - self.better_epoch >= patience


def empty_pack(model: InterestModel) -> Pack:
    """One event and no target, for a rank that has no file."""
    one = UserHistory(np.zeros((2, model.vocabulary.levels), dtype=np.int64), np.ones(2, dtype=bool))
    return without_targets(pack_targets(model.vocabulary, [one], 2))


def without_targets(pack: Pack) -> Pack:
    """The same context, of which nothing is predicted."""
    none = {name: getattr(pack, name)[:0] for name in ("target_sids", "target_places", "recent")}
    return replace(pack, **none)
