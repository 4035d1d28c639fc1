"""The scoring rule of training and search (ours): at each level a softmax over the prefix's *valid children* only.

log p(SID) = sum over levels of log p(c_l | c_<l, history); the probabilities of all SIDs of the catalog sum to 1.
The logit of a child is scale_l <h, row of its code> and, for a model that reads content, + share_l <W h_0, content of
the child node>: SIDs and dense retrieval in one probability. h is the last state after the prefix, h_0 that after the
history: with equal shares a SID's products add up to that of one dense retrieval; each level has its own softmax.

Legend for shapes: R rows (prefixes), m most children of any node at that depth, C codes, L levels, S SIDs, D hidden
width, d width of content vectors.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from gpl_core.errors import ContractError
from gpl_core.interest.interest_model import InterestModel
from gpl_core.sids.trie import Trie

_MOST_NUMBERS = 2**26  # of gathered content vectors: a quarter of a gigabyte


class Children(NamedTuple):
    """The children of R nodes of one depth."""

    node: Tensor  # int64 [R x m]: their node numbers at the next depth, ascending; meaningless where not valid
    code: Tensor  # int64 [R x m]: their codes, in [0, C); 0 where not valid
    valid: Tensor  # bool [R x m]


class DeviceTrie:
    """A catalog's trie as tensors: the children of many nodes at once, padded to one width per level."""

    def __init__(
        self, trie: Trie, device: torch.device | str = "cpu", content: Sequence[np.ndarray] | None = None
    ) -> None:
        """``content``: of every node (`node_content`). Raises ContractError on a catalog without SIDs."""
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
        self.content = None if content is None else [torch.from_numpy(c).to(device, kind) for c in content]
        """Per level [n_(l+1) x d]: content of the nodes of depth l + 1."""
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

    def similarity(self, level: int, node: Tensor, query: Tensor) -> Tensor:
        """Products of ``query`` [R x d] with the content of ``node`` (int64 [R x m], of depth ``level`` + 1), [R x m].

        Vectors are gathered for a bounded number of rows at a time, and again in the backward pass.
        """
        if self.content is None:
            raise ContractError("trie: without content, expected that of its nodes; the model scores by content too.")
        table = self.content[level]
        if level == 0:  # every node of depth 1 is a child of the root
            return query @ table.T.to(query.dtype)
        rows = max(1, _MOST_NUMBERS // (node.shape[1] * table.shape[1]))

        def products(node: Tensor, query: Tensor) -> Tensor:
            return torch.bmm(table[node].to(query.dtype), query[:, :, None])[:, :, 0]

        parts = zip(node.clamp_max(len(table) - 1).split(rows), query.split(rows), strict=True)
        return torch.cat([checkpoint(products, n, q, use_reentrant=False) for n, q in parts])

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


def level_logits(model: InterestModel, hidden: Tensor, level: int) -> Tensor:
    """Logits over the codes of ``level``, without content: ``hidden`` [R x D] -> [R x C], never below float32.

    In bf16, codes of nearly equal score would tie; the head is small enough for float32.
    """
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    return hidden.to(dtype) @ model.level_rows(level).to(dtype).T * model.scale[level].to(dtype)


def content_query(model: InterestModel, hidden: Tensor) -> Tensor | None:
    """W h_0 [R x d], which is compared with nodes' content; ``hidden`` [R x D]. None for a model that reads none."""
    if model.content is None:
        return None
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    return hidden.to(dtype) @ model.content.query.weight.to(dtype).T


def child_log_probs(
    model: InterestModel, trie: DeviceTrie, level: int, node: Tensor, hidden: Tensor, query: Tensor | None
) -> tuple[Children, Tensor]:
    """The children of ``node`` (int64 [R], of depth ``level``), and their log p [R x m], -inf where not valid.

    ``hidden`` [R x D]: last states after these prefixes; ``query`` [R x d]: `content_query` of the states after the
    histories. Differentiable.
    """
    children = trie.children(level, node)
    logits = level_logits(model, hidden, level).gather(1, children.code)
    if model.content is not None and query is not None:
        logits = logits + model.content.share[level].to(logits.dtype) * trie.similarity(level, children.node, query)
    return children, logits.masked_fill(~children.valid, -torch.inf).log_softmax(dim=1)
