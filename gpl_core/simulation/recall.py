"""The simulated platform's cascade: what it observes, recall channels, exposure.

Nothing here takes true content, quality, interests or click probabilities: the inputs are titles, histories and counts,
as on a real platform. That keeps the logged data honest.
"""

import hashlib
import itertools
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from gpl_core.simulation.rng import rounded, unit_rows

CHANNELS = ("content", "collaborative", "popular", "random")
FEATURES = 32
NEIGHBORS = 40
_BLOCK = 4096


@dataclass(frozen=True)
class Observed:
    """What the platform knows of its N items."""

    features: np.ndarray  # float32 [N x 32]: unit vectors from the titles' words
    neighbors: np.ndarray  # int64 [N x 40]: nearest by features, best first
    together: np.ndarray  # int64 [N x 20]: most often in the same users' histories, best first, -1 padded
    positives: np.ndarray  # int64 [N]: earlier positives per item


def observe(titles: Sequence[str], groups: np.ndarray, user: np.ndarray, item: np.ndarray) -> Observed:
    """What `titles` [N] and past positives (`user`, `item`) [E] show; neighbors share a group (`groups` int [N])."""
    features = text_features(titles)
    return Observed(
        features=features,
        neighbors=nearest(features, groups),
        together=bought_together(user, item, len(titles)),
        positives=np.bincount(item, minlength=len(titles)),
    )


@lru_cache(maxsize=65536)
def _word_vector(word: str) -> np.ndarray:
    seed = int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest(), "little")
    return np.random.Generator(np.random.Philox(key=seed)).normal(size=FEATURES)


def text_features(titles: Sequence[str]) -> np.ndarray:
    """Unit float32 [N x 32] of the titles [N]: random projection of the words, weighted by log inverse frequency."""
    rows: list[list[str]] = [sorted(set(re.findall(r"[a-z]{3,}", title.lower()))) for title in titles]
    frequency = Counter(itertools.chain.from_iterable(rows))
    out = np.zeros((len(rows), FEATURES))
    for row, words in zip(out, rows):
        for word in words:
            row += np.log(1 + len(rows) / frequency[word]) * _word_vector(word)
    return unit_rows(out)


def nearest(features: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """int64 [N x 40]: each item's nearest by features inside its group, best first; -1 where the group is smaller.

    Groups above 4,096 items are cut into chunks of that size, so that the cost stays linear in N.
    """
    found = np.full((len(features), NEIGHBORS), -1, np.int64)
    order = np.argsort(groups, kind="stable")
    for group in np.split(order, np.flatnonzero(np.diff(groups[order])) + 1):
        for low in range(0, len(group), _BLOCK):
            members = group[low : low + _BLOCK]
            cosine = features[members] @ features[members].T
            np.fill_diagonal(cosine, -np.inf)
            width = min(NEIGHBORS, len(members) - 1)
            # Stable: which of equal neighbors come first must not depend on how a CPU sorts.
            found[members, :width] = members[np.argsort(-cosine, axis=1, kind="stable")[:, :width]]
    return found


def bought_together(user: np.ndarray, item: np.ndarray, items: int, width: int = 20) -> np.ndarray:
    """int64 [items x width]: items most often in the same histories (pairs at most 5 events apart), -1 padded."""
    order = np.argsort(user, kind="stable")
    user, item = user[order], item[order]
    pairs = []
    for gap in range(1, 6):
        near = user[gap:] == user[:-gap]
        left, right = item[gap:][near], item[:-gap][near]
        pairs += [left * items + right, right * items + left]
    keys, counts = np.unique(np.concatenate(pairs), return_counts=True)
    left, right = keys // items, keys % items
    keep = left != right
    left, right, counts = left[keep], right[keep], counts[keep]
    order = np.lexsort((right, -counts, left))
    left, right = left[order], right[order]
    rank = np.arange(len(left)) - np.searchsorted(left, left)
    out = np.full((items, width), -1, np.int64)
    inside = rank < width
    out[left[inside], rank[inside]] = right[inside]
    return out


@dataclass(frozen=True)
class Recalled:
    """Candidates of R requests, and which channels found them."""

    item: np.ndarray  # int64 [R x K], -1 padded at the end
    row: np.ndarray  # [C] request, like what follows one entry per (request, item, channel), sorted
    hit_item: np.ndarray
    hit_channel: np.ndarray
    hit_score: np.ndarray


def recall(
    history: np.ndarray,
    observed: Observed,
    released: int,
    shares: Mapping[str, float],
    count: int,
    rng: np.random.Generator,
) -> Recalled:
    """Up to `count` distinct candidates for each of R requests.

    history int64 [R x H] (-1 where empty, newest last). Every channel is imperfect: `content` follows title words of a
    random recent positive, `collaborative` what other users had beside it, `popular` counts, `random` nothing. A
    channel that knows nothing of a user yields nothing, and the random channel fills up. Items that the user already
    had are left out.
    """
    rows = len(history)
    blocks = [
        _draw(name, history, observed, released, int(np.ceil(1.6 * shares[name] * count)) + 1, rng) for name in CHANNELS
    ]
    # The first picks of all channels come before any surplus, and the filler last.
    surplus = [np.arange(b.shape[1]) >= round(shares[c] * count) for b, c in zip(blocks, CHANNELS)]
    blocks.append(rng.integers(0, released, (rows, 3 * count)))  # fills what overlaps left empty
    late = np.concatenate([*surplus, np.full(3 * count, 2)])
    pool = np.concatenate(blocks, axis=1)
    of = np.repeat([*range(len(CHANNELS)), CHANNELS.index("random")], [b.shape[1] for b in blocks])
    channel = np.broadcast_to(of, pool.shape)
    priority = rng.random(pool.shape) + late
    pool = np.where((pool >= released) | _among(pool, history), -1, pool)

    by_priority = np.argsort(priority, axis=1, kind="stable")
    pool, channel = (np.take_along_axis(a, by_priority, axis=1) for a in (pool, channel))
    by_item = np.argsort(pool, axis=1, kind="stable")
    sorted_items = np.take_along_axis(pool, by_item, axis=1)
    first = np.ones_like(sorted_items, bool)
    first[:, 1:] = sorted_items[:, 1:] != sorted_items[:, :-1]
    first &= sorted_items >= 0
    is_first = np.zeros_like(first)
    np.put_along_axis(is_first, by_item, first, axis=1)
    chosen_first = is_first & (np.cumsum(is_first, axis=1) <= count)

    item = np.full((rows, count), -1, np.int64)
    r, c = np.nonzero(chosen_first)
    item[r, np.cumsum(chosen_first, axis=1)[r, c] - 1] = pool[r, c]
    # A hit counts for every channel that found the item; the filler only for what no channel found.
    filler = np.take_along_axis(np.broadcast_to(late == 2, pool.shape), by_priority, axis=1)
    hit = _among(pool, item) & (~filler | chosen_first)
    r, c = np.nonzero(hit)
    return _with_hits(item, r, pool[r, c], channel[r, c], history, observed)


def add_candidates(
    found: Recalled, item: np.ndarray, channel: np.ndarray, history: np.ndarray, observed: Observed
) -> Recalled:
    """`found` with `item` [R] (-1: none) among the candidates, as if `channel` [R] had found it.

    An item that recall already found keeps its channels; any other replaces the last candidate.
    """
    last = np.maximum((found.item >= 0).sum(axis=1) - (found.item[:, -1] >= 0), 0)
    rows = np.flatnonzero((item >= 0) & ~(found.item == item[:, None]).any(axis=1))  # where it is missing
    items, evicted = found.item.copy(), np.full(len(item), -1)
    evicted[rows] = items[rows, last[rows]]
    items[rows, last[rows]] = item[rows]
    kept = found.hit_item != evicted[found.row]
    return _with_hits(
        items,
        np.concatenate([found.row[kept], rows]),
        np.concatenate([found.hit_item[kept], item[rows]]),
        np.concatenate([found.hit_channel[kept], channel[rows]]),
        history,
        observed,
    )


def _with_hits(
    item: np.ndarray,
    row: np.ndarray,
    hit_item: np.ndarray,
    hit_channel: np.ndarray,
    history: np.ndarray,
    observed: Observed,
) -> Recalled:
    """The candidates `item` [R x K] with the hits [C] sorted by row, item and channel, each once and scored.

    The score is the channel's own: cosine to the mean of the recent history, log positives, or NaN for random.
    """
    items = np.int64(len(observed.features))
    pair, hit_channel = np.divmod(np.unique((row * items + hit_item) * len(CHANNELS) + hit_channel), len(CHANNELS))
    row, hit_item = np.divmod(pair, items)
    profile, name = history_profile(history, observed.features), np.array(CHANNELS)[hit_channel]
    cosine = np.einsum("cd,cd->c", profile[row], observed.features[hit_item]).astype(np.float64)
    known = [cosine, np.full(len(row), np.nan)]
    score = np.select([name == "content", name == "random"], known, rounded(np.log1p(observed.positives[hit_item])))
    return Recalled(item, row, hit_item, hit_channel, score)


def _draw(
    channel: str, history: np.ndarray, observed: Observed, released: int, width: int, rng: np.random.Generator
) -> np.ndarray:
    rows = len(history)
    if channel == "random":
        return rng.integers(0, released, (rows, width))
    if channel == "popular":
        cumulative = np.cumsum(observed.positives[:released] + 0.05)
        drawn = np.searchsorted(cumulative, rng.random((rows, width)) * cumulative[-1], side="right")
        return drawn.clip(0, released - 1)
    recent = history[:, -10:]
    seed = recent[np.arange(rows)[:, None], rng.integers(0, recent.shape[1], (rows, width))]
    table = observed.neighbors if channel == "content" else observed.together
    rank = (table.shape[1] * rng.random((rows, width)) ** 1.5).astype(np.int64)
    return np.where(seed >= 0, table[np.maximum(seed, 0), rank], -1)


def _among(pool: np.ndarray, items: np.ndarray) -> np.ndarray:
    """bool [R x P]: which entries of `pool` [R x P] occur in the same row of `items` [R x K]; -1 is never found."""
    found = np.zeros(pool.shape, bool)
    for column in range(items.shape[1]):
        found |= (pool == items[:, column : column + 1]) & (pool >= 0)
    return found


def history_profile(history: np.ndarray, features: np.ndarray) -> np.ndarray:
    """Unit float32 [R x 32]: mean features of the last ten positives; zero without any."""
    recent = history[:, -10:]
    vectors = features[np.maximum(recent, 0)] * (recent >= 0)[..., None]
    return unit_rows(vectors.sum(axis=1))


def ranker_noise(seed: int, user: np.ndarray, item: np.ndarray) -> np.ndarray:
    """The logging ranker's error for (user [R], item [R x K]): roughly standard normal, the same for a pair every time.

    Sum of four uniform 16-bit parts of a hash (splitmix64) of the pair, centered and scaled.
    """
    with np.errstate(over="ignore"):
        x = user.astype(np.uint64)[:, None] * np.uint64(0x9E3779B97F4A7C15) + item.astype(np.uint64)
        x = x + np.uint64(seed % 2**32) * np.uint64(0xD1B54A32D192ED03)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        x = x ^ (x >> np.uint64(31))
    parts = np.stack([(x >> np.uint64(16 * k)) & np.uint64(0xFFFF) for k in range(4)]).astype(np.float64) / 65536
    return (parts.sum(axis=0) - 2.0) * np.sqrt(3.0)


@dataclass(frozen=True)
class LoggingPolicy:
    """The ranker that decides exposure: its weights of popularity, observed similarity to history and all else."""

    popularity: float
    history: float
    noise: float
    exposed: int
    random_share: float


@dataclass(frozen=True)
class Exposed:
    """The exposed pairs [E], by request and position: request row, candidate column, item number, position (from 0)."""

    row: np.ndarray
    column: np.ndarray
    item: np.ndarray
    position: np.ndarray
    is_random: np.ndarray  # bool [R]: whether a request shows a uniform sample


def expose(
    policy: LoggingPolicy,
    item: np.ndarray,
    history: np.ndarray,
    observed: Observed,
    noise: np.ndarray,
    rng: np.random.Generator,
) -> Exposed:
    """Choose and order the exposed among the candidates `item` [R x K].

    A `random_share` of requests shows a uniform sample in uniform order; the others the ranker's best. The ranker sees
    popularity counts and title words, standardized within the request, and `noise` [R x K] beside them.
    """
    valid = item >= 0
    safe = np.maximum(item, 0)
    cosine = np.einsum("rkd,rd->rk", observed.features[safe], history_profile(history, observed.features))
    score = (
        policy.popularity * standardized(np.log1p(observed.positives[safe]), valid)
        + policy.history * standardized(cosine, valid)
        + policy.noise * noise
    )
    is_random = rng.random(len(item)) < policy.random_share
    score = np.where(is_random[:, None], rng.random(item.shape), score)
    score = np.where(valid, score, -np.inf)
    best = np.argsort(-score, axis=1, kind="stable")[:, : policy.exposed]
    row, position = np.nonzero(np.take_along_axis(valid, best, axis=1))
    column = best[row, position]
    return Exposed(row, column, item[row, column], position, is_random)


def standardized(values: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """`values` [R x K] less the mean of their row, over its standard deviation; only `valid` ones count."""
    count = np.maximum(valid.sum(axis=1, keepdims=True), 1)
    mean = np.where(valid, values, 0).sum(axis=1, keepdims=True) / count
    spread = np.sqrt(np.where(valid, (values - mean) ** 2, 0).sum(axis=1, keepdims=True) / count)
    return (values - mean) / np.maximum(spread, 1e-6)
