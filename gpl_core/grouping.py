"""Bounded groups of what comes in order: files read together, users packed into one batch."""

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import numpy as np

Item = TypeVar("Item")


def grouped(items: Iterable[Item], size: Callable[[Item], int], most: int) -> Iterator[list[Item]]:
    """`items` in their order, in groups whose sizes add up to at most `most`; a larger item is a group of its own."""
    group: list[Item] = []
    total = 0
    for item in items:
        if group and total + size(item) > most:
            yield group
            group, total = [], 0
        group.append(item)
        total += size(item)
    if group:
        yield group


def runs(sizes: np.ndarray, most: int) -> Iterator[slice]:
    """`grouped` of an array: slices whose `sizes` [n] add up to at most `most`; a larger one is a slice of its own."""
    ends = np.cumsum(sizes)
    start = 0
    while start < len(ends):
        before = ends[start - 1] if start else 0
        stop = max(start + 1, int(np.searchsorted(ends, before + most, side="right")))
        yield slice(start, stop)
        start = stop


def ranges(lengths: np.ndarray) -> np.ndarray:
    """0 .. length - 1 for each length, concatenated: int64 [sum]."""
    ends = np.cumsum(lengths)
    return np.arange(ends[-1] if len(ends) else 0) - np.repeat(ends - lengths, lengths)


def run_starts(values: np.ndarray) -> np.ndarray:
    """bool [n]: where a run of equal values begins."""
    first = np.ones(len(values), dtype=bool)
    np.not_equal(values[1:], values[:-1], out=first[1:])
    return first
