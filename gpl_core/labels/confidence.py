"""Confidence weight of a pseudo-label: the geometric mean of three factors (numpy and Spark SQL text).

    w = (R * h * q)^(1/3)        (ours)

R: semantic coherence, h: historical consistency, q: LLM confidence, each in [0, 1] (`labels/pair_scoring.py`). The
factors are the paper's; their formulas and the geometric mean are ours (docs/method.md).
"""

import numpy as np
import numpy.typing as npt


def combined_weight(
    coherence: npt.ArrayLike, consistency: npt.ArrayLike, llm_confidence: npt.ArrayLike
) -> npt.NDArray[np.float64]:
    """Raw weights float64 [n] in [0, 1] from the three factors [n] each."""
    weight = np.ones(1)
    for values in (coherence, consistency, llm_confidence):
        weight = weight * np.clip(np.asarray(values, dtype=np.float64), 0.0, 1.0) ** (1 / 3)
    return weight


def weight_sql() -> str:
    """Spark SQL text (double, in [0, 1]) of `combined_weight` over the columns of the factors' names."""
    factors = ("coherence", "consistency", "llm_confidence")
    return " * ".join(f"power(least(greatest(cast({f} as double), 0.0D), 1.0D), {1 / 3!r}D)" for f in factors)
