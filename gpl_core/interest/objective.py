"""The training loss: one forward pass predicts every next SID, by the scoring rule of the search."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from gpl_core.interest.attention import CausalPlan
from gpl_core.interest.interest_model import InterestModel
from gpl_core.interest.packing import Pack
from gpl_core.interest.trie_scoring import DeviceTrie, child_log_probs, content_query
from gpl_core.sids.content_table import ContentTable


class TargetScores(NamedTuple):
    """Teacher-forced scores of one pack's targets; E' of its E targets are in the catalog."""

    log_prob: Tensor  # [E' x L]: log p of each code given the history and the codes before it
    outside: int  # E - E': targets left out because the catalog does not hold their SID (retired items)


def target_log_probs(
    model: InterestModel, trie: DeviceTrie, pack: Pack, content: ContentTable | None = None
) -> TargetScores:
    """log p of every target code of ``pack``; differentiable. ``content``: for a model that reads item vectors."""
    device = model.device
    hidden = model.hidden(
        torch.from_numpy(pack.token_ids).to(device),
        torch.from_numpy(pack.positions).to(device),
        CausalPlan(pack.lengths, device),
        content_of(content, pack.items, pack.item_places, device),
    )
    sids = torch.from_numpy(pack.target_sids).to(device)
    nodes, found = trie.path(sids)
    places = torch.from_numpy(pack.target_places).to(device)[found]
    nodes = nodes[found]
    scores = []
    query = content_query(model, hidden[places[:, 0]])
    for level in range(trie.levels):
        node, child = nodes[:, level], nodes[:, level + 1]
        log_prob = child_log_probs(model, trie, level, node, hidden[places[:, level]], query)[1]
        scores.append(log_prob.gather(1, (child - trie.offsets[level][node])[:, None])[:, 0])
    return TargetScores(torch.stack(scores, dim=1), len(sids) - len(nodes))


def content_of(
    table: ContentTable | None, items: np.ndarray, places: np.ndarray, device: torch.device
) -> tuple[Tensor, Tensor] | None:
    """The ``content`` of `InterestModel.hidden`: places int64 [m] and vectors [m x d] of the items that have one."""
    if table is None:
        return None
    rows = table.rows(items)
    known = rows >= 0
    return torch.from_numpy(places[known]).to(device), table.take(rows[known]).to(device)


def interest_loss(scores: TargetScores) -> Tensor:
    """Mean negative log-likelihood per target SID, in nats; 0 (still differentiable) for a pack without targets."""
    return -scores.log_prob.sum() / max(len(scores.log_prob), 1)
