"""The scoring rule of training and search (ours): at each level a softmax over the prefix's *valid children* only.

log p(SID) = sum over levels of log p(c_l | c_<l, history); the probabilities of all SIDs of the catalog sum to 1.
The logit of a child is scale_l <h, row of its code> and, for a model that reads content, + the log of the sum of
exp(content logit) over the leaves below it: SIDs and dense retrieval in one probability. h is the last state after the
prefix. With equal rows of codes what is left is the softmax of the content logits over all SIDs, exactly, however deep
the trie is. The content logit of a leaf with vector v is

    share <W h_0, v> + log(1 + sum_j exp(age_j + own_j [the leaf is event j's] + sharpness (cos(v_j, v) - 1)))

h_0 is the state after the history, v_j the vector of the leaf of its j-th newest event: what is wanted next is like
something that was wanted lately, in whatever the small state forgot; and W h_0 learns what that does not explain.

Legend for shapes: H histories, R prefixes (as many of each history, one history's after another), m most children of
any node at that depth, C codes, L levels, S SIDs, D hidden width, d width of content vectors, n_l nodes of depth l, M
newest events, V distinct leaves of them.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gpl_core.errors import ContractError
from gpl_core.grouping import runs
from gpl_core.interest.interest_model import InterestModel
from gpl_core.sids.trie import Trie

_SHORTEST = 1e-4  # a vector no longer than that points nowhere: rounding noise
_MOST_NUMBERS = 2**26  # of content vectors, or products with them, at a time: a quarter of a gigabyte


class Children(NamedTuple):
    """The children of R nodes of one depth."""

    node: Tensor  # int64 [R x m]: their node numbers at the next depth, ascending; meaningless where not valid
    code: Tensor  # int64 [R x m]: their codes, in [0, C); 0 where not valid
    valid: Tensor  # bool [R x m]


class RecentEvents(NamedTuple):
    """The newest events of H histories, as leaves; what is wanted next is like one of them."""

    leaf: Tensor  # int64 [H x M]; 0 where there is none
    weight: Tensor  # [H x M]: exp(age), 0 where there is none
    own: Tensor  # [M]: exp(own), the factor for the very leaf
    sharpness: Tensor  # [1]

    def distinct(self) -> tuple[Tensor, Tensor]:
        """The distinct leaves, int64 [V], and each event's among them, int64 [H x M]."""
        leaves, place = torch.unique(self.leaf, return_inverse=True)
        return leaves, place


class DenseScores(NamedTuple):
    """What the content of the catalog's leaves says to H histories."""

    query: Tensor  # [H x d]: share * W h_0
    recent: RecentEvents
    inner: list[Tensor]  # per depth 1 .. L-1 [H x n_l]: the nodes' log sums of exp(logit) over the leaves below


class DeviceTrie:
    """A catalog's trie as tensors: the children of many nodes at once, padded to one width per level."""

    def __init__(self, trie: Trie, device: torch.device | str = "cpu", content: np.ndarray | None = None) -> None:
        """``content``: of every leaf (`leaf_content`). Raises ContractError on a catalog without SIDs."""
        if trie.size == 0:
            raise ContractError("trie: no SID in the catalog, expected at least one; assign SIDs before this step.")
        self.trie = trie
        self.levels, self.codes, self.size = trie.levels, trie.codes, trie.size
        self.offsets = [torch.from_numpy(np.asarray(o, dtype=np.int64)).to(device) for o in trie.offsets]
        self.tokens = [torch.from_numpy(np.asarray(t, dtype=np.int32)).to(device) for t in trie.tokens]
        self.widths = [int(np.diff(o).max()) for o in trie.offsets]  # m per level: the most children of any node
        self._edges = [torch.from_numpy(keys).to(device) for keys in trie.edge_keys]
        # Half the memory on an accelerator, where tables of large catalogs must fit; products are in float32.
        kind = torch.float16 if torch.device(device).type == "cuda" else torch.float32
        self.content = None if content is None else torch.from_numpy(content).to(device, kind)
        """[S x d]: content of the leaves."""
        none = np.full((1, trie.levels), -1, dtype=np.int32)
        self.prefixes = torch.from_numpy(np.concatenate([trie.prefixes(), none])).to(device)
        """int32 [n_1 + ... + n_(L-1) + 1 x L]: `Trie.prefixes`, and a last row without any code."""
        self.first_prefix = [0, *np.cumsum([len(t) for t in trie.tokens[:-1]]).tolist()]
        """Where the prefixes of length 1, 2, ... begin in it."""

    def children(self, level: int, node: Tensor) -> Children:
        """The children of ``node`` (int64 [R], node numbers at depth ``level``)."""
        first, end = self.offsets[level][node], self.offsets[level][node + 1]
        child = first[:, None] + torch.arange(self.widths[level], device=node.device)
        valid = child < end[:, None]
        code = self.tokens[level][child.clamp_max(len(self.tokens[level]) - 1)].long()
        return Children(child, torch.where(valid, code, 0), valid)

    @property
    def histories_at_once(self) -> int:
        """As many as training scores at a time: each has a number for every inner node."""
        return max(1, _MOST_NUMBERS // max((len(tokens) for tokens in self.tokens[:-1]), default=1))

    def leaf_sums(self, query: Tensor, recent: RecentEvents) -> DenseScores:
        """For ``query`` [H x d]; the leaves are gone through in blocks, and again in the backward pass."""
        inner = list[Tensor]()
        if self.levels > 1:
            last = self.trie.offsets[-1]
            asked = recent.distinct()

            def block(start: int, end: int, query: Tensor) -> Tensor:
                logits = self._leaf_logits(int(last[start]), int(last[end]), query, recent, *asked)
                return _log_sums(logits, self.offsets[-1][start : end + 1] - int(last[start]))

            widest = max(*query.shape, len(asked[0]))
            nodes = runs(np.diff(last), max(1, _MOST_NUMBERS // widest))
            inner = [in_parts(block, [(part.start, part.stop, query) for part in nodes])]
            for offsets in self.offsets[-2:0:-1]:
                inner.insert(0, _log_sums(inner[0], offsets))
        return DenseScores(query, recent, [sums.T for sums in inner])

    def _leaf_logits(
        self, first: int, end: int, query: Tensor, recent: RecentEvents, asked: Tensor, place: Tensor
    ) -> Tensor:
        """Content logits of the leaves ``first`` to ``end``, [end - first x H]; ``asked``, ``place``: `distinct`."""
        table = self._content_of_leaves()
        vectors = table[first:end].to(query.dtype)
        like = _likeness(table[asked].to(query.dtype), vectors, recent.sharpness)  # [V x n]
        total = nn.functional.embedding_bag(place, like, mode="sum", per_sample_weights=recent.weight)
        row, column = torch.nonzero((recent.leaf >= first) & (recent.leaf < end), as_tuple=True)
        own = recent.leaf[row, column] - first
        more = recent.weight[row, column] * (recent.own[column] - 1) * like[place[row, column], own]
        total = total.index_put((row, own), more, accumulate=True)
        return (query @ vectors.T + total.log1p()).T

    def dense_logits(self, level: int, node: Tensor, dense: DenseScores) -> Tensor:
        """Of ``node`` (int64 [R x m], of depth ``level`` + 1): [R x m].

        Vectors of leaves are gathered for a bounded number of rows at a time, and again in the backward pass.
        """
        each = len(node) // max(1, len(dense.query))
        if level < self.levels - 1:
            sums = dense.inner[level]
            known = node.clamp_max(sums.shape[1] - 1).view(len(sums), each * node.shape[1])
            return sums.gather(1, known).view(node.shape)
        recent = dense.recent
        if level == 0:  # every leaf is a child of the root
            return self._leaf_logits(0, self.size, dense.query, recent, *recent.distinct()).T
        table = self._content_of_leaves()
        history = torch.arange(len(dense.query), device=node.device).repeat_interleave(each)
        rows = max(1, _MOST_NUMBERS // ((node.shape[1] + recent.leaf.shape[1]) * table.shape[1]))

        def logits(node: Tensor, history: Tensor, query: Tensor) -> Tensor:
            vectors, leaf = table[node].to(query.dtype), recent.leaf[history]
            like = _likeness(vectors, table[leaf].to(query.dtype), recent.sharpness)  # [R x m x M]
            factor = torch.where(node[:, :, None] == leaf[:, None], recent.own, 1.0) * recent.weight[history][:, None]
            total = (like * factor).sum(2)
            return torch.bmm(vectors, query[history][:, :, None])[:, :, 0] + total.log1p()

        parts = zip(node.clamp_max(len(table) - 1).split(rows), history.split(rows), strict=True)
        return torch.cat([checkpoint(logits, n, h, dense.query, use_reentrant=False) for n, h in parts])

    def _content_of_leaves(self) -> Tensor:
        if self.content is None:
            raise ContractError("trie: without content, expected that of its leaves; the model scores by content too.")
        return self.content

    def path(self, sids: Tensor) -> tuple[Tensor, Tensor]:
        """The nodes on the way to each SID (int64 [S x L], codes in [0, C)), and which SIDs are in the catalog.

        Returns int64 [S x L + 1] (column l: the node at depth l, the last one the leaf) and bool [S]; where False the
        nodes mean nothing.
        """
        node = torch.zeros(len(sids), dtype=torch.int64, device=sids.device)
        found = torch.ones(len(sids), dtype=torch.bool, device=sids.device)
        nodes = [node]
        for level, edges in enumerate(self._edges):
            wanted = node * self.codes + sids[:, level]
            node = torch.searchsorted(edges, wanted).clamp_max(len(edges) - 1)
            found &= edges[node] == wanted
            nodes.append(node)
        return torch.stack(nodes, dim=1), found


def in_parts(function: Callable[..., Tensor], parts: Sequence[Sequence[Any]]) -> Tensor:
    """``function`` of each of ``parts``, concatenated; where they are several, computed again in the backward pass."""
    if len(parts) == 1:
        return function(*parts[0])
    return torch.cat([checkpoint(function, *part, use_reentrant=False) for part in parts])


def _log_sums(logits: Tensor, offsets: Tensor) -> Tensor:
    """log sum of exp of the rows [n x H] of each segment offsets[i] : offsets[i + 1], none of them empty."""
    if not logits.shape[1]:  # a rank that has run out of targets; torch would divide by 0
        return logits[: len(offsets) - 1]
    most = torch.segment_reduce(logits.detach(), "max", offsets=offsets, axis=0)
    spread = (logits - most.repeat_interleave(offsets.diff(), dim=0)).exp()
    return torch.segment_reduce(spread, "sum", offsets=offsets, axis=0).log() + most


def _likeness(left: Tensor, right: Tensor, sharpness: Tensor) -> Tensor:
    """exp(sharpness (cosine - 1)) of ``left`` [.. x a x d] and ``right`` [.. x b x d], [.. x a x b]; 1 if equal."""
    one, other = (vectors.norm(dim=-1).clamp_min(_SHORTEST) for vectors in (left, right))
    cosines = left @ right.mT / (one[..., :, None] * other[..., None, :])
    return ((cosines - 1.0) * sharpness).exp()


def recent_leaves(trie: DeviceTrie, sids: np.ndarray, events: np.ndarray) -> Tensor:
    """Leaves of ``events`` (int [H x M], rows of ``sids`` [n x L]), int64 [H x M]; -1 where none is (event -1, or a SID
    that the catalog does not hold).
    """
    rows = torch.from_numpy(events).to(trie.offsets[0].device)
    if not len(sids):
        return torch.full_like(rows, -1)
    nodes, found = trie.path(torch.from_numpy(np.asarray(sids, dtype=np.int64)).to(rows.device))
    leaf = torch.where(found, nodes[:, -1], -1)
    return torch.where(rows >= 0, leaf[rows.clamp_min(0)], -1)


def level_logits(model: InterestModel, hidden: Tensor, level: int) -> Tensor:
    """Logits over the codes of ``level``, without content: ``hidden`` [R x D] -> [R x C], never below float32.

    In bf16, codes of nearly equal score would tie; the head is small enough for float32.
    """
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    return hidden.to(dtype) @ model.level_rows(level).to(dtype).T * model.scale[level].to(dtype)


def dense_scores(model: InterestModel, trie: DeviceTrie, hidden: Tensor, recent: Tensor) -> DenseScores | None:
    """What content says after histories whose last states are ``hidden`` [H x D]; None for a model that reads none.

    ``recent``: the leaves of their newest events (`recent_leaves`).
    """
    heads = model.content
    if heads is None:
        return None
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    query = hidden.to(dtype) @ heads.query.weight.to(dtype).T * heads.share.to(dtype)
    weight = torch.where(recent >= 0, heads.age.to(dtype).exp(), 0.0)
    events = RecentEvents(recent.clamp_min(0), weight, heads.own.to(dtype).exp(), heads.sharpness.to(dtype))
    return trie.leaf_sums(query, events)


def child_log_probs(
    model: InterestModel, trie: DeviceTrie, level: int, node: Tensor, hidden: Tensor, dense: DenseScores | None
) -> tuple[Children, Tensor]:
    """The children of ``node`` (int64 [R], of depth ``level``), and their log p [R x m], -inf where not valid.

    ``hidden`` [R x D]: last states after these prefixes; ``dense``: of their histories. Differentiable.
    """
    children = trie.children(level, node)
    logits = level_logits(model, hidden, level).gather(1, children.code)
    if dense is not None:
        logits = logits + trie.dense_logits(level, children.node, dense)
    return children, logits.masked_fill(~children.valid, -torch.inf).log_softmax(dim=1)
