"""The words of a text as an encoder: it knows no language, but tells apart what a language model finds alike (ours).

Each word is a fixed random direction, and a text the sum of its first words' directions: the cosine of two texts is
about the share of words that they have in common (random indexing; the error falls with 1 / sqrt(d_p)). Sizes, brands
and model numbers, which decide what is bought again or beside it, weigh as much as any other word.

Legend for shapes: N items, d_p width of the part.
"""

import hashlib
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import lru_cache

import numpy as np

from gpl_core.errors import UsageError
from gpl_core.sids.item_content import ItemContent, PartVectors

_KEPT = 20_000  # words whose directions are remembered: 20 MB at the default width


class WordsEncoder:
    """Text to the normalized sum of its first ``max_words`` words' directions; a word's k-th repetition adds less.

    Words are runs of letters, their marks and digits, case ignored: in a script that puts no spaces between words a
    whole clause is one word, and texts meet only where clauses are equal.
    """

    name = "words"
    lacking = "text without words"

    def __init__(self, *, dim: int = 256, max_words: int = 16) -> None:
        """UsageError unless ``dim`` is a positive multiple of 8 and ``max_words`` positive."""
        if dim < 8 or dim % 8:
            raise UsageError(f"encoder.parts.words.options.dim: {dim}, expected a positive multiple of 8.")
        if max_words < 1:
            raise UsageError(f"encoder.parts.words.options.max_words: {max_words}, expected at least 1.")
        self.dim, self._most = dim, max_words
        self._direction = lru_cache(_KEPT)(self._hashed)

    @property
    def identity(self) -> Mapping[str, object]:
        return {"words": 1, "dim": self.dim, "max_words": self._most}

    def encode(self, items: Sequence[ItemContent]) -> PartVectors:
        out = np.zeros((len(items), self.dim), dtype=np.float32)
        for row, item in zip(out, items, strict=True):
            counts = Counter(_words(item.text)[: self._most])
            for word, count in sorted(counts.items()):  # in one order: a sum of floats depends on it
                row += np.float32(1 + np.log(count)) * self._direction(word)
            length = float(np.linalg.norm(row))
            if length > 0:
                row /= np.float32(length)
        return PartVectors(out)

    def _hashed(self, word: str) -> np.ndarray:
        """float32 [d_p] of -1 and 1: bits of the word's hash, the same on every machine."""
        bits = np.unpackbits(np.frombuffer(hashlib.shake_256(word.encode()).digest(self.dim // 8), dtype=np.uint8))
        return bits.astype(np.float32) * 2 - 1


def _words(text: str) -> list[str]:
    """The words of ``text``, in its order."""
    plain = unicodedata.normalize("NFKC", text).lower()
    return "".join(c if unicodedata.category(c)[0] in "LMN" else " " for c in plain).split()
