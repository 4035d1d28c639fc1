"""Shoppers: several drifting interests each, organic behavior, and the true probability of a click."""

from dataclasses import dataclass

import numpy as np

from gpl_core.grouping import ranges
from gpl_core.labels.fitting import fit_location
from gpl_core.simulation.item_world import LATENT, ItemWorld, Taste
from gpl_core.simulation.rng import stream, unit_rows
from gpl_core.simulation.simulation_settings import Behavior, SimulationSettings

HISTORY = 50  # positives a user's state remembers, newest last
_SHARPNESS = 6.0  # of the soft maximum over interests


@dataclass
class Shoppers:
    """The state of one batch of B users, advanced day by day."""

    first: int
    topic: np.ndarray  # int [B x M]
    wish: np.ndarray  # float32 [B x M x D]: unit true content that each interest wants
    share: np.ndarray  # [B x M], rows sum to 1
    bias: np.ndarray  # [B]
    activity: np.ndarray  # [B], mean 1
    current: np.ndarray  # int [B]: interest of the last organic event
    history: np.ndarray  # int64 [B x 50]: item numbers, -1 padded on the left, newest last

    @property
    def size(self) -> int:
        return len(self.bias)

    def remember(self, user: np.ndarray, item: np.ndarray) -> None:
        """Append positives (`user`, `item`, in order of time) to the histories; a user may occur several times."""
        for u, i in zip(user.tolist(), item.tolist()):
            row = self.history[u]
            row[:-1] = row[1:]
            row[-1] = i


def user_id(number: int) -> str:
    """The platform's id of user `number`."""
    return f"u{number:05d}"


def make_shoppers(settings: SimulationSettings, taste: Taste, batch: int) -> Shoppers:
    """Draw the users of one batch as they are before the warm-up."""
    first = batch * settings.batch_users
    size = min(settings.batch_users, settings.users - first)
    rng, count = stream(settings.seed, "users", 0, batch), settings.rules.interests
    topic = rng.integers(0, len(taste.topic), (size, count))
    share = rng.dirichlet(np.full(count, 1.5), size)
    return Shoppers(
        first, topic, wish=_wish(rng, taste, topic), share=share, bias=rng.normal(0, settings.rules.user_bias, size),
        activity=rng.lognormal(-0.32, 0.8, size), current=rng.integers(0, count, size),
        history=np.full((size, HISTORY), -1, np.int64),
    )  # fmt: skip


def drift(shoppers: Shoppers, rules: Behavior, taste: Taste, rng: np.random.Generator) -> None:
    """One night: each interest is replaced with `drift_per_day`, often by a topic related to the old one."""
    replaced = rng.random(shoppers.topic.shape) < rules.drift_per_day
    pick = rng.integers(0, taste.related.shape[1], shoppers.topic.shape)
    related = taste.related[shoppers.topic, pick]
    fresh = rng.integers(0, len(taste.topic), shoppers.topic.shape)
    follows = rng.random(shoppers.topic.shape) < rules.drift_to_related
    topic = np.where(replaced, np.where(follows, related, fresh), shoppers.topic)
    wish = _wish(rng, taste, topic)
    shoppers.topic = topic
    shoppers.wish = np.where(replaced[..., None], wish, shoppers.wish)


def organic(
    shoppers: Shoppers, world: ItemWorld, taste: Taste, settings: SimulationSettings, day: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Positives that users find without the recommender on `day`: (user [E], item [E]), grouped by user.

    A user follows the current interest (it changes with probability 0.4 per event), comes across a dozen items of its
    topic (by appeal) and takes the one of best taste and quality, noise included.
    """
    count = rng.poisson(np.minimum(settings.organic_per_user_day * shoppers.activity, 20.0))
    user = np.repeat(np.arange(shoppers.size), count)
    # Slot by slot, so that a user's second event of the day follows the interest of the first.
    interest = np.empty(len(user), np.int64)
    slot = ranges(count)
    for step in range(int(count.max(initial=0))):
        at = np.flatnonzero(slot == step)
        who = user[at]
        moved = rng.random(len(at)) < 0.4
        cumulative = np.cumsum(shoppers.share[who], axis=1)
        drawn = np.minimum((cumulative < rng.random((len(at), 1))).sum(axis=1), shoppers.share.shape[1] - 1)
        shoppers.current[who] = np.where(moved, drawn, shoppers.current[who])
        interest[at] = shoppers.current[who]
    topic = shoppers.topic[user, interest]
    wandering = rng.random(len(user)) < 0.1
    topic = np.where(wandering, rng.integers(0, len(taste.topic), len(user)), topic)
    seen = _come_across(world, topic, world.released(day), 12, rng)
    fit = np.einsum("ekd,ed->ek", world.content[np.maximum(seen, 0)], shoppers.wish[user, interest])
    value = 5.0 * fit + 0.6 * world.quality[np.maximum(seen, 0)] + rng.gumbel(size=seen.shape)
    value[seen < 0] = -np.inf
    item = seen[np.arange(len(user)), value.argmax(axis=1)] if len(user) else np.empty(0, np.int64)
    kept = item >= 0
    return user[kept], item[kept]


def click_logits(
    shoppers: Shoppers, user: np.ndarray, item: np.ndarray, world: ItemWorld, rules: Behavior
) -> np.ndarray:
    """True click logits without the intercept, for users [R] and their items [R x K] (entries < 0 give junk).

    affinity(u, i) = log sum_m share_m exp(6 <wish_m, content_i>) / 6, a soft maximum over the user's interests in the
    space of *true* content, not a cosine of any encoder, which sees only words and pixels.
    """
    safe = np.maximum(item, 0)
    cosine = np.einsum("rkd,rmd->rkm", world.content[safe], shoppers.wish[user], optimize=True).astype(np.float64)
    affinity = np.log(np.einsum("rkm,rm->rk", np.exp(_SHARPNESS * cosine), shoppers.share[user])) / _SHARPNESS
    logits = rules.taste_strength * affinity + rules.quality_strength * world.quality[safe]
    return logits + shoppers.bias[user][:, None]


def find_intercept(shoppers: Shoppers, world: ItemWorld, settings: SimulationSettings) -> float:
    """The intercept at which uniformly random pairs have the wanted mean click probability, to three decimals."""
    rng = stream(settings.seed, "intercept")
    user = np.arange(shoppers.size)
    item = rng.integers(0, world.initial, (shoppers.size, 64))
    logits = click_logits(shoppers, user, item, world, settings.rules)
    return round(fit_location(logits, np.ones(logits.shape), settings.rules.random_pair_rate), 3)


def _wish(rng: np.random.Generator, taste: Taste, topic: np.ndarray) -> np.ndarray:
    """What an interest in `topic` wants: the topic, a favorite product and a personal part, unit length."""
    product = taste.product[topic * 5 + rng.integers(0, 5, topic.shape)]
    personal = rng.normal(0, 1 / np.sqrt(LATENT), (*topic.shape, LATENT))
    return unit_rows(taste.topic[topic] + 0.7 * product + 0.4 * personal)


def _come_across(
    world: ItemWorld, topic: np.ndarray, released: int, count: int, rng: np.random.Generator
) -> np.ndarray:
    """`count` items of each given topic by appeal, int64 [E x count]; not yet released ones are -1."""
    offsets, items, cumulative = world.by_topic
    floor = np.where(offsets[:-1] > 0, cumulative[np.maximum(offsets[:-1] - 1, 0)], 0.0)
    total = np.where(offsets[1:] > offsets[:-1], cumulative[offsets[1:] - 1], 0.0) - floor
    draws = floor[topic][:, None] + rng.random((len(topic), count)) * np.maximum(total[topic], 0.0)[:, None]
    at = np.searchsorted(cumulative, draws, side="right")
    inside = np.clip(at, offsets[topic][:, None], np.maximum(offsets[topic + 1] - 1, offsets[topic])[:, None])
    found = items[np.minimum(inside, world.size - 1)]
    empty = (offsets[topic + 1] == offsets[topic])[:, None]
    return np.where((found < released) & ~empty, found, -1)
