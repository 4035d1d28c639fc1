"""The catalog of a simulated marketplace: what items show (words, pictures) and what they are (content, quality)."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from gpl_core.simulation.rng import stream, unit_rows
from gpl_core.simulation.rows import CatalogItem
from gpl_core.simulation.simulation_settings import SimulationSettings
from gpl_core.simulation.topics import departments, topics

LATENT = 48  # D, the width of true content vectors


@dataclass(frozen=True)
class ItemWorld:
    """All items, in order of release: on day `d` the first `released(d)` exist."""

    topic: np.ndarray  # int32 [N], shown by text and picture like what follows, down to the model
    product: np.ndarray
    adjective: np.ndarray
    material: np.ndarray
    use: np.ndarray
    brand: np.ndarray
    model: np.ndarray
    quality: np.ndarray  # [N] standard normal, hidden from both
    content: np.ndarray  # [N x D] the unit true content vector, in part hidden from both
    appeal: np.ndarray  # [N] probability that a shopper comes across the item at all (long-tailed, sums to 1)
    initial: int
    per_day: int

    @property
    def size(self) -> int:
        return len(self.topic)

    def released(self, day: int) -> int:
        """Number of items that exist on request day `day` (0 is the first; warm-up days are negative)."""
        return self.initial + self.per_day * max(0, min(day + 1, (self.size - self.initial) // max(1, self.per_day)))

    @cached_property
    def by_topic(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Items grouped by topic, as CSR: offsets [T + 1], items [N] and the running sum of appeal over `items` [N]."""
        order = np.lexsort((np.arange(self.size), self.topic))
        offsets = np.searchsorted(self.topic[order], np.arange(len(topics()) + 1))
        return offsets, order.astype(np.int64), np.cumsum(self.appeal[order])


@dataclass(frozen=True)
class Taste:
    """The fixed directions of true content of topics and products (float64 [. x D])."""

    topic: np.ndarray  # [T x D], the department's direction included
    product: np.ndarray  # [T * 5 x D]
    related: np.ndarray  # int [T x 3]: topics that shoppers of a topic move on to


def make_taste(seed: int) -> Taste:
    """Draw the directions of true content and the graph of related topics.

    Half of what sets a topic apart in its department is its themes', half of what sets a product apart its noun's, and
    the rest their own: who knows what words mean sees which topics are alike, but not all of how alike. Related are a
    topic of the same department and the two of others with which it shares most themes.
    """
    rng = stream(seed, "taste")
    tree = topics()
    scale = 1 / np.sqrt(LATENT)
    department = rng.normal(0, scale, (len(departments()), LATENT))
    own = rng.normal(0, scale, (len(tree), LATENT))
    product = rng.normal(0, scale, (len(tree) * 5, LATENT))
    theme = _by_word(rng, [t.themes for t in tree]).sum(axis=1) / np.sqrt(2)  # two of each topic
    noun = _by_word(rng, [[name.split()[-1] for name in t.products] for t in tree]).reshape(product.shape)
    of = np.array([t.department for t in tree])
    shared = np.array([[len({*a.themes} & {*b.themes}) for b in tree] for a in tree])
    siblings = [rng.choice(np.flatnonzero((of == of[t]) & (np.arange(len(tree)) != t))) for t in range(len(tree))]
    order = np.argsort(rng.random(shared.shape) - np.where(of == of[:, None], -1, shared), axis=1, kind="stable")
    related = np.column_stack([np.array(siblings), order[:, :2]])
    return Taste(
        topic=0.5 * department[of] + 0.8 * (theme + own) / np.sqrt(2), product=0.6 * (noun + product) / np.sqrt(2),
        related=related,
    )  # fmt: skip


def _by_word(rng: np.random.Generator, words: Sequence[Sequence[str]]) -> np.ndarray:
    """A direction per word, the same wherever it occurs: float64 [rows x words of a row x D]."""
    _, number = np.unique(np.array(words), return_inverse=True)
    return rng.normal(0, 1 / np.sqrt(LATENT), (number.max() + 1, LATENT))[number.reshape(len(words), -1)]


def make_items(settings: SimulationSettings, taste: Taste) -> ItemWorld:
    """Draw the catalog: attributes, hidden quality, true content and long-tailed appeal.

    appeal follows a Zipf law over a ranking by `rho * quality + sqrt(1 - rho^2) * noise`; items released later are
    ranked among the whole catalog, so some of them are good and none has a history.
    """
    rng, rules = stream(settings.seed, "items"), settings.rules
    size = settings.items + settings.new_items_per_day * settings.days
    tree = topics()
    topic = rng.integers(0, len(tree), size)
    product = rng.integers(0, 5, size)
    adjective = rng.integers(0, 5, size)
    material, use, brand = rng.integers(0, 4, size), rng.integers(0, 4, size), rng.integers(0, 3, size)
    quality = rng.normal(size=size)
    scale = 1 / np.sqrt(LATENT)
    of = np.array([t.department for t in tree])[topic]
    adjectives = _by_word(rng, [d.adjectives for d in departments()])
    materials = _by_word(rng, [d.materials for d in departments()])
    shown = taste.topic[topic] + taste.product[topic * 5 + product]
    shown = shown + 0.35 * adjectives[of, adjective] + 0.35 * materials[of, material]
    content = unit_rows(shown + rules.hidden_content * rng.normal(0, scale, (size, LATENT)))
    rho = rules.quality_in_popularity
    merit = rho * quality + np.sqrt(1 - rho**2) * rng.normal(size=size)
    rank = np.empty(size)
    rank[np.argsort(-merit, kind="stable")] = np.arange(1, size + 1)
    # The shift flattens the head: with a bare Zipf law most items would never be clicked.
    appeal = (rank + 0.01 * size) ** -rules.popularity_exponent
    return ItemWorld(
        topic, product, adjective, material, use, brand, rng.integers(10, 1000, size), quality, content,
        appeal / appeal.sum(), initial=settings.items, per_day=settings.new_items_per_day,
    )  # fmt: skip


def item_id(index: int) -> str:
    """The platform's id of the item released as number `index`."""
    return f"i{index:06d}"


def item_text(world: ItemWorld, index: int, revised: bool = False) -> CatalogItem:
    """The words of the item `index`; `revised` gives the wording after an update."""
    topic = topics()[world.topic[index]]
    branch = departments()[topic.department]
    product = topic.products[world.product[index]]
    adjective, material = branch.adjectives[world.adjective[index]], branch.materials[world.material[index]]
    use, brand = branch.uses[world.use[index]], branch.brands[world.brand[index]]
    title = f"{brand} {adjective} {product}, {material}, model {world.model[index]}"
    description = (
        f"A {adjective} {product} from {brand}, made with {material}. "
        f"Well suited to {use}. Part of our {topic.name} range in {branch.name.lower()}."
    )
    if revised:
        title, description = f"{title} (new edition)", f"{description} Now in a new edition with a longer warranty."
    return CatalogItem(item_id(index), title, description, brand, f"{branch.name} > {topic.name}")
