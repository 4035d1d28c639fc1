"""Shared-prefix beam search: K anchors per user for one prefill and L - 1 short steps.

The K beams of a user are K extra positions of the *same* sequence under a tree mask: each sees the prompt and its own
ancestors. No key or value is copied or reordered. Only a level's valid children are scored, so every beam is a SID of
the catalog. The beams are those of textbook beam search under the scoring rule of `trie_scoring`.

Legend for shapes: U users, K beams, W beams to extend (1 at the root, then K), m most children of a node, L levels, D
hidden width.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from gpl_core.errors import ContractError, GplError, UsageError
from gpl_core.grouping import ranges
from gpl_core.interest.attention import PrefillPlan, PrefixStore, TreePlan
from gpl_core.interest.content import RECENT, content_of
from gpl_core.interest.interest_model import InterestModel
from gpl_core.interest.packing import budget_batches, event_ends, most_events, newest_first
from gpl_core.interest.trie_scoring import DenseScores, DeviceTrie, child_log_probs, dense_scores, recent_leaves
from gpl_core.sids.content_table import ContentTable

PAD_LOG_PROB = -100.0
"""log_prob of a slot without an anchor (its sid is -1): finite, because tables hold no infinities; its exp is 0."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SearchSettings:
    """Width of the search and size of its batches."""

    beams: int  # K, anchors per user
    max_events: int  # newest events of a history that the model reads; as in training
    token_budget: int = 16_384  # positions per batch: prompts plus (L - 1) * K per user. Halved when memory runs out.
    prefixes: int = 0  # P, scored prefixes returned with the anchors; they change no beam


class Anchors(NamedTuple):
    """The K most probable beams of U users, best first; equal probabilities are ordered by SID.

    Also the P likeliest of the prefixes that the search scored: all of length 1, and the children of every beam.
    """

    sids: np.ndarray  # int32 [U x K x L]; -1 where there are fewer than K SIDs
    log_prob: np.ndarray  # float32 [U x K] (float64 from a float64 model), descending; PAD_LOG_PROB where sids is -1
    prefixes: np.ndarray  # int32 [U x P x L]: by length, then lexicographic; -1 behind a prefix and where there are < P
    prefix_log_probs: np.ndarray  # [U x P], typed like log_prob: their log p; PAD_LOG_PROB where there is none


class _Beams(NamedTuple):
    """The beams of one level, in trie order, so that the smaller SID wins a tie."""

    score: Tensor  # [U x W], log p of the prefix; -inf for a slot without a beam
    node: Tensor  # int64 [U x W]: node numbers at this depth
    code: Tensor  # int64 [U x W]: the last code
    parent: Tensor  # int64 [U x W]: the slot of the level before


class _Kept(NamedTuple):
    """The likeliest prefixes scored so far, ordered by number."""

    number: Tensor  # int64 [U x P]: rows of `DeviceTrie.prefixes`
    score: Tensor  # [U x P], log p; -inf for a slot without a prefix


class BeamSearch:
    """Searches anchors for any number of users; a token budget halved for lack of memory stays halved."""

    def __init__(
        self, model: InterestModel, trie: DeviceTrie, settings: SearchSettings, content: ContentTable | None = None
    ) -> None:
        """UsageError where model, settings and content do not fit. The model should be in eval mode.

        ``trie`` is of the model's sid_version. ``content``: the item vectors, for a model that reads them; then the
        trie needs its leaves' content too.
        """
        width = content.width if content else 0
        if model.settings.content_width != width:
            raise UsageError(
                f"content: vectors of width {width}, the model was trained on {model.settings.content_width}; pass the "
                "item embeddings of its encoder_version."
            )
        most_events(model.vocabulary, settings.max_events, model.config.max_position_embeddings)
        self.model, self.trie, self.settings, self.content = model, trie, settings, content
        self.token_budget = settings.token_budget

    def search(self, histories: Sequence[np.ndarray], items: Sequence[np.ndarray] | None = None) -> Anchors:
        """Anchors of every history (int [n x L], oldest first, n >= 1), in their order.

        ``items``: the histories' item_index (int [n] each), for a model that reads content vectors.
        A user's result does not depend on the others beyond float rounding. ContractError on an empty history.
        """
        for user, history in enumerate(histories):
            if len(history) == 0:
                raise ContractError(f"history {user}: empty, expected at least one event; leave such users out.")
        if self.content is not None and items is None:
            raise UsageError("search: this model reads content vectors; pass the histories' item_index too.")
        dtype = np.float64 if self.model.input_rows.dtype == torch.float64 else np.float32
        users, levels, beams, prefixes = len(histories), self.trie.levels, self.settings.beams, self.settings.prefixes
        out = Anchors(
            np.full((users, beams, levels), -1, dtype=np.int32),
            np.full((users, beams), PAD_LOG_PROB, dtype=dtype),
            np.full((users, prefixes, levels), -1, dtype=np.int32),
            np.full((users, prefixes), PAD_LOG_PROB, dtype=dtype),
        )
        most = self.settings.max_events
        prompts = [self.model.vocabulary.ids(h[-most:]).ravel() for h in histories]
        sizes = np.array([len(p) for p in prompts], dtype=np.int64) + (levels - 1) * beams
        waiting = budget_batches(sizes, self.token_budget)[::-1]
        while waiting:
            rows = waiting.pop()
            if len(rows) > 1 and sizes[rows].sum() > self.token_budget:
                # Cut before the budget was halved.
                waiting.extend(rows[part] for part in budget_batches(sizes[rows], self.token_budget)[::-1])
                continue
            try:
                found = self._search_batch(
                    [prompts[u] for u in rows],
                    [items[u][-most:] for u in rows] if items is not None else None,
                    [histories[u][-min(most, RECENT) :] for u in rows],
                )
            except (RuntimeError, MemoryError) as error:  # the CPU allocator raises a plain RuntimeError
                known = isinstance(error, torch.OutOfMemoryError | MemoryError)
                if not known and "can't allocate memory" not in str(error):
                    raise
                self._halve(int(sizes[rows].sum()), len(rows), error)
                waiting.append(rows)
                continue
            for whole, part in zip(out, found, strict=True):
                whole[rows] = part
        return out

    def _halve(self, tokens: int, users: int, error: BaseException) -> None:
        if users == 1:
            raise GplError(
                f"search: out of memory on one user of {tokens} positions; lower anchors.count or "
                "sequences.max_length, or use a larger device."
            ) from error
        self.token_budget = max(1, min(self.token_budget, tokens) // 2)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        _log.warning("search: out of memory at %d positions; token budget is now %d", tokens, self.token_budget)

    @torch.inference_mode()
    def _search_batch(
        self, prompts: Sequence[np.ndarray], items: Sequence[np.ndarray] | None, newest: Sequence[np.ndarray]
    ) -> Anchors:
        model, trie, width = self.model, self.trie, self.settings.beams
        device, users = model.device, len(prompts)
        lengths = np.array([len(p) for p in prompts], dtype=np.int64)
        longest = int(lengths.max())
        length = torch.from_numpy(lengths).to(device)
        config, slots = model.config, longest + (trie.levels - 1) * width
        head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        shape = (config.num_hidden_layers, users, config.num_key_value_heads, slots, head)
        store = PrefixStore(*(torch.zeros(shape, dtype=model.input_rows.dtype, device=device) for _ in range(2)))
        hidden = model.hidden(
            torch.from_numpy(np.concatenate(prompts)).to(device),
            torch.from_numpy(ranges(lengths)).to(device),
            PrefillPlan(store, lengths, longest),
            self._content(lengths, items),
        )[length.cumsum(0) - 1]
        visible = torch.arange(longest, device=device) < length[:, None]
        visible = visible[:, None].expand(users, 1, longest)

        root = torch.zeros(users, 1, dtype=torch.int64, device=device)
        kind = torch.promote_types(hidden.dtype, torch.float32)
        nothing = hidden.new_full((users, self.settings.prefixes), -torch.inf, dtype=kind)
        kept = _Kept(nothing.long().zero_(), nothing)
        known = np.array([len(sids) for sids in newest])
        events = newest_first(known.cumsum() - known, known.cumsum())
        dense = dense_scores(model, trie, hidden, recent_leaves(trie, np.concatenate(newest), events))
        beams, kept = self._extend(0, hidden, dense, _Beams(root.to(hidden.dtype), root, root, root), kept)
        trail = [beams]
        first_slot = longest
        for level in range(1, trie.levels):
            own = torch.eye(width, dtype=torch.bool, device=device).expand(users, width, width)
            # A beam sees what its parent saw, and itself.
            seen = beams.parent[:, :, None].expand(users, width, visible.shape[2])
            visible = torch.cat([visible.gather(1, seen), own], dim=2)
            ids = beams.code + model.vocabulary.first_id + (level - 1) * trie.codes
            at = (length + level - 1)[:, None].expand(users, width)
            hidden = model.hidden(ids.flatten(), at.flatten(), TreePlan(store, visible, first_slot))
            first_slot += width
            beams, kept = self._extend(level, hidden, dense, beams, kept)
            trail.append(beams)
        return self._collect(trail, kept)

    def _content(self, lengths: np.ndarray, items: Sequence[np.ndarray] | None) -> tuple[Tensor, Tensor] | None:
        """Content of the prompts' events; beams have none: part of a SID is not an item."""
        if self.content is None or items is None:
            return None
        starts = np.cumsum(lengths) - lengths
        places = [s + event_ends(self.model.vocabulary, len(i)) for s, i in zip(starts, items, strict=True)]
        return content_of(self.content, np.concatenate(items), np.concatenate(places), self.model.device)

    def _extend(
        self, level: int, hidden: Tensor, dense: DenseScores | None, beams: _Beams, kept: _Kept
    ) -> tuple[_Beams, _Kept]:
        """The best W children of ``beams``, and ``kept`` with what is better among all children.

        ``hidden`` [U * W x D] are the beams' last states, ``dense`` what content says to the users.
        """
        users, width = beams.score.shape
        children, log_prob = child_log_probs(self.model, self.trie, level, beams.node.flatten(), hidden, dense)
        most = log_prob.shape[1]
        score = beams.score[:, :, None].to(log_prob.dtype) + log_prob.view(users, width, most)
        score, node = score.flatten(1), children.node.view(users, -1)
        chosen, scores = _best_in_order(score, self.settings.beams)
        extended = _Beams(
            scores,
            node.gather(1, chosen).masked_fill(scores == -torch.inf, 0),
            children.code.view(users, -1).gather(1, chosen),
            chosen // most,
        )
        if self.settings.prefixes and level < self.trie.levels - 1:
            number = torch.cat([kept.number, node + self.trie.first_prefix[level]], dim=1)
            every = torch.cat([kept.score.to(score.dtype), score], dim=1)
            chosen, scores = _best_in_order(every, self.settings.prefixes)
            kept = _Kept(number.gather(1, chosen), scores)
        return extended, kept

    def _collect(self, trail: list[_Beams], kept: _Kept) -> Anchors:
        """The last level's beams by score, their SIDs read back through the parents; the kept prefixes."""
        best = trail[-1].score.sort(dim=1, descending=True, stable=True)
        score, slot = best.values, best.indices
        codes = []
        for beams in reversed(trail):
            codes.append(beams.code.gather(1, slot))
            slot = beams.parent.gather(1, slot)
        sids = torch.stack(codes[::-1], dim=2)
        missing, absent = score == -torch.inf, kept.score == -torch.inf
        return Anchors(
            sids.masked_fill(missing[:, :, None], -1).to(torch.int32).cpu().numpy(),
            score.masked_fill(missing, PAD_LOG_PROB).cpu().numpy(),
            self.trie.prefixes[kept.number.masked_fill(absent, -1)].cpu().numpy(),
            kept.score.masked_fill(absent, PAD_LOG_PROB).cpu().numpy(),
        )


def _best_in_order(score: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Places [U x count] of the ``count`` largest of ``score`` [U x n], in ascending place, and their scores.

    Among equals at the cut the lower places win; torch.topk leaves that open, and may differ by device or batch. Where
    n < count or fewer are finite, the rest are place 0 with score -inf, at the end.
    """
    users, size = score.shape
    top = score.topk(min(count, size), dim=1).values
    cut = top[:, -1:]
    above = score > cut
    at_cut = score == cut
    room = top.shape[1] - above.sum(1, keepdim=True)
    taken = (above | (at_cut & (at_cut.cumsum(1) <= room))) & (score > -torch.inf)
    # The taken places in ascending order: a nonzero of fixed shape.
    places = torch.arange(size, device=score.device).expand(users, size)
    chosen = torch.where(taken, places, size).topk(top.shape[1], dim=1, largest=False, sorted=True).values
    chosen = torch.nn.functional.pad(chosen, (0, count - chosen.shape[1]), value=size)
    missing = chosen == size
    chosen = chosen.masked_fill(missing, 0)
    return chosen, score.gather(1, chosen).masked_fill(missing, -torch.inf)
