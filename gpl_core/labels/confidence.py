"""Confidence weight of a pseudo-label: three factors combined (numpy and Spark SQL text).

    w = (R^a * h^b * q^c)^(1 / (a + b + c))        (ours)

R: semantic coherence, h: historical consistency, q: LLM confidence, each in [0, 1] (`labels/pair_scoring.py`). The
factors are the paper's; their formulas and this weighted geometric mean are ours (docs/method.md). An exponent of 0
switches its factor off; with all three off every weight is 1.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from gpl_core.errors import UsageError


@dataclass(frozen=True)
class Exponents:
    """Exponents >= 0 of the factors in the combined weight."""

    coherence: float = 1.0
    consistency: float = 1.0
    llm_confidence: float = 1.0

    def __post_init__(self) -> None:
        for name in ("coherence", "consistency", "llm_confidence"):
            value = getattr(self, name)
            if not 0.0 <= value < float("inf"):
                raise UsageError(f"confidence exponent of {name} is {value!r}; expected a finite number >= 0")

    @property
    def shares(self) -> tuple[tuple[str, float], ...]:
        """(factor, exponent / sum of exponents) of the factors that are on; empty when all are off."""
        total = self.coherence + self.consistency + self.llm_confidence
        names = ("coherence", "consistency", "llm_confidence")
        return tuple((name, getattr(self, name) / total) for name in names if getattr(self, name) > 0)


def combined_weight(
    coherence: npt.ArrayLike, consistency: npt.ArrayLike, llm_confidence: npt.ArrayLike, exponents: Exponents
) -> npt.NDArray[np.float64]:
    """Raw weights float64 [n] in [0, 1] from the three factors [n] each."""
    given = {"coherence": coherence, "consistency": consistency, "llm_confidence": llm_confidence}
    factors = {name: np.asarray(values, dtype=np.float64) for name, values in given.items()}
    weight = np.ones(np.broadcast_shapes(*(values.shape for values in factors.values())))
    for name, share in exponents.shares:
        weight = weight * np.clip(factors[name], 0.0, 1.0) ** share
    return weight


def weight_sql(exponents: Exponents) -> str:
    """Spark SQL text (double, in [0, 1]) of `combined_weight` over the columns of the factors' names."""
    terms = [
        f"power(least(greatest(cast({name} as double), 0.0D), 1.0D), {share!r}D)" for name, share in exponents.shares
    ]
    return "(" + " * ".join(terms) + ")" if terms else "1.0D"
