"""The language model's probability of a candidate's own semantic ID, from what the search cached (torch; ours).

The cache holds anchors (whole SIDs) and prefixes, each with its probability. A cached node keeps what the cached nodes
directly below it leave of its probability and of its SIDs, and every SID has an equal part of the longest cached node
it belongs to; the empty prefix, with probability 1, always counts as cached. Over the catalog this sums to 1.

Legend for shapes: U users of a block, K anchors, P prefixes, B candidates, L levels of a SID.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from gpl_core.sids.trie import Trie

_MOST_CELLS = 2**27  # of a dense table of prefixes: half a gigabyte; beyond it they are searched
_STEP = 2.0**-10  # nats: the coarsest step of a stored log-probability
_BLOCK = 512  # users rounded at a time: what is computed of them stays in a core's cache
_FINEST = 2.0**-24  # finer than a float32 holds
_NO_FRACTION = -(2**52)  # the bits of a float64 that are its sign and exponent
_LEAST_SHARE = 1e-6  # of a node's probability that stays with it, so that rounding leaves no logarithm of 0


class PrefixKeys:
    """SIDs and prefixes of one catalog as numbers, on one device.

    A number's digits are the codes + 1, 0 behind a prefix' end: a prefix comes right before all that it is a prefix of.
    """

    def __init__(self, trie: Trie, device: torch.device | str = "cpu") -> None:
        self.codes, self.levels, self.size = trie.codes, trie.levels, trie.size
        self.base = trie.codes + 1
        counts = [np.diff(trie.offsets[-1])]  # SIDs below each node, from the deepest prefixes up to the root
        for offsets in trie.offsets[-2::-1]:
            counts.insert(0, np.add.reduceat(counts[0], offsets[:-1]))
        root = np.full((1, trie.levels), -1, dtype=np.int32)
        keys, order = self.of(torch.from_numpy(np.concatenate([root, trie.prefixes()])).to(device)).sort()
        self.device = keys.device
        self._keys, self._below, self._dense = keys, torch.from_numpy(np.concatenate(counts)).to(device)[order], None
        # The last digit of a prefix is 0: a table of all numbers without it, where that fits, is far faster.
        if self.base ** (self.levels - 1) <= _MOST_CELLS:
            self._dense = torch.zeros(self.base ** (self.levels - 1), dtype=torch.int32, device=device)
            self._dense[keys // self.base] = self._below.int()

    def of(self, sids: Tensor) -> Tensor:
        """int64 [...] of SIDs or prefixes [... x L], -1 behind a prefix' end."""
        key = sids[..., 0].long() + 1
        for level in range(1, sids.shape[-1]):
            key = key * self.base + (sids[..., level] + 1)
        return key

    def leaves_below(self, key: Tensor) -> Tensor:
        """SIDs below each prefix, int [...]; 0 where the catalog has none."""
        if self._dense is not None:
            return self._dense[key // self.base]
        at = torch.searchsorted(self._keys, key).clamp_max(len(self._keys) - 1)
        return torch.where(self._keys[at] == key, self._below[at], 0)


def prefix_log_prob(
    anchor_sids: Tensor,
    anchor_mask: Tensor,
    log_prob: Tensor,
    prefixes: Tensor,
    prefix_log_probs: Tensor,
    candidate_sids: Tensor,
    keys: PrefixKeys,
) -> Tensor:
    """ln of the probability of a candidate's own SID as far as the search scored it, float32 [U x B].

    A candidate without a SID has that of a SID of which nothing is known: 1 / SIDs in the catalog.

    anchor_sids: int [U x K x L]; anchor_mask, log_prob: [U x K], as in `score_block`; prefixes: int [U x P x L], -1
    after a prefix' end; prefix_log_probs: [U x P]; candidate_sids: int [U x B x L], -1 where there is none.
    """
    nodes = _cached_nodes(anchor_sids, anchor_mask, log_prob, prefixes, prefix_log_probs, candidate_sids, keys)
    each = nodes.each - torch.log(nodes.left.sum(dim=1, keepdim=True))
    first = each.shape[1] - candidate_sids.shape[1]
    own = torch.empty_like(each).scatter_(1, nodes.order, each.gather(1, nodes.parent))[:, first:]
    return torch.where(candidate_sids[..., 0] >= 0, own, -float(np.log(keys.size))).float()


def rounded(
    anchor_sids: np.ndarray, log_prob: np.ndarray, prefixes: np.ndarray, prefix_log_probs: np.ndarray, keys: PrefixKeys
) -> np.ndarray:
    """The prefixes' log-probabilities on as few digits as `prefix_log_prob` needs, float32 [U x P] (ours).

    What a node keeps is a difference of probabilities. So a prefix is rounded to what it and its parent keep, as a
    share of what it has itself, times `_STEP` nats or less: nodes that are nearer to each other, in what each of their
    SIDs has, may not change places, however the errors of the prefixes below them add up.

    anchor_sids: int [U x K x L]; log_prob: [U x K]; prefixes: int [U x P x L], -1 after a prefix' end; -1 throughout
    where there is none; prefix_log_probs: [U x P].
    """
    stored = prefix_log_probs.astype(np.float32)
    used = (prefixes[..., 0] >= 0).any(axis=0)  # a small catalog does not fill the columns
    for start in range(0, len(prefixes), _BLOCK):
        part = slice(start, start + _BLOCK)
        block = anchor_sids[part], log_prob[part], prefixes[part, used], prefix_log_probs[part, used]
        found = _rounded(*(torch.from_numpy(of).to(keys.device) for of in block), keys=keys)
        stored[part, used] = found.cpu().numpy()
    return stored


def _rounded(sids: Tensor, of_anchors: Tensor, prefixes: Tensor, exact: Tensor, *, keys: PrefixKeys) -> Tensor:
    nodes = _cached_nodes(sids, sids[..., 0] >= 0, of_anchors, prefixes, exact, sids[:, :0], keys)
    each = nodes.each
    place = _argsort(each)
    gaps = each.gather(1, place).diff(dim=1).nan_to_num(1.0)  # nan: between nodes without a SID
    gaps = torch.nn.functional.pad(gaps, (1, 1), value=1.0)
    gap = torch.empty_like(nodes.mass).scatter_(1, place, torch.minimum(gaps[:, 1:], gaps[:, :-1]))
    prefix = (nodes.order > 0) & (nodes.order <= prefixes.shape[1])
    errors = (prefix & (nodes.mass > 0)).double()  # a node's own and those of the prefixes directly below it
    errors = errors.scatter_add(1, nodes.parent[:, 1:], errors[:, 1:]).clamp(min=1)
    bears = (nodes.left * (gap / errors).clamp(max=_STEP)).masked_fill(nodes.room <= 0, torch.inf)
    step = torch.minimum(bears, bears.gather(1, nodes.parent)) / nodes.mass
    step = step.nan_to_num_(_STEP).clamp_(_FINEST, _STEP)
    step = (step.view(torch.int64) & _NO_FRACTION).view(torch.float64)  # the power of two below
    step = torch.empty_like(step).scatter_(1, nodes.order, step)[:, 1 : 1 + prefixes.shape[1]]
    return torch.round(exact / step) * step


class _Nodes(NamedTuple):
    """The empty prefix, a block's prefixes, anchors and candidates, each user's in the order of their keys, [U x n]."""

    order: Tensor  # int64: a place's number before
    parent: Tensor  # int64: the place of the longest cached node that it lies below; 0 for the empty prefix itself
    mass: Tensor  # float64: a cached node's probability; 0 of a candidate, and where there is none
    left: Tensor  # float64: what the cached nodes directly below it leave of that; 0 where no SID is left for it
    room: Tensor  # float64: what they leave of its SIDs

    @property
    def each(self) -> Tensor:
        """log of what each of a node's remaining SIDs has, float64; -inf where there is none."""
        return torch.log(self.left / self.room.clamp(min=1))


def _cached_nodes(
    anchor_sids: Tensor,
    anchor_mask: Tensor,
    log_prob: Tensor,
    prefixes: Tensor,
    prefix_log_probs: Tensor,
    candidate_sids: Tensor,
    keys: PrefixKeys,
) -> _Nodes:
    """Arguments as in `prefix_log_prob`."""
    users, count, levels = candidate_sids.shape
    kind, device = torch.float64, candidate_sids.device  # a float32 cannot count the SIDs of a large catalog
    missing = (prefixes[..., 0] < 0) | (prefixes.amax(dim=2) >= keys.codes)
    beyond = keys.base**levels
    of_prefix = keys.of(prefixes).masked_fill(missing, 0)
    nodes = 1 + prefixes.shape[1] + anchor_sids.shape[1]
    # Candidates are sorted among the nodes, which come first among equals: one sort finds what each belongs to.
    key = torch.cat(
        [
            torch.zeros(users, 1, dtype=torch.int64, device=device), of_prefix.masked_fill(missing, beyond),
            keys.of(anchor_sids).masked_fill(~anchor_mask, beyond), keys.of(candidate_sids),
        ], dim=1,
    )  # fmt: skip
    one, none = torch.ones(users, 1, dtype=kind, device=device), torch.zeros(users, count, dtype=kind, device=device)
    of_prefixes = torch.exp(prefix_log_probs.float()).masked_fill(missing, 0.0)
    of_anchors = torch.exp(log_prob.float()).masked_fill(~anchor_mask, 0.0)
    below = keys.leaves_below(of_prefix).masked_fill(missing, 0)
    mass = torch.cat([one, of_prefixes.to(kind), of_anchors.to(kind), none], dim=1)
    leaves = torch.cat([one * keys.size, below.to(kind), anchor_mask.to(kind), none], dim=1)
    key, order = _sorted(key)
    mass, leaves = mass.gather(1, order), leaves.gather(1, order)
    place = torch.arange(key.shape[1], device=device).expand_as(key)
    is_candidate = order >= nodes
    parent, above = torch.zeros_like(key), torch.zeros_like(key)
    for level in range(1, levels + 1):
        cut = keys.base ** (levels - level)
        prefix = key // cut * cut if cut > 1 else key  # the first `level` codes
        inside = is_candidate | (prefix != key)
        last = torch.where((prefix != above) & ~inside, place, 0).cummax(dim=1).values  # the last node of this length
        parent = torch.where((key.gather(1, last) == prefix) & inside, last, parent)
        above = prefix
    # Place 0 is the empty prefix. What is directly below a node is taken off it.
    room = leaves.scatter_add(1, parent[:, 1:], -leaves[:, 1:])
    # A node may have no SID left for its probability: an anchor whose item is gone. The others share that.
    left = torch.maximum(mass.scatter_add(1, parent[:, 1:], -mass[:, 1:]), _LEAST_SHARE * mass) * (room > 0)
    return _Nodes(order, parent, mass, left, room)


def _sorted(key: Tensor) -> tuple[Tensor, Tensor]:
    """`key` [U x n] in ascending order along the rows, equal ones in their own order; and their places."""
    count = key.shape[1]
    bits = count.bit_length()
    if key.device.type != "cpu" or int(key.max()) >= 2 ** (63 - bits):
        return key.sort(dim=1, stable=True)
    # numpy sorts plain integers several times as fast as torch: the place goes along in the lowest bits.
    packed = torch.from_numpy(np.sort((key << bits | torch.arange(count)).numpy(), axis=1))
    return packed >> bits, packed & (2**bits - 1)


def _argsort(values: Tensor) -> Tensor:
    """The places of `values` [U x n] in ascending order along the rows."""
    if values.device.type != "cpu":
        return values.argsort(dim=1)
    return torch.from_numpy(np.argsort(values.numpy(), axis=1))  # several times as fast as torch
