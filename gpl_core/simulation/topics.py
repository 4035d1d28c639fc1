"""The topic tree that item texts are made from: departments -> topics -> products, in real English words.

Words carry their ordinary meaning, as far as it decides what goes with what: topics that share a theme are alike in
truth too, across departments, and so are products of one noun and items of one adjective or material. A sentence
encoder or language model that knows English knows more of this than the words in common show. The tree is data only
(topics.yaml); what an item is truly like, and what a user truly wants, is drawn in `item_world` and `users`.
"""

from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

import yaml


@dataclass(frozen=True)
class Topic:
    """One leaf of the tree. `name` is unique in its department; `products` are nouns; a theme has several topics."""

    department: int
    name: str
    themes: tuple[str, ...]
    products: tuple[str, ...]


@dataclass(frozen=True)
class Department:
    """One branch: the words its items' titles and descriptions draw from."""

    name: str
    adjectives: tuple[str, ...]
    materials: tuple[str, ...]
    uses: tuple[str, ...]
    brands: tuple[str, ...]


@cache
def _tree() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = yaml.safe_load((resources.files("gpl_core.simulation") / "topics.yaml").read_bytes())
    return found


@cache
def departments() -> tuple[Department, ...]:
    """The twelve departments, in a fixed order."""
    words = ("adjectives", "materials", "uses", "brands")
    return tuple(Department(branch["name"], *(tuple(branch[kind]) for kind in words)) for branch in _tree())


@cache
def topics() -> tuple[Topic, ...]:
    """The sixty topics (five per department), in a fixed order: department by department."""
    return tuple(
        Topic(number, leaf["name"], tuple(leaf["themes"]), tuple(leaf["products"]))
        for number, branch in enumerate(_tree())
        for leaf in branch["topics"]
    )
