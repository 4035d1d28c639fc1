"""What an item's content is, and what the encoder of one modality (text, picture, precomputed column) promises.

Legend for shapes: N items, d_p width of part p.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np


@dataclass(frozen=True)
class ItemContent:
    """One item as encoders see it; what is absent is empty or None."""

    item_index: int
    text: str = ""
    image: bytes | None = None
    image_uri: str | None = None
    embedding: np.ndarray | None = None  # the platform's own vector, float [d_p]


@dataclass(frozen=True)
class PartVectors:
    """N items encoded by one part. An item is in ``rejected``, has a vector, or lacks the modality (zero row)."""

    vectors: np.ndarray  # float32 [N x d_p], unit or zero rows
    rejected: Mapping[int, str] = field(default_factory=dict)  # position -> why the item's content cannot be used


class PartEncoder(Protocol):
    """A frozen encoder of one modality; an item's vector does not depend on its batch mates (to 1e-5)."""

    name: str
    dim: int
    lacking: str  # why this part alone cannot encode an item without the modality

    @property
    def identity(self) -> Mapping[str, object]:
        """All that decides its vectors, as JSON types: weights hash, preprocessing, options."""

    def encode(self, items: Sequence[ItemContent]) -> PartVectors:
        """Encodes ``items``; content that cannot be used is reported, never raised."""
