"""The scoring rule of training and search (ours): at each level a softmax over the prefix's *valid children* only.

log p(SID) = sum over levels of log p(c_l | c_<l, history); the probabilities of all SIDs of the catalog sum to 1.

Legend for shapes: R rows (prefixes), m most children of any node at that depth, C codes, L levels, S SIDs.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from gpl_core.errors import ContractError
from gpl_core.sids.trie import Trie


class Children(NamedTuple):
    """The children of R nodes of one depth."""

    node: Tensor  # int64 [R x m]: their node numbers at the next depth, ascending; meaningless where not valid
    code: Tensor  # int64 [R x m]: their codes, in [0, C); 0 where not valid
    valid: Tensor  # bool [R x m]


class DeviceTrie:
    """A catalog's trie as tensors: the children of many nodes at once, padded to one width per level."""

    def __init__(self, trie: Trie, device: torch.device | str = "cpu") -> None:
        """Raises ContractError on a catalog without SIDs."""
        if trie.size == 0:
            raise ContractError("trie: no SID in the catalog, expected at least one; assign SIDs before this step.")
        self.trie = trie
        self.levels, self.codes, self.size = trie.levels, trie.codes, trie.size
        self.offsets = [torch.from_numpy(np.asarray(o, dtype=np.int64)).to(device) for o in trie.offsets]
        self.tokens = [torch.from_numpy(np.asarray(t, dtype=np.int32)).to(device) for t in trie.tokens]
        self.widths = [int(np.diff(o).max()) for o in trie.offsets]  # m per level: the most children of any node
        self._edges = [torch.from_numpy(keys).to(device) for keys in trie.edge_keys]
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


def child_log_probs(logits: Tensor, children: Children) -> Tensor:
    """log p of every child: ``logits`` [R x C] of a level -> [R x m] in at least float32, -inf where not valid."""
    picked = logits.gather(1, children.code)
    if picked.dtype in (torch.float16, torch.bfloat16):
        picked = picked.float()
    picked = picked.masked_fill(~children.valid, -torch.inf)
    return picked.log_softmax(dim=1)


def code_log_probs(logits: Tensor, children: Children, code: Tensor) -> Tensor:
    """log p of one child per row: ``code`` int64 [R], a valid child's code -> [R]; differentiable in ``logits``."""
    picked = logits.gather(1, children.code)
    # A finite floor instead of -inf: its exp is exactly 0 too, and no gradient becomes NaN.
    picked = picked.masked_fill(~children.valid, torch.finfo(picked.dtype).min)
    return logits.gather(1, code[:, None])[:, 0] - picked.logsumexp(dim=1)
