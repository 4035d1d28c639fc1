"""Users' histories as packed token rows: L tokens per event, user after user, no pad tokens.

Legend for shapes: B users, T packed tokens, E target events, L levels, H events of a table row, N
events of the context, I of them with an item.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from gpl_core.errors import ContractError, UsageError
from gpl_core.grouping import grouped, ranges, runs
from gpl_core.interest.content import RECENT
from gpl_core.interest.vocabulary import SidVocabulary

_NOTHING = np.empty(0, dtype=np.int64)


@dataclass(frozen=True, eq=False)
class UserHistory:
    """One user's sequence, oldest first, without padding."""

    sids: np.ndarray  # int [n x L], n >= 1
    is_target: np.ndarray  # bool [n]: events to predict in training, after down-sampling
    items: np.ndarray | None = None  # int [n]: the events' item_index; None for a model without content vectors


@dataclass(frozen=True, eq=False)
class Pack:
    """Several users in one row of tokens, ready for the model."""

    token_ids: np.ndarray  # int64 [T]
    positions: np.ndarray  # int64 [T]: starting at 0 for every user
    lengths: np.ndarray  # int64 [B]: tokens of each user
    target_sids: np.ndarray  # int64 [E x L]
    target_places: np.ndarray  # int64 [E x L]: the packed position whose hidden state predicts that code
    items: np.ndarray  # int64 [I]: item_index of the context's events, whose content may be added
    item_places: np.ndarray  # int64 [I]: the packed position of such an event's last code
    event_sids: np.ndarray  # int64 [N x L]: SIDs of all events of the context
    recent: np.ndarray  # int64 [E x RECENT]: rows of `event_sids` before each target, newest first; -1 where none is


def unflatten(sid: np.ndarray, length: int, levels: int) -> np.ndarray:
    """A table's ``sid`` (int [H * L], padded with -1) as int [length x L]; ContractError where it has another form."""
    flat = np.asarray(sid)
    if flat.ndim != 1 or len(flat) % levels or not 0 <= length <= len(flat) // levels:
        raise ContractError(
            f"sid: {flat.shape} numbers for length {length}, expected H * {levels} with H >= length; "
            "the table was written for another number of levels."
        )
    if (flat[: length * levels] < 0).any() or (flat[length * levels :] != -1).any():
        raise ContractError(
            f"sid: {flat.tolist()} with length {length}, expected codes followed by -1; rebuild the table."
        )
    return flat.reshape(-1, levels)[:length]


def most_events(vocabulary: SidVocabulary, wanted: int, context: int) -> int:
    """``wanted``; UsageError unless events and one generated SID fit into ``context`` positions."""
    need = (wanted + 1) * vocabulary.levels
    if wanted < 1 or need > context:
        room = context // vocabulary.levels - 1
        raise UsageError(
            f"sequences.max_length = {wanted}: needs {need} positions, the model has {context}; set it between 1 and "
            f"{room}."
        )
    return wanted


def event_ends(vocabulary: SidVocabulary, events: int) -> np.ndarray:
    """Positions of the last code of each of ``events`` events in a user's tokens, int64 [events]."""
    return (np.arange(events) + 1) * vocabulary.levels - 1


def newest_first(first: np.ndarray | int, end: np.ndarray) -> np.ndarray:
    """The last RECENT of rows ``first`` .. ``end`` - 1 (int [n] each), int64 [n x RECENT]; -1 where there are fewer."""
    rows = np.asarray(end)[:, None] - 1 - np.arange(RECENT)
    return np.where(rows >= np.reshape(first, (-1, 1)), rows, -1)


def pack_targets(vocabulary: SidVocabulary, histories: Sequence[UserHistory], max_events: int) -> Pack:
    """One training row of ``histories``: every target event is predicted from all events before it in one pass.

    The first event kept is never a target, because nothing precedes it. The last token predicts nothing and is left
    out.
    """
    levels = vocabulary.levels
    rows, sids, places = [], [], []
    events, recent, known = [], [], 0
    items: list[np.ndarray] = [_NOTHING]
    item_places: list[np.ndarray] = [_NOTHING]
    start = 0
    for history in histories:
        kept = history.sids[-max_events:]
        ids = vocabulary.ids(kept).ravel()[:-1]
        target = np.flatnonzero(history.is_target[-max_events:])
        target = target[target > 0]
        sids.append(kept[target])
        # Code l of event e is predicted one place before its own: e * L + l - 1.
        places.append(start + target[:, None] * levels + np.arange(levels) - 1)
        events.append(kept[:-1])
        recent.append(newest_first(known, known + target))
        known += len(kept) - 1
        if history.items is not None:  # the last event's last code is not part of the input
            items.append(history.items[-max_events:][:-1])
            item_places.append(start + event_ends(vocabulary, len(kept) - 1))
        rows.append(ids)
        start += len(ids)
    lengths = np.array([len(row) for row in rows], dtype=np.int64)
    rest = (np.concatenate(parts).astype(np.int64) for parts in (sids, places, items, item_places, events, recent))
    return Pack(np.concatenate(rows), ranges(lengths), lengths, *rest)


def training_packs(
    vocabulary: SidVocabulary, histories: Iterable[UserHistory], max_events: int, token_budget: int
) -> Iterator[Pack]:
    """Pack ``histories`` in their order; a pack ends before it would exceed ``token_budget`` tokens.

    Users without a target are skipped. A single user longer than the budget gets a pack alone.
    """
    users = (h for h in histories if h.is_target[-max_events:][1:].any())
    for group in grouped(users, lambda h: min(len(h.sids), max_events) * vocabulary.levels - 1, token_budget):
        yield pack_targets(vocabulary, group, max_events)


def budget_batches(sizes: np.ndarray, token_budget: int) -> list[np.ndarray]:
    """Indices of users, grouped so that a group's ``sizes`` (tokens, int [B]) sum to at most ``token_budget``.

    Longest first, so that neighbors have similar lengths and a lack of memory shows at once. A user above the budget
    gets a group alone.
    """
    order = np.argsort(-np.asarray(sizes, dtype=np.int64), kind="stable")
    return [order[run] for run in runs(sizes[order], token_budget)]
