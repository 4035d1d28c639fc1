"""Attention for packed sequences, without pad tokens in any linear layer.

The model runs on one flat row of T tokens. Queries, keys and values are laid out per sequence only inside the attention
kernel; a *plan*, passed to the model as a keyword and called once per layer, decides what may attend to what.

Legend for shapes: T packed tokens, B sequences, n longest of them, U users, W beams, h heads, h_kv key/value heads,
d_h width of a head.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from gpl_core.grouping import ranges

ATTENTION = "gpl_packed"


class AttentionPlan(Protocol):
    """Decides, per layer, which packed tokens attend to which."""

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """Query [T x h x d_h], key and value [T x h_kv x d_h] -> [T x h x d_h]."""
        ...


def _planned_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: None, *, scaling: float, **kwargs: Any
) -> tuple[Tensor, None]:
    """The hook the model calls: [1 x h x T x d_h] in, [1 x T x h x d_h] out."""
    plan: AttentionPlan = kwargs["plan"]
    flat = [t[0].transpose(0, 1) for t in (query, key, value)]
    return plan.attend(module.layer_idx, flat[0], flat[1], flat[2], scaling)[None], None


AttentionInterface.register(ATTENTION, _planned_attention)


@dataclass(frozen=True, eq=False)
class Rectangle:
    """Sequences of similar length side by side: the places of their packed tokens in a [B x n] grid."""

    shape: tuple[int, int]  # B sequences, n places each
    source: Tensor  # int64 [t]: the packed tokens of these sequences
    place: Tensor  # int64 [t]: their places in the flattened grid


class CausalPlan:
    """Block-diagonal causal attention over packed sequences.

    Sequences are grouped by length, so that a group's grid is at most 1/4 larger than its tokens. Places behind the end
    of a sequence are never attended to, because attention is causal; they cost attention, but no linear layer.
    """

    def __init__(self, lengths: np.ndarray, device: torch.device | str = "cpu") -> None:
        """``lengths`` int [B], each >= 1, of sequences packed one after another: T is their sum."""
        lengths = np.asarray(lengths, dtype=np.int64)
        starts = np.cumsum(lengths) - lengths
        order = np.argsort(lengths, kind="stable")
        self.rectangles: list[Rectangle] = []
        first = 0
        while first < len(order):
            shortest = lengths[order[first]]
            last = int(np.searchsorted(lengths[order], shortest + max(shortest // 4, 4), side="right"))
            rows = order[first:last]
            width = int(lengths[rows].max())
            within = ranges(lengths[rows])
            self.rectangles.append(
                Rectangle(
                    (len(rows), width),
                    torch.from_numpy(np.repeat(starts[rows], lengths[rows]) + within).to(device),
                    torch.from_numpy(np.repeat(np.arange(len(rows)) * width, lengths[rows]) + within).to(device),
                )
            )
            first = last
        # The groups' outputs, one after another, are a permutation of the packed tokens.
        self._order = torch.argsort(torch.cat([grid.source for grid in self.rectangles]))

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """Shapes as in AttentionPlan; differentiable."""
        parts = []
        for grid in self.rectangles:
            q, k, v = (_spread(t, grid) for t in (query, key, value))
            seen = scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=True)
            parts.append(seen.transpose(1, 2).flatten(0, 1)[grid.place])
        return torch.cat(parts)[self._order]


class PrefixStore(NamedTuple):
    """Keys and values of U prompts with room for beam positions behind them; written in place, never copied.

    Both [layers x U x h_kv x slots x d_h], 0 at first, so that no slot is NaN. The slots of a user are [prompt, padded
    to P | step 0: W_0 slots | step 1: W_1 slots | ...].
    """

    keys: Tensor
    values: Tensor


class PrefillPlan:
    """Causal attention of U packed prompts; their keys and values go to a PrefixStore."""

    def __init__(self, store: PrefixStore, lengths: np.ndarray, prompt: int) -> None:
        """``lengths`` int [U], none above ``prompt`` (P, the prompt slots of the store)."""
        lengths = np.asarray(lengths, dtype=np.int64)
        device = store.keys.device
        self._store, self._prompt = store, prompt
        self._user = torch.from_numpy(np.repeat(np.arange(len(lengths)), lengths)).to(device)
        self._place = torch.from_numpy(ranges(lengths)).to(device)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """Shapes as in AttentionPlan."""
        keys, values = self._store.keys[layer], self._store.values[layer]
        keys[self._user, :, self._place] = key
        values[self._user, :, self._place] = value
        spread = query.new_zeros(keys.shape[0], query.shape[1], self._prompt, query.shape[2])
        spread[self._user, :, self._place] = query
        keys, values = keys[:, :, : self._prompt], values[:, :, : self._prompt]
        seen = scaled_dot_product_attention(spread, keys, values, is_causal=True, scale=scaling, enable_gqa=True)
        return seen[self._user, :, self._place]


class TreePlan:
    """One decoding step: W beams per user, each attending to its user's prompt, its ancestors and itself."""

    def __init__(self, store: PrefixStore, visible: Tensor, first_slot: int) -> None:
        """``visible`` bool [U x W x slots, this step's included]; the step's keys go to the W slots from first_slot."""
        self._store, self._first = store, first_slot
        self._users, self._beams, self._slots = visible.shape
        self._visible = visible[:, None]

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """Shapes as in AttentionPlan with T = U * W, user after user."""
        here = slice(self._first, self._first + self._beams)
        q, k, v = (t.view(self._users, self._beams, *t.shape[1:]).transpose(1, 2) for t in (query, key, value))
        keys, values = self._store.keys[layer], self._store.values[layer]
        keys[:, :, here] = k
        values[:, :, here] = v
        keys, values = keys[:, :, : self._slots], values[:, :, : self._slots]
        seen = scaled_dot_product_attention(q, keys, values, self._visible, scale=scaling, enable_gqa=True)
        return seen.transpose(1, 2).flatten(0, 1)


def _spread(packed: Tensor, grid: Rectangle) -> Tensor:
    """[T x h x d_h] -> [B x h x n x d_h], zero where a sequence has ended."""
    rows, width = grid.shape
    out = packed.new_zeros(rows * width, *packed.shape[1:]).index_copy(0, grid.place, packed[grid.source])
    return out.view(rows, width, *packed.shape[1:]).transpose(1, 2)
