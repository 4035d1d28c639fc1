"""Choosing settings on the valid split, with the same number of tries for every model."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple


class Tuned(NamedTuple):
    """What a climb came to."""

    chosen: dict[str, Any]
    tries: int
    open_axes: list[str]  # on which the choice is not known to be a peak: at an edge, or a neighbor was not tried


def climb(
    start: Mapping[str, Any], axes: Mapping[str, Sequence[Any]], score: Callable[[dict[str, Any]], float], most: int
) -> Tuned:
    """From ``start`` to the first neighbor that is better, until none is, or after ``most`` tries.

    ``axes``: the values of each axis, in order; neighbors differ by one step on one axis.
    """
    found: dict[tuple[Any, ...], float] = {}

    def tried(setting: dict[str, Any]) -> float:
        key = tuple(setting[name] for name in axes)
        if key not in found and len(found) < most:
            found[key] = score(setting)
        return found.get(key, -math.inf)

    def neighbors(setting: dict[str, Any], name: str) -> list[dict[str, Any]]:
        values = axes[name]
        place = values.index(setting[name])
        return [{**setting, name: values[p]} for p in (place + 1, place - 1) if 0 <= p < len(values)]

    best: dict[str, Any] | None = dict(start)
    while best:
        chosen = best
        best = next((o for name in axes for o in neighbors(chosen, name) if tried(o) > tried(chosen)), None)
    peaks = [name for name in axes if [math.isfinite(tried(o)) for o in neighbors(chosen, name)] == [True, True]]
    return Tuned(chosen, len(found), [name for name in axes if name not in peaks])
