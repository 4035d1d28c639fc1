"""Similarity of (user, item) pairs to the user's interest anchors, and the three confidence factors (torch).

Max-pooled cosine and the idea of the three factors are the paper's (arXiv 2602.20995); the formulas below are ours
(docs/method.md). With anchors a_1 .. a_K of one user, g(a) the unit anchor embedding, e(i) the unit
item embedding, w_k = p_k / sum p over the user's anchors:

    similarity(u, i)         = max_k <e(i), g(a_k)>, k* its argmax (the likelier anchor on a tie)
    history_similarity(u, i) = max_{j in H_u} <e(i), e(j)>
    coherence R_u            = || sum_k w_k g(a_k) ||           (mean resultant length: Mardia & Jupp 2000)
    consistency h_u          = sum_k w_k max_{j in H_u} max(0, <g(a_k), e(j)>)
    llm_confidence q_ui      = exp(log p_{k*} / L)              (geometric-mean token probability)

Legend for shapes: U users of a block, K anchors, H history items, B candidates, N items, d width, L levels of a SID.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from gpl_core.errors import ContractError

_CPU_GATHER_BYTES = 2**19


class PairScores(NamedTuple):
    """Scores of one block; entries where `valid` is False are 0 and mean nothing."""

    similarity: Tensor  # float32 [U x B] in [-1, 1]
    history_similarity: Tensor  # float32 [U x B] in [-1, 1]; 0 for a user without a history item that has an embedding
    anchor_rank: Tensor  # int64 [U x B]: k*, 0 for the likeliest anchor
    llm_confidence: Tensor  # float32 [U x B] in [0, 1]
    coherence: Tensor  # float32 [U] in [0, 1]; 0 without anchors
    consistency: Tensor  # float32 [U] in [0, 1]; 0 without anchors or without history
    valid: Tensor  # bool [U x B]: the candidate is not padding, and the user has an anchor


class PairBlock(NamedTuple):
    """Users and their candidates to score, on one device."""

    anchors: Tensor  # unit vectors g(a_k) [U x K x d], likeliest first
    anchor_mask: Tensor  # bool [U x K], False where padded or where no item carries the SID any more
    log_prob: Tensor  # [U x K], natural log, ignored where masked
    history: Tensor  # int64 [U x H], row numbers of the item vectors; -1 where padded or without a vector
    candidates: Tensor  # int64 [U x B], likewise


def score_block(block: PairBlock, item_vectors: Tensor, levels: int) -> PairScores:
    """Scores every candidate of every user in the block in one pass.

    item_vectors: [N x d], float32 or a half type (the products are then made from half-precision values, in the type of
    `anchors`), on the block's device. ContractError when an item number is beyond N.
    """
    _check(block, item_vectors)
    anchors, anchor_mask, log_prob, history, candidates = block
    kind = anchors.dtype
    k = anchors.shape[1]

    history_mask = history >= 0
    # A padded anchor may hold NaN: it must not leak into the weighted sums through 0 * NaN.
    if not bool(anchor_mask.all()):
        anchors = anchors.masked_fill(~anchor_mask[..., None], 0)
    products, between = _cosines(item_vectors, anchors, history, candidates)
    used = torch.cat([anchor_mask, history_mask], dim=1)
    if not bool(used.all()):
        products.masked_fill_(~used[:, None], -torch.inf)
    to_anchors, to_history = products[..., :k], products[..., k:]
    valid = (candidates >= 0) & anchor_mask.any(dim=1)[:, None]
    similarity, rank = to_anchors.max(dim=-1)

    logs = log_prob.float().masked_fill(~anchor_mask, -torch.inf)
    weight = torch.softmax(logs, dim=1).nan_to_num(0.0)  # all masked gives NaN rows
    resultant = torch.einsum("uk,ukd->ud", weight.to(kind), anchors).float()
    consistency = torch.zeros_like(weight[:, 0])
    history_similarity = torch.zeros_like(similarity)
    if history.shape[1]:
        between = between.masked_fill(~history_mask[:, None], 0)  # as good as -inf: max(0, .) follows
        consistency = (weight * between.amax(dim=-1).clamp(min=0)).sum(dim=1)
        some = history_mask.any(dim=1)[:, None]
        history_similarity = torch.where(some, to_history.amax(dim=-1), 0.0)

    def pairs(values: Tensor) -> Tensor:
        return torch.where(valid, values, torch.zeros_like(values))

    return PairScores(
        similarity=pairs(similarity.clamp(-1, 1)),
        history_similarity=pairs(history_similarity.clamp(-1, 1)),
        anchor_rank=pairs(rank),
        llm_confidence=pairs(torch.exp(logs.gather(1, rank) / levels).clamp(0, 1)),
        coherence=resultant.norm(dim=1).clamp(0, 1),
        consistency=consistency.clamp(0, 1),
        valid=valid,
    )


def first_occurrence(candidates: Tensor) -> Tensor:
    """bool [U x B]: False where the same item (or padding, -1) stands earlier in the row; padding is always False."""
    order = torch.argsort(candidates, dim=1, stable=True)
    ordered = candidates.gather(1, order)
    new = torch.ones_like(ordered, dtype=torch.bool)
    new[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    return torch.zeros_like(new).scatter(1, order, new) & (candidates >= 0)


def _gather(vectors: Tensor, rows: Tensor, kind: torch.dtype) -> Tensor:
    """vectors[rows] [U x n x d], any vector for -1; index_select copies whole rows: on a CPU faster than indexing."""
    found = torch.index_select(vectors, 0, rows.clamp(min=0).reshape(-1))
    return found.view(*rows.shape, vectors.shape[1]).to(kind)


def _cosines(vectors: Tensor, anchors: Tensor, history: Tensor, candidates: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines float32 of candidates to anchors and history [U x B x (K + H)], and of anchors to history [U x K x H]."""
    (users, count), k, kind = candidates.shape, anchors.shape[1], anchors.dtype
    step = max(1, users)
    if vectors.device.type == "cpu":
        # What is gathered stays in the core's cache until the products have read it.
        step = max(1, _CPU_GATHER_BYTES // max(1, count * vectors.shape[1] * anchors.element_size()))
    out = anchors.new_empty(users, count, k + history.shape[1])
    between = anchors.new_empty(users, k, history.shape[1])
    for start in range(0, users, step):
        part = slice(start, start + step)
        past = _gather(vectors, history[part], kind)
        probes = torch.cat([anchors[part], past], dim=1)  # one product for both maxima: candidates are gathered once
        torch.bmm(_gather(vectors, candidates[part], kind), probes.transpose(1, 2), out=out[part])
        torch.bmm(anchors[part], past.transpose(1, 2), out=between[part])
    return out.float(), between.float()


def _check(block: PairBlock, item_vectors: Tensor) -> None:
    for name, items in (("history", block.history), ("candidates", block.candidates)):
        largest = int(items.max()) if items.numel() else -1
        if largest >= len(item_vectors):
            raise ContractError(
                f"score_block: {name} holds item_index {largest}; item_embeddings has {len(item_vectors)} rows: "
                "read the embeddings at the version the requests were made from"
            )
