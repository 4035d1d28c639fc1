"""Similarity of (user, item) pairs to the user's interest anchors, and the three confidence factors (torch).

Max-pooled cosine and the idea of the three factors are the paper's (arXiv 2602.20995); the formulas below are ours
(docs/method.md). With anchors a_1 .. a_K of one user, g(a) the unit anchor embedding, e(i) the unit
item embedding, w_k = p_k / sum p over the user's anchors:

    similarity(u, i)         = max_k <e(i), g(a_k)>, k* its argmax (the likelier anchor on a tie)
    history_similarity(u, i) = max_{j in H_u} <e(i), e(j)>
    coherence R_u            = || sum_k w_k g(a_k) ||           (mean resultant length: Mardia & Jupp 2000)
    consistency h_u          = sum_k w_k max_{j in H_u} max(0, <g(a_k), e(j)>)
    llm_confidence q_ui      = exp(log p_{k*} / L)              (geometric-mean token probability)
    prefix_log_prob(u, i)    = log-probability of the candidate's own SID, see the function

Legend for shapes: U users of a block, K anchors, H history items, B candidates, N items, d width, L levels of a SID.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from gpl_core.errors import ContractError

_CPU_GATHER_BYTES = 16 * 2**20


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
    `anchors`), on the block's device.

    Raises ContractError when shapes disagree, levels < 1, or an item number is beyond N.
    """
    _check(block, item_vectors, levels)
    step = max(1, len(block.anchors))
    if item_vectors.device.type == "cpu":
        # Larger gathers get fresh pages from the system every time, which costs as much as the gather itself.
        size = block.candidates.shape[1] * item_vectors.shape[1] * block.anchors.element_size()
        step = max(1, _CPU_GATHER_BYTES // max(1, size))
    parts = [_score(PairBlock(*p), item_vectors, levels) for p in zip(*(t.split(step) for t in block), strict=True)]
    return parts[0] if len(parts) == 1 else PairScores(*(torch.cat(pieces) for pieces in zip(*parts, strict=True)))


def _score(block: PairBlock, item_vectors: Tensor, levels: int) -> PairScores:
    anchors, anchor_mask, log_prob, history, candidates = block
    kind = anchors.dtype
    k = anchors.shape[1]

    history_mask = history >= 0
    history_vectors = _gather(item_vectors, history, kind)  # [U x H x d]
    # A padded anchor may hold NaN: it must not leak into the weighted sums through 0 * NaN.
    if not bool(anchor_mask.all()):
        anchors = anchors.masked_fill(~anchor_mask[..., None], 0)
    probes = torch.cat([anchors, history_vectors], dim=1)  # one product for both maxima: candidates are gathered once
    gathered = _gather(item_vectors, candidates, kind)
    products = torch.bmm(gathered, probes.transpose(1, 2)).float()  # [U x B x (K + H)]

    to_anchors = products[..., :k].masked_fill(~anchor_mask[:, None], -torch.inf)
    to_history = products[..., k:].masked_fill(~history_mask[:, None], -torch.inf)
    valid = (candidates >= 0) & anchor_mask.any(dim=1)[:, None]
    similarity, rank = to_anchors.max(dim=-1)

    logs = log_prob.float().masked_fill(~anchor_mask, -torch.inf)
    weight = torch.softmax(logs, dim=1).nan_to_num(0.0)  # all masked gives NaN rows
    resultant = torch.einsum("uk,ukd->ud", weight.to(kind), anchors).float()
    consistency = torch.zeros_like(weight[:, 0])
    history_similarity = torch.zeros_like(similarity)
    if history.shape[1]:
        between = torch.bmm(anchors, history_vectors.transpose(1, 2)).float()
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


def prefix_log_prob(
    anchor_sids: Tensor,
    anchor_mask: Tensor,
    log_prob: Tensor,
    prefixes: Tensor,
    prefix_log_probs: Tensor,
    candidate_sids: Tensor,
    below: Tensor,
    size: int,
) -> Tensor:
    """ln of the probability of a candidate's own SID as far as the search scored it, float32 [U x B] (ours).

    An anchor has its own. Any other SID has an equal part of its longest prefix that is known: of a kept prefix what
    its anchors leave, else the mass of the anchors that have the prefix. A SID without any known prefix, or a candidate
    without a SID, shares what no known prefix has (at least 1e-6) with all SIDs. A score: over the catalog it need
    not sum to 1.

    anchor_sids: int [U x K x L]; anchor_mask, log_prob: [U x K], as in `score_block`; prefixes: int [U x P x L], -1
    after a prefix' end; prefix_log_probs: [U x P]; candidate_sids: int [U x B x L], -1 where there is none; below: int
    [U x B x L], SIDs below each of the candidate's prefixes (`Trie.leaves_below`), ignored where there is none; size:
    SIDs in the catalog.
    """
    levels = candidate_sids.shape[2]
    p = torch.exp(log_prob.float()).masked_fill(~anchor_mask, 0.0)
    # A prefix as one number; 0 is the empty one, which stands for padding.
    base = 2 + max((int(x.max()) for x in (prefixes, candidate_sids) if x.numel()), default=0)
    weights = base ** torch.arange(levels - 1, -1, -1, device=p.device)
    known, order = torch.nn.functional.pad(((prefixes.long() + 1) * weights).sum(dim=2), (0, 1)).sort(dim=1)
    mass_of = torch.nn.functional.pad(torch.exp(prefix_log_probs.float()), (0, 1)).gather(1, order)
    of_one = (prefixes[..., 0] >= 0) & (prefixes[..., 1:] < 0).all(dim=2)
    # In double precision: what is left of 1 may be a millionth.
    first = (torch.exp(prefix_log_probs.double()) * of_one).sum(dim=1)
    anchored = torch.exp(log_prob.double()).masked_fill(~anchor_mask, 0.0).sum(dim=1)
    rest = (1.0 - torch.maximum(first, anchored)).clamp(min=1e-6).float()
    out = torch.log(rest / size)[:, None].expand(candidate_sids.shape[:2])
    there = candidate_sids[..., 0] >= 0
    shared = there[:, :, None] & anchor_mask[:, None]  # [U x B x K]
    own = torch.zeros_like(candidate_sids[..., 0], dtype=torch.long)
    for level in range(levels):
        shared = shared & (candidate_sids[:, :, None, level] == anchor_sids[:, None, :, level])
        mass, count = (shared * p[:, None]).sum(dim=2), shared.sum(dim=2)
        leaves = below[..., level]
        value, found = mass / leaves.clamp(min=1), mass > 0
        if level < levels - 1:
            own = own + (candidate_sids[..., level].long() + 1) * weights[level]
            place = torch.searchsorted(known, own).clamp_max(known.shape[1] - 1)
            hit = there & (known.gather(1, place) == own)
            of_prefix = mass_of.gather(1, place)
            free = torch.maximum(of_prefix - mass, 1e-6 * of_prefix) / (leaves - count).clamp(min=1)
            value, found = torch.where(hit, free, value), found | hit
        out = torch.where(found, torch.log(value.clamp(min=1e-30)), out)
    return out


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


def _check(block: PairBlock, item_vectors: Tensor, levels: int) -> None:
    anchors, anchor_mask, log_prob, history, candidates = block
    users, k, width = anchors.shape
    expected = {
        "anchor_mask": (anchor_mask, (users, k)),
        "log_prob": (log_prob, (users, k)),
        "history": (history, (users, history.shape[-1])),
        "candidates": (candidates, (users, candidates.shape[-1])),
        "item_vectors": (item_vectors, (len(item_vectors), width)),
    }
    for name, (tensor, shape) in expected.items():
        if tuple(tensor.shape) != shape:
            raise ContractError(f"score_block: {name} has shape {tuple(tensor.shape)}; expected {shape}")
    if levels < 1 or k < 1 or len(item_vectors) < 1:
        raise ContractError(
            f"score_block: levels {levels}, anchors {k}, items {len(item_vectors)}; expected at least 1 each"
        )
    for name, items in (("history", history), ("candidates", candidates)):
        largest = int(items.max()) if items.numel() else -1
        if largest >= len(item_vectors):
            raise ContractError(
                f"score_block: {name} holds item_index {largest}; item_embeddings has {len(item_vectors)} rows: "
                "read the embeddings at the version the requests were made from"
            )
